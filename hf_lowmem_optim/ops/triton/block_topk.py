"""Error-feedback Top-K in Triton: one program per block of any tensor, everything between load and store in registers.

The threshold is found by bisection on the bits of |a|, which order as the numbers do; it ends where exactly k entries
reach it, which saves most rounds. One prefix sum of "above" and "at the threshold" (in the two halves of an integer)
gives each selected entry its place.

As in ``block_quant``, launches pass ``enable_fp_fusion=False`` (s·(code·u + lo) + g must round at every operation), and
are not autotuned (the kernel works in place).
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, misc"
# ruff: noqa: SIM300 (an argument in capitals is taken for the constant)
from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_lowmem_optim.ops.block_quant import Quantized, rounding_keys
from hf_lowmem_optim.ops.block_topk import Errors, Selection, _select_all
from hf_lowmem_optim.ops.dispatch import register
from hf_lowmem_optim.ops.step_numbers import argument
from hf_lowmem_optim.ops.triton.block_quant import block_range, decode, encode, load_codes, store_codes
from hf_lowmem_optim.ops.triton.block_topk_common import block_topk_kernel, common_options, is_common
from hf_lowmem_optim.ops.triton.device import by_value, on_device
from hf_lowmem_optim.ops.triton.tables import TYPES, Launch, launches, owner_and_block, pointer, size
from hf_lowmem_optim.ops.triton.window import addresses, decode_values, encode_values, grid_of, stored_as
from hf_lowmem_optim.ops.window import MAX_FUSED_BLOCK, Memo, SparseWindow

__all__ = ["select_all"]

#: Entries of a row where none are quantized.
_ROW = 64
_ENTRIES_PER_WARP = 512  # 16 per thread of a warp of 32
_FLAGS = tl.constexpr(32)


@triton.jit
def threshold_of(magnitude, k):
    """A t with at least k of int32 [ROWS, COLUMNS] ≥ t, and at most k > t (entries below 0 never count)."""
    lo = 0
    count = tl.sum((magnitude >= lo).to(tl.int32))  # of what is ≥ lo
    hi = tl.max(magnitude) + 1
    # down from the largest, by a factor of 2, 2^4, 2^16, ... until there are enough; then by halves
    step = 1 << 23
    while (hi - lo > 1) & (count != k):
        middle = tl.where(step > 0, tl.maximum(hi - step, lo + 1), lo + (hi - lo) // 2)
        found = tl.sum((magnitude >= middle).to(tl.int32))
        enough = found >= k
        lo = tl.where(enough, middle, lo)
        count = tl.where(enough, found, count)
        hi = tl.where(enough, hi, middle)
        step = tl.where(enough, 0, tl.minimum(step, 1 << 28) * 4)
    return lo


@triton.jit
def select_block(
    table_ptr, owners_ptr, program, window_row, k, error_scale, key0, key1, BLOCK: tl.constexpr, TILE: tl.constexpr,
    QUANT_BLOCK: tl.constexpr, ERROR: tl.constexpr, BITS: tl.constexpr, STOCHASTIC: tl.constexpr, GRAD: tl.constexpr,
    BUFFER: tl.constexpr, STATS: tl.constexpr, VALUES: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Do one block; see the kernel for the arguments."""
    # everything but the block's own place is in 32 bits: wide offsets would take most of the registers
    record, block = owner_and_block(owners_ptr, table_ptr, program, 11)
    n = size(record, 7, ALIGNED)
    kept = tl.load(record + 8)
    base = block * BLOCK
    length = tl.minimum(n - base, BLOCK).to(tl.int32)
    # a quantization block a row, throughout: another order would have to go through shared memory
    ROWS: tl.constexpr = TILE // QUANT_BLOCK
    LEVELS: tl.constexpr = (1 << BITS) - 1
    row = tl.arange(0, ROWS)  # [ROWS]
    live = row * QUANT_BLOCK < length
    index = row[:, None] * QUANT_BLOCK + tl.arange(0, QUANT_BLOCK)[None, :]  # [ROWS, QUANT_BLOCK]
    valid = index < length
    grad_ptr = pointer(record, 1, GRAD, ALIGNED) + base
    if ERROR == "dense":
        error_ptr = pointer(record, 2, BUFFER, ALIGNED) + base
    if ERROR == "quantized":
        error_ptr = pointer(record, 2, BUFFER, ALIGNED) + base * BITS // 8
        lo_ptr = pointer(record, 3, STATS, ALIGNED) + block * (BLOCK // QUANT_BLOCK)
        hi_ptr = pointer(record, 4, STATS, ALIGNED) + block * (BLOCK // QUANT_BLOCK)

    # a ← g + s·Q⁻¹(e)
    a = tl.load(grad_ptr + index, mask=valid, other=0.0).to(tl.float32)
    if ERROR == "dense":
        a = a + error_scale * tl.load(error_ptr + index, mask=valid, other=0.0).to(tl.float32)
    if ERROR == "quantized":
        lo = tl.load(lo_ptr + row, mask=live, other=0.0).to(tl.float32)
        hi = tl.load(hi_ptr + row, mask=live, other=0.0).to(tl.float32)
        codes = load_codes(error_ptr, row, length, QUANT_BLOCK, QUANT_BLOCK, BITS)
        a = a + error_scale * decode(codes, lo, hi, LEVELS)

    # I ← the k entries of largest |a|: all above the threshold, then the lowest indices among those equal to it
    magnitude = tl.minimum(a.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 0x7F800001)  # every NaN just above infinity
    magnitude = tl.where(valid, magnitude, -1)
    num_kept = tl.minimum(kept - block * k, k).to(tl.int32)
    threshold = threshold_of(magnitude, num_kept)
    above = (magnitude > threshold).to(tl.int32)
    equal = (magnitude == threshold).to(tl.int32)
    room = num_kept - tl.sum(above)
    both = above | (equal << 16)
    in_row = tl.sum(both, 1)
    # equal counts up to 2^15, so the upper half needs its sign bit: read it as unsigned
    ranks = (tl.cumsum(both, 1) + (tl.cumsum(in_row, 0) - in_row)[:, None]).to(tl.uint32, bitcast=True)
    equal_rank = (ranks >> 16).to(tl.int32)
    selected = (above > 0) | ((equal > 0) & (equal_rank <= room))
    place = (ranks & 0xFFFF).to(tl.int32) + tl.minimum(equal_rank, room) - 1

    # V ← a[I] as stored
    column = window_row * kept + block * k  # added to the pointer before the place: that stays in 32 bits
    word = index
    if VALUES == tl.uint8 or VALUES == tl.int16:
        grid_lo, grid_step = grid_of(a, selected, VALUES)
        grid = window_row * tl.cdiv(n, BLOCK) + block
        tl.store(pointer(record, 9, tl.float32, False) + grid, grid_lo)
        tl.store(pointer(record, 10, tl.float32, False) + grid, grid_step)
        codes = encode_values(a, grid_lo, grid_step, VALUES)
        wide = decode_values(codes, grid_lo, grid_step, VALUES)
        if VALUES == tl.uint8:
            at = column + place  # one wide offset for both stores: with two narrow ones sm80 spills
            tl.store(pointer(record, 6, VALUES, False) + at, codes.to(VALUES), mask=selected)
            tl.store(pointer(record, 5, tl.int16, False) + at, index.to(tl.int16), mask=selected)
        else:
            word = index | (codes << 12)
    else:
        value = a.to(VALUES)
        wide = value.to(tl.float32)
        tl.store(pointer(record, 6, VALUES, False) + column + place, value, mask=selected)
    if VALUES != tl.uint8:
        tl.store(pointer(record, 5, tl.int16, False) + column + place, word.to(tl.int16), mask=selected)

    # e ← Q(a with a[I] ← a[I] − V)
    if ERROR != "none":
        finite = (wide.to(tl.int32, bitcast=True) & 0x7FFFFFFF) < 0x7F800000
        rest = tl.where(selected, tl.where(finite, a - wide, 0.0), a)
        if ERROR == "dense":
            tl.store(error_ptr + index, rest.to(BUFFER), mask=valid)
        else:
            BF16_STATS: tl.constexpr = STATS == tl.bfloat16
            lo, hi = block_range(rest, valid, BF16_STATS)
            codes = encode(rest, valid, lo, hi, base + index, key0, key1, LEVELS, STOCHASTIC)
            store_codes(error_ptr, codes, row, length, ROWS, QUANT_BLOCK, QUANT_BLOCK, BITS)
            tl.store(lo_ptr + row, lo.to(STATS), mask=live)
            tl.store(hi_ptr + row, hi.to(STATS), mask=live)


@triton.jit(do_not_specialize=["window_row", "k", "key0", "key1"])
def _block_topk_kernel(
    # [tensors, 11]: first program; gradient, error, lo, hi, indices, values; entries, entries kept; lo, step of values
    table_ptr,
    owners_ptr,
    flags_ptr,  # [blocks], or None for every block
    num_blocks,
    window_row,
    k,
    error_scale,
    key0,
    key1,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,  # BLOCK rounded up to a power of two
    QUANT_BLOCK: tl.constexpr,
    ERROR: tl.constexpr,  # "none", "dense", "quantized"
    BITS: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    GRAD: tl.constexpr,
    BUFFER: tl.constexpr,  # dtype of a dense error, or of a quantized one's codes
    STATS: tl.constexpr,
    VALUES: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    window_row = by_value(window_row)
    if flags_ptr is None:
        select_block(
            table_ptr, owners_ptr, tl.program_id(0), window_row, k, error_scale, key0, key1, BLOCK, TILE, QUANT_BLOCK,
            ERROR, BITS, STOCHASTIC, GRAD, BUFFER, STATS, VALUES, ALIGNED,
        )  # fmt: skip
    else:
        # every program has blocks from all over the tensors; it looks at the flags of many at a time
        apart = tl.num_programs(0)
        for first in range(tl.program_id(0), num_blocks, apart * _FLAGS):
            number = first + apart * tl.arange(0, _FLAGS)
            flags = tl.load(flags_ptr + number, mask=number < num_blocks, other=0)
            if tl.max(flags) > 0:
                for block in range(first, tl.minimum(first + apart * _FLAGS, num_blocks), apart):
                    if tl.load(flags_ptr + block) > 0:
                        select_block(
                            table_ptr, owners_ptr, block, window_row, k, error_scale, key0, key1, BLOCK, TILE,
                            QUANT_BLOCK, ERROR, BITS, STOCHASTIC, GRAD, BUFFER, STATS, VALUES, ALIGNED,
                        )  # fmt: skip


def _launch_options(block_size: int) -> dict[str, int | bool]:
    """Return the launch parameters for blocks of this size, fixed by registers per thread, not tuned per device."""
    tile = triton.next_power_of_2(block_size)
    # With more warps of NVIDIA's a thread has 128 registers at most, and blocks of 8192 spill. AMD's spill with fewer.
    most, entries = (16, _ENTRIES_PER_WARP // 2) if torch.version.hip else (8, _ENTRIES_PER_WARP)
    return {"num_warps": max(1, min(most, tile // entries)), "enable_fp_fusion": False}


def _why_not(
    grads: Sequence[Tensor], windows: Sequence[SparseWindow], errors: Errors, how: Selection, memo: Memo
) -> str | None:
    """Return why the kernel cannot make the selections; the torch version makes them then."""
    if windows[0].block_size > MAX_FUSED_BLOCK:
        return f"a block of {windows[0].block_size} entries does not fit on a GPU (at most {MAX_FUSED_BLOCK})"
    if isinstance(error := errors[0], Quantized) and (size := error.format.block_size) & (size - 1):
        return f"quantization block size {size} is not a power of two"
    return None


@register(_select_all, "triton", why_not=_why_not)
def select_all(
    grads: Sequence[Tensor], windows: Sequence[SparseWindow], errors: Errors, how: Selection, memo: Memo
) -> None:
    """Select from all tensors in one launch, and another for those that are not aligned."""
    found, addresses = launches(
        grads,
        lambda place: _record(windows[place], errors[place]),
        lambda place: windows[place].num_blocks,
        memo,
        "selections in Triton",
        others=lambda place: _parts(errors[place]),
    )
    with on_device(grads[0]):
        for launch in found:
            _select(launch, launch.table(addresses), grads[0].dtype, windows[0], errors[0], how)


def _parts(error: Quantized | Tensor | None) -> list[Tensor]:
    """Return the tensors in which an error is kept."""
    if isinstance(error, Quantized):
        return [error.codes, error.lo, error.hi]
    return [] if error is None else [error]


def _record(window: SparseWindow, error: Quantized | Tensor | None) -> tuple[int, ...]:
    """Return a tensor's record but for its gradient."""
    buffers = [part.data_ptr() for part in _parts(error)]
    values, *grid = addresses(window.values, window.grids)
    return *buffers, *[0] * (3 - len(buffers)), window.indices.data_ptr(), values, window.numel, window.kept, *grid


def _select(
    launch: Launch,
    table: Tensor,
    dtype: torch.dtype,
    window: SparseWindow,
    error: Quantized | Tensor | None,
    how: Selection,
) -> None:
    """Select from tensors in one launch; ``window`` and ``error`` are those of one of them."""
    row, error_scale, seed = argument(how.row, int), how.error_scale, how.seed
    owners, device, block_size, k = launch.owners, table.device, window.block_size, window.kept_per_block
    key0, key1 = rounding_keys(seed) if seed is not None else (0, 0)
    tile = max(2, triton.next_power_of_2(block_size))
    kind, buffer, stats = "none", tl.uint8, None
    quant_block, bits = min(tile, _ROW), 8
    if isinstance(error, Quantized):
        kind, stats = "quantized", TYPES[error.lo.dtype]
        quant_block, bits = error.format.block_size, error.format.bits
    elif error is not None:
        kind, buffer = "dense", TYPES[error.dtype]
    programs, flags, values = len(owners), None, stored_as(window.values, window.grids)
    if launch.is_aligned and error_scale == 1 and seed is None and is_common(window, error):
        flags = torch.empty(programs, dtype=torch.int32, device=device)
        block_topk_kernel[(programs,)](
            table, owners, flags, row, K=k, BITS=bits, GRAD=TYPES[dtype], VALUES=values, **common_options()
        )
        programs = min(programs, _persistent_programs(device))
    _block_topk_kernel[(programs,)](
        table,
        owners,
        flags,
        len(owners),
        row,
        k,
        float(error_scale),
        key0,
        key1,
        BLOCK=block_size,
        TILE=tile,
        QUANT_BLOCK=quant_block,
        ERROR=kind,
        BITS=bits,
        STOCHASTIC=seed is not None,
        GRAD=TYPES[dtype],
        BUFFER=buffer,
        STATS=stats,
        VALUES=values,
        ALIGNED=launch.is_aligned,
        **_launch_options(block_size),
    )


def _persistent_programs(device: torch.device) -> int:
    """Return how many programs look for flagged blocks: as many as run at a time."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 3
