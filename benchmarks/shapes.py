"""Build what the benchmarks step over: the shapes of models, from their configurations with random weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM


def _minilm() -> nn.Module:
    """Return MiniLM-L6: 22.7 M parameters, half of them embeddings."""
    return BertModel(BertConfig(hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536))


def _llama() -> LlamaForCausalLM:
    """Return an 8-layer Llama of 58 M parameters with separate embedding and head."""
    sizes: dict[str, Any] = {
        "hidden_size": 512,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "intermediate_size": 1376,
    }
    return LlamaForCausalLM(LlamaConfig(vocab_size=32000, tie_word_embeddings=False, **sizes))


def _lora() -> nn.Module:
    """Return LoRA adapters of rank 64 on every linear layer of that Llama: 112 matrices, 5.0 M trainable parameters."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=64, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(_llama(), config)


def _matrix() -> nn.Module:
    """Return one matrix of 16.8 M entries."""
    return nn.ModuleDict({"layer": nn.Linear(4096, 4096, bias=False)})


def _large() -> nn.Module:
    """Return the matrices of two layers of Llama-7B, 405 M parameters: for GPUs."""
    shapes = [(4096, 4096)] * 4 + [(4096, 11008), (4096, 11008), (11008, 4096)]
    return nn.ModuleList(nn.Linear(*shape, bias=False) for shape in shapes * 2)


def _small() -> nn.Module:
    """Return 1000 small tensors, half of them matrices of 96 × 168, half their biases: 8.1 M parameters."""
    return nn.ModuleList(nn.Linear(168, 96) for _ in range(500))


SHAPES: dict[str, Callable[[], nn.Module]] = {
    "minilm": _minilm,
    "llama": _llama,
    "lora": _lora,
    "matrix": _matrix,
    "large": _large,
    "small": _small,
}
