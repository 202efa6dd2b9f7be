"""Error-feedback Top-K: the backends against each other bit for bit, and all of them against what it promises."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from hf_lowmem_optim.ops.block_quant import Quantized, dequantize_
from hf_lowmem_optim.ops.block_topk import foreach_block_topk_, num_kept, window_specs
from hf_lowmem_optim.ops.dispatch import ENVIRONMENT_VARIABLE
from hf_lowmem_optim.ops.window import MAX_BLOCK_SIZE, MAX_FUSED_BLOCK, ValueDtype, kept_per_block, windows_of
from hf_lowmem_optim.spec import QuantFormat
from tests.ops.backends import BF16, DEVICE, FAST, FP16, FP32, QUIET, Use, block_topk_, new_error, parts, same
from tests.ops.test_block_quant import AWKWARD
from tests.reference import block_topk as paper

pytestmark = QUIET


@dataclass(frozen=True)
class Case:
    """How the selection is made and where the error is kept."""

    block_size: int
    density: float
    error: QuantFormat | torch.dtype | None
    values: torch.dtype = BF16
    error_scale: float = 1.0
    seed: int | None = None

    def new_error(self, numel: int, device: str = "cpu") -> Quantized | Tensor | None:
        return new_error(numel, self.error, device)

    def select(self, grad: Tensor, error: Quantized | Tensor | None) -> tuple[Tensor, Tensor]:
        """One call, on poisoned outputs."""
        kept = num_kept(grad.numel(), self.block_size, self.density)
        indices = torch.full((kept,), -7, dtype=torch.int16, device=grad.device)
        values = torch.full((kept,), torch.nan, dtype=self.values, device=grad.device)
        options = {"error_scale": self.error_scale, "seed": self.seed}
        block_topk_(indices, values, grad, error, block_size=self.block_size, density=self.density, **options)
        return indices, values


CASES = [
    Case(64, 0.05, QuantFormat()),
    Case(128, 0.3, QuantFormat(8, 16, FP32), FP32, error_scale=0.75, seed=5),
    Case(192, 0.02, QuantFormat(4, 64, FP32)),
    Case(96, 1.0, QuantFormat(4, 32), seed=1),
    Case(256, 0.1, FP32),
    Case(100, 0.01, BF16, FP32, error_scale=0.5),
    Case(48, 0.2, None),
]


def position(indices: Tensor, case: Case) -> Tensor:
    """Indices relative to the whole tensor."""
    k = kept_per_block(case.block_size, case.density)
    return indices.long() + torch.arange(len(indices), device=indices.device) // k * case.block_size


def scatter(indices: Tensor, values: Tensor, numel: int, case: Case) -> Tensor:
    out = torch.zeros(numel, dtype=torch.float64)
    out[position(indices, case)] = values.double()
    return out


GRADIENTS = AWKWARD | {
    "all tied": torch.full((300,), -0.25),
    "tied magnitudes": torch.tensor([1.0, -1.0, 0.5, -0.5, 0.0] * 50),
    # every NaN is tied with every other one, whatever its bits
    "nan payloads": (torch.arange(120, dtype=torch.int32) * 1001 + 0x7FC00000).view(FP32),
    "ties of the last bit": AWKWARD["last bit"].repeat(2) * torch.tensor([1.0, -1.0]).repeat(128),
}


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("name", GRADIENTS)
def test_backends_agree_bit_for_bit(name: str, backend: str, use: Use) -> None:
    first = GRADIENTS[name][:170]
    grads = [first, first.flip(0) * 0.125]
    for number, case in enumerate(CASES):
        dtype = (FP32, BF16, FP16)[number % 3] if name in ("odd", "ragged", "tied magnitudes") else FP32
        results = []
        for which in ("reference", backend):
            on = use(which)
            error = case.new_error(len(first), on)
            results.append([t for g in grads for t in case.select(g.to(on, dtype), error)] + parts(error))
        for i, (expected, got) in enumerate(zip(*results, strict=True)):
            assert same(got, expected), f"tensor {i} of {case} from {dtype}"


@pytest.mark.parametrize("backend", FAST)
def test_largest_block_and_default_block(backend: str, use: Use) -> None:
    grad = torch.randn(20_000, generator=torch.Generator().manual_seed(3)).round(decimals=1)  # many ties
    largest = MAX_FUSED_BLOCK if backend == "triton" else MAX_BLOCK_SIZE
    for case in (Case(largest, 0.01, QuantFormat()), Case(largest, 1.0, FP32), Case(4096, 0.01, QuantFormat())):
        devices = (use(which) for which in ("reference", backend))
        results = [case.select(grad.to(on), case.new_error(len(grad), on)) for on in devices]
        assert all(map(same, *results)), case


def common(kind: str, numel: int, generator: torch.Generator) -> Tensor:
    """Gradients for blocks of 4096 at 1 %, which a GPU does by candidates, or leaves to its general kernel."""
    x, place = torch.randn(numel, generator=generator), torch.arange(numel)
    chosen = torch.rand(numel, generator=generator)
    return {
        "normal": x,
        "many magnitudes": x * torch.exp(2 * torch.randn(numel, generator=generator)),
        "zero": torch.zeros(numel),
        "minus zero": -torch.zeros(numel),
        "constant": torch.full((numel,), -0.25),
        "many ties": (x * 2).round() / 2,
        "few ties": (x * 64).round() / 64,
        "largest together": torch.where(place % 4096 < 70, 2 + place % 71 / 71, x * 1e-3),
        "fewer than k": torch.where(chosen < 0.003, x, 0.0),
        "mostly zero": torch.where(chosen < 0.03, x, 0.0),
        "rows of zeros": torch.where(place // 4096 % 2 == 0, x, 0.0),
        "small": x * 1e-22,
        "tiny": x * 1e-33,
        "subnormal": x * 1e-39,
        "large": x * 1e26,
        "huge": x * 3e37,
        "rising": place - numel / 2,
        "one": torch.where(place % 4096 == 2048, -1.0, 0.0),
        "half-ways": ((x.bfloat16().view(torch.int16).int() << 16) | 0x8000).view(FP32),
        "not finite": x.masked_fill(place % 1501 == 7, torch.nan).masked_fill(place % 997 == 5, -torch.inf),
    }[kind]


#: Of full blocks at the first step: whether the general kernel does them.
COMMON = dict.fromkeys(
    ["normal", "many magnitudes", "zero", "minus zero", "few ties", "mostly zero", "half-ways"], False
)
COMMON |= dict.fromkeys(["rows of zeros", "small"], False)
COMMON |= dict.fromkeys(["constant", "many ties", "largest together", "fewer than k", "tiny", "subnormal"], True)
COMMON |= dict.fromkeys(["large", "huge", "rising", "one", "not finite"], True)


#: Those that are also kept as codes.
CODED = {
    "normal": "4bit",
    "many magnitudes": "8bit",
    "few ties": "4bit",
    "rows of zeros": "4bit",
    "fewer than k": "8bit",
}


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize(("kind", "stored"), [*((kind, "bf16") for kind in COMMON), *CODED.items()])
def test_common_blocks_agree_bit_for_bit(
    kind: str, stored: ValueDtype, backend: str, use: Use, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several tensors in a call: full and short blocks, sizes and addresses that vectors cannot serve."""
    number, flags = list(COMMON).index(kind), []
    bits, dtype = (4, 8)[number % 2], FP16 if "many" in kind else (BF16, FP32)[number // 2 % 2]
    real = torch.empty

    def noted(*args: Any, **kwargs: Any) -> Tensor:
        flags.append(real(*args, **kwargs).fill_(7))
        return flags[-1]

    results = []
    for which in ("reference", backend):
        on, generator = use(which), torch.Generator().manual_seed(number)
        sizes, tensors = (2 * 4096, 4096 + 112, 4096 + 5, 4096), []
        for numel in sizes:
            specs = window_specs(numel, window=3, density=0.01, block_size=4096, value_dtype=stored)
            window = {key: [spec.allocate(on) - 7] for key, spec in specs.items()}
            tensors.append((windows_of(window, [numel], 4096, 0.01)[0], new_error(numel, QuantFormat(bits), on)))
        found = []
        for step in range(2):
            grads = [common(kind, numel + 1, generator).to(on, dtype) for numel in sizes]
            # the last begins at an odd address
            grads = [*(g[:n] for g, n in zip(grads[:-1], sizes, strict=False)), grads[-1][1:]]
            with monkeypatch.context() as patch:
                patch.setattr(torch, "empty", noted)
                foreach_block_topk_(grads, *zip(*tensors, strict=True), row=step, density=0.01)
            for rows, e in tensors:
                written = rows.indices, rows.values, *(rows.grids or ()), *parts(e)
                found += [t.clone() for t in written if t is not None]
        results.append(found)
    for index, (expected, got) in enumerate(zip(*results, strict=True)):
        assert same(got, expected), f"part {index} of {len(results[0])}"
    if backend == "triton":
        flagged = next(flag.tolist() for flag in flags if flag.dtype == torch.int32)
        assert flagged == [COMMON[kind], COMMON[kind], COMMON[kind], True]


grids = st.tuples(st.integers(1, 400), st.sampled_from([1, 7, 64, 100]), st.floats(0.01, 1.0), st.integers(0, 2**31))


@given(grids)
def test_agrees_with_the_transcription_and_loses_nothing(spec):
    """Small integers: many ties, and exact in every dtype. A dense error keeps all that was not selected."""
    numel, block_size, density, seed = spec
    case = Case(block_size, density, FP32)
    generator = torch.Generator().manual_seed(seed)
    error, expected_error = case.new_error(numel), np.zeros(numel)
    for _ in range(4):
        grad = torch.randint(-6, 7, (numel,), generator=generator).float()
        before = grad.clone()
        indices, values = case.select(grad, error)
        expected = paper.step(expected_error + grad.double().numpy(), block_size, density)
        expected_error = expected[2]
        for got, want in zip((indices, values, error), expected, strict=True):
            np.testing.assert_array_equal(got.double().numpy(), want)
        assert torch.equal(grad, before), "the gradient is left intact"


@given(grids, st.sampled_from([BF16, FP32]), st.sampled_from([BF16, FP32, FP16]), st.sampled_from([1.0, 0.25]))
def test_kept_and_rest_are_the_input_and_the_rest_contracts(spec, value_dtype, grad_dtype, error_scale):
    """Of the error a part goes in: what MicroAdam's alpha added to the update is not fed back again."""
    numel, block_size, density, seed = spec
    case = Case(block_size, density, FP32, value_dtype, error_scale)
    generator = torch.Generator().manual_seed(seed)
    error = torch.randn(numel, generator=generator)
    grad = torch.randn(numel, generator=generator).to(grad_dtype)
    a = grad.float() + error_scale * error
    indices, values = case.select(grad, error)
    # the values' rounding residual is in the error: the sum is exact
    assert torch.equal(scatter(indices, values, numel, case) + error.double(), a.double())
    rest = a.double().clone()
    rest[position(indices, case)] = 0.0
    for block, left in zip(a.double().split(block_size), rest.split(block_size), strict=True):
        k = kept_per_block(len(block), density)
        assert left.square().sum() <= (1 - k / len(block)) * block.square().sum() * (1 + 1e-12)
        assert int((left != 0).sum()) <= len(block) - k


def test_a_quantized_error_is_within_half_a_step_of_the_rest():
    case = Case(128, 0.05, QuantFormat(4, 64))
    grad = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    error = case.new_error(1000)
    for _ in range(5):
        old, new = torch.empty(1000), torch.full((1000,), torch.nan)
        dequantize_(old, error)
        indices, values = case.select(grad, error)
        dequantize_(new, error)
        u = ((error.hi.double() - error.lo.double()) / 15).repeat_interleave(64)[:1000]
        lost = (grad + old).double() - scatter(indices, values, 1000, case) - new.double()
        assert torch.all(lost.abs() <= u / 2 + 1e-6)


def test_what_is_not_finite_is_selected_first_and_does_not_stay_in_the_error():
    for error_format in (QuantFormat(), FP32):
        case = Case(64, 0.05, error_format)  # 4 of 64
        grad = torch.ones(128)
        grad[3], grad[9], grad[50], grad[100] = torch.nan, torch.inf, -torch.inf, 3.4e38  # the last: Inf as bfloat16
        error = case.new_error(128)
        indices, values = case.select(grad, error)
        assert indices[:4].tolist() == [0, 3, 9, 50] and indices[4:].tolist() == [0, 1, 2, 36]
        assert values[1].isnan() and values[2] == torch.inf and values[3] == -torch.inf and values[7] == torch.inf
        kept = torch.full((128,), torch.nan) if isinstance(error, Quantized) else error
        if isinstance(error, Quantized):
            dequantize_(kept, error)
        assert kept.isfinite().all()
    # more than can be selected: the others stay visible in the error
    error = Case(64, 0.05, FP32).new_error(64)
    Case(64, 0.05, FP32).select(torch.full((64,), torch.nan), error)
    assert torch.equal(error.isnan(), torch.arange(64) >= 4)


def test_counts_and_window_rows():
    assert kept_per_block(4096, 0.01) == 41 and kept_per_block(100, 0.07) == 7 and kept_per_block(1, 0.001) == 1
    assert num_kept(10_000, 4096, 0.01) == 41 + 41 + 19 and num_kept(0, 64, 0.1) == 0 and num_kept(64, 64, 1.0) == 64
    specs = window_specs(10_000, window=3, density=0.01, block_size=4096, value_dtype="fp32")
    assert specs["indices"].shape == specs["values"].shape == (3, 41 + 41 + 19)
    assert specs["indices"].dtype == torch.int16 and specs["values"].dtype == FP32
    with pytest.raises(ValueError, match="window must be at least 1"):
        window_specs(10, window=0, density=0.1, block_size=4)


@pytest.mark.parametrize(
    ("says", "changed"),
    [
        (r"block_size must be in \[1, 32768\]", {"block_size": 65536}),
        (r"density must be in \(0, 1\]", {"density": 0.0}),
        ("128 entries in blocks of 64 with 8 kept per block cannot give rows of 8", {"density": 0.12}),
        ("indices must be int16, got torch.int32", {"indices": torch.zeros(8).int()}),
        ("grad must be contiguous", {"grad": torch.zeros(64, 4)[:, :2]}),
        ("multiple of the error's quantization block size", {"error": new_error(128, QuantFormat(4, 48))}),
        ("error has 100 entries", {"error": new_error(100, QuantFormat())}),
    ],
)
def test_wrong_arguments_say_what_is_wrong(says, changed):
    right = {"indices": torch.zeros(8, dtype=torch.int16), "values": torch.zeros(8), "grad": torch.zeros(128)}
    right |= {"error": torch.zeros(128), "block_size": 64, "density": 0.05}
    block_topk_(**right)
    with pytest.raises((TypeError, ValueError), match=says):
        block_topk_(**right | changed)


def test_what_triton_cannot_serve_is_refused_if_it_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("hf_lowmem_optim.ops.triton.block_topk", exc_type=ImportError)
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # so that nothing else speaks against tensors on the CPU
    grad = torch.ones(16384, device=DEVICE)
    with pytest.raises(ValueError, match="a block of 16384 entries does not fit on a GPU"):
        Case(16384, 1e-4, None).select(grad, None)
    case = Case(48, 0.1, QuantFormat(4, 48))
    with pytest.raises(ValueError, match="quantization block size 48 is not a power of two"):
        case.select(grad, case.new_error(16384, DEVICE))
    monkeypatch.delenv(ENVIRONMENT_VARIABLE)
    assert Case(16384, 1e-4, None).select(grad, None)[0].tolist() == [0, 1]
