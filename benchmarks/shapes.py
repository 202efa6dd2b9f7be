"""What the benchmarks step over: the shapes of models, built from their configurations with random weights."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

__all__ = ["BODY_SIZES", "SHAPES", "body", "small_tensors"]


def _minilm() -> nn.Module:
    """MiniLM-L6: 22.7 M parameters, half of them embeddings."""
    return BertModel(BertConfig(hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536))


def _llama() -> LlamaForCausalLM:
    """An 8-layer Llama of 58 M parameters with separate embedding and head."""
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=512,
            num_hidden_layers=8,
            num_attention_heads=8,
            intermediate_size=1376,
            vocab_size=32000,
            tie_word_embeddings=False,
        )
    )


def _lora() -> nn.Module:
    """LoRA adapters of rank 64 on every linear layer of that Llama: 112 matrices, 5.0 M trainable parameters."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=64, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(_llama(), config)  # type: ignore[no-any-return]


def _matrix() -> nn.Module:
    """One matrix of 16.8 M entries."""
    return nn.ModuleDict({"layer": nn.Linear(4096, 4096, bias=False)})


def _large() -> nn.Module:
    """The matrices of two layers of Llama-7B, 405 M parameters: for GPUs."""
    return body(4096, 2, inner=11008)


def small_tensors(count: int = 1000) -> nn.Module:
    """Half of them matrices of 96 × 168, half their biases; 1000 have 8.1 M parameters."""
    return nn.ModuleList(nn.Linear(168, 96) for _ in range(count // 2))


SHAPES: dict[str, Callable[[], nn.Module]] = {
    "minilm": _minilm,
    "llama": _llama,
    "lora": _lora,
    "matrix": _matrix,
    "large": _large,
    "small": small_tensors,
}

#: Width and layers of bodies from 10 M to 200 M parameters.
BODY_SIZES = ((384, 6), (512, 8), (640, 10), (768, 14), (1024, 16))


def body(hidden: int, layers: int, inner: int | None = None) -> nn.Module:
    """The matrices of a Llama without embedding and head, about 12 · hidden² a layer, wider and deeper with size.

    So the mix of shapes is the same at every size, and a cost per parameter that changes is the optimizer's doing.

    Args:
        hidden: Width.
        layers: Number of layers.
        inner: Width of the feed-forward layers, a multiple of 32 near 8/3 of the width if None.

    Returns:
        A module that holds the weights; it computes nothing.
    """
    inner = 8 * hidden // 3 // 32 * 32 if inner is None else inner
    shapes = [(hidden, hidden)] * 4 + [(hidden, inner), (hidden, inner), (inner, hidden)]
    return nn.ModuleList(nn.Linear(*shape, bias=False) for _ in range(layers) for shape in shapes)
