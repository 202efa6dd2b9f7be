"""Transformers models built from configurations, small enough to train in a test."""

from __future__ import annotations

from typing import Any

import torch
import transformers as hf
from peft import LoraConfig, get_peft_model
from torch import nn

VOCAB = 48
SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}


def tiny_llama(*, tied: bool = False, seed: int = 0, classifier: bool = False, **sizes: int) -> nn.Module:
    torch.manual_seed(seed)
    settings = {**SIZES, "num_hidden_layers": 2, "pad_token_id": 0, **sizes}
    config = hf.LlamaConfig(vocab_size=VOCAB, tie_word_embeddings=tied, **settings)
    return hf.LlamaForSequenceClassification(config) if classifier else hf.LlamaForCausalLM(config)


def tiny_gpt2(*, tied: bool = True) -> nn.Module:
    return hf.GPT2LMHeadModel(
        hf.GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=1, n_head=2, n_positions=16, tie_word_embeddings=tied)
    )


def tiny_bert_classifier() -> nn.Module:
    config = hf.BertConfig(vocab_size=VOCAB, **SIZES, num_hidden_layers=1, max_position_embeddings=16)
    return hf.BertForSequenceClassification(config)


def tiny_t5() -> nn.Module:
    layers = {"num_layers": 1, "num_decoder_layers": 1, "num_heads": 2}
    return hf.T5ForConditionalGeneration(hf.T5Config(vocab_size=VOCAB, d_model=32, d_ff=64, d_kv=16, **layers))


def tiny_vit() -> nn.Module:
    config = hf.ViTConfig(**SIZES, num_hidden_layers=1, image_size=16, patch_size=8, num_labels=3)
    return hf.ViTForImageClassification(config)


def tiny_mamba() -> nn.Module:
    return hf.MambaForCausalLM(
        hf.MambaConfig(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=1, state_size=4, tie_word_embeddings=True)
    )


def tiny_mixtral() -> nn.Module:
    """Four experts a layer: gate and up projections (4, 48, 32), down projections (4, 32, 24)."""
    torch.manual_seed(0)
    sizes = {**SIZES, "intermediate_size": 24, "num_key_value_heads": 2, "num_hidden_layers": 1, "pad_token_id": 0}
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2, "router_jitter_noise": 0.0}
    return hf.MixtralForCausalLM(hf.MixtralConfig(vocab_size=VOCAB, **sizes, **experts))


def tiny_gpt_oss() -> nn.Module:
    """Experts' weights transposed, (6, 32, 48) and (6, 24, 32), and biases (6, 48) and (6, 32)."""
    sizes = {"hidden_size": 32, "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 2}
    experts = {"num_local_experts": 6, "num_experts_per_tok": 2}
    torch.manual_seed(0)
    return hf.GptOssForCausalLM(
        hf.GptOssConfig(vocab_size=VOCAB, head_dim=16, num_hidden_layers=1, pad_token_id=0, **sizes, **experts)
    )


def only_head() -> nn.Module:
    model = tiny_llama().requires_grad_(False)
    model.lm_head.requires_grad_(True)
    return model


def with_lora(model: nn.Module | None = None, **settings: Any) -> nn.Module:
    """Adapters on a tiny Llama, or on another model; the same each time."""
    model = tiny_llama() if model is None else model
    torch.manual_seed(7)
    return get_peft_model(model, LoraConfig(**{"r": 6, "target_modules": ["q_proj", "down_proj"], **settings}))


def token_rows(count: int, length: int = 12, seed: int = 1) -> list[dict[str, torch.Tensor]]:
    """Rows for a causal language model: counting sequences, which can be learned."""
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(1, VOCAB - length, (count,), generator=generator)
    rows = [torch.arange(start, start + length) for start in starts.tolist()]
    return [{"input_ids": row, "labels": row} for row in rows]
