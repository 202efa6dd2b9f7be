"""Well-known models as their published ``config.json`` describes them, so that a plan needs no download.

Only what shapes the weights is written; the rest are transformers' defaults for the model type.
"""

from __future__ import annotations

from typing import Any

__all__ = ["PRESETS"]


def _llama(hidden: int, intermediate: int, layers: int, heads: int, **other: Any) -> dict[str, Any]:
    """Describe Llama and its relatives, by default with Llama 2's vocabulary and bfloat16 weights."""
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "vocab_size": 32000,
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
    }
    return {**config, **other}


def _qwen2(hidden: int, intermediate: int, layers: int, heads: int, **other: Any) -> dict[str, Any]:
    """Describe Qwen 2.5."""
    kind = {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "vocab_size": 151936}
    return _llama(hidden, intermediate, layers, heads, **{**kind, **other})


def _gemma2(hidden: int, intermediate: int, layers: int, heads: int, **other: Any) -> dict[str, Any]:
    """Describe Gemma 2, whose head is tied to the embedding."""
    kind = {
        "model_type": "gemma2",
        "architectures": ["Gemma2ForCausalLM"],
        "vocab_size": 256000,
        "head_dim": 256,
        "tie_word_embeddings": True,
    }
    return _llama(hidden, intermediate, layers, heads, **{**kind, **other})


def _encoder(model_type: str, architecture: str, hidden: int, layers: int, **other: Any) -> dict[str, Any]:
    """Describe BERT and its relatives, float32."""
    config = {
        "model_type": model_type,
        "architectures": [architecture],
        "hidden_size": hidden,
        "intermediate_size": 4 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": hidden // 64,
        "dtype": "float32",
    }
    return {**config, **other}


def _gpt2(width: int, layers: int, heads: int) -> dict[str, Any]:
    """Describe GPT-2, float32, head tied to the embedding."""
    kind = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "vocab_size": 50257, "dtype": "float32"}
    return {**kind, "n_embd": width, "n_layer": layers, "n_head": heads}


PRESETS: dict[str, dict[str, Any]] = {
    "llama-2-7b": _llama(4096, 11008, 32, 32),
    "llama-2-13b": _llama(5120, 13824, 40, 40),
    "llama-2-70b": _llama(8192, 28672, 80, 64, num_key_value_heads=8),
    "llama-3.1-8b": _llama(4096, 14336, 32, 32, num_key_value_heads=8, vocab_size=128256),
    "llama-3.1-70b": _llama(8192, 28672, 80, 64, num_key_value_heads=8, vocab_size=128256),
    "llama-3.2-1b": _llama(
        2048, 8192, 16, 32, num_key_value_heads=8, head_dim=64, vocab_size=128256, tie_word_embeddings=True
    ),
    "llama-3.2-3b": _llama(
        3072, 8192, 28, 24, num_key_value_heads=8, head_dim=128, vocab_size=128256, tie_word_embeddings=True
    ),
    "mistral-7b": _llama(
        4096, 14336, 32, 32, num_key_value_heads=8, model_type="mistral", architectures=["MistralForCausalLM"]
    ),
    "qwen2.5-0.5b": _qwen2(896, 4864, 24, 14, num_key_value_heads=2, tie_word_embeddings=True),
    "qwen2.5-7b": _qwen2(3584, 18944, 28, 28, num_key_value_heads=4, vocab_size=152064),
    "gemma-2-2b": _gemma2(2304, 9216, 26, 8, num_key_value_heads=4),
    "gemma-2-9b": _gemma2(3584, 14336, 42, 16, num_key_value_heads=8),
    "bert-base": _encoder("bert", "BertForMaskedLM", 768, 12, vocab_size=30522),
    "minilm-l6": _encoder("bert", "BertModel", 384, 6, num_attention_heads=12, vocab_size=30522),
    "bert-large": _encoder("bert", "BertForMaskedLM", 1024, 24, vocab_size=30522),
    "roberta-base": _encoder(
        "roberta",
        "RobertaForMaskedLM",
        768,
        12,
        vocab_size=50265,
        max_position_embeddings=514,
        type_vocab_size=1,
        pad_token_id=1,
    ),
    "gpt2": _gpt2(768, 12, 12),
    "gpt2-xl": _gpt2(1600, 48, 25),
    "t5-base": {
        "model_type": "t5",
        "architectures": ["T5ForConditionalGeneration"],
        "vocab_size": 32128,
        "d_model": 768,
        "d_ff": 3072,
        "d_kv": 64,
        "num_layers": 12,
        "num_heads": 12,
        "dtype": "float32",
    },
    "vit-base": _encoder(
        "vit",
        "ViTForImageClassification",
        768,
        12,
        image_size=224,
        patch_size=16,
        id2label={str(label): f"LABEL_{label}" for label in range(1000)},
    ),
    "mamba-130m": {
        "model_type": "mamba",
        "architectures": ["MambaForCausalLM"],
        "vocab_size": 50280,
        "hidden_size": 768,
        "intermediate_size": 1536,
        "num_hidden_layers": 24,
        "state_size": 16,
        "tie_word_embeddings": True,
        "dtype": "float32",
    },
}
"""Configurations by name."""
