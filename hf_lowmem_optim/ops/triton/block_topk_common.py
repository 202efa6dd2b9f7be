"""Error-feedback Top-K in Triton for what is common: blocks of 4096, some 1 %, an error of 4 or 8 bits.

One program per block, as in ``block_topk``, with a third of its instructions and registers for two programs at a time:

- k of the maxima of 16 entries each reach a number t, so at least k entries do, and hardly more: t is found among the
  256 maxima, and the few entries that reach it are the candidates;
- candidates are compacted into 64 lanes, which compare each with each: ranks, places and the exact k-th magnitude;
- codes are divided by multiplication with the rounded reciprocal and one correction, which Markstein's theorem makes
  the rounded quotient.

A block for which that does not hold (too many candidates, numbers that are not finite or out of the range in which all
is exact, a short block) is left as it is and flagged; ``block_topk`` does it then. To the bit it gives the same.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, misc"
# ruff: noqa: SIM300 (an argument in capitals is taken for the constant)
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_lowmem_optim.ops.block_quant import Quantized
from hf_lowmem_optim.ops.triton.block_quant import round_to_bfloat16
from hf_lowmem_optim.ops.triton.device import by_value
from hf_lowmem_optim.ops.triton.tables import owner_and_block, pointer
from hf_lowmem_optim.ops.triton.window import decode_values, encode_values, grid_of
from hf_lowmem_optim.ops.window import SparseWindow

__all__ = ["block_topk_kernel", "common_options", "is_common"]

#: What the kernel is made for.
_BLOCK, _QUANT_BLOCK, _MOST_KEPT = 4096, 64, 48

_ROWS = tl.constexpr(64)
_CANDIDATES = tl.constexpr(64)
#: Bits of 2^110 and 2^-120: magnitudes from which on, and below which, sums in here might not be exact.
_HUGE, _TINY = tl.constexpr(0x76800000), tl.constexpr(0x03800000)


@triton.jit
def coarse_threshold(top, greatest, k, most):
    """A t with k ≤ #(top ≥ t) ≤ most if the search meets one, else the greatest with at least k.

    Three thresholds a round; each count is at most 256 and has 10 bits of one sum.
    """
    hi = greatest + 1
    lo = 0
    found = 1 << 30
    step = 1 << 22
    # down from the greatest in growing steps until there are enough, then by quarters
    while (hi - lo > 1) & (found > most):
        quarter = (hi - lo) // 4
        down = step > 0
        first = tl.maximum(tl.where(down, hi - step, lo + quarter * 3), lo + 1)
        second = tl.maximum(tl.where(down, hi - 2 * step, lo + quarter * 2), lo + 1)
        third = tl.maximum(tl.where(down, hi - 4 * step, lo + quarter), lo + 1)
        reached = (top >= first).to(tl.int32)
        reached += (top >= second).to(tl.int32) << 10
        reached += (top >= third).to(tl.int32) << 20
        reached = tl.sum(reached)
        count1 = reached & 1023
        count2 = (reached >> 10) & 1023
        count3 = reached >> 20
        enough1 = count1 >= k
        enough2 = count2 >= k
        enough3 = count3 >= k
        hi = tl.where(enough1, hi, tl.where(enough2, first, tl.where(enough3, second, third)))
        lo = tl.where(enough1, first, tl.where(enough2, second, tl.where(enough3, third, lo)))
        found = tl.where(enough1, count1, tl.where(enough2, count2, tl.where(enough3, count3, found)))
        step = tl.where(enough3, 0, tl.minimum(step, 1 << 24) * 8)
    return lo


@triton.jit
def popcount(x):
    """Set bits of uint32."""
    x = x - ((x >> 1) & 0x55555555)
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    return ((((x + (x >> 4)) & 0x0F0F0F0F) * 0x01010101) >> 24).to(tl.int32)


@triton.jit
def places_of_codes(BITS: tl.constexpr):
    """The lowest bit of each code in a little-endian word [codes of a word]."""
    code = tl.arange(0, 32 // BITS)
    # of 4 bits the entry of even index has the high nibble
    return code // 2 * 8 + (1 - code % 2) * 4 if BITS == 4 else code * 8


@triton.jit
def unpack(words, BITS: tl.constexpr):
    """int32 [64, words of a row] → codes [64, 64] as float32: each bit field in the mantissa of 2^23, scaled down."""
    place = places_of_codes(BITS)
    wide = words[:, :, None]
    half = tl.where((place < 16)[None, None, :], wide, wide >> 16)  # fields must end below bit 23
    shift = place % 16
    mask = ((1 << BITS) - 1) << shift
    mantissa = ((half & mask[None, None, :]) | 0x4B000000).to(tl.float32, bitcast=True)
    scale = ((127 - shift) << 23).to(tl.float32, bitcast=True)[None, None, :]
    return tl.reshape(tl.fma(mantissa, scale, -8388608.0 * scale), (_ROWS, 64))


@triton.jit
def candidates(keys, a, threshold, GROUP: tl.constexpr):
    """Compact the entries that reach the threshold: index and value of each in a lane, in any order; and how many.

    Lanes beyond them hold index −1. All of it is junk if there are more than there are lanes. And each thread's own: a
    bit for each of its entries, the first lane, how many there are.
    """
    # a bit for each of a thread's entries, 32 at most
    REPEATS: tl.constexpr = _ROWS // GROUP
    keys = tl.reshape(keys, (REPEATS, GROUP, 8, 8))
    bit = (tl.arange(0, REPEATS)[:, None] * 8 + tl.arange(0, 8)[None, :])[:, None, None, :]
    bits = tl.sum(tl.sum(tl.where(keys >= threshold, 1 << bit, 0), 3), 0)
    THREADS: tl.constexpr = GROUP * 8
    bits = tl.reshape(bits, (THREADS,)).to(tl.uint32, bitcast=True)
    count = popcount(bits)
    upto = tl.cumsum(count, 0)
    total = tl.max(upto)
    # candidate j belongs to the first thread whose candidates end behind it
    lane = tl.arange(0, _CANDIDATES)
    ends = tl.histogram(upto, _CANDIDATES, mask=upto < _CANDIDATES)
    thread = tl.minimum(tl.cumsum(ends, 0), THREADS - 1)
    nth = lane - tl.gather(upto - count, thread, 0)
    mine = tl.gather(bits, thread, 0)
    for i in range(tl.max(count) - 1):
        mine = tl.where(i < nth, mine & (mine - 1), mine)  # without the lowest bit
    lowest = mine & (0 - mine)
    which = ((lowest.to(tl.float32).to(tl.int32, bitcast=True) >> 23) - 127) & 31
    index = (which // 8 * GROUP + thread // 8) * 64 + thread % 8 * 8 + which % 8
    there = lane < total
    value = tl.gather(tl.reshape(a, (_ROWS * 64,)), tl.where(there, index, 0), 0)
    return tl.where(there, index, -1), value, total, bits, upto - count, count


@triton.jit
def put_back(a, values, bits, first, count, GROUP: tl.constexpr):
    """The entries a, with the candidates replaced by the values in their lanes."""
    REPEATS: tl.constexpr = _ROWS // GROUP
    a = tl.reshape(a, (REPEATS, GROUP, 8, 8))
    bit = (1 << (tl.arange(0, REPEATS)[:, None] * 8 + tl.arange(0, 8)[None, :]))[:, None, None, :]
    # a thread's first candidate, then its second, ...: three are many
    for nth in range(tl.max(count)):
        lowest = tl.reshape((bits & (0 - bits)).to(tl.int32, bitcast=True), (1, GROUP, 8, 1))
        value = tl.gather(values, tl.minimum(first + nth, _CANDIDATES - 1), 0)
        a = tl.where(bit == lowest, tl.reshape(value, (1, GROUP, 8, 1)), a)
        bits = bits & (bits - 1)
    return tl.reshape(a, (_ROWS, 64))


@triton.jit(do_not_specialize=["window_row"])
def block_topk_kernel(
    table_ptr,  # [tensors, 11], see `block_topk`
    owners_ptr,
    flags_ptr,  # [programs], written: whether the block is left to `block_topk`
    window_row,
    K: tl.constexpr,
    BITS: tl.constexpr,
    GRAD: tl.constexpr,
    VALUES: tl.constexpr,
    GROUP: tl.constexpr,  # rows that one register holds over all threads, eight entries each
):
    """Do a block, or flag it and leave it as it is."""
    program = tl.program_id(0)
    record, block = owner_and_block(owners_ptr, table_ptr, program, 11)
    if (block + 1) * 4096 > tl.load(record + 7):
        tl.store(flags_ptr + program, 1)
        return
    # a quantization block a row; a thread has eight neighbours of four rows
    row = tl.arange(0, _ROWS)
    index = row[:, None] * 64 + tl.arange(0, 64)[None, :]
    WORDS: tl.constexpr = 2 * BITS  # of a row
    word = row[:, None] * WORDS + tl.arange(0, WORDS)[None, :]
    codes_ptr = pointer(record, 2, tl.int32, True) + block * (_ROWS * WORDS)
    lo_ptr = pointer(record, 3, tl.bfloat16, True) + block * _ROWS
    hi_ptr = pointer(record, 4, tl.bfloat16, True) + block * _ROWS
    LEVELS: tl.constexpr = (1 << BITS) - 1

    # a ← g + Q⁻¹(e)
    grad = tl.load(pointer(record, 1, GRAD, True) + block * 4096 + index)
    lo = tl.load(lo_ptr + row).to(tl.float32)
    unit = tl.div_rn(tl.load(hi_ptr + row).to(tl.float32) - lo, LEVELS * 1.0)
    codes = unpack(tl.load(codes_ptr + word), BITS)
    a = grad.to(tl.float32) + (codes * unit[:, None] + lo[:, None])

    # a bound that hardly more than k magnitudes reach
    keys = a.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    top = tl.max(tl.max(tl.reshape(keys, (_ROWS // GROUP // 2, 2, GROUP, 8, 8)), 4), 1)
    greatest = tl.max(top)
    window_row = by_value(window_row)
    column = window_row * tl.load(record + 8) + block * K
    indices_ptr = pointer(record, 5, tl.int16, False) + column
    values_ptr = pointer(record, 6, VALUES, False) + column
    GRIDS: tl.constexpr = VALUES == tl.uint8 or VALUES == tl.int16
    grid = window_row * tl.cdiv(tl.load(record + 7), 4096) + block
    lane = tl.arange(0, _CANDIDATES)
    if greatest == 0:  # as in an embedding's rows: the first k, and nothing is left
        tl.store(indices_ptr + lane, lane.to(tl.int16), mask=lane < K)
        if VALUES != tl.int16:
            tl.store(values_ptr + lane, tl.zeros([_CANDIDATES], VALUES), mask=lane < K)
        if GRIDS:
            tl.store(pointer(record, 9, tl.float32, False) + grid, 0.0)
            tl.store(pointer(record, 10, tl.float32, False) + grid, 0.0)
        tl.store(codes_ptr + word, tl.zeros([_ROWS, WORDS], tl.int32))
        tl.store(lo_ptr + row, tl.zeros([_ROWS], tl.bfloat16))
        tl.store(hi_ptr + row, tl.zeros([_ROWS], tl.bfloat16))
        tl.store(flags_ptr + program, 0)
        return
    threshold = coarse_threshold(top, greatest, K, K + (_CANDIDATES - K) // 3)
    at, value, total, bits, first, count = candidates(keys, a, threshold, GROUP)
    if (total > _CANDIDATES) | (greatest >= _HUGE) | (threshold < _TINY):
        tl.store(flags_ptr + program, 1)
        return

    # I ← the K largest of them
    magnitude = tl.where(at >= 0, value.to(tl.int32, bitcast=True) & 0x7FFFFFFF, -1)
    above = tl.sum((magnitude[:, None] > magnitude[None, :]).to(tl.int32), 0)
    selected = (at >= 0) & (above < K)
    exact = tl.min(tl.where(selected, magnitude, 0x7FFFFFFF))
    reach = tl.sum(selected.to(tl.int32))
    if reach > K:  # of those equal to the least, the first ones
        tied = selected & (magnitude == exact)
        tied_at = tl.where(tied, at, 4096)
        before = tl.sum((tied_at[:, None] < at[None, :]).to(tl.int32), 0)
        room = K - reach + tl.sum(tied.to(tl.int32))
        selected = selected & ((magnitude > exact) | (before < room))
        last = tl.max(tl.where(selected & tied, at, -1))
        keys = tl.where((keys == exact) & (index > last), -1, keys)
    chosen = tl.where(selected, at, 4096)
    place = tl.sum((chosen[:, None] < at[None, :]).to(tl.int32), 0)

    # a[I] ← a[I] − V
    if GRIDS:
        grid_lo, grid_step = grid_of(value, selected, VALUES)
        value_codes = encode_values(value, grid_lo, grid_step, VALUES)
        stored = decode_values(value_codes, grid_lo, grid_step, VALUES)
        rest = put_back(a, tl.where(selected, value - stored, value), bits, first, count, GROUP)
    else:
        # rounded to 8 bits by adding 1.5·2^(exponent + 16), and subtracting it again
        middle = ((a.to(tl.int32, bitcast=True) & 0x7F800000) | 0x00400000).to(tl.float32, bitcast=True)
        rounded = tl.fma(middle, -65536.0, tl.fma(middle, 65536.0, a))
        rest = tl.where(keys >= exact, a - rounded, a)

    # e ← Q(a)
    lo = round_to_bfloat16(tl.min(rest, 1), False)
    hi = round_to_bfloat16(tl.max(rest, 1), True)
    lo = tl.where(lo == 0.0, 0.0, lo)  # no −0
    hi = tl.where(hi == 0.0, 0.0, hi)
    spread = hi - lo
    strange = (spread != 0.0) & ((spread < 1e-24) | (spread > 1e26))
    if tl.max(strange.to(tl.int32)) > 0:
        tl.store(flags_ptr + program, 1)
        return
    tl.store(flags_ptr + program, 0)
    kept_word = at
    if GRIDS:
        tl.store(pointer(record, 9, tl.float32, False) + grid, grid_lo)
        tl.store(pointer(record, 10, tl.float32, False) + grid, grid_step)
    if VALUES == tl.int16:
        kept_word = at | (value_codes << 12)
    elif VALUES == tl.uint8:
        tl.store(values_ptr + place, value_codes.to(tl.uint8), mask=selected)
    else:
        tl.store(values_ptr + place, value.to(tl.bfloat16), mask=selected)
    tl.store(indices_ptr + place, kept_word.to(tl.int16), mask=selected)
    unit = tl.div_rn(spread, LEVELS * 1.0)
    reciprocal = tl.where(spread > 0.0, tl.div_rn(1.0, tl.where(spread > 0.0, unit, 1.0)), 0.0)[:, None]
    offset = rest - lo[:, None]
    quotient = offset * reciprocal
    quotient = tl.fma(tl.fma(-quotient, unit[:, None], offset), reciprocal, quotient)
    codes = tl.reshape((quotient + 0.5).to(tl.int32), (_ROWS, WORDS, 32 // BITS))
    tl.store(codes_ptr + word, tl.sum(codes << places_of_codes(BITS)[None, None, :], 2))
    tl.store(lo_ptr + row, lo.to(tl.bfloat16))
    tl.store(hi_ptr + row, hi.to(tl.bfloat16))


def is_common(window: SparseWindow, error: Quantized | Tensor | None) -> bool:
    """Return whether the kernel serves aligned tensors with such windows and errors."""
    if not isinstance(error, Quantized):
        return False
    fmt = error.format
    return (
        (window.block_size, fmt.block_size, fmt.stat_dtype) == (_BLOCK, _QUANT_BLOCK, torch.bfloat16)
        and window.kept_per_block <= _MOST_KEPT
        # AMD's registers do not hold what codes of 8 bits take
        and window.value_dtype in (("bf16", "4bit") if torch.version.hip else ("bf16", "8bit", "4bit"))
    )


def common_options() -> dict[str, int | bool]:
    """Return the launch parameters: four warps, of 32 threads or of AMD's 64."""
    return {"GROUP": 32 if torch.version.hip else 16, "num_warps": 4, "enable_fp_fusion": False}
