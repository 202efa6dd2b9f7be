"""The emulator of compiled kernels: what it runs agrees with torch, and it tells the faults that it is there for.

Kernels are compiled or interpreted, for good, when triton is imported: whatever launches some does it in a process of
its own, this file with ``EMULATE`` set. That also runs the tests of other operations that are named here.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from fractions import Fraction
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.kernel_report import RECORD
from hf_lowmem_optim.spec import QuantFormat
from tests.ops.backends import EMULATED, Use, normal, python
from tests.ops.test_block_quant import round_trip

triton = pytest.importorskip("triton")
pytest.importorskip("numpy", minversion="2")  # in which Python's numbers do not widen an array
import triton.language as tl  # noqa: E402 (only where it is installed)
from triton.runtime.jit import JITFunction  # noqa: E402 (likewise)

from tests.ops.emulator import values  # noqa: E402 (needs numpy 2)

emulated = pytest.mark.skipif(not EMULATED, reason="in a process of its own, by the first test")
Edit = Callable[[Callable[[str], str]], None]

TOPK = "test_block_topk.py::test_common_blocks_agree_bit_for_bit[few ties-4bit-triton]"
WINDOW = "test_sparse_window.py::test_awkward_numbers[param_dtype0-values_dtype0-triton]"
LDADAM = "test_ldadam_step.py::test_less_precise_products_cost_what_the_rule_says[bf16-4bit-0.1]"


@pytest.mark.skipif(EMULATED, reason="runs the others")
@pytest.mark.parametrize(("how", "tests"), [("sm80", (TOPK,)), ("sm90,descending", (WINDOW, LDADAM))])
def test_kernels_agree_as_compiled(how: str, tests: tuple[str, ...]) -> None:
    recorded = json.loads(RECORD.read_text())["triton"]
    if recorded != triton.__version__:
        pytest.skip(f"the emulator knows the PTX of Triton {recorded}")
    paths = [f"tests/ops/{name}" for name in ("test_emulator.py", *tests)]
    run = python("-m", "pytest", "-p", "no:cacheprovider", *paths, EMULATE=how, TRITON_INTERPRET=None)
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]


@JITFunction  # triton.jit makes an interpreted one of it
def reverse_kernel(x_ptr, scratch_ptr, y_ptr, BARRIER: tl.constexpr):
    lane = tl.arange(0, 256)
    tl.store(scratch_ptr + lane, tl.load(x_ptr + lane))
    if BARRIER:
        tl.debug_barrier()
    tl.store(y_ptr + lane, tl.load(scratch_ptr + 255 - lane))


@JITFunction  # triton.jit makes an interpreted one of it
def cumulate_kernel(x_ptr, y_ptr):
    lane = tl.arange(0, 256)
    tl.store(y_ptr + lane, tl.cumsum(tl.load(x_ptr + lane), 0))


@JITFunction  # triton.jit makes an interpreted one of it
def copy_kernel(x_ptr, y_ptr, start, stop, ALIGNED: tl.constexpr, SHARE: tl.constexpr):
    lane = tl.arange(0, 256)
    entry = tl.max_contiguous(tl.multiple_of(start + lane, ALIGNED), ALIGNED)
    x = tl.load(x_ptr + entry, mask=lane // 8 < stop)
    tl.store(y_ptr + lane // SHARE, x)


@JITFunction  # triton.jit makes an interpreted one of it
def neighbour_kernel(x_ptr, y_ptr, STEP: tl.constexpr):
    program = tl.program_id(0)
    tl.store(x_ptr + program, program)
    tl.debug_barrier()
    tl.store(y_ptr + program, tl.load(x_ptr + (program ^ STEP)))


@JITFunction  # triton.jit makes an interpreted one of it
def product_kernel(x_ptr, y_ptr, z_ptr, DEPTH: tl.constexpr):
    row, column, depth = tl.arange(0, 64)[:, None], tl.arange(0, 32)[None, :], tl.arange(0, 32)
    total = tl.zeros([64, 32], tl.float32)
    for first in range(0, DEPTH, 32):
        x = tl.load(x_ptr + row * DEPTH + first + depth[None, :])
        y = tl.load(y_ptr + (first + depth[:, None]) * 32 + column)
        total = tl.dot(x, y, total)
    tl.store(z_ptr + row * 32 + column, total)


def numbers(count: int = 256) -> torch.Tensor:
    return torch.arange(1, count + 1, dtype=torch.float32)


@pytest.fixture
def edit(monkeypatch: pytest.MonkeyPatch) -> Edit:
    """Have the PTX changed that kernels are compiled to."""
    from tests.ops.emulator import launch

    def change(how: Callable[[str], str]) -> None:
        stock = launch.compile_kernel

        def compile_and_change(*given: Any) -> Any:
            compiled = stock(*given)
            changed = how(compiled.asm["ptx"])
            assert changed != compiled.asm["ptx"]
            return SimpleNamespace(asm={"ptx": changed}, metadata=compiled.metadata, src=compiled.src)

        monkeypatch.setattr(launch, "compile_kernel", compile_and_change)
        monkeypatch.setattr(launch, "_compiled", {})

    return change


def cumulated() -> torch.Tensor:
    y = torch.empty(256)
    cumulate_kernel[(1,)](numbers(), y)
    return y


@emulated
def test_a_kernel_without_fault_passes() -> None:
    x, y = numbers(), torch.empty(256)
    reverse_kernel[(1,)](x, torch.empty(256), y, BARRIER=True)
    assert torch.equal(y, x.flip(0))
    assert torch.equal(cumulated(), x.cumsum(0))
    copy_kernel[(1,)](x[:248], y, 8, 30, ALIGNED=8, SHARE=1)
    assert torch.equal(y[:240], x[8:248])
    neighbour_kernel[(300,)](torch.empty(300), y := torch.empty(300), STEP=0)
    assert torch.equal(y, torch.arange(300.0))


def multiplied(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    z = torch.empty(64, 32)
    product_kernel[(1,)](x, y, z, DEPTH=128)
    return z


@emulated
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tensor_cores_multiply_in_a_pipeline(dtype: torch.dtype, edit: Edit) -> None:
    """Integers, whose products and sums are exact: mma or wgmma, in TF32 or bfloat16. Nothing is there too early."""
    x, y = normal(64, 128).mul(8).round(), normal(128, 32, seed=1).mul(8).round()
    assert torch.equal(multiplied(x.to(dtype), y.to(dtype)), x @ y)
    edit(lambda ptx: ptx.replace("cp.async.wait_group", "// "))
    assert multiplied(x.to(dtype), y.to(dtype)).isnan().any()


@emulated
def test_codes_are_those_of_torch(use: Use) -> None:
    codes, values = [], []
    for backend in ("reference", "triton"):
        use(backend)
        quantized, restored = round_trip(normal(1000), QuantFormat(4, 64), seed=5)
        codes.append(quantized.codes)
        values.append(restored)
    assert torch.equal(*codes) and torch.equal(*values)


@emulated
def test_races_are_told() -> None:
    x, y = numbers(), torch.empty(256)
    conflict = "(reads global memory that another warp writes|writes global memory that another warp reads): "
    places = r"PTX line \d+ `.*` \(test_emulator.py:\d+:\d+\) against PTX line \d+ `"
    with pytest.raises(AssertionError, match=r"reverse_kernel: thread \d+ of CTA 0 " + conflict + places):
        reverse_kernel[(1,)](x, torch.empty(256), y, BARRIER=False)
    with pytest.raises(AssertionError, match="neighbour_kernel: .*" + conflict + places):
        neighbour_kernel[(2,)](x, y, STEP=1)


@emulated
def test_accesses_that_are_none_are_told() -> None:
    with pytest.raises(AssertionError, match="accesses 4 bytes of global memory outside the tensors"):
        copy_kernel[(1,)](numbers(202), torch.empty(256), 3, 25, ALIGNED=1, SHARE=1)
    with pytest.raises(AssertionError, match=r"accesses 8 bytes of global memory at a misaligned address.*v2"):
        copy_kernel[(1,)](numbers(), torch.empty(256), 3, 25, ALIGNED=8, SHARE=1)
    with pytest.raises(AssertionError, match="stores to global memory where another lane stores a different value"):
        copy_kernel[(1,)](numbers(), torch.empty(256), 0, 32, ALIGNED=1, SHARE=8)


@emulated
@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (lambda ptx: ptx.replace("bar.sync", "// "), "(reads|writes) shared memory that another warp (reads|writes)"),
        (
            lambda ptx: ptx.replace("bar.sync", "setp.lt.u32 %p99, %tid.x, 32; @%p99 ret; bar.sync", 1),
            "threads of CTA 0 wait at",
        ),
        (lambda ptx: ptx.replace("global_smem;", "2147483647;"), "shared memory"),
        (lambda ptx: ptx.replace("add.f32", "add.rz.f32"), "PTX line .* `add.rz.f32.*modifiers"),
        (
            lambda ptx: ptx.replace("shfl.", "setp.lt.u32 %p99, %tid.x, 16; @!%p99 shfl.", 1),
            "gets a value from a lane that does not take part",
        ),
    ],
)
def test_faults_in_shared_memory_are_told(edit: Edit, change: Callable[[str], str], fault: str) -> None:
    edit(change)
    with pytest.raises((AssertionError, NotImplementedError), match=fault):
        cumulated()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_fused_operations_round_once(dtype: type[np.floating[Any]]) -> None:
    """Also what cancels, where the exact product decides between neighbours, and where it is subnormal."""
    random, half, tiny = np.random.default_rng(0), np.finfo(dtype).epsneg, np.finfo(dtype).smallest_subnormal
    x, y = (random.standard_normal(300) * 2.0 ** random.integers(-30, 30, 300) for _ in range(2))
    z = np.where(random.random(300) < 0.5, -x * y, random.standard_normal(300))
    x = np.r_[x, 1 + 2 * half, 1, 1, 1 - half, tiny, 0.5, 1.5, 0, 1].astype(dtype)
    y = np.r_[y, 1 - half, half, half * (1 + 4 * half), half, tiny, tiny, tiny, 5, 1].astype(dtype)
    z = np.r_[z, 1, 1 + 2 * half, 1, 1, 1, tiny, 0, tiny, -1].astype(dtype)
    fused = values.fused32 if dtype == np.float32 else values.fused64
    with np.errstate(all="ignore"):
        got = fused(x, y, z)
        for factors in zip(x, y, z, got, strict=True):
            a, b, c, result = (Fraction(float(each)) for each in factors)
            for neighbour in (np.nextafter(factors[3], dtype(end)) for end in (-np.inf, np.inf)):
                nearer = abs(Fraction(float(neighbour)) - a * b - c) - abs(result - a * b - c)
                is_even = factors[3].view(f"u{factors[3].itemsize}") % 2 == 0
                assert nearer > 0 or (nearer == 0 and is_even), factors
    infinite = np.array([np.inf, 2.0, -0.0], dtype), np.array([0.0, np.finfo(dtype).max, 1], dtype), np.zeros(3, dtype)
    with np.errstate(all="ignore"):
        special = fused(infinite[0], infinite[1], -infinite[2])
    assert np.isnan(special[0]) and np.isinf(special[1]) and np.signbit(special[2])


def test_functions_that_numpy_has_not() -> None:
    """Examples worked out by hand from the definitions of prmt, bfe, min, cvt and div."""
    word = lambda *given: [np.array([each], np.uint32) for each in given]  # noqa: E731 (an abbreviation)
    assert values.permuted(*word(0x33221100, 0x77665544, 0x7650)) == 0x77665500
    assert values.permuted(*word(0x7F80, 0, 0x9108)) == 0x007F80FF
    for a, start, length, unsigned, signed in [
        (0xABCD1234, 8, 12, 0xD12, 0xD12 - 0x1000),
        (0x80000000, 28, 8, 8, -8),
        (0x80000000, 40, 8, 0, -1),
        (0xFFFFFFFF, 4, 0, 0, 0),
        (0x87654321, 0, 32, 0x87654321, 0x87654321 - (1 << 32)),
    ]:
        assert values.extracted(*word(a, start, length)) == unsigned
        bits, *field = word(a, start, length)
        assert values.extracted(bits.view(np.int32), *field) == signed
    zero, nan, one = (np.array([each], np.float32) for each in (0.0, np.nan, 1.0))
    for x, y in [(zero, -zero), (-zero, zero)]:
        assert np.signbit(values.lesser(x, y)) and not np.signbit(values.greater(x, y))
    assert values.lesser(nan, one) == 1 == values.greater(one, nan)
    assert np.isnan(values.nan_of_either(values.lesser)(nan, one))
    floats = np.array([np.nan, 3e9, -3e9, -1.5], np.float32)
    assert values.to_integer(np.int32, np.trunc)(floats).tolist() == [0, 2**31 - 1, -(2**31), -1]
    halves = np.array([1 + 2.0**-11, -1 - 2.0**-11, np.inf], np.float32)
    assert values.to_tf32(halves).view(np.float32).tolist() == [1 + 2.0**-10, -1 - 2.0**-10, np.inf]
    halves = np.array([1 + 2.0**-8, 1 + 3 * 2.0**-8, -(2.0**-134), 3.4e38], np.float32)
    rounded = [1.0, 1 + 2.0**-6, -0.0, np.inf]
    assert values.from_bf16(values.to_bf16(halves)).tolist() == rounded
    assert values.quotient(np.array([-7, 7, -8]), np.array([2, -2, -3])).tolist() == [-3, -3, 2]
    factors = np.array([-(2**62), 3]), np.array([-6, -7])
    assert values.high_product(*factors).tolist() == [1, -1]
    assert values.high_product(*(each.astype(np.uint64) for each in factors)).tolist() == [2**64 - 2**62 - 6 + 1, 2]
