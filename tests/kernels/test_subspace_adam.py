"""Adam's moments in a moved subspace: every backend against float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_lowmem_optim.kernels.backend import ENVIRONMENT_VARIABLE
from hf_lowmem_optim.kernels.subspace_adam import subspace_adam_

BETAS, CORRECTION, DAMPING = (0.9, 0.99), 0.7, 1e-4


def inputs(shape: tuple[int, ...]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    names = ("exp_avg", "exp_avg_sq", "projected", "moved", "rotated")
    return {name: torch.randn(shape, generator=generator) for name in names}


def run(tensors: dict[str, Tensor], **changes: Any) -> None:
    subspace_adam_(**tensors, **{"betas": BETAS, "correction": CORRECTION, "damping": DAMPING, **changes})


@pytest.mark.parametrize("backend", ["reference", "cpu", "triton"])
# the last is cut into pieces
@pytest.mark.parametrize("shape", [(1,), (16, 37), (3, 4, 9), (64, 9000)])
def test_it_is_the_formula(backend: str, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, backend)
    got = inputs(shape)
    p, moved, rotated = (got[name].double() for name in ("projected", "moved", "rotated"))
    beta1, beta2 = BETAS
    v = (rotated + beta2 * CORRECTION * moved**2).abs() + (1 - beta2) * p**2
    m = beta1 * moved + (1 - beta1) * p
    run(got)
    torch.testing.assert_close(got["exp_avg"].double(), m, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(got["exp_avg_sq"].double(), v, rtol=1e-6, atol=1e-6)
    # of the moments as they were rounded: next to v = 0 the quotient is ill-conditioned
    direction = got["exp_avg"].double() / (got["exp_avg_sq"].double().sqrt() + DAMPING)
    torch.testing.assert_close(got["projected"].double(), direction, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_is_carried_on(backend: str, value: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, backend)
    got = inputs((100,))
    got["projected"][3] = value
    run(got)
    assert not got["exp_avg"][3].isfinite()
    assert not got["exp_avg_sq"][3].isfinite()
    assert got["projected"][3].isnan()
    rest = torch.arange(100) != 3
    assert all(got[name][rest].isfinite().all() for name in ("exp_avg", "exp_avg_sq", "projected"))


def test_wrong_tensors_are_refused() -> None:
    wrong = {
        "moved must have 12 entries, got 6": {"moved": torch.zeros(6)},
        "rotated must be one of torch.float32; got torch.bfloat16": {"rotated": torch.zeros(3, 4).bfloat16()},
        "projected must be contiguous": {"projected": torch.zeros(4, 3).mT},
    }
    for message, changes in wrong.items():
        with pytest.raises(ValueError, match=message):
            run({**inputs((3, 4)), **changes})
