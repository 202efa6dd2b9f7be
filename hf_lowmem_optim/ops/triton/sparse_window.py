# mypy: disable-error-code="no-untyped-def, untyped-decorator, attr-defined"
"""Adam's statistics of a sparse window in Triton, which has no scatter into shared memory: rows add up in two ways.

Sorted: index, row and bfloat16 value of an entry fit one 32-bit key, a block's whole window is sorted by (index, row),
and the first entry of each index then walks over its followers while any has one. Everything stays on the chip.

Scratch: for any window, density, block size and value type. One program at a time owns a piece of global scratch memory
(small enough to stay in the second-level cache) and adds row after row into it. Indices of a row are unique, so that
only rows must be kept apart, by barriers.

Both add the rows in the order of their storage, as the reference does; compiled without contraction into fused
multiply-adds they agree with it bit for bit. Nothing is autotuned: these kernels work in place.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_lowmem_optim.ops.dispatch import register
from hf_lowmem_optim.ops.sparse_window import SparseWindow, WindowStep, _update_all
from hf_lowmem_optim.ops.triton.device import on_device
from hf_lowmem_optim.ops.triton.tables import TYPES, owner_and_block, pointer, size
from hf_lowmem_optim.ops.triton.window_products import groups, num_programs, sparse_tile, step_tables

__all__ = ["update_all"]

#: What is sorted: 12 bits of index, 4 bits of row (row 15 marks padding), and keys of one program.
_SORTED_BLOCK_SIZE, _SORTED_WINDOW, _SORTED_SLOTS = 4096, 15, 2048
_NUM_WARPS = 4


@triton.jit
def weighted(key, mask, weights_ptr, WINDOW: tl.constexpr):
    """w1·V and w2·V² of sorted keys, each with the weights of its row."""
    row = ((key >> 16) & 15).to(tl.int32)
    value = (key << 16).to(tl.float32, bitcast=True)
    w1 = tl.load(weights_ptr + row, mask=mask, other=0.0)
    w2 = tl.load(weights_ptr + WINDOW + row, mask=mask, other=0.0)
    return w1 * value + 0.0, w2 * (value * value) + 0.0  # sums begin at +0


@triton.jit
def _sorted_update_kernel(
    table_ptr,  # [tensors, 6], see `step_tables`
    owners_ptr,
    weights_ptr,
    lr,
    eps,
    decay,
    WINDOW: tl.constexpr,
    KEPT_PER_BLOCK: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    SLOTS: tl.constexpr,
    TILE: tl.constexpr,
    HAS_DECAY: tl.constexpr,
    PARAM: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    record, block = owner_and_block(owners_ptr, table_ptr, tl.program_id(0), 6)
    param_ptr = pointer(record, 1, PARAM, ALIGNED)
    indices_ptr = pointer(record, 2, tl.int16, False)
    values_ptr = pointer(record, 3, tl.bfloat16, False)
    numel = size(record, 4, ALIGNED)
    kept = tl.load(record + 5)
    slot = tl.arange(0, SLOTS)

    # one key per entry: 12 bits index | 4 bits row | 16 bits bfloat16 value
    row = slot // KEPT_PER_BLOCK
    column = block * KEPT_PER_BLOCK + (slot - row * KEPT_PER_BLOCK)
    exists = (row < WINDOW) & (column < kept)
    w1 = tl.load(weights_ptr + row, mask=exists, other=0.0)
    w2 = tl.load(weights_ptr + WINDOW + row, mask=exists, other=0.0)
    exists = exists & ((w1 != 0) | (w2 != 0))
    entry = row * kept + column
    index = tl.load(indices_ptr + entry, mask=exists, other=0).to(tl.uint32)
    value_bits = tl.load(values_ptr + entry, mask=exists, other=0.0).to(tl.uint16, bitcast=True).to(tl.uint32)
    key = (index << 20) | (row.to(tl.uint32) << 16) | value_bits
    key = tl.sort(tl.where(exists, key, 0xFFFFFFFF))

    # z1 ← Σ w1·V, z2 ← Σ w2·V² in the order of the rows, at the first entry of each index
    index = key >> 20
    previous = tl.gather(key, tl.maximum(slot - 1, 0), 0) >> 20
    first = ((slot == 0) | (index != previous)) & (((key >> 16) & 15) != 15)
    z1, z2 = weighted(key, first, weights_ptr, WINDOW)
    offset = 1
    more = 1
    while more > 0:
        follower = tl.gather(key, tl.minimum(slot + offset, SLOTS - 1), 0)
        same = first & ((follower >> 20) == index) & (((follower >> 16) & 15) != 15) & (slot + offset < SLOTS)
        z1_more, z2_more = weighted(follower, same, weights_ptr, WINDOW)
        z1 = tl.where(same, z1 + z1_more, z1)
        z2 = tl.where(same, z2 + z2_more, z2)
        more = tl.max(same.to(tl.int32))
        offset += 1

    # W ← W·(1 − lr·wd) − lr·z1/(√z2 + eps); the touched entries are read before the decay of the block overwrites them
    start = block * BLOCK_SIZE
    touched_ptr = param_ptr + start + index.to(tl.int64)
    touched = tl.load(touched_ptr, mask=first, other=0.0).to(tl.float32)
    if HAS_DECAY:
        tl.debug_barrier()
        for tile in range(0, BLOCK_SIZE, TILE):
            inner = tile + tl.arange(0, TILE)
            inside = (inner < BLOCK_SIZE) & (start + inner < numel)
            dense = tl.load(param_ptr + start + inner, mask=inside, other=0.0).to(tl.float32)
            tl.store(param_ptr + start + inner, (dense * decay).to(PARAM), mask=inside)
        tl.debug_barrier()
        touched = touched * decay
    touched = touched - lr * tl.div_rn(z1, tl.sqrt_rn(z2) + eps)
    tl.store(touched_ptr, touched.to(PARAM), mask=first)


@triton.jit
def untouched(TILE: tl.constexpr):
    """−0 [TILE], by its bits: Triton 3.6 takes a literal −0.0 for +0."""
    return tl.full([TILE], 0x80000000, tl.uint32).to(tl.float32, bitcast=True)


@triton.jit
def is_untouched(z2):
    """Where z2 is −0, to which no square adds up."""
    return z2.to(tl.uint32, bitcast=True) == 0x80000000


@triton.jit
def _scratch_update_kernel(
    table_ptr,
    owners_ptr,
    weights_ptr,
    scratch_ptr,
    lr,
    eps,
    decay,
    num_blocks,
    window,
    kept_per_block,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    HAS_DECAY: tl.constexpr,
    PARAM: tl.constexpr,
    VALUES: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    program = tl.program_id(0)
    z1_ptr = scratch_ptr + program.to(tl.int64) * (2 * BLOCK_SIZE)
    z2_ptr = z1_ptr + BLOCK_SIZE
    lane = tl.arange(0, TILE)
    for number in range(program, num_blocks, tl.num_programs(0)):
        record, block = owner_and_block(owners_ptr, table_ptr, number, 6)
        param_ptr = pointer(record, 1, PARAM, ALIGNED)
        indices_ptr = pointer(record, 2, tl.int16, False)
        values_ptr = pointer(record, 3, VALUES, False)
        numel = size(record, 4, ALIGNED)
        kept = tl.load(record + 5)
        first = block * kept_per_block
        last = tl.minimum(first + kept_per_block, kept)
        start = block * BLOCK_SIZE

        # z1 ← +0, z2 ← −0 (untouched), only where they will be used
        if HAS_DECAY:
            for tile in range(0, BLOCK_SIZE, TILE):
                inside = tile + lane < BLOCK_SIZE
                tl.store(z1_ptr + tile + lane, tl.zeros([TILE], tl.float32), mask=inside)
                tl.store(z2_ptr + tile + lane, untouched(TILE), mask=inside)
        else:
            for row in range(window):
                w1 = tl.load(weights_ptr + row)
                w2 = tl.load(weights_ptr + window + row)
                if (w1 != 0) | (w2 != 0):
                    for tile in range(0, kept_per_block, TILE):
                        column = first + tile + lane
                        live = column < last
                        index = tl.load(indices_ptr + row * kept + column, mask=live, other=0)
                        tl.store(z1_ptr + index, tl.zeros([TILE], tl.float32), mask=live)
                        tl.store(z2_ptr + index, untouched(TILE), mask=live)
        tl.debug_barrier()

        # z1 ← Σ w1·V, z2 ← Σ w2·V², row after row
        for row in range(window):
            w1 = tl.load(weights_ptr + row)
            w2 = tl.load(weights_ptr + window + row)
            if (w1 != 0) | (w2 != 0):
                for tile in range(0, kept_per_block, TILE):
                    column = first + tile + lane
                    live = column < last
                    entry = row * kept + column
                    index = tl.load(indices_ptr + entry, mask=live, other=0)
                    value = tl.load(values_ptr + entry, mask=live, other=0.0).to(tl.float32)
                    z1 = tl.load(z1_ptr + index, mask=live, other=0.0)
                    z2 = tl.load(z2_ptr + index, mask=live, other=0.0)
                    tl.store(z1_ptr + index, z1 + w1 * value, mask=live)
                    tl.store(z2_ptr + index, z2 + w2 * (value * value), mask=live)
            tl.debug_barrier()

        # W ← W·(1 − lr·wd) − lr·z1/(√z2 + eps)
        if HAS_DECAY:
            for tile in range(0, BLOCK_SIZE, TILE):
                inner = tile + lane
                inside = (inner < BLOCK_SIZE) & (start + inner < numel)
                z1 = tl.load(z1_ptr + inner, mask=inside, other=0.0)
                z2 = tl.load(z2_ptr + inner, mask=inside, other=0.0)
                dense = tl.load(param_ptr + start + inner, mask=inside, other=0.0).to(tl.float32) * decay
                stepped = dense - lr * tl.div_rn(z1, tl.sqrt_rn(z2) + eps)
                dense = tl.where(is_untouched(z2), dense, stepped)
                tl.store(param_ptr + start + inner, dense.to(PARAM), mask=inside)
        else:
            for row in range(window):
                w1 = tl.load(weights_ptr + row)
                w2 = tl.load(weights_ptr + window + row)
                if (w1 != 0) | (w2 != 0):
                    for tile in range(0, kept_per_block, TILE):
                        column = first + tile + lane
                        entry = row * kept + column
                        index = tl.load(indices_ptr + entry, mask=column < last, other=0)
                        z2 = tl.load(z2_ptr + index, mask=column < last, other=0.0)
                        live = (column < last) & (is_untouched(z2) == 0)
                        z1 = tl.load(z1_ptr + index, mask=live, other=0.0)
                        sparse = tl.load(param_ptr + start + index, mask=live, other=0.0).to(tl.float32)
                        sparse = sparse - lr * tl.div_rn(z1, tl.sqrt_rn(z2) + eps)
                        tl.store(param_ptr + start + index, sparse.to(PARAM), mask=live)
                        tl.store(z2_ptr + index, untouched(TILE), mask=live)  # applied once
                tl.debug_barrier()
        tl.debug_barrier()


def sorted_slots(window: SparseWindow) -> int | None:
    """Return how many keys are sorted for a block, None where the rows are added up in scratch memory."""
    slots = max(128, 1 << (window.window * window.kept_per_block - 1).bit_length())
    fits = window.block_size <= _SORTED_BLOCK_SIZE and window.window <= _SORTED_WINDOW and slots <= _SORTED_SLOTS
    return slots if fits and window.values.dtype == torch.bfloat16 else None


def _dense_tile(param: Tensor, window: SparseWindow, num_warps: int) -> int:
    """Return the lanes for a loop over a block of the parameter: 16 bytes a thread, of up to 64 in a warp."""
    return int(min(16 * 64 * num_warps // param.itemsize, max(128, triton.next_power_of_2(window.block_size))))


@register(_update_all, "triton")
def update_all(steps: Sequence[WindowStep]) -> None:
    """Take MicroAdam's step for all tensors that are treated alike in one launch."""
    for group in groups(steps):
        slots = sorted_slots(group[0].rows)
        with on_device(group[0].param):
            if slots is not None:
                _launch_sorted(group, slots)
            else:
                _launch_scratch(group)


def _launch_sorted(steps: Sequence[WindowStep], slots: int) -> None:
    param, window, weights, lr, weight_decay, eps = steps[0]
    num_warps = max(4, slots // 256)
    table, owners, is_aligned = step_tables(steps)
    _sorted_update_kernel[(len(owners),)](
        table,
        owners,
        weights,
        float(lr),
        float(eps),
        1.0 - lr * weight_decay,
        WINDOW=window.window,
        KEPT_PER_BLOCK=window.kept_per_block,
        BLOCK_SIZE=window.block_size,
        SLOTS=slots,
        TILE=_dense_tile(param, window, num_warps),
        HAS_DECAY=weight_decay != 0,
        PARAM=TYPES[param.dtype],
        ALIGNED=is_aligned,
        num_warps=num_warps,
        enable_fp_fusion=False,
    )


def _launch_scratch(steps: Sequence[WindowStep]) -> None:
    param, window, weights, lr, weight_decay, eps = steps[0]
    table, owners, is_aligned = step_tables(steps)
    programs = num_programs(len(owners), window.block_size, 2)
    has_decay = weight_decay != 0
    tile = _dense_tile(param, window, _NUM_WARPS) if has_decay else sparse_tile(window.kept_per_block)
    scratch = torch.empty(programs, 2, window.block_size, dtype=torch.float32, device=param.device)
    _scratch_update_kernel[(programs,)](
        table,
        owners,
        weights,
        scratch,
        float(lr),
        float(eps),
        1.0 - lr * weight_decay,
        len(owners),
        window.window,
        window.kept_per_block,
        BLOCK_SIZE=window.block_size,
        TILE=tile,
        HAS_DECAY=has_decay,
        PARAM=TYPES[param.dtype],
        VALUES=TYPES[window.values.dtype],
        ALIGNED=is_aligned,
        num_warps=_NUM_WARPS,
        enable_fp_fusion=False,
    )
