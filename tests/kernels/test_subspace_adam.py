"""Adam's moments carried into a moved subspace: every backend against float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_lowmem_optim.kernels.backend import ENVIRONMENT_VARIABLE
from hf_lowmem_optim.kernels.subspace_adam import subspace_adam_

BETAS, CORRECTION, DAMPING = (0.9, 0.99), 0.7, 1e-4
WRITTEN = ("exp_avg", "exp_avg_sq", "projected", "left", "right")


def inputs(p: int, r: int, q: int, batch: tuple[int, ...] = ()) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*batch, *shape, generator=generator)

    return {
        "old_basis": normal(p, r) / p**0.5,
        "basis": normal(p, r) / p**0.5,
        "exp_avg": normal(r, q),
        "exp_avg_sq": normal(r, q).abs(),
        "projected": normal(r, q),
        "left": torch.full((*batch, p, 2 * r), math.nan),
        "right": torch.full((*batch, 2 * r, q), math.nan),
    }


def run(tensors: dict[str, Tensor], **changes: Any) -> None:
    subspace_adam_(**tensors, **{"betas": BETAS, "correction": CORRECTION, "damping": DAMPING, **changes})


@pytest.fixture(params=["reference", "cpu", "triton"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, request.param)
    return str(request.param)


SIZES = {
    "one row": (5, 1, 7, ()),
    "no multiple of four or of a tile": (150, 13, 197, ()),
    "a batch": (12, 4, 64, (3,)),
    "above the small ranks": (80, 40, 100, (2,)),
    "in pieces": (64, 16, 40_000, ()),
    "in pieces, above the small ranks": (64, 48, 12_000, ()),
}


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_it_is_the_formula(size: tuple[int, int, int, tuple[int, ...]]) -> None:
    got = inputs(*size)
    old_basis, basis, m_old, v_old, p = (got[name].double() for name in list(got)[:5])
    beta1, beta2 = BETAS
    rotation = basis.mT @ old_basis
    moved = rotation @ m_old
    x = beta2 * (rotation**2 @ (v_old - CORRECTION * m_old**2))
    v = (x + beta2 * CORRECTION * moved**2).abs() + (1 - beta2) * p**2
    m = beta1 * moved + (1 - beta1) * p
    c = beta1 / (1 - beta1)
    taken = old_basis @ (c * m_old) - basis @ (p + c * moved)
    run(got)

    def close(name: str, expected: Tensor, tolerance: float = 2e-6) -> None:
        torch.testing.assert_close(got[name].double(), expected, rtol=tolerance, atol=tolerance)

    close("exp_avg", m)
    close("exp_avg_sq", v)
    # of the moments as they were rounded: next to v = 0 the quotient is ill-conditioned
    close("projected", got["exp_avg"].double() / (got["exp_avg_sq"].double().sqrt() + DAMPING))
    assert torch.equal(got["left"], torch.cat((got["old_basis"], got["basis"]), -1))
    close("right", torch.cat((c * m_old, -(1 + c) * got["exp_avg"].double()), -2))
    torch.testing.assert_close(got["left"].double() @ got["right"].double(), taken, rtol=1e-5, atol=1e-5)


# sizes of which batches are made: ``is_aligned``
@pytest.mark.parametrize("rank", [8, 32, 40])
@pytest.mark.parametrize("backend", ["reference", "cpu"], indirect=True)
def test_one_of_a_batch_is_what_it_is_alone(backend: str, rank: int) -> None:
    together = inputs(48, rank, 160, (3,))
    alone = [{name: tensor[i].clone() for name, tensor in together.items()} for i in range(3)]
    run(together)
    for i, one in enumerate(alone):
        run(one)
        assert all(torch.equal(one[name], together[name][i]) for name in WRITTEN)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("rank", [6, 40])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_is_carried_on_and_nowhere_else(value: float, rank: int) -> None:
    got = inputs(50, rank, 100)
    got["projected"][3, 7] = value
    got["exp_avg"][2, 9] = value
    run(got)
    written = [got[name] for name in WRITTEN[:3]]
    assert not any(tensor[3, 7].isfinite() for tensor in written[:2])
    assert got["projected"][3, 7].isnan()
    # R mixes a column
    assert not any(tensor[:, 9].isfinite().any() for tensor in written[:2])
    rest = torch.ones(rank, 100, dtype=torch.bool)
    rest[3, 7], rest[:, 9] = False, False
    assert all(tensor[rest].isfinite().all() for tensor in written)


def test_wrong_tensors_are_refused() -> None:
    wrong = {
        "old_basis must have 6 entries, got 9": {"old_basis": torch.zeros(3, 3)},
        "left must have 12 entries, got 6": {"left": torch.zeros(3, 2)},
        "right must be one of torch.float32; got torch.bfloat16": {"right": torch.zeros(4, 4).bfloat16()},
        "projected must be contiguous": {"projected": torch.zeros(4, 2).mT},
    }
    for message, changes in wrong.items():
        with pytest.raises(ValueError, match=message):
            run({**inputs(3, 2, 4), **changes})
