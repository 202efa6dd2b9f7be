"""The repaired interpreter: each repair does what a GPU does, and catches what it is meant to catch."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.ops.backends import EMULATED, INTERPRETED, python

if EMULATED or not INTERPRETED:
    pytest.skip("tests of the interpreter", allow_module_level=True)

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402
from triton.runtime.errors import InterpreterError  # noqa: E402

HALFWAY_TO_EVEN_BOTH_WAYS, JUST_OFF = [1.00390625, 1.01171875], [1.0039063, 1.0117186]
BFLOAT16_SUBNORMALS, SMALLEST, OVERFLOWING = [1e-39, -3e-40, 9.2e-41], [1.4e-45], [3.4e38]
SPECIAL = [float("inf"), float("-inf"), float("nan")]
ROUNDED = [*HALFWAY_TO_EVEN_BOTH_WAYS, *JUST_OFF, 1 / 3, -7.77]
AWKWARD = torch.tensor([*ROUNDED, *BFLOAT16_SUBNORMALS, *SMALLEST, *OVERFLOWING, *SPECIAL, 0.0, -0.0])


@triton.jit
def _cast_kernel(x_ptr, narrow_ptr, wide_ptr, N: tl.constexpr):
    at = tl.arange(0, N)
    narrow = tl.load(x_ptr + at).to(tl.bfloat16)
    tl.store(narrow_ptr + at, narrow)
    tl.store(wide_ptr + at, narrow.to(tl.float32))


def test_bfloat16_casts_round_to_nearest_even_and_keep_subnormals():
    narrow, wide = torch.full((16,), 7.0, dtype=torch.bfloat16), torch.full((16,), 7.0)
    _cast_kernel[(1,)](AWKWARD, narrow, wide, N=16)
    torch.testing.assert_close(narrow, AWKWARD.bfloat16(), rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(wide, AWKWARD.bfloat16().float(), rtol=0, atol=0, equal_nan=True)


@triton.jit
def _pair_sum(key1, sum1, key2, sum2):
    return key2, tl.where(key1 == key2, sum1 + sum2, sum2)


@triton.jit
def _largest_magnitude(a, b):
    return tl.where(tl.abs(a) >= tl.abs(b), a, b)


@triton.jit
def _scan_sort_kernel(key_ptr, x_ptr, sums_ptr, largest_ptr, N: tl.constexpr):
    at = tl.arange(0, N)
    key, x = tl.load(key_ptr + at), tl.load(x_ptr + at)
    order = tl.sort(key)
    _, sums = tl.associative_scan((order, x), 0, _pair_sum)
    tl.store(key_ptr + at, order)
    tl.store(sums_ptr + at, sums)
    tl.store(largest_ptr, tl.reduce(x, 0, _largest_magnitude))


def test_custom_scan_sort_and_reduce():
    rng = np.random.default_rng(0)
    key = torch.from_numpy(rng.integers(0, 20, 256).astype(np.int32))
    x = torch.from_numpy(rng.integers(-9, 10, 256).astype(np.float32))
    x[77] = -50.0
    given, sums, largest = key.clone(), torch.full((256,), torch.nan), torch.full((1,), torch.nan)
    _scan_sort_kernel[(1,)](given, x, sums, largest, N=256)
    order = key.sort().values
    assert torch.equal(given, order)
    expected, running = [], 0.0
    for i in range(256):
        running = x[i].item() + (running if i and order[i] == order[i - 1] else 0.0)
        expected.append(running)
    assert torch.equal(sums, torch.tensor(expected))
    assert largest.item() == -50.0


@triton.jit
def _copy_kernel(x_ptr, y_ptr, stride, read_shift, n, N: tl.constexpr):
    at = tl.program_id(0) * stride + tl.arange(0, N)
    tl.store(y_ptr + at, tl.load(x_ptr + at + read_shift), mask=at < n)


@triton.jit
def _collide_kernel(y_ptr, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(y_ptr + at // 2, at)


def test_races_and_out_of_bounds_raise():
    x, y = torch.zeros(16), torch.zeros(16)
    _copy_kernel[(2,)](x, y, 8, 0, 16, N=8)  # a correct launch passes
    with pytest.raises(InterpreterError, match="two programs store to one address"):
        _copy_kernel[(2,)](x, y, 4, 0, 16, N=8)
    with pytest.raises(InterpreterError, match="writes an address more than once"):
        _collide_kernel[(1,)](torch.zeros(16, dtype=torch.int32), N=16)
    with pytest.raises(InterpreterError, match="another one"):
        _copy_kernel[(2,)](x, x[4:], 4, 0, 8, N=4)  # program 0 stores what program 1 loads
    with pytest.raises(InterpreterError, match="load out of bounds: 1 of 8 lanes"):
        _copy_kernel[(2,)](x, y, 8, 1, 16, N=8)
    with pytest.raises(InterpreterError, match="store out of bounds"):
        _copy_kernel[(2,)](x, y[:12], 8, 0, 16, N=8)
    with pytest.raises(InterpreterError, match="store out of bounds"):  # of the view
        _copy_kernel[(1,)](x, torch.zeros(2, 8)[0], 8, 0, 16, N=16)


@triton.jit
def _part_kernel(x_ptr, at, SECOND: tl.constexpr):
    if tl.program_id(0) == 0:
        tl.store(x_ptr + 2 * tl.arange(0, 2), 1.0)
    elif SECOND == "int8":
        tl.store(x_ptr.to(tl.pointer_type(tl.int8)) + at, 1)
    else:
        tl.store(x_ptr.to(tl.pointer_type(tl.int64)) + at, 1)


def test_accesses_of_several_sizes_meet_in_their_bytes():
    for kind, free, taken in (("int8", (4, 7, 12), (0, 3, 8, 11)), ("int64", (2,), (0, 1))):
        for at in free:
            _part_kernel[(2,)](torch.zeros(6), at, SECOND=kind)
        for at in taken:
            with pytest.raises(InterpreterError, match="two programs store to one address"):
                _part_kernel[(2,)](torch.zeros(6), at, SECOND=kind)


@triton.jit
def _copy_by_table_kernel(x_ptr, table_ptr, n, N: tl.constexpr):
    at = tl.arange(0, N)
    y_ptr = tl.load(table_ptr + tl.program_id(0)).to(tl.pointer_type(tl.float32))
    tl.store(y_ptr + at, tl.load(x_ptr + at), mask=at < n)


def test_tensors_behind_a_table_of_addresses_are_guarded_too():
    x, buffer = torch.arange(8.0), torch.zeros(3, 8)

    def copy(*out: torch.Tensor, n: int = 8) -> None:
        table = torch.tensor([t.data_ptr() for t in out])
        _copy_by_table_kernel[(len(out),)](x, table, n, N=8)

    copy(buffer[2], buffer[0])
    assert torch.equal(buffer, torch.stack([x, torch.zeros(8), x]))
    with pytest.raises(InterpreterError, match="two programs store to one address"):
        copy(buffer[0], buffer[0])
    copy(buffer[0], buffer[1, :4], n=4)
    with pytest.raises(InterpreterError, match="store out of bounds: 3 of 8 lanes"):
        copy(buffer[1, :5])
    with pytest.raises(InterpreterError, match="out of bounds"):
        _copy_by_table_kernel[(1,)](x, torch.tensor([12345 * 16]), 8, N=8)


def test_enable_refuses_a_triton_that_was_imported_without_the_variable():
    code = (
        "import os, triton\nos.environ['TRITON_INTERPRET'] = '1'\n"
        "from tests.ops import interpreter\ninterpreter.enable()"
    )
    run = python("-c", code, TRITON_INTERPRET=None)
    assert run.returncode != 0 and "before TRITON_INTERPRET=1 was set" in run.stderr
