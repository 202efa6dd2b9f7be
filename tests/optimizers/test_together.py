"""Which tensors a sparse rule takes in one call."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from torch import Tensor, nn

from hf_lowmem_optim.kernels.backend import ENVIRONMENT_VARIABLE
from hf_lowmem_optim.optimizers.pending import PendingUpdate
from hf_lowmem_optim.optimizers.together import split_together


def pending(param: Tensor, grad: Tensor | None = None, seed: int | None = None) -> PendingUpdate:
    return PendingUpdate(param, torch.zeros_like(param) if grad is None else grad, {}, {}, seed)


@pytest.mark.skipif(importlib.util.find_spec("numba") is None, reason="numba is not installed")
def test_plain_contiguous_tensors_of_a_cpu_go_together(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, weight = torch.zeros(4, 6), nn.Parameter(torch.zeros(5, dtype=torch.bfloat16))
    wrapped = torch.zeros(3).as_subclass(type("Wrapped", (Tensor,), {}))
    updates = [
        pending(plain),
        pending(plain.T),
        pending(weight),
        pending(plain, seed=3),
        pending(wrapped),
        pending(plain, grad=torch.zeros(6, 4).T),
        pending(torch.zeros(2, device="meta")),
    ]
    assert split_together(updates) == ([0, 2], [1, 3, 4, 5, 6])
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "reference")
    assert split_together(updates) == ([], list(range(7)))


def test_a_backend_that_is_demanded_for_another_device_is_not_in_the_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton does not run on a CPU without the interpreter: with tensors of a GPU alone nobody asks it to."""
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "triton")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert split_together([pending(torch.zeros(2, device="meta"))]) == ([], [0])
