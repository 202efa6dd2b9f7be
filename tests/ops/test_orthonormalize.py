"""A GPU's way to orthonormal columns: by Cholesky where that is accurate, else by reflections."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from hf_lowmem_optim.ops.low_rank import orthonormalize
from tests.ops.backends import DEVICE, INTERPRETED, ON_GPU, QUIET

kernel = pytest.importorskip("hf_lowmem_optim.ops.triton.low_rank", exc_type=ImportError)
pytestmark = [*([] if INTERPRETED else ON_GPU), QUIET]


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(DEVICE)


def columns(name: str, p: int, r: int) -> Tensor:
    """A matrix whose first two columns are independent."""
    Y = normal(p, r)
    if name == "a repeated column":
        Y[:, 3] = Y[:, 1]
    elif name == "zero columns":
        Y[:, 2:5] = 0
    elif name == "as dependent as Cholesky serves":
        Y[:, 2:] = Y[:, :1] + 1e-4 * Y[:, 2:]
    elif name == "a chain of neighbours":
        orthonormal = torch.linalg.qr(Y)[0]
        for j in range(1, r):
            Y[:, j] = (1 - 0.03**2) ** 0.5 * orthonormal[:, j - 1] + 0.03 * orthonormal[:, j]
        Y[:, 0] = orthonormal[:, 0]
    elif name == "a repeated column, large":
        Y[:, 3] = Y[:, 1]
        Y *= 1e13
    elif name == "nearly dependent":
        Y[:, 2:] = Y[:, :1] + 1e-6 * Y[:, 2:]
    elif name == "lengths of all sizes":
        Y *= torch.logspace(-25, 17, r, device=DEVICE)
    elif name == "one row":
        Y[1:] = 0
        Y[2, 1] = 1
    return Y


BAD = (
    "as dependent as Cholesky serves",
    "a chain of neighbours",
    "a repeated column",
    "a repeated column, large",
    "zero columns",
    "nearly dependent",
    "lengths of all sizes",
    "one row",
)


def deviation(U: Tensor) -> float:
    wide = U.double()
    return (wide.mT @ wide - torch.eye(U.shape[-1], device=DEVICE)).abs().max().item()


@pytest.mark.parametrize(
    ("name", "p", "r"),
    [
        *((name, p, r) for name in ("any", *BAD) for p, r in [(7, 7), (40, 6), (45, 18)]),
        *((name, 90, 37) for name in ("any", "a chain of neighbours")),
    ],
)
def test_columns_are_orthonormal_and_span_the_same(name: str, p: int, r: int, monkeypatch: pytest.MonkeyPatch) -> None:
    # several tiles of small matrices
    monkeypatch.setattr(kernel, "_ROWS", 16 if p < 50 else 32)
    monkeypatch.setattr(kernel, "_COLUMNS", 8 if p < 50 else 16)
    Y = columns(name, p, r)
    U = kernel.orthonormal_columns(Y)
    assert U.shape == Y.shape and U.dtype == torch.float32
    assert deviation(U) <= 1e-6
    # every column lies in the span of the first ones of U, upper triangular as in a QR
    lengths = Y.double().norm(dim=0).clamp(min=1e-300)
    assert (U.double().mT @ (Y.double() / lengths)).tril(-1).abs().max() <= 1e-6


@pytest.mark.parametrize("name", BAD)
def test_each_of_a_batch_goes_its_own_way(name: str) -> None:
    good, bad = normal(40, 6), columns(name, 40, 6)
    bad_as_well = torch.full_like(good, math.nan)
    U = kernel.orthonormal_columns(torch.stack([good, bad, bad_as_well, good]))
    assert torch.equal(U[0], kernel.orthonormal_columns(good)) and torch.equal(U[3], U[0])
    assert torch.equal(U[1], kernel.orthonormal_columns(bad))
    assert not U[2].isfinite().any()


def test_reflections_are_those_of_a_qr() -> None:
    """Also their signs; the column of zeros sends the matrix there."""
    Y = normal(60, 12)
    U = kernel.orthonormal_columns(Y * torch.tensor([*[1.0] * 11, 0.0], device=DEVICE))
    torch.testing.assert_close(U[:, :11], torch.linalg.qr(Y)[0][:, :11], rtol=0, atol=3e-6)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("length", [1.0, 0.0])
def test_what_is_not_finite_stays_so(value: float, length: float) -> None:
    Y = normal(40, 6) * length
    Y[7, 2] = value
    U = kernel.orthonormal_columns(Y)
    assert not U[:, 2:].isfinite().all(0).any()


@pytest.mark.parametrize("length", [1.0, 0.0])
def test_one_column(length: float) -> None:
    U = kernel.orthonormal_columns(normal(2, 40, 1) * length)
    assert U.shape == (2, 40, 1) and (U.norm(dim=1) - 1).abs().max() <= 1e-6


def test_what_has_no_such_columns_is_refused() -> None:
    for wrong in (normal(3, 4), normal(4), normal(4, 3).double()):
        with pytest.raises(ValueError, match=r"p ≥ r; got"):
            orthonormalize(wrong)
