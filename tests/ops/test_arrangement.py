"""What a step remembers of its tensors: enough that the next one hardly looks at each."""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest
import torch
from torch import nn

from hf_lowmem_optim import OPTIMIZERS
from hf_lowmem_optim.engine import buckets
from hf_lowmem_optim.optimizers import LowMemoryOptimizer
from tests.ops.backends import Use

#: Calls of functions, also of torch's in C, that one tensor more costs a step.
MOST_CALLS = {"microadam": 36, "sparse_mfac": 36, "sparse_ggt": 36, "ldadam": 34}


def step(optimizer: LowMemoryOptimizer, count: Callable[..., None] | None = None) -> None:
    """A step as a training loop takes it: other gradients, another learning rate."""
    for group in optimizer.param_groups:
        group["lr"] *= 0.9
        for param in group["params"]:
            param.grad = torch.randn_like(param)
    sys.setprofile(count)
    try:
        optimizer.step()
    finally:
        sys.setprofile(None)


def calls(name: str, tensors: int) -> int:
    """How many functions a later step calls."""
    weights = [nn.Parameter(torch.randn(64, 64)) for _ in range(tensors)]
    optimizer, events = OPTIMIZERS[name].optimizer_class(weights), []
    for _ in range(3):
        step(optimizer)
    step(optimizer, lambda frame, event, arg: events.append(event))
    return events.count("call") + events.count("c_call")


@pytest.mark.parametrize("name", MOST_CALLS)
def test_a_step_of_many_tensors_calls_little_for_each(name: str, use: Use, monkeypatch: pytest.MonkeyPatch) -> None:
    """The host's part of a step on a GPU, without the kernels."""
    triton = pytest.importorskip("triton")
    use("triton")
    for kind in (triton.runtime.jit.JITFunction, triton.runtime.interpreter.InterpretedFunction):
        monkeypatch.setattr(kind, "__getitem__", lambda self, grid: lambda *args, **kwargs: None)
    # not the one with which the interpreter checks bounds
    monkeypatch.setattr(torch.Tensor, "data_ptr", torch._C.TensorBase.data_ptr)
    monkeypatch.setattr(buckets, "most_tensors", lambda *_: 1 << 30)  # as on a GPU
    few, many = calls(name, 20), calls(name, 60)
    assert 0 < many - few <= 40 * MOST_CALLS[name]
