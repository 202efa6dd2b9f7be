"""What is planned for the memory benchmark is what its optimizers keep, and the peak that it reads is one."""

from __future__ import annotations

import sys

import memory
import pytest
import torch
from memory import ENTRIES, NO_OPTIMIZER, plan
from transformers import LlamaConfig, LlamaForCausalLM

from hf_lowmem_optim import measure_state


@pytest.mark.parametrize("name", [name for name in ENTRIES if name != NO_OPTIMIZER])
def test_the_planned_state_is_the_state(name: str) -> None:
    entry = ENTRIES[name]
    if entry.problem is not None:
        pytest.skip(entry.problem)
    torch.manual_seed(0)
    sizes = {"hidden_size": 160, "intermediate_size": 320, "num_hidden_layers": 1, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=64, tie_word_embeddings=False, **sizes))
    optimizer = entry.build(model)
    assert optimizer is not None
    before = [parameter.detach().clone() for parameter in model.parameters()]
    tokens = torch.arange(16).view(1, 16)
    model(input_ids=tokens, labels=tokens).loss.backward()
    layerwise = name.endswith("_layerwise")
    assert all((parameter.grad is None) == layerwise for parameter in model.parameters())
    optimizer.step()
    assert all(not torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))
    planned = plan(model, name)
    if entry.planned is None:
        assert not planned
        return
    assert planned["planned_state_bytes"] == measure_state(optimizer).total_bytes
    all_gradients = 4 * sum(parameter.numel() for parameter in model.parameters())
    assert planned["planned_gradients_bytes"] == (4 * 160 * 320 if layerwise else all_gradients)
    parts = ("weights", "gradients", "state", "step")
    assert planned["planned_bytes"] == sum(planned[f"planned_{part}_bytes"] for part in parts)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_meter_sees_what_was_freed_again_until_it_is_reset() -> None:
    size = 2**26
    meter = memory.PeakMeter("cpu")
    meter.baseline = meter.now()
    meter.reset()
    kept = torch.ones(size // 4)
    freed = torch.ones(size // 4)
    del freed
    assert 2 * size <= meter.peak() + 2**22 and meter.peak() < 2.2 * size
    assert meter.now() < 1.2 * size
    meter.reset()
    assert meter.peak() < 1.2 * size
    assert kept.numel() == size // 4
