"""Values of a window in Triton, bit for bit the torch version: see ``ops/window.py``.

A kernel is told their storage by a type VALUES: that of floats, uint8 for codes of 8 bits, and int16 for codes of 4,
which are in the words of their indices. LEVELS, the largest code without its sign, is written out: what a function
returns is no constant for Triton 3.4. As everywhere, launches pass ``enable_fp_fusion=False``.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, misc"
# ruff: noqa: SIM300 (an argument in capitals is taken for the constant)
from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from hf_lowmem_optim.ops.window import EXP2, LOG2, Grids, value_dtype_of

__all__ = [
    "addresses",
    "decode_values",
    "encode_values",
    "grid_of",
    "index_of",
    "load_grid",
    "load_stored",
    "stored_as",
    "value_of",
]

_LOG2, _EXP2 = tl.constexpr(LOG2), tl.constexpr(EXP2)
_NORMAL, _LARGEST, _INFINITE = tl.constexpr(0x00800000), tl.constexpr(0x7F7FFFFF), tl.constexpr(0x7F800000)
_TYPES = {"fp32": tl.float32, "bf16": tl.bfloat16, "8bit": tl.uint8, "4bit": tl.int16}


@triton.jit
def _log2_above(magnitude, base):
    x = ((magnitude & 0x7FFFFF) | 0x3F800000).to(tl.float32, bitcast=True) - 1.0
    y = x * _LOG2[7] + _LOG2[6]
    for i in tl.static_range(6):
        y = y * x + _LOG2[5 - i]
    return y * x + ((magnitude >> 23) - base).to(tl.float32)


@triton.jit
def decode_values(codes, lo, step, VALUES: tl.constexpr):
    """Values of int32 codes; lo and step as stored, broadcast."""
    LEVELS: tl.constexpr = 127 if VALUES == tl.uint8 else 7
    c = codes & LEVELS
    first = (lo < 0.0).to(tl.int32)
    last = LEVELS - (step.to(tl.int32, bitcast=True) < 0).to(tl.int32)
    t = (c - first).to(tl.float32) * tl.abs(step)
    whole = t.to(tl.int32)
    x = t - whole.to(tl.float32)
    y = x * _EXP2[4] + _EXP2[3]
    for i in tl.static_range(3):
        y = y * x + _EXP2[2 - i]
    value = tl.abs(lo) * (y * x + 1.0)
    magnitude = tl.minimum(value.to(tl.int32, bitcast=True) + (whole << 23), _LARGEST)
    magnitude = tl.where(c < first, 0, tl.where(c > last, _INFINITE, magnitude))
    return (magnitude | ((codes > LEVELS).to(tl.int32) << 31)).to(tl.float32, bitcast=True)


@triton.jit
def grid_of(values, selected, VALUES: tl.constexpr):
    """Grid of the selected values: lo and step as stored."""
    LEVELS: tl.constexpr = 127 if VALUES == tl.uint8 else 7
    magnitude = values.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    usual = selected & (magnitude >= _NORMAL) & (magnitude < _INFINITE)
    hi = tl.max(tl.where(usual, magnitude, 0))
    lo = tl.minimum(tl.min(tl.where(usual, magnitude, _LARGEST)), hi)
    small = tl.max((selected & (magnitude < _NORMAL)).to(tl.int32))
    infinite = tl.max((selected & (magnitude >= _INFINITE)).to(tl.int32))
    first = tl.where(lo > 0, small, 0)
    base = lo >> 23
    span = tl.maximum(_log2_above(hi, base) - _log2_above(lo, base), 0.0)
    step = tl.div_rn(span, (LEVELS - infinite - first).to(tl.float32))
    lo = (lo | (first << 31)).to(tl.float32, bitcast=True)
    return lo, (step.to(tl.int32, bitcast=True) | (infinite << 31)).to(tl.float32, bitcast=True)


@triton.jit
def encode_values(values, lo, step, VALUES: tl.constexpr):
    """int32 codes of values on the grid that :func:`grid_of` made for them."""
    LEVELS: tl.constexpr = 127 if VALUES == tl.uint8 else 7
    signed = values.to(tl.int32, bitcast=True)
    magnitude = signed & 0x7FFFFFFF
    first = (lo < 0.0).to(tl.int32)
    most = LEVELS - first - (step.to(tl.int32, bitcast=True) < 0).to(tl.int32)
    lo = lo.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    step = tl.abs(step)
    base = lo >> 23
    some = step > 0.0
    place = tl.div_rn(_log2_above(magnitude, base) - _log2_above(lo, base), tl.where(some, step, 1.0)) + 0.5
    place = tl.where(some, tl.floor(place), 0.0)
    c = tl.minimum(tl.maximum(place, 0.0), most.to(tl.float32)).to(tl.int32) + first
    c = tl.where(magnitude < _NORMAL, 0, tl.where(magnitude >= _INFINITE, LEVELS, c))
    return c + tl.where(signed < 0, LEVELS + 1, 0)


@triton.jit
def index_of(word, VALUES: tl.constexpr):
    """The index in a word of ``indices``, int32."""
    index = word.to(tl.int32)
    return index & 0xFFF if VALUES == tl.int16 else index


@triton.jit
def load_stored(indices_ptr, values_ptr, at, live, VALUES: tl.constexpr):
    """Index, int32, and value as it is stored, of the entries at ``at``; zeros where they are not live."""
    word = tl.load(indices_ptr + at, mask=live, other=0)
    code = (word.to(tl.int32) >> 12) & 15
    stored = code if VALUES == tl.int16 else tl.load(values_ptr + at, mask=live, other=0)
    return index_of(word, VALUES), stored


@triton.jit
def load_grid(lo_ptr, step_ptr, at, live, VALUES: tl.constexpr):
    """Grid of a row's block: lo and step; zeros for floats."""
    lo = tl.zeros_like(at).to(tl.float32)
    step = lo
    if VALUES == tl.uint8 or VALUES == tl.int16:
        lo = tl.load(lo_ptr + at, mask=live, other=0.0)
        step = tl.load(step_ptr + at, mask=live, other=0.0)
    return lo, step


@triton.jit
def value_of(stored, lo, step, VALUES: tl.constexpr):
    """The float32 values of what :func:`load_stored` gave."""
    if VALUES == tl.uint8 or VALUES == tl.int16:
        return decode_values(stored.to(tl.int32), lo, step, VALUES)
    else:  # noqa: RET505 (a branch of a constexpr that is not taken is not compiled)
        return stored.to(tl.float32)


def stored_as(values: Tensor | None, grids: Grids | None) -> Any:
    """Return what a kernel is told of the storage of a window's values."""
    return _TYPES[value_dtype_of(values, grids)]


def addresses(values: Tensor | None, grids: Grids | None) -> tuple[int, int, int]:
    """Return the addresses of values, lo and step; 0 for what a window has not."""
    lo, step = (0, 0) if grids is None else (grids.lo.data_ptr(), grids.step.data_ptr())
    return 0 if values is None else values.data_ptr(), lo, step
