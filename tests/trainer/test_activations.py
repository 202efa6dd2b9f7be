"""The estimate of activations, made on the meta device, against what the allocator saw of a step on the CPU."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as hf
from torch import nn

from hf_lowmem_optim import ModelOptions, plan_memory
from hf_lowmem_optim.trainer.activations import activation_bytes
from tests.memory.allocator import peak_bytes
from tests.trainer.tiny_models import with_lora

SIZES = {"hidden_size": 256, "intermediate_size": 688, "num_attention_heads": 8, "num_hidden_layers": 4}
#: torch's fused attention on the CPU has no dropout, so that it would keep the scores there.
NO_DROPOUT = {"attention_probs_dropout_prob": 0.0}
MINILM = {"hidden_size": 384, "intermediate_size": 1536, "num_attention_heads": 12, "num_hidden_layers": 6}


def llama() -> nn.Module:
    return hf.LlamaForCausalLM(hf.LlamaConfig(vocab_size=4000, num_key_value_heads=2, **SIZES))


def gpt2() -> nn.Module:
    return hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=4000, n_embd=256, n_layer=4, n_head=8, attn_pdrop=0.0))


def minilm() -> nn.Module:
    return hf.BertForSequenceClassification(hf.BertConfig(**MINILM, **NO_DROPOUT))


def vit() -> nn.Module:
    return hf.ViTForImageClassification(hf.ViTConfig(**MINILM, image_size=64, patch_size=16))


def run(model: nn.Module, batch: int, length: int) -> None:
    """Forward and backward pass, each gradient freed as it comes."""
    tokens = torch.ones(batch, length, dtype=torch.long)
    if isinstance(model, hf.ViTForImageClassification):
        inputs: dict[str, Any] = {
            "pixel_values": torch.ones(batch, 3, 64, 64, dtype=model.dtype),
            "labels": tokens[:, 0],
        }
    else:
        labels = tokens[:, 0] if isinstance(model, hf.BertForSequenceClassification) else tokens
        inputs = {"input_ids": tokens, "attention_mask": tokens, "labels": labels}
    model(**inputs).loss.backward()


@pytest.mark.parametrize(
    ("make", "batch", "length", "checkpointing", "dtype"),
    [
        (llama, 8, 64, False, torch.float32),
        (llama, 8, 64, True, torch.bfloat16),
        (lambda: with_lora(llama()), 2, 128, False, torch.bfloat16),
        (gpt2, 2, 128, False, torch.bfloat16),
        (minilm, 8, 64, False, torch.float32),
        (minilm, 8, 64, True, torch.bfloat16),
        (vit, 8, 1, False, torch.float32),
        (gpt2, 8, 64, True, torch.bfloat16),
    ],
)
def test_the_estimate_is_within_5_percent_of_what_is_measured(
    make: Callable[[], nn.Module], batch: int, length: int, checkpointing: bool, dtype: torch.dtype
) -> None:
    model = make().to(dtype).train()
    estimate = activation_bytes(copy.deepcopy(model).to("meta"), batch, length, checkpointing=checkpointing)
    base: Any = model.get_base_model() if hasattr(model, "get_base_model") else model
    base.config.use_cache = False
    if checkpointing:
        base.gradient_checkpointing_enable({"use_reentrant": False})
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    run(model, batch, length)  # libraries set themselves up
    measured = peak_bytes(lambda: run(model, batch, length))
    assert abs(estimate / measured - 1) < 0.05


def test_a_plan_adds_activations_to_gradients_or_in_layerwise_mode_to_the_state() -> None:
    names = ["ldadam", "ldadam_layerwise"]
    options = ModelOptions(seq_len=128, batch_size=16)
    plan, without = (plan_memory("minilm-l6", names, options=each) for each in (options, None))
    activations = plan.activation_bytes
    assert activations > 100 * 2**20
    normal, layerwise = plan.optimizers
    for row, before in zip(plan.optimizers, without.optimizers, strict=True):
        assert row == before
    held = plan.weights.total_bytes + normal.state.total_bytes
    assert plan.total_bytes(normal) == held + max(activations, normal.temporary_bytes)
    # the gradient at hand is among the activations
    weights = sum(plan.weights.weight_bytes.values())
    together = weights + activations + layerwise.state.total_bytes + layerwise.temporary_bytes
    assert plan.total_bytes(layerwise) == together
    less = plan_memory("minilm-l6", names, options=ModelOptions(seq_len=128, batch_size=16, checkpointing=True))
    assert less.activation_bytes < activations / 2
    assert "activations" in without.not_counted and "activations" not in plan.not_counted


@pytest.mark.parametrize(("model", "reason"), [("mamba-130m", "no attention"), ("t5-base", "learned bias")])
def test_what_cannot_be_estimated_is_refused(model: str, reason: str) -> None:
    with pytest.raises(ValueError, match=f"{reason}.*plan without seq_len"):
        plan_memory(model, "ldadam", options=ModelOptions(seq_len=8))


def test_a_plan_leaves_the_configuration_as_it_was() -> None:
    config = hf.LlamaConfig(vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
    before = config.to_dict(), config._attn_implementation
    plan_memory(config, "ldadam", options=ModelOptions(seq_len=8))
    assert (config.to_dict(), config._attn_implementation) == before


def test_the_note_names_what_the_batch_is() -> None:
    text = hf.GPT2Config(
        vocab_size=40, n_positions=8, n_embd=16, n_layer=1, n_head=2, architectures=["GPT2LMHeadModel"]
    )
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    pictures = hf.ViTConfig(architectures=["ViTForImageClassification"], **sizes)
    notes = [plan_memory(each, "ldadam", options=ModelOptions(seq_len=9)).notes[-1] for each in (text, pictures)]
    assert "1 × 9 tokens at a time" in notes[0] and "9 tokens are more than the 8 positions" in notes[0]
    assert "1 picture at a time" in notes[1] and "positions" not in notes[1]
