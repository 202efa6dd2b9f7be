"""The Triton kernels of low rank: orthonormal columns, LDAdam's moments in their new basis, the descent of weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from benchmarks.launches import NUMBERS
from hf_lowmem_optim.ops.low_rank import of_safe_size, orthonormalize
from hf_lowmem_optim.optimizers.ldadam import ldadam_moments_
from tests.ops.backends import BF16, DEVICE, FP16, FP32, INTERPRETED, ON_GPU, QUIET, normal

kernel = pytest.importorskip("hf_lowmem_optim.ops.triton.low_rank", exc_type=ImportError)
ldadam = pytest.importorskip("hf_lowmem_optim.ops.triton.ldadam", exc_type=ImportError)
pytestmark = [*([] if INTERPRETED else ON_GPU), QUIET]

DEPENDENT = ("as dependent as Cholesky serves", "nearly dependent", "a repeated column", "a repeated column, large")
BAD = (*DEPENDENT, "a chain of neighbours", "zero columns", "lengths of all sizes", "one row")


def columns(name: str, p: int, r: int) -> Tensor:
    """A matrix whose first two columns are independent."""
    Y = normal(p, r)
    if name.startswith("a repeated column"):
        Y[:, 3] = Y[:, 1]
        Y *= 1e13 if name.endswith("large") else 1.0
    elif name == "zero columns":
        Y[:, 2:5] = 0
    elif name == "as dependent as Cholesky serves":
        Y[:, 2:] = Y[:, :1] + 1e-4 * Y[:, 2:]
    elif name == "a chain of neighbours":
        orthonormal = torch.linalg.qr(Y)[0]
        for j in range(1, r):
            Y[:, j] = (1 - 0.03**2) ** 0.5 * orthonormal[:, j - 1] + 0.03 * orthonormal[:, j]
        Y[:, 0] = orthonormal[:, 0]
    elif name == "nearly dependent":
        Y[:, 2:] = Y[:, :1] + 1e-6 * Y[:, 2:]
    elif name == "lengths of all sizes":
        Y *= torch.logspace(-25, 17, r, device=DEVICE)
    elif name == "one row":
        Y[1:] = 0
        Y[2, 1] = 1
    return Y


@pytest.mark.parametrize(
    ("name", "p", "r"),
    [
        *((name, p, r) for name in ("any", *BAD) for p, r in [(7, 7), (40, 6), (37, 12)]),
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
    wide, lengths = U.double(), Y.double().norm(dim=0).clamp(min=1e-300)
    assert (wide.mT @ wide - torch.eye(r, device=DEVICE)).abs().max() <= 1e-6
    # every column lies in the span of the first ones of U, upper triangular as in a QR
    assert (wide.mT @ (Y.double() / lengths)).tril(-1).abs().max() <= 1e-6


@pytest.mark.parametrize("name", BAD)
def test_each_of_a_batch_goes_its_own_way(name: str) -> None:
    good, bad = normal(40, 6), columns(name, 40, 6)
    bad_as_well = torch.full_like(good, math.nan)
    U = kernel.orthonormal_columns(torch.stack([good, bad, bad_as_well, good]))
    assert torch.equal(U[0], kernel.orthonormal_columns(good)) and torch.equal(U[3], U[0])
    assert torch.equal(U[1], kernel.orthonormal_columns(bad))
    assert not U[2].isfinite().any()


@pytest.mark.parametrize(
    ("r", "held"), [(1, 64), (2, 64), (13, 64), (64, 64), (65, 64), (150, 64), (67, 16), (128, 16)]
)
def test_the_inverse_of_a_factor_is_that_of_cholesky(r: int, held: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of ranks above four times what a program holds, too, where it does twice of that."""
    monkeypatch.setattr(kernel, "_FACTOR_RANK", held)
    columns = normal(3, r + 5, r).double()
    gram = columns.mT @ columns
    gram[1] = -gram[1]
    got, factor = kernel.inverse_factor(gram.contiguous()), torch.linalg.cholesky(gram[::2])
    identity = torch.eye(r, dtype=torch.float64, device=DEVICE)
    # half of an ulp of each of r terms, times the condition of the factor, whose columns are random
    torch.testing.assert_close(got[::2] @ factor, identity.expand(2, r, r), rtol=0, atol=1e-10)
    assert not got[1].isfinite().all()


def test_reflections_are_those_of_a_qr() -> None:
    """Also their signs; the column of zeros sends the matrix there."""
    Y = normal(60, 12)
    U = kernel.orthonormal_columns(Y * torch.tensor([*[1.0] * 11, 0.0], device=DEVICE))
    torch.testing.assert_close(U[:, :11], torch.linalg.qr(Y)[0][:, :11], rtol=0, atol=3e-6)


@pytest.mark.parametrize("length", [1.0, 0.0])
def test_what_is_not_finite_stays_so_and_one_column_is_fine(length: float) -> None:
    for value in (math.nan, math.inf):
        Y = normal(40, 6) * length
        Y[7, 2] = value
        assert not kernel.orthonormal_columns(Y)[:, 2:].isfinite().all(0).any()
    U = kernel.orthonormal_columns(normal(2, 40, 1) * length)
    assert U.shape == (2, 40, 1) and (U.norm(dim=1) - 1).abs().max() <= 1e-6


def test_what_has_no_such_columns_is_refused() -> None:
    for wrong in (normal(3, 4), normal(4), normal(4, 3).double()):
        with pytest.raises(ValueError, match=r"p ≥ r; got"):
            orthonormalize(wrong)


def test_of_a_batch_what_is_too_large_is_divided() -> None:
    V = normal(2, 4, 30).mT
    assert torch.equal(of_safe_size(V), V)
    V[1, 3, 2] = -(2.0**30)  # the excess of 2¹⁰, twice
    assert torch.equal(of_safe_size(V), V * torch.tensor([1.0, 2.0**-20], device=V.device)[:, None, None])
    V[0, 5, 1] = math.nan
    safe = of_safe_size(V)
    assert safe[0].isnan().any() and torch.equal(safe[1], V[1] * 2.0**-20)


def close(got: Tensor, expected: Tensor, tolerance: float) -> None:
    scale = expected.abs().max().item()
    torch.testing.assert_close(got.double() / scale, expected / scale, rtol=0, atol=tolerance)


def state(n: int, r: int, q: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """R, m, v, p̃ and what is written: of bases that are not far from each other."""
    R = torch.eye(r, device=DEVICE) + 0.3 * normal(n, r, r, seed=1)
    right = torch.full((n, 2 * r, q), math.nan, device=DEVICE)
    return R, normal(n, r, q, seed=2), normal(n, r, q, seed=3).abs(), normal(n, r, q, seed=4), right


@pytest.mark.parametrize(
    ("n", "r", "q", "rows"),
    [(1, 1, 7, 256), (1, 3, 16, 256), (3, 4, 64, 256), (2, 13, 97, 256), (1, 37, 70, 256), (2, 37, 70, 16)],
)
def test_moments_are_the_formulas(n: int, r: int, q: int, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """By programs of all rows, or of a few of them."""
    monkeypatch.setattr(ldadam, "_MOST_MOMENT_ROWS", rows)
    monkeypatch.setattr(ldadam, "_FEW_MOMENT_ROWS", 16)
    R, m, v, projected, right = state(n, r, q)
    wide_R, old_m, old_v, p = (tensor.double() for tensor in (R, m, v, projected))
    ldadam.update_moments_(R, m, v, projected, right, NUMBERS)
    beta1, beta2, k, c = NUMBERS.beta1, NUMBERS.beta2, NUMBERS.correction, NUMBERS.beta1 / (1 - NUMBERS.beta1)
    moved = wide_R @ old_m
    close(m, beta1 * moved + (1 - beta1) * p, 1e-6)
    second = (beta2 * wide_R**2 @ (old_v - k * old_m**2) + beta2 * k * moved**2).abs() + (1 - beta2) * p**2
    close(v, second, 2e-6)  # every product and sum is rounded
    # of the moments as they were rounded: next to v = 0 the quotient is ill-conditioned
    close(projected, m.double() / (v.double().sqrt() + NUMBERS.damping), 1e-6)
    close(right, torch.cat([c * old_m, -(p + c * moved)], 1), 1e-6)


@pytest.mark.parametrize(
    ("update", "r"), [(ldadam.move_moments_, 5), (ldadam_moments_.torch_version, 5), (ldadam.move_moments_, 20)]
)
def test_a_projection_to_rounding_noise_counts_as_zero(
    update: Callable[..., None], r: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ldadam, "_MOST_MOMENT_ROWS", 16)
    monkeypatch.setattr(ldadam, "_FEW_MOMENT_ROWS", 16)
    R, m, v, p, _ = state(2, r, 40)
    for moments in (R, m, v):
        moments.zero_()  # as in the first step
    p[:, 1] = p[:, 0] * 2.0**-19
    p[:, 2] = p[:, 0] * 2.0**-23
    p[1, :, 7] = 0
    signs = p.sign()
    update(R, m, v, p, NUMBERS)
    kept = (torch.arange(r, device=DEVICE) != 2)[None, :, None] & (signs != 0)
    # noise as well where another row is far larger than the first
    kept[:, 1] &= m[:, 1] != 0
    assert torch.equal(m != 0, kept) and torch.equal(v != 0, kept) and torch.equal(p != 0, kept)
    assert (m[:, 1] != 0).any() and torch.equal(p.sign()[kept], signs[kept])


def test_each_of_a_batch_is_what_it_is_alone() -> None:
    together = state(3, 13, 40)
    alone = [[tensor[i : i + 1].clone() for tensor in together] for i in range(3)]
    ldadam.update_moments_(*together, NUMBERS)
    for i, one in enumerate(alone):
        ldadam.update_moments_(*one, NUMBERS)
        assert all(torch.equal(a[i : i + 1], b) for a, b in zip(together, one, strict=True))


@pytest.mark.parametrize("r", [6, 20])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_moments_carry_on_what_is_not_finite_and_nowhere_else(value: float, r: int) -> None:
    R, m, v, projected, right = state(1, r, 100)
    projected[0, 3, 7] = value
    ldadam.update_moments_(R, m, v, projected, right, NUMBERS)
    for tensor in (m, v, projected, right):
        assert not tensor[..., 7].isfinite().all()
        assert tensor[..., torch.arange(100) != 7].isfinite().all()


def weights_of(n: int, rows: int, columns: int, dtype: torch.dtype) -> list[Tensor]:
    return [normal(rows, columns, seed=10 + i).to(dtype) for i in range(n)]


def check_descent(weights: Sequence[Tensor], left: Tensor, right: Tensor) -> None:
    """Against the formula: half a unit of the last place, and what float32 rounded before."""
    decay, step_size = NUMBERS.decay, NUMBERS.step_size
    expected = [
        decay * w.double() - step_size * (a.double() @ b.double()) for w, a, b in zip(weights, left, right, strict=True)
    ]
    ldadam.descend_(weights, left, right, decay, step_size)
    for weight, exact in zip(weights, expected, strict=True):
        last_place = 0 if weight.dtype == FP32 else torch.finfo(weight.dtype).eps / 2
        error = (weight.double() - exact).abs()
        assert (error <= (last_place + 1e-6) * exact.abs() + 1e-6 * exact.abs().max()).all()


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16])
@pytest.mark.parametrize(
    ("n", "rows", "columns", "rank"),
    [(1, 7, 5, 1), (3, 64, 128, 4), (2, 70, 150, 13), (1, 150, 70, 32), (2, 65, 80, 33), (1, 40, 64, 128)],
)
def test_weights_descend_and_are_rounded_once(n: int, rows: int, columns: int, rank: int, dtype: torch.dtype) -> None:
    check_descent(weights_of(n, rows, columns, dtype), normal(n, rows, rank), normal(n, rank, columns))


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_factors_and_weights_of_any_layout(dtype: torch.dtype) -> None:
    left, right = normal(2, 6, 48), normal(2, 80, 6)
    transposed = [weight.mT.contiguous().mT for weight in weights_of(2, 48, 80, dtype)]
    check_descent(transposed, left.mT, right.mT)
    # rows of a wider matrix, and what does not begin at a multiple of 16 bytes
    wider = [normal(48, 96).to(dtype)[:, 16:] for _ in range(2)]
    check_descent(wider, left.mT, right.mT)
    odd = [normal(48 * 80 + 1).to(dtype)[1:].view(48, 80), *weights_of(1, 48, 80, dtype)]
    check_descent(odd, left.mT, right.mT)
    check_descent([normal(1, 64).to(dtype), normal(1, 64).to(dtype)], normal(2, 1, 3), normal(2, 3, 64))
    check_descent([normal(64, 1).to(dtype), normal(64, 1).to(dtype)], normal(2, 64, 3), normal(2, 3, 1))


def test_all_weights_are_one_launch_and_come_out_as_they_do_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    launches: list[tuple[int, ...]] = []
    kernel = ldadam._descend_kernel

    class Counting:
        def __getitem__(self, grid: tuple[int, ...]) -> object:
            launches.append(grid)
            return kernel[grid]

    monkeypatch.setattr(ldadam, "_descend_kernel", Counting())
    left, right = normal(5, 48, 6), normal(5, 6, 80)
    together, alone = weights_of(5, 48, 80, BF16), weights_of(5, 48, 80, BF16)
    ldadam.descend_(together, left, right, 0.9, 0.4)
    assert launches == [(2, 5)]
    for i, weight in enumerate(alone):
        ldadam.descend_([weight], left[i : i + 1], right[i : i + 1], 0.9, 0.4)
        assert torch.equal(weight, together[i])


def test_what_is_not_finite_reaches_its_own_entries() -> None:
    weights, left, right = weights_of(2, 20, 30, BF16), normal(2, 20, 4), normal(2, 4, 30)
    weights[0][3, 5], right[1, 2, 7] = math.nan, math.inf
    ldadam.descend_(weights, left, right, 0.9, 0.4)
    at = [(~weight.isfinite()).nonzero().tolist() for weight in weights]
    assert at == [[[3, 5]], [[row, 7] for row in range(20)]]


def test_what_one_launch_cannot_serve_is_refused() -> None:
    left, right = normal(2, 8, 3), normal(2, 3, 8)
    wrong = {
        r"got torch.float32 \[8, 4\]": [normal(8, 8), normal(8, 4)],
        r"with strides \(1, 8\) beside": [normal(8, 8), normal(8, 8).mT],
        r"got torch.bfloat16": [normal(8, 8), normal(8, 8).bfloat16()],
        r"one of the weights' strides must be 1, got \(2, 16\)": [normal(8, 16)[:, ::2]] * 2,
    }
    for message, weights in wrong.items():
        with pytest.raises(ValueError, match=message):
            ldadam.descend_(weights, left, right, 0.9, 0.4)


def test_a_table_of_addresses_is_made_again_when_they_change() -> None:
    from hf_lowmem_optim.ops.triton import device

    first, second = normal(4), normal(4)
    table = device.address_table([first, second])
    assert table.tolist() == [first.data_ptr(), second.data_ptr()] and table.device.type == DEVICE
    assert device.address_table([first, second]) is table
    assert device.address_table([second, first]).tolist() == [second.data_ptr(), first.data_ptr()]
