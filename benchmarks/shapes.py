"""The models whose shapes the benchmarks use, built from their configurations with random weights."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

__all__ = ["MODELS"]


def _minilm() -> nn.Module:
    """MiniLM-L6: 22.7 M parameters, half of them embeddings."""
    return BertModel(BertConfig(hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536))


def _llama() -> nn.Module:
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


MODELS: dict[str, Callable[[], nn.Module]] = {"minilm": _minilm, "llama": _llama}
