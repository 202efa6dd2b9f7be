"""How the values of a window are stored: as floats, or in 8 or 4 bits on a geometric grid for each block of a row.

With L = 2^(bits − 1) − 1, lo and hi the smallest and the largest magnitude that a block keeps, and c rounded to the
nearest in the logarithm:

    step = log2(hi/lo)/L        c = round(log2(|v|/lo)/step)        v̂ = ±lo·2^(c·step)

A code is the sign and c. Stored are lo and, instead of hi, step: reading then needs no logarithm. What has no place on
such a grid takes a code from one of its ends, and the step is that of the codes left:

- zeros among the kept, and what is below the smallest normal float32, have c = 0; the sign of lo says so;
- infinite and NaN have c = L and are read as infinite; the sign of step says so.

A block that keeps nothing but these has lo = step = 0. Blocks of at most 4096 entries have indices of 12 bits: an index
and its code of 4 bits are one int16, code·4096 + index.

All backends take the same steps in float32, with the same polynomials for the logarithm and the power, so that codes
and values agree bit for bit; they are within 1e-6 of the exact grid.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

__all__ = [
    "EXP2",
    "FLOATS",
    "INDEX_BITS",
    "LOG2",
    "MAX_PACKED_BLOCK",
    "VALUES_HELP",
    "Grids",
    "ValueDtype",
    "check_block_and_values",
    "decode",
    "encode",
    "fault_of_grids",
    "unpack",
]

ValueDtype = Literal["bf16", "fp32", "8bit", "4bit"]
#: Those that are floats.
FLOATS: dict[ValueDtype, torch.dtype] = {"bf16": torch.bfloat16, "fp32": torch.float32}
VALUES_HELP = (
    'Storage of the kept values: floats, or codes on a geometric grid for each block and row. ``"4bit"`` puts a code '
    "and its index into 16 bits, for blocks of at most 4096 entries."
)
#: Bits of an index that shares an int16 with a code of 4 bits.
INDEX_BITS = 12
MAX_PACKED_BLOCK = 1 << INDEX_BITS

#: Every product and every sum is rounded.
#: log2(1 + x) = x·(LOG2[0] + LOG2[1]·x + …) and 2^x = 1 + x·(EXP2[0] + EXP2[1]·x + …) for x in [0, 1), to 1e-7.
LOG2 = (1.4426899, -0.7211658, 0.4786837, -0.3473011, 0.24186478, -0.13752135, 0.052059, -0.00930916)
EXP2 = (0.6931513, 0.24016445, 0.05579991, 0.00901703, 0.00186713)
_MAGNITUDE, _MANTISSA, _ONE = 0x7FFFFFFF, 0x7FFFFF, 0x3F800000
_NORMAL, _LARGEST, _INFINITE = 0x00800000, 0x7F7FFFFF, 0x7F800000


class Grids(NamedTuple):
    """The grids of a window's values.

    Attributes:
        lo: float32 [window, blocks], contiguous; negative where c = 0 stands for zero.
        step: float32 [window, blocks], contiguous; its sign bit set where c = L stands for infinite.
    """

    lo: Tensor
    step: Tensor


def check_block_and_values(block_size: int, value_dtype: ValueDtype) -> None:
    """Raise ValueError if an index into a block of this size leaves no room for its value's code."""
    if value_dtype == "4bit" and block_size > MAX_PACKED_BLOCK:
        raise ValueError(
            f"block_size={block_size} does not fit value_dtype='4bit', which puts an index and a code into 16 bits: "
            f"take blocks of at most {MAX_PACKED_BLOCK} entries, or value_dtype='8bit'"
        )


def unpack(words: Tensor) -> tuple[Tensor, Tensor]:
    """Return indices, int64, and codes of 4 bits, int32, of the int16 in which they are."""
    return words.long() & (MAX_PACKED_BLOCK - 1), (words.int() >> INDEX_BITS) & 15


def fault_of_grids(grids: Grids) -> str | None:
    """Return why loaded grids are none, as a clause; None if all their values are zero or in the range of float32."""
    lo, step = grids.lo.abs(), grids.step.abs()
    # the largest code is 127 at most; a larger step means less codes
    empty = (lo == 0) & (step == 0)
    fits = (lo.view(torch.int32) >= _NORMAL) & (lo <= torch.finfo(torch.float32).max) & (step <= 256)
    if bool((empty | fits).all()):
        return None
    return "'value_lo' and 'value_step' hold numbers that are no grid's"


def encode(x: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the codes of the values of some blocks, and the blocks' grids.

    Args:
        x: float32 [blocks, kept].
        bits: 8 or 4.

    Returns:
        int32 [blocks, kept]; lo and step, float32 [blocks].
    """
    levels = (1 << (bits - 1)) - 1
    signed = x.view(torch.int32)
    magnitude = signed & _MAGNITUDE
    small, infinite = magnitude < _NORMAL, magnitude >= _INFINITE
    usual = ~(small | infinite)
    # lo, hi ← smallest and largest usual magnitude, as bits; 0 if there is none
    hi = torch.where(usual, magnitude, 0).amax(1, keepdim=True)
    lo = torch.minimum(torch.where(usual, magnitude, _LARGEST).amin(1, keepdim=True), hi)
    has_zero, has_infinite = small.any(1, keepdim=True) & (lo > 0), infinite.any(1, keepdim=True)
    first = has_zero.float()
    most = levels - has_infinite.float() - first
    # step ← log2(hi/lo) / codes
    logs = _log2_above(torch.cat((magnitude, lo, hi), 1), lo >> 23)
    c, low, high = logs[:, :-2], logs[:, -2:-1], logs[:, -1:]
    step = (high - low).clamp_(min=0) / most
    # c ← round(log2(|v|/lo) / step)
    c = (c - low).div_(torch.where(step > 0, step, torch.inf)).add_(0.5).floor_().clamp_(min=0)
    codes = torch.minimum(c, most).add_(first).int().masked_fill_(small, 0).masked_fill_(infinite, levels)
    codes |= (signed >> 31) & (levels + 1)
    wide = lo.view(torch.float32)
    return codes, torch.where(has_zero, -wide, wide)[:, 0], torch.where(has_infinite, -step, step)[:, 0]


def decode(codes: Tensor, lo: Tensor, step: Tensor, bits: int) -> Tensor:
    """Return the values of codes.

    Args:
        codes: int32, of any shape.
        lo: float32, that of each code's grid; broadcast.
        step: Likewise.
        bits: 8 or 4.

    Returns:
        float32.
    """
    levels = (1 << (bits - 1)) - 1
    c = codes & levels
    first, last = (lo < 0).int(), levels - (step.view(torch.int32) < 0).int()
    # lo·2^t: a polynomial for the fraction of t, the exponent for the rest
    t = (c - first).float() * step.abs()
    whole = t.int()
    fraction = t - whole.float()
    power = fraction * EXP2[-1]
    for coefficient in EXP2[-2::-1]:
        power.add_(coefficient).mul_(fraction)
    value = lo.abs() * power.add_(1)
    magnitude = (value.view(torch.int32) + (whole << 23)).clamp_(max=_LARGEST)
    magnitude.masked_fill_(c < first, 0).masked_fill_(c > last, _INFINITE)
    return magnitude.add_((codes >> (bits - 1)) << 31).view(torch.float32)


def _log2_above(magnitude: Tensor, base: Tensor) -> Tensor:
    """Return log2(x) − (base − 127) of normal float32 numbers by their bits; junk for others."""
    x = ((magnitude & _MANTISSA) | _ONE).view(torch.float32) - 1
    total = x * LOG2[-1]
    for coefficient in LOG2[-2::-1]:
        total.add_(coefficient).mul_(x)
    return total.add_(((magnitude >> 23) - base).float())
