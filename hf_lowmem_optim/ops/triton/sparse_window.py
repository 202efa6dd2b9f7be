# mypy: disable-error-code="no-untyped-def, untyped-decorator, attr-defined, assignment, var-annotated, unreachable"
"""Adam's statistics of a sparse window in Triton, added up row after row in scratch memory.

Triton has no scatter into shared memory. One program at a time owns a piece of global scratch memory, small enough to
stay in the second-level cache. Indices of a row are unique, so that only rows must be kept apart, by barriers.

Held: for windows of a block that fit registers, as the usual ones do. Everything is loaded before the first row is
added, and an entry is written where its first row meets it, so that the rows need barriers only while they add up.

Looped: for any window and density.

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
from hf_lowmem_optim.ops.sparse_window import Rates, _update_all
from hf_lowmem_optim.ops.step_numbers import argument
from hf_lowmem_optim.ops.triton.device import by_value, on_device
from hf_lowmem_optim.ops.triton.tables import TYPES, Launch, owner_and_block, pointer, size
from hf_lowmem_optim.ops.triton.weight_correction import load_weight, store_weight
from hf_lowmem_optim.ops.triton.window import index_of, load_grid, load_stored, stored_as, value_of
from hf_lowmem_optim.ops.triton.window_products import num_programs, sparse_tile, step_launches
from hf_lowmem_optim.ops.window import Memo, SparseWindow

__all__ = ["update_all"]

#: Rows, and kept entries of a block, of a window that a program's registers hold, one entry of each row a thread.
_MOST_ROWS, _MOST_KEPT = 16, 256
_NUM_WARPS = 4


@triton.jit
def untouched(TILE: tl.constexpr):
    """−0 [TILE], by its bits: Triton 3.6 takes a literal −0.0 for +0."""
    return tl.full([TILE], 0x80000000, tl.uint32).to(tl.float32, bitcast=True)


@triton.jit
def is_untouched(z2):
    """Where z2 is −0, to which no square adds up."""
    return z2.to(tl.uint32, bitcast=True) == 0x80000000


@triton.jit
def load_cells(cells_ptr, index, mask):
    """z1 and z2 of entries: the low and the high half of a 64-bit cell."""
    cell = tl.load(cells_ptr + index, mask=mask, other=0)
    return cell.to(tl.int32).to(tl.float32, bitcast=True), (cell >> 32).to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def pack(z1, z2):
    """What :func:`load_cells` takes apart."""
    return (z2.to(tl.uint32, bitcast=True).to(tl.int64) << 32) | z1.to(tl.uint32, bitcast=True).to(tl.int64)


@triton.jit
def _held_update_kernel(
    table_ptr,  # [tensors, 10], see `step_launches`
    owners_ptr,
    weights_ptr,
    cells_ptr,  # int64 [programs, BLOCK_SIZE]
    lr,
    eps,
    decay,
    num_blocks,
    kept_per_block,
    WINDOW: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,  # at least kept_per_block
    DENSE: tl.constexpr,
    HAS_DECAY: tl.constexpr,
    PARAM: tl.constexpr,
    CORRECTED: tl.constexpr,
    VALUES: tl.constexpr,
    ALIGNED: tl.constexpr,
    LATE_SCALARS: tl.constexpr,  # a row's weights and grid are loaded as they are needed
):
    lr, decay = by_value(lr), by_value(decay)
    program = tl.program_id(0)
    cells_ptr += program.to(tl.int64) * BLOCK_SIZE
    lane = tl.arange(0, TILE)
    nothing = pack(tl.zeros([TILE], tl.float32), untouched(TILE))
    for tile in range(0, BLOCK_SIZE, TILE):
        tl.store(cells_ptr + tile + lane, nothing, mask=tile + lane < BLOCK_SIZE)
    weights = ()
    for row in tl.static_range(WINDOW):
        w1 = tl.load(weights_ptr + row)
        w2 = tl.load(weights_ptr + WINDOW + row)
        weights += ((w1, w2, tl.where((w1 != 0) | (w2 != 0), kept_per_block, 0)),)

    for number in range(program, num_blocks, tl.num_programs(0)):
        record, block = owner_and_block(owners_ptr, table_ptr, number, 10)
        param_ptr = pointer(record, 1, PARAM, ALIGNED)
        indices_ptr = pointer(record, 2, tl.int16, False)
        values_ptr = pointer(record, 3, VALUES, False)
        numel = size(record, 4, ALIGNED)
        kept = tl.load(record + 5)
        lo_ptr = pointer(record, 6, tl.float32, False)
        step_ptr = pointer(record, 7, tl.float32, False)
        blocks = tl.cdiv(numel, BLOCK_SIZE)
        column = block * kept_per_block + lane
        start = block * BLOCK_SIZE
        param_ptr += start
        correction_ptr = pointer(record, 9, tl.int8, ALIGNED) + start if CORRECTED else None
        rows = ()
        for row in tl.static_range(WINDOW):
            live = (column < kept) & (lane < weights[row][2])
            index, stored = load_stored(indices_ptr, values_ptr, row * kept + column, live, VALUES)
            lo, step = 0.0, 0.0
            if not LATE_SCALARS:
                lo, step = load_grid(lo_ptr, step_ptr, row * blocks + block, weights[row][2] > 0, VALUES)
            rows += ((live, index, stored, lo, step),)
        old = ()
        for row in tl.static_range(WINDOW):
            old += (load_weight(param_ptr, correction_ptr, rows[row][1], rows[row][0]),)
        tl.debug_barrier()  # every cell is untouched

        # z1 ← Σ w1·V, z2 ← Σ w2·V², row after row; an entry belongs to the first row that meets it
        mine = ()
        for row in tl.static_range(WINDOW):
            live, index, stored, lo, step = rows[row]
            w1, w2, some = weights[row]
            if LATE_SCALARS:
                w1 = tl.load(weights_ptr + row)
                w2 = tl.load(weights_ptr + WINDOW + row)
                some = tl.where((w1 != 0) | (w2 != 0), kept_per_block, 0)
                live = (column < kept) & (lane < some)
                lo, step = load_grid(lo_ptr, step_ptr, row * blocks + block, some > 0, VALUES)
            value = value_of(stored, lo, step, VALUES)
            z1, z2 = load_cells(cells_ptr, index, live)
            mine += (live & is_untouched(z2),)
            z1 += w1 * value
            z2 += w2 * (value * value)
            tl.store(cells_ptr + index, pack(z1, z2), mask=live)
            tl.debug_barrier()

        # W ← W·(1 − lr·wd) − lr·z1/(√z2 + eps)
        if HAS_DECAY:
            for tile in range(0, BLOCK_SIZE, DENSE):
                inner = tile + tl.arange(0, DENSE)
                exists = (inner < BLOCK_SIZE) & (start + inner < numel)
                dense = load_weight(param_ptr, correction_ptr, inner, exists).to(tl.float32)
                store_weight(param_ptr, correction_ptr, inner, dense * decay, exists)
            tl.debug_barrier()
        for row in tl.static_range(WINDOW):
            index = rows[row][1]
            z1, z2 = load_cells(cells_ptr, index, mine[row])
            touched = old[row].to(tl.float32)
            if HAS_DECAY:
                touched = touched * decay
            touched = touched - lr * tl.div_rn(z1, tl.sqrt_rn(z2) + eps)
            store_weight(param_ptr, correction_ptr, index, touched, mine[row])
            tl.store(cells_ptr + index, nothing, mask=mine[row])


@triton.jit
def _looped_update_kernel(
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
    CORRECTED: tl.constexpr,
    VALUES: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    lr, decay = by_value(lr), by_value(decay)
    program = tl.program_id(0)
    z1_ptr = scratch_ptr + program.to(tl.int64) * (2 * BLOCK_SIZE)
    z2_ptr = z1_ptr + BLOCK_SIZE
    lane = tl.arange(0, TILE)
    for number in range(program, num_blocks, tl.num_programs(0)):
        record, block = owner_and_block(owners_ptr, table_ptr, number, 10)
        param_ptr = pointer(record, 1, PARAM, ALIGNED)
        indices_ptr = pointer(record, 2, tl.int16, False)
        values_ptr = pointer(record, 3, VALUES, False)
        numel = size(record, 4, ALIGNED)
        kept = tl.load(record + 5)
        lo_ptr = pointer(record, 6, tl.float32, False)
        step_ptr = pointer(record, 7, tl.float32, False)
        blocks = tl.cdiv(numel, BLOCK_SIZE)
        first = block * kept_per_block
        last = tl.minimum(first + kept_per_block, kept)
        start = block * BLOCK_SIZE
        param_ptr += start
        correction_ptr = pointer(record, 9, tl.int8, ALIGNED) + start if CORRECTED else None

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
                        index = index_of(tl.load(indices_ptr + row * kept + column, mask=live, other=0), VALUES)
                        tl.store(z1_ptr + index, tl.zeros([TILE], tl.float32), mask=live)
                        tl.store(z2_ptr + index, untouched(TILE), mask=live)
        tl.debug_barrier()

        # z1 ← Σ w1·V, z2 ← Σ w2·V², row after row
        for row in range(window):
            w1 = tl.load(weights_ptr + row)
            w2 = tl.load(weights_ptr + window + row)
            if (w1 != 0) | (w2 != 0):
                lo, step = load_grid(lo_ptr, step_ptr, row * blocks + block, True, VALUES)
                for tile in range(0, kept_per_block, TILE):
                    column = first + tile + lane
                    live = column < last
                    entry = row * kept + column
                    index, stored = load_stored(indices_ptr, values_ptr, entry, live, VALUES)
                    value = value_of(stored, lo, step, VALUES)
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
                dense = load_weight(param_ptr, correction_ptr, inner, inside).to(tl.float32) * decay
                stepped = dense - lr * tl.div_rn(z1, tl.sqrt_rn(z2) + eps)
                dense = tl.where(is_untouched(z2), dense, stepped)
                store_weight(param_ptr, correction_ptr, inner, dense, inside)
        else:
            for row in range(window):
                w1 = tl.load(weights_ptr + row)
                w2 = tl.load(weights_ptr + window + row)
                if (w1 != 0) | (w2 != 0):
                    for tile in range(0, kept_per_block, TILE):
                        column = first + tile + lane
                        entry = row * kept + column
                        index = index_of(tl.load(indices_ptr + entry, mask=column < last, other=0), VALUES)
                        z2 = tl.load(z2_ptr + index, mask=column < last, other=0.0)
                        live = (column < last) & (is_untouched(z2) == 0)
                        z1 = tl.load(z1_ptr + index, mask=live, other=0.0)
                        sparse = load_weight(param_ptr, correction_ptr, index, live).to(tl.float32)
                        sparse = sparse - lr * tl.div_rn(z1, tl.sqrt_rn(z2) + eps)
                        store_weight(param_ptr, correction_ptr, index, sparse, live)
                        tl.store(z2_ptr + index, untouched(TILE), mask=live)  # applied once
                tl.debug_barrier()
        tl.debug_barrier()


def _holds(window: SparseWindow) -> bool:
    """Return whether a program's registers hold the kept entries of a block, of all rows."""
    return window.window <= _MOST_ROWS and window.kept_per_block <= _MOST_KEPT


def _dense_tile(param: Tensor, window: SparseWindow, num_warps: int, corrected: bool) -> int:
    """Return the lanes for a loop over a block of the parameter: 16 bytes a thread, of up to 64 in a warp."""
    # twice as many in a warp of 32, unless corrections take registers
    threads = num_warps * (32 if corrected and not torch.version.hip else 64)
    return int(min(16 * threads // param.itemsize, max(128, triton.next_power_of_2(window.block_size))))


@register(_update_all, "triton")
def update_all(
    params: Sequence[Tensor], windows: Sequence[SparseWindow], weights: Tensor, rates: Rates, memo: Memo,
    corrections: Sequence[Tensor] | None,
) -> None:  # fmt: skip
    """Take MicroAdam's step for all tensors in one launch, and another for those that are not aligned."""
    with on_device(params[0]):
        for launch, table in step_launches(params, windows, memo, corrections):
            run = _launch_held if _holds(windows[0]) else _launch_looped
            run(launch, table, params[0], windows[0], weights, rates, corrections is not None)


def _launch_held(
    launch: Launch, table: Tensor, param: Tensor, window: SparseWindow, weights: Tensor, rates: Rates, corrected: bool
) -> None:
    """Launch the update of tensors; ``param`` and ``window`` are those of one of them."""
    programs = num_programs(len(launch.owners), window.block_size, 2)
    tile = sparse_tile(window.kept_per_block)
    num_warps = tile // (64 if torch.version.hip else 32)
    _held_update_kernel[(programs,)](
        table,
        launch.owners,
        weights,
        torch.empty(programs, window.block_size, dtype=torch.int64, device=param.device),
        argument(rates.lr),
        float(rates.eps),
        argument(1 - rates.lr * rates.weight_decay),
        len(launch.owners),
        window.kept_per_block,
        WINDOW=window.window,
        BLOCK_SIZE=window.block_size,
        TILE=tile,
        DENSE=_dense_tile(param, window, num_warps, corrected),
        HAS_DECAY=rates.weight_decay != 0,
        PARAM=TYPES[param.dtype],
        CORRECTED=corrected,
        VALUES=stored_as(window.values, window.grids),
        ALIGNED=launch.is_aligned,
        LATE_SCALARS=bool(torch.version.hip),  # AMD's scalar registers do not hold those of all rows
        num_warps=num_warps,
        enable_fp_fusion=False,
    )


def _launch_looped(
    launch: Launch, table: Tensor, param: Tensor, window: SparseWindow, weights: Tensor, rates: Rates, corrected: bool
) -> None:
    """Launch the update of tensors of which a program's registers do not hold the rows; likewise."""
    programs = num_programs(len(launch.owners), window.block_size, 2)
    tile = sparse_tile(window.kept_per_block)
    if rates.weight_decay != 0:
        tile = _dense_tile(param, window, _NUM_WARPS, corrected)
    scratch = torch.empty(programs, 2, window.block_size, dtype=torch.float32, device=param.device)
    _looped_update_kernel[(programs,)](
        table,
        launch.owners,
        weights,
        scratch,
        argument(rates.lr),
        float(rates.eps),
        argument(1 - rates.lr * rates.weight_decay),
        len(launch.owners),
        window.window,
        window.kept_per_block,
        BLOCK_SIZE=window.block_size,
        TILE=tile,
        HAS_DECAY=rates.weight_decay != 0,
        PARAM=TYPES[param.dtype],
        CORRECTED=corrected,
        VALUES=stored_as(window.values, window.grids),
        ALIGNED=launch.is_aligned,
        num_warps=_NUM_WARPS,
        enable_fp_fusion=False,
    )
