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

#: Calls of functions, also of torch's in C, that one tensor more costs a step; by optimizer, and how many sets of
#: tensors take turns.
MOST_CALLS = {
    ("microadam", 1): 36,
    ("sparse_mfac", 1): 36,
    ("sparse_ggt", 1): 36,
    ("ldadam", 1): 34,
    ("microadam", 3): 36,
    ("sparse_mfac", 2): 40,
}


def step(optimizer: LowMemoryOptimizer, count: Callable[..., None] | None = None, left_out: int = -1) -> None:
    """A step as a training loop takes it: other gradients, another learning rate; every tenth tensor may have none."""
    for group in optimizer.param_groups:
        group["lr"] *= 0.9
        for place, param in enumerate(group["params"]):
            param.grad = None if place % 10 == left_out else torch.randn_like(param)
    sys.setprofile(count)
    try:
        optimizer.step()
    finally:
        sys.setprofile(None)


def calls(name: str, tensors: int, sets: int) -> int:
    """How many functions a later step calls where so many sets of tensors take turns."""
    weights = [nn.Parameter(torch.randn(64, 64)) for _ in range(tensors)]
    optimizer, events = OPTIMIZERS[name].optimizer_class(weights), []
    turns = [*range(sets)] if sets > 1 else [-1]
    for left_out in [*turns * 3, turns[0]]:
        events.clear()
        step(optimizer, lambda frame, event, arg: events.append(event), left_out)
    return events.count("call") + events.count("c_call")


@pytest.mark.parametrize(("name", "sets"), MOST_CALLS)
def test_a_step_of_many_tensors_calls_little_for_each(
    name: str, sets: int, use: Use, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The host's part of a step on a GPU, without the kernels; also where layers or losses are trained in turns."""
    triton = pytest.importorskip("triton")
    use("triton")
    for kind in (triton.runtime.jit.JITFunction, triton.runtime.interpreter.InterpretedFunction):
        monkeypatch.setattr(kind, "__getitem__", lambda self, grid: lambda *args, **kwargs: None)
    # not the one with which the interpreter checks bounds
    monkeypatch.setattr(torch.Tensor, "data_ptr", torch._C.TensorBase.data_ptr)
    monkeypatch.setattr(buckets, "most_tensors", lambda *_: 1 << 30)  # as on a GPU
    few, many = calls(name, 20, sets), calls(name, 60, sets)
    assert 0 < many - few <= 40 * MOST_CALLS[name, sets]
