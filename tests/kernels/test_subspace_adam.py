"""What LDAdam does with a matrix after its gradient: every backend against float64, both ways round."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_lowmem_optim.compression.quantization import (
    QuantFormat,
    Quantized,
    dequantize_add_,
    quantize_,
    quantized_specs,
    quantized_state,
)
from hf_lowmem_optim.kernels.backend import ENVIRONMENT_VARIABLE
from hf_lowmem_optim.kernels.subspace_adam import descend_, power_iteration, subspace_adam_

BETAS, CORRECTION, DAMPING = (0.9, 0.99), 0.7, 1e-4
SHARE, REST = 0.8, 0.3
DECAY, STEP_SIZE = 0.9, 0.4

#: Rows, columns, rank, batch.
SIZES = {
    "one column": (7, 5, 1, ()),
    "square": (16, 16, 3, ()),
    "wide, no multiple of anything": (150, 597, 13, ()),
    "tall, no multiple of anything": (597, 151, 13, ()),
    "a rank of several tiles": (70, 90, 37, ()),
    "tall, of several tiles": (91, 70, 37, ()),
    "a batch": (12, 64, 4, (3,)),
    "a tall batch": (64, 12, 4, (3,)),
    "wide, in pieces": (520, 1030, 8, ()),
    "tall, in pieces": (1030, 520, 8, ()),
}


class Problem:
    """A matrix with its state, and in float64 what is to come out."""

    def __init__(self, rows: int, columns: int, rank: int, batch: tuple[int, ...] = ()) -> None:
        generator = torch.Generator().manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*batch, *shape, generator=generator)

        p, q = sorted((rows, columns))
        self.tall = rows > columns
        self.gradient, self.param = normal(rows, columns), normal(rows, columns)
        self.old_basis, self.basis = (torch.linalg.qr(normal(p, rank))[0] for _ in range(2))
        self.old_basis = self.old_basis.contiguous()
        self.exp_avg, self.exp_avg_sq = normal(rank, q), normal(rank, q).abs()
        self.bases, self.right = (torch.full((*batch, 2 * rank, size), math.nan) for size in (p, q))
        self.projected = torch.full((*batch, rank, q), math.nan)

    def short_side_first(self, matrix: Tensor) -> Tensor:
        return matrix.mT if self.tall else matrix

    def sketch(self) -> Tensor:
        args = (self.gradient, self.old_basis, self.exp_avg, self.bases, self.projected)
        return power_iteration(*args, momentum_weight=SHARE, gradient_weight=REST)

    def update(self, keeps_rest: bool = True, **changes: Any) -> None:
        names = ("basis", "exp_avg", "exp_avg_sq", "bases", "projected", "right")
        hyper = {"betas": BETAS, "correction": CORRECTION, "damping": DAMPING, "keeps_rest": keeps_rest}
        tensors = {"matrix": self.gradient, **{name: getattr(self, name) for name in names}}
        subspace_adam_(**{**tensors, **hyper, **changes})

    def descend(self) -> None:
        args = (self.param, self.basis, self.projected)
        descend_(*args, decay=DECAY, step_size=STEP_SIZE, wide=lambda: torch.empty(self.param.shape))


@pytest.fixture(params=["reference", "cpu"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, request.param)
    return str(request.param)


def close(got: Tensor, expected: Tensor, tolerance: float) -> None:
    scale = expected.abs().max().item()
    torch.testing.assert_close(got.double() / scale, expected / scale, rtol=0, atol=tolerance)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("contiguous", [True, False])
def test_they_are_the_formulas(size: tuple[int, int, int, tuple[int, ...]], contiguous: bool) -> None:
    one = Problem(*size)
    if not contiguous:
        one.gradient, one.param = (matrix.mT.contiguous().mT for matrix in (one.gradient, one.param))
    a, W = (one.short_side_first(matrix.double()) for matrix in (one.gradient, one.param))
    old, U, m, v = (tensor.double() for tensor in (one.old_basis, one.basis, one.exp_avg, one.exp_avg_sq))

    b = SHARE * old @ m + REST * a
    close(one.sketch(), b @ (b.mT @ old), 1e-6)

    one.update()
    beta1, beta2 = BETAS
    R, p = U.mT @ old, U.mT @ a
    moved = R @ m
    second = (beta2 * R**2 @ (v - CORRECTION * m**2) + beta2 * CORRECTION * moved**2).abs() + (1 - beta2) * p**2
    c = beta1 / (1 - beta1)
    close(one.exp_avg, beta1 * moved + (1 - beta1) * p, 1e-6)
    close(one.exp_avg_sq, second, 1e-6)
    # of the moments as they were rounded: next to v = 0 the quotient is ill-conditioned
    d = one.exp_avg.double() / (one.exp_avg_sq.double().sqrt() + DAMPING)
    close(one.projected, d, 1e-6)
    close(one.short_side_first(one.gradient), a + old @ (c * m) - U @ (p + c * moved), 2e-6)

    one.descend()
    close(one.short_side_first(one.param), DECAY * W - STEP_SIZE * U @ d, 1e-6)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [(150, 597, 13), (597, 151, 16)])
def test_a_narrow_weight_is_rounded_once(size: tuple[int, int, int], dtype: torch.dtype) -> None:
    one = Problem(*size)
    one.projected = torch.randn(one.projected.shape)
    one.param = one.param.to(dtype)
    U, d = one.basis.double(), one.projected.double()
    exact = DECAY * one.short_side_first(one.param.double()) - STEP_SIZE * U @ d
    one.descend()
    # half a unit of the last place, and what float32 rounded before
    error = (one.short_side_first(one.param.double()) - exact).abs()
    assert (error <= (torch.finfo(dtype).eps / 2 + 1e-6) * exact.abs() + 1e-6).all()


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("fmt", [QuantFormat(4, 64), QuantFormat(8, 64), QuantFormat(4, 48)], ids=str)
@pytest.mark.parametrize("size", [(21, 37, 3, ()), (520, 1030, 8, ()), (64, 12, 4, (3,))], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("seed", [None, 5])
def test_a_quantized_error_is_added_and_stored_to_the_bit(
    size: tuple[int, int, int, tuple[int, ...]], fmt: QuantFormat, dtype: torch.dtype, seed: int | None
) -> None:
    fused = Problem(*size)
    apart = copy.deepcopy(fused)
    numel, gradient = fused.gradient.numel(), fused.param.to(dtype)

    def stored() -> Quantized:
        specs = quantized_specs(numel, fmt)
        state = {key: torch.zeros(spec.shape, dtype=spec.dtype) for key, spec in specs.items()}
        quantized = quantized_state(state, numel, fmt)
        quantize_(quantized, apart.gradient)
        return quantized

    one, other = stored(), stored()
    fused.gradient = torch.full_like(fused.gradient, math.nan)
    dequantize_add_(apart.gradient, other, onto=gradient)
    args = (fused.gradient, fused.old_basis, fused.exp_avg, fused.bases, fused.projected)
    weights = {"momentum_weight": SHARE, "gradient_weight": REST}
    assert torch.equal(power_iteration(*args, **weights, gradient=gradient, error=one), apart.sketch())
    fused.update(error=one, seed=seed)
    apart.update()
    quantize_(other, apart.gradient, seed=seed)
    for name in ("gradient", "exp_avg", "exp_avg_sq", "projected"):
        assert torch.equal(getattr(fused, name), getattr(apart, name))
    assert all(torch.equal(getattr(one, part), getattr(other, part)) for part in ("codes", "lo", "hi"))


@pytest.mark.parametrize("rank", [8, 32, 40])
@pytest.mark.parametrize("rows", [48, 640])
@pytest.mark.parametrize("backend", ["reference", "cpu"], indirect=True)
def test_one_of_a_batch_is_what_it_is_alone(backend: str, rows: int, rank: int) -> None:
    # sizes of which batches are made: ``is_aligned``
    def run(one: Problem) -> list[Tensor]:
        sketch = one.sketch().clone()
        one.update()
        one.descend()
        return [sketch, one.exp_avg, one.exp_avg_sq, one.projected, one.gradient, one.param]

    together = Problem(rows, 160, rank, (3,))
    alone = [Problem(rows, 160, rank) for _ in range(3)]
    for i, one in enumerate(alone):
        for name, tensor in vars(together).items():
            if isinstance(tensor, Tensor):
                setattr(one, name, tensor[i].clone())
    expected = [run(one) for one in alone]
    for got, each in zip(run(together), zip(*expected, strict=True), strict=True):
        assert all(torch.equal(got[i], each[i]) for i in range(3))


@pytest.mark.parametrize("backend", ["cpu"], indirect=True)
@pytest.mark.parametrize("shape", [(520, 1030), (1030, 520)])
def test_the_pieces_change_nothing(backend: str, shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("numba")
    from hf_lowmem_optim.kernels.subspace_adam import cpu

    def run(pieces: int) -> list[Tensor]:
        monkeypatch.setattr(cpu, "num_pieces", lambda *_: pieces)
        one = Problem(*shape, 8)
        sketch = one.sketch().clone()
        one.update()
        one.descend()
        return [sketch, one.exp_avg, one.exp_avg_sq, one.projected, one.gradient, one.param]

    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        assert all(torch.equal(a, b) for a, b in zip(run(1), run(3), strict=True))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("backend", ["reference", "cpu", "triton"], indirect=True)
@pytest.mark.usefixtures("backend")
def test_without_a_place_for_the_rest_the_gradient_is_only_read() -> None:
    one = Problem(30, 40, 4)
    before = one.gradient.clone()
    one.sketch()
    one.update(keeps_rest=False)
    assert torch.equal(one.gradient, before)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("rank", [6, 20])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_is_carried_on_and_nowhere_else(value: float, rank: int) -> None:
    one = Problem(50, 100, rank)
    one.sketch()
    one.gradient[3, 7] = value
    one.update()
    one.descend()
    moments, rest = (one.exp_avg, one.exp_avg_sq, one.projected), torch.arange(100) != 7
    for tensor in (*moments, one.gradient, one.param):
        assert not tensor[:, 7].isfinite().all()
        assert tensor[:, rest].isfinite().all()


def test_wrong_tensors_are_refused() -> None:
    one = Problem(3, 4, 2)
    wrong = {
        "basis must have 6 entries, got 9": {"basis": torch.zeros(3, 3)},
        "bases must have 12 entries, got 6": {"bases": torch.zeros(2, 3)},
        "right must be one of torch.float32; got torch.bfloat16": {"right": torch.zeros(4, 4).bfloat16()},
        "projected must be contiguous": {"projected": torch.zeros(4, 2).mT},
    }
    for message, changes in wrong.items():
        with pytest.raises(ValueError, match=message):
            one.update(**changes)
    with pytest.raises(ValueError, match="keeps_rest=True"):
        one.update(keeps_rest=False, error=object())
    with pytest.raises(ValueError, match="old_basis must have 6 entries, got 4"):
        one.old_basis = torch.zeros(2, 2)
        one.sketch()
    with pytest.raises(ValueError, match="direction must have 8 entries"):
        descend_(one.param, one.basis, torch.zeros(2, 5), decay=1.0, step_size=1.0, wide=lambda: one.param)
