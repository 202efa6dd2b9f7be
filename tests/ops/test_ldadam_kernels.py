"""What LDAdam does with a matrix in a step: every backend against float64, both ways round."""

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
from hf_lowmem_optim.kernels.subspace_adam import Buffers, Coefficients, subspace_adam_
from tests.ops.test_block_quant import DEVICE, FAST, INTERPRETED

# the interpreter computes in numpy, which warns of what the cases are made for
pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")

NUMBERS = Coefficients(
    momentum_weight=0.8,
    gradient_weight=0.3,
    beta1=0.9,
    beta2=0.99,
    correction=0.7,
    damping=1e-4,
    decay=0.9,
    step_size=0.4,
)

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
RESULTS = ("param", "matrix", "basis", "exp_avg", "exp_avg_sq")


class Problem:
    """A matrix with its state."""

    def __init__(self, rows: int, columns: int, rank: int, batch: tuple[int, ...] = ()) -> None:
        generator = torch.Generator().manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*batch, *shape, generator=generator).to(DEVICE)

        p, q = sorted((rows, columns))
        self.tall = rows > columns
        self.matrix, self.param = normal(rows, columns), normal(rows, columns)
        self.basis, self.new_basis = (torch.linalg.qr(normal(p, rank))[0].contiguous() for _ in range(2))
        self.exp_avg, self.exp_avg_sq = normal(rank, q), normal(rank, q).abs()
        both, right = (torch.full((*batch, 2 * rank, size), math.nan, device=DEVICE) for size in (p, q))
        self.buffers = Buffers(both, torch.full_like(self.exp_avg, math.nan), right)

    def short_side_first(self, matrix: Tensor) -> Tensor:
        return matrix.mT if self.tall else matrix

    def step(self, *, moves: bool = False, **changes: Any) -> None:
        """Do it, with the power iteration or to the basis that is given."""
        tensors = {name: getattr(self, name) for name in RESULTS}
        given = {"new_basis": None if moves else self.new_basis, "store": None if "error" in changes else _nowhere}
        usual = {"buffers": self.buffers, "coefficients": NUMBERS, "wide": lambda: torch.empty_like(self.matrix)}
        subspace_adam_(**{**tensors, **given, **usual, **changes})

    def results(self) -> list[Tensor]:
        return [*(getattr(self, name) for name in RESULTS), self.buffers.projected]


def quantized(matrix: Tensor, fmt: QuantFormat) -> Quantized:
    """A matrix, quantized."""
    specs = quantized_specs(matrix.numel(), fmt)
    state = {key: torch.zeros(spec.shape, dtype=spec.dtype, device=DEVICE) for key, spec in specs.items()}
    stored = quantized_state(state, matrix.numel(), fmt)
    quantize_(stored, matrix)
    return stored


def _nowhere() -> None:
    """What is left of the matrix stays where it is."""


@pytest.fixture(params=["reference", *FAST])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, request.param)
    return str(request.param)


def skip_what_takes_long(backend: str, size: tuple[int, int, int, tuple[int, ...]]) -> None:
    """In Triton's interpreter, where 500 × 1000 take seconds, only what is small is run; on a GPU everything is."""
    if backend == "triton" and INTERPRETED and size[0] * size[1] > 10_000:
        pytest.skip("the interpreter takes seconds for it, and smaller ones have several tiles, too")


def close(got: Tensor, expected: Tensor, tolerance: float) -> None:
    scale = expected.abs().max().item()
    torch.testing.assert_close(got.double() / scale, expected / scale, rtol=0, atol=tolerance)


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("moves", [True, False])
@pytest.mark.parametrize("contiguous", [True, False])
def test_it_is_the_formulas(
    backend: str, size: tuple[int, int, int, tuple[int, ...]], moves: bool, contiguous: bool
) -> None:
    skip_what_takes_long(backend, size)
    one = Problem(*size)
    if not contiguous:
        one.matrix, one.param = (matrix.mT.contiguous().mT for matrix in (one.matrix, one.param))
    a, W = (one.short_side_first(matrix.double()) for matrix in (one.matrix, one.param))
    old, U, m, v = (tensor.double() for tensor in (one.basis, one.new_basis, one.exp_avg, one.exp_avg_sq))
    if moves:
        b = NUMBERS.momentum_weight * old @ m + NUMBERS.gradient_weight * a
        U = torch.linalg.qr(b @ (b.mT @ old))[0]
    one.step(moves=moves)

    if backend == "triton":  # no QR: its columns have signs of their own
        U = U * (U * one.basis).sum(-2, keepdim=True).sign()
    close(one.basis, U, 3e-6)
    U = one.basis.double()  # as it was rounded
    beta1, beta2, k = NUMBERS.beta1, NUMBERS.beta2, NUMBERS.correction
    R, p = U.mT @ old, U.mT @ a
    moved = R @ m
    second = (beta2 * R**2 @ (v - k * m**2) + beta2 * k * moved**2).abs() + (1 - beta2) * p**2
    c = beta1 / (1 - beta1)
    close(one.exp_avg, beta1 * moved + (1 - beta1) * p, 1e-6)
    # Triton rounds every product and sum, where the others contract some
    close(one.exp_avg_sq, second, 2e-6 if backend == "triton" else 1e-6)
    # of the moments as they were rounded: next to v = 0 the quotient is ill-conditioned
    d = one.exp_avg.double() / (one.exp_avg_sq.double().sqrt() + NUMBERS.damping)
    close(one.buffers.projected, d, 1e-6)
    rest = 3e-6 if backend == "triton" else 2e-6
    close(one.short_side_first(one.matrix), a + old @ (c * m) - U @ (p + c * moved), rest)
    close(one.short_side_first(one.param), NUMBERS.decay * W - NUMBERS.step_size * U @ d, 1e-6)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [(150, 597, 13), (597, 151, 16)])
def test_a_narrow_weight_is_rounded_once(size: tuple[int, int, int], dtype: torch.dtype) -> None:
    one = Problem(*size)
    one.param = one.param.to(dtype)
    W = one.short_side_first(one.param.double())
    one.step()
    exact = NUMBERS.decay * W - NUMBERS.step_size * one.basis.double() @ one.buffers.projected.double()
    # half a unit of the last place, and what float32 rounded before
    error = (one.short_side_first(one.param.double()) - exact).abs()
    assert (error <= (torch.finfo(dtype).eps / 2 + 1e-6) * exact.abs() + 1e-6).all()


@pytest.mark.parametrize("fmt", [QuantFormat(4, 64), QuantFormat(8, 64), QuantFormat(4, 48)], ids=str)
@pytest.mark.parametrize("size", [(21, 37, 3, ()), (520, 1030, 8, ()), (64, 12, 4, (3,))], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("seed", [None, 5])
def test_a_quantized_error_is_added_and_stored_to_the_bit(
    backend: str, size: tuple[int, int, int, tuple[int, ...]], fmt: QuantFormat, dtype: torch.dtype, seed: int | None
) -> None:
    skip_what_takes_long(backend, size)
    fused = Problem(*size)
    fused.param = fused.param.to(dtype)
    apart, gradient = copy.deepcopy(fused), fused.param.clone()
    one, other = (quantized(apart.matrix, fmt) for _ in range(2))
    fused.matrix = torch.full_like(fused.matrix, math.nan)
    # a wide copy of a narrow weight takes the matrix's place: what is left of that must be stored by then
    fused.step(moves=True, gradient=gradient, error=one, seed=seed, wide=lambda: fused.matrix)
    dequantize_add_(apart.matrix, other, onto=gradient)
    apart.step(moves=True)
    quantize_(other, apart.matrix, seed=seed)
    if dtype != torch.float32 and (backend == "reference" or (backend == "triton" and size[2] > 32)):
        assert not torch.equal(fused.matrix, apart.matrix)  # the wide copy is there now
        fused.matrix = apart.matrix
    assert all(torch.equal(a, b) for a, b in zip(fused.results(), apart.results(), strict=True))
    assert all(torch.equal(getattr(one, part), getattr(other, part)) for part in ("codes", "lo", "hi"))


@pytest.mark.usefixtures("backend")
def test_what_is_left_is_stored_before_its_memory_serves_the_weight() -> None:
    one = Problem(30, 40, 4)
    other = copy.deepcopy(one)
    other.step()
    one.param = one.param.bfloat16()
    kept: list[Tensor] = []
    one.step(wide=lambda: one.matrix, store=lambda: kept.append(one.matrix.clone()))
    assert torch.equal(kept[0], other.matrix)


@pytest.mark.parametrize("rank", [8, 32, 40])
@pytest.mark.parametrize("rows", [48, 640])
@pytest.mark.parametrize("backend", ["reference", "cpu"], indirect=True)
def test_one_of_a_batch_is_what_it_is_alone(backend: str, rows: int, rank: int) -> None:
    # sizes of which batches are made: ``is_aligned``
    together = Problem(rows, 160, rank, (3,))
    alone = [Problem(rows, 160, rank) for _ in range(3)]
    for i, one in enumerate(alone):
        for name, tensor in vars(together).items():
            if isinstance(tensor, Tensor):
                setattr(one, name, tensor[i].clone())
        one.step(moves=True)
    together.step(moves=True)
    for i, one in enumerate(alone):
        assert all(torch.equal(a[i], b) for a, b in zip(together.results(), one.results(), strict=True))


@pytest.mark.skipif(not INTERPRETED, reason="the interpreter's")
def test_a_gpu_leaves_large_ranks_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    from hf_lowmem_optim.kernels.subspace_adam import kernel

    monkeypatch.setattr(kernel, "_MOST_ROWS", 12)
    monkeypatch.setattr(kernel, "_moments_kernel", None)
    one, other = Problem(40, 60, 13), Problem(40, 60, 13)
    for each, backend in ((one, "triton"), (other, "reference")):
        monkeypatch.setenv(ENVIRONMENT_VARIABLE, backend)
        each.step()
    assert all(torch.equal(a, b) for a, b in zip(one.results(), other.results(), strict=True))


@pytest.mark.parametrize("backend", ["cpu"], indirect=True)
@pytest.mark.parametrize("shape", [(520, 1030), (1030, 520)])
@pytest.mark.parametrize("way", ["given", "moves", "with an error"])
def test_the_pieces_change_nothing(
    backend: str, shape: tuple[int, int], way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("numba")
    from hf_lowmem_optim.kernels.subspace_adam import cpu

    def run(pieces: int) -> list[Tensor]:
        monkeypatch.setattr(cpu, "num_pieces", lambda *_: pieces)
        one = Problem(*shape, 8)
        if way != "with an error":
            one.step(moves=way == "moves")
            return one.results()
        one.param = one.param.bfloat16()
        error = quantized(one.matrix, QuantFormat(4, 64))
        one.step(moves=True, gradient=one.param.clone(), error=error)
        return [*one.results(), error.codes, error.lo, error.hi]

    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        assert all(torch.equal(a, b) for a, b in zip(run(1), run(3), strict=True))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("backend", ["cpu"], indirect=True)
def test_integers_among_the_numbers_compile_nothing_anew(backend: str) -> None:
    pytest.importorskip("numba")
    from hf_lowmem_optim.kernels.subspace_adam import cpu

    Problem(30, 40, 4).step()
    compiled = len(cpu._step.signatures)
    Problem(30, 40, 4).step(coefficients=NUMBERS._replace(beta1=0, decay=1))
    assert len(cpu._step.signatures) == compiled


@pytest.mark.usefixtures("backend")
def test_without_a_place_for_the_rest_the_gradient_is_only_read() -> None:
    one = Problem(30, 40, 4)
    before = one.matrix.clone()
    one.step(moves=True, store=None)
    assert torch.equal(one.matrix, before)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("rank", [6, 20])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_is_carried_on_and_nowhere_else(value: float, rank: int) -> None:
    one = Problem(50, 100, rank)
    one.matrix[3, 7] = value
    one.step()
    rest = torch.arange(100) != 7
    for tensor in (one.exp_avg, one.exp_avg_sq, one.buffers.projected, one.matrix, one.param):
        assert not tensor[:, 7].isfinite().all()
        assert tensor[:, rest].isfinite().all()


def test_wrong_tensors_are_refused() -> None:
    one = Problem(3, 4, 2)
    buffers = one.buffers
    wrong = {
        "basis must have 6 entries, got 9": {"basis": torch.zeros(3, 3)},
        "new_basis must have 6 entries, got 4": {"new_basis": torch.zeros(2, 2)},
        "exp_avg_sq must have 8 entries": {"exp_avg_sq": torch.zeros(2, 5)},
        "at most 3 rows, of 4 entries": {"exp_avg": torch.zeros(4, 4)},
        "rows, of 4 entries; got": {"exp_avg": torch.zeros(2, 2, 2)},
        "param must have 12 entries, got 9": {"param": torch.zeros(3, 3)},
        "matrix must be one of torch.float32; got torch.float16": {"matrix": one.matrix.half()},
        "bases must have 12 entries, got 6": {"buffers": buffers._replace(bases=torch.zeros(2, 3))},
        "right must be one of torch.float32; got torch.bfloat16": {
            "buffers": buffers._replace(right=torch.zeros(4, 4).bfloat16())
        },
        "projected must be contiguous": {"buffers": buffers._replace(projected=torch.zeros(4, 2).mT)},
        "pass gradient": {"error": object()},
        "no other way to store": {"error": object(), "gradient": one.matrix, "store": _nowhere},
    }
    for message, changes in wrong.items():
        with pytest.raises(ValueError, match=message):
            one.step(**changes)
