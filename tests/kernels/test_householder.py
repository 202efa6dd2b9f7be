"""Orthonormal rows, beside LAPACK's QR in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

numba = pytest.importorskip("numba")

# after the line above, because this module cannot be imported where there is no numba
from hf_lowmem_optim.kernels.householder import REFLECTIONS, orthonormalize_rows  # noqa: E402

_run = numba.njit(lambda address, r, p: orthonormalize_rows(address, r, p))


def orthonormalized(rows: Tensor) -> Tensor:
    """Rows made orthonormal."""
    result = rows.clone()
    _run(result.data_ptr(), *result.shape)
    return result


def deviation(rows: Tensor) -> float:
    """‖QQᵀ − I‖₂."""
    wide = rows.double()
    return float(torch.linalg.matrix_norm(wide @ wide.mT - torch.eye(len(rows), dtype=torch.float64), 2))


@pytest.mark.parametrize("count", [1, 2, 3, REFLECTIONS - 1, REFLECTIONS, REFLECTIONS + 1, 3 * REFLECTIONS + 5])
@pytest.mark.parametrize("length", [0, 1, 13, 200, 1021])
@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e30])
def test_it_is_the_QR_of_the_transpose(count: int, length: int, scale: float) -> None:
    rows = torch.randn(count, count + length, generator=torch.Generator().manual_seed(count)) * scale
    got = orthonormalized(rows)
    assert deviation(got) < 1e-5
    exact = torch.linalg.qr(rows.double().mT)[0].mT
    condition = float(torch.linalg.cond(rows.double()))
    torch.testing.assert_close(got.double(), exact, rtol=0, atol=2e-6 * condition)


@pytest.mark.parametrize("case", ["zero", "all alike", "one of each scale", "unit vectors", "more and more alike"])
def test_rows_that_depend_on_each_other_become_orthonormal_too(case: str) -> None:
    count, length = 2 * REFLECTIONS + 1, 100
    normal = torch.randn(count, length, generator=torch.Generator().manual_seed(0))
    rows = {
        "zero": torch.zeros(count, length),
        "all alike": torch.ones(count, length),
        "one of each scale": normal * torch.logspace(37, -38, count)[:, None],
        "unit vectors": -torch.eye(count, length),
        "more and more alike": normal[:1] + 1e-4 * normal * torch.logspace(0, -8, count)[:, None],
    }[case]
    got = orthonormalized(rows)
    assert deviation(got) < 1e-5
    # the first row keeps its direction
    if case != "zero":
        cosine = torch.nn.functional.cosine_similarity(got[0].double(), rows[0].double(), dim=0)
        assert abs(cosine) > 1 - 1e-6


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("row", ["normal", "zeros", "last of a square"])
def test_what_is_not_finite_is_carried_on_from_there(value: float, row: str) -> None:
    length = 5 if row == "last of a square" else 30
    rows = torch.randn(5, length, generator=torch.Generator().manual_seed(0))
    at = 4 if row == "last of a square" else 2
    if row == "zeros":
        rows[at] = 0
    rows[at, -1] = value
    got = orthonormalized(rows)
    assert torch.isfinite(got[:at]).all()
    assert not torch.isfinite(got[at:]).all(dim=1).any()
