"""Well-known models as their published ``config.json`` describes them, so that a plan needs no download.

Only what shapes the weights is written; the rest are transformers' defaults for the model type.
"""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from typing import Any

from hf_lowmem_optim.words import nearest, shown

__all__ = ["PRESETS", "find_model"]


def _model(model_type: str, architecture: str, **other: Any) -> dict[str, Any]:
    """Describe any model, float32 unless said otherwise."""
    return {"model_type": model_type, "architectures": [architecture], "dtype": "float32", **other}


def _decoder(kind: tuple[str, str], hidden: int, intermediate: int, layers: int, heads: int, **other: Any) -> Any:
    """Describe Llama and its relatives, by default with Llama 2's vocabulary and bfloat16 weights."""
    sizes = {"hidden_size": hidden, "intermediate_size": intermediate, "num_hidden_layers": layers}
    attention = {"num_attention_heads": heads, "num_key_value_heads": heads}
    more = {"vocab_size": 32000, "tie_word_embeddings": False, "dtype": "bfloat16"}
    return _model(*kind, **{**sizes, **attention, **more, **other})


def _encoder(model_type: str, architecture: str, hidden: int, layers: int, **other: Any) -> dict[str, Any]:
    """Describe BERT and its relatives."""
    sizes = {"hidden_size": hidden, "intermediate_size": 4 * hidden, "num_hidden_layers": layers}
    return _model(model_type, architecture, **{**sizes, "num_attention_heads": hidden // 64, **other})


_llama = partial(_decoder, ("llama", "LlamaForCausalLM"))
_mistral = partial(_decoder, ("mistral", "MistralForCausalLM"))
_qwen2 = partial(_decoder, ("qwen2", "Qwen2ForCausalLM"), vocab_size=151936)
_gemma2 = partial(_decoder, ("gemma2", "Gemma2ForCausalLM"), vocab_size=256000, head_dim=256, tie_word_embeddings=True)
_gpt2 = partial(_model, "gpt2", "GPT2LMHeadModel", vocab_size=50257)
_LLAMA_3 = {"num_key_value_heads": 8, "vocab_size": 128256}
_ROBERTA = {"max_position_embeddings": 514, "type_vocab_size": 1, "pad_token_id": 1}
_T5_BASE = {"d_model": 768, "d_ff": 3072, "d_kv": 64}
_CLASSES = {str(label): f"LABEL_{label}" for label in range(1000)}
_MAMBA_130M = {"hidden_size": 768, "intermediate_size": 1536, "state_size": 16, "tie_word_embeddings": True}

PRESETS: dict[str, dict[str, Any]] = {
    "llama-2-7b": _llama(4096, 11008, 32, 32),
    "llama-2-13b": _llama(5120, 13824, 40, 40),
    "llama-2-70b": _llama(8192, 28672, 80, 64, num_key_value_heads=8),
    "llama-3.1-8b": _llama(4096, 14336, 32, 32, **_LLAMA_3),
    "llama-3.1-70b": _llama(8192, 28672, 80, 64, **_LLAMA_3),
    "llama-3.2-1b": _llama(2048, 8192, 16, 32, head_dim=64, tie_word_embeddings=True, **_LLAMA_3),
    "llama-3.2-3b": _llama(3072, 8192, 28, 24, head_dim=128, tie_word_embeddings=True, **_LLAMA_3),
    "mistral-7b": _mistral(4096, 14336, 32, 32, num_key_value_heads=8),
    "qwen2.5-0.5b": _qwen2(896, 4864, 24, 14, num_key_value_heads=2, tie_word_embeddings=True),
    "qwen2.5-7b": _qwen2(3584, 18944, 28, 28, num_key_value_heads=4, vocab_size=152064),
    "gemma-2-2b": _gemma2(2304, 9216, 26, 8, num_key_value_heads=4),
    "gemma-2-9b": _gemma2(3584, 14336, 42, 16, num_key_value_heads=8),
    "bert-base": _encoder("bert", "BertForMaskedLM", 768, 12, vocab_size=30522),
    "minilm-l6": _encoder("bert", "BertModel", 384, 6, num_attention_heads=12, vocab_size=30522),
    "bert-large": _encoder("bert", "BertForMaskedLM", 1024, 24, vocab_size=30522),
    "roberta-base": _encoder("roberta", "RobertaForMaskedLM", 768, 12, vocab_size=50265, **_ROBERTA),
    "gpt2": _gpt2(n_embd=768, n_layer=12, n_head=12),
    "gpt2-xl": _gpt2(n_embd=1600, n_layer=48, n_head=25),
    "t5-base": _model("t5", "T5ForConditionalGeneration", vocab_size=32128, num_layers=12, num_heads=12, **_T5_BASE),
    "vit-base": _encoder("vit", "ViTForImageClassification", 768, 12, image_size=224, patch_size=16, id2label=_CLASSES),
    "mamba-130m": _model("mamba", "MambaForCausalLM", vocab_size=50280, num_hidden_layers=24, **_MAMBA_130M),
}
"""Configurations by name."""

_HUB_NAMES = {
    "meta-llama-3.1-8b": "llama-3.1-8b",
    "meta-llama-3.1-70b": "llama-3.1-70b",
    "mistral-7b-v0.1": "mistral-7b",
    "mistral-7b-instruct-v0.1": "mistral-7b",
    "bert-base-uncased": "bert-base",
    "bert-large-uncased": "bert-large",
    "all-minilm-l6-v2": "minilm-l6",
    "vit-base-patch16-224": "vit-base",
}


def find_model(name: str) -> str:
    """Return the preset for its name or its id on the hub (``meta-llama/Llama-3.1-8B``); a path that exists as it is.

    Raises:
        FileNotFoundError: It is none of these; the message has the nearest preset.
    """
    if name in PRESETS or Path(name).exists():
        return name
    organization, _, last = name.lower().rpartition("/")
    last = _HUB_NAMES.get(last, last)
    preset = re.sub(r"(-chat|-instruct|-it)?(-hf)?$", "", last)
    if re.fullmatch(r"[\w-]+", organization) and preset in PRESETS:
        return preset
    raise FileNotFoundError(
        f"{shown(name)} is neither a file, nor a directory, nor a preset{nearest(last, PRESETS)} "
        f"(presets: {', '.join(PRESETS)})"
    )
