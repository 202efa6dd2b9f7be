# mypy: disable-error-code="no-untyped-def, untyped-decorator, attr-defined, assignment, var-annotated"
"""Products of a sparse window's rows in Triton: with one of the rows, and with weights.

The product of two rows looks up each index of one among those of the other, which ascend. A combination of rows is
added up in a program's own scratch memory, as in ``sparse_window.py``; a block of the parameter is read and written
once.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_lowmem_optim.ops.constants import kept
from hf_lowmem_optim.ops.dispatch import register
from hf_lowmem_optim.ops.sparse_window import Rates, _combine, _descend_all, _gram_rows
from hf_lowmem_optim.ops.step_numbers import argument
from hf_lowmem_optim.ops.triton.device import by_value, on_device
from hf_lowmem_optim.ops.triton.tables import TYPES, Launch, block_tables, launches, owner_and_block, pointer, size
from hf_lowmem_optim.ops.triton.weight_correction import load_weight, store_weight
from hf_lowmem_optim.ops.triton.window import (
    addresses,
    index_of,
    load_grid,
    load_stored,
    stored_as,
    value_of,
)
from hf_lowmem_optim.ops.window import Memo, SparseWindow

__all__ = ["GRAM_ROWS", "combine", "descend_all", "gram_rows", "num_programs", "sparse_tile", "step_launches"]

#: Rows that a program multiplies with one of them, and how many programs share the blocks of all tensors, at most
#: (one more for each tensor).
GRAM_ROWS, _GRAM_PROGRAMS = 32, 4096
#: Scratch memory at most, which stays in the second-level cache.
_SCRATCH_BYTES = 1 << 25
_SPARSE_TILE = 1024
_DENSE_TILE = 1024
_GRAM_ENTRIES, _SUM_ENTRIES = 16, 1024
_NUM_WARPS = 4


@triton.jit
def weighted_row(
    indices_ptr, values_ptr, lo_ptr, step_ptr, weights_ptr, row, column, last, kept, window, block, blocks,
    VALUES: tl.constexpr,
):  # fmt: skip
    """Index and weighted value of a row's entries at ``column``, and which there are: none in a row of weight zero."""
    weight = tl.load(weights_ptr + tl.minimum(row, window - 1))
    some = (row < window) & (weight != 0.0)
    live = column < tl.where(some, last, 0)
    index, stored = load_stored(indices_ptr, values_ptr, row * kept + column, live, VALUES)
    lo, step = load_grid(lo_ptr, step_ptr, row * blocks + block, some, VALUES)
    return index, weight * value_of(stored, lo, step, VALUES), live


@triton.jit
def add_row(dense_ptr, index, part, live):
    """Add what :func:`weighted_row` gave to a dense block; the next row may meet the same entries."""
    dense = tl.load(dense_ptr + index, mask=live, other=0.0)
    tl.store(dense_ptr + index, dense + part, mask=live)
    tl.debug_barrier()


@triton.jit
def add_rows(
    dense_ptr, indices_ptr, values_ptr, lo_ptr, step_ptr, weights_ptr, block, blocks, kept, window, kept_per_block,
    VALUES: tl.constexpr, TILE: tl.constexpr, ONE_TILE: tl.constexpr,
):  # fmt: skip
    """Add weighted rows of a block to a dense block, row after row."""
    first = block * kept_per_block
    last = tl.minimum(first + kept_per_block, kept)
    column = first + tl.arange(0, TILE)
    if ONE_TILE:
        # four rows are loaded before the first is added
        for row in range(0, window, 4):
            parts = ()
            for ahead in tl.static_range(4):
                parts += (
                    weighted_row(
                        indices_ptr, values_ptr, lo_ptr, step_ptr, weights_ptr, row + ahead, column, last, kept,
                        window, block, blocks, VALUES,
                    ),
                )  # fmt: skip
            for ahead in tl.static_range(4):
                index, part, live = parts[ahead]
                add_row(dense_ptr, index, part, live)
    else:
        for row in range(window):
            for tile in range(0, kept_per_block, TILE):
                index, part, live = weighted_row(
                    indices_ptr, values_ptr, lo_ptr, step_ptr, weights_ptr, row, column + tile, last, kept, window,
                    block, blocks, VALUES,
                )  # fmt: skip
                add_row(dense_ptr, index, part, live)


@triton.jit
def _combine_kernel(
    out_ptr,
    indices_ptr,
    values_ptr,
    lo_ptr,
    step_ptr,
    weights_ptr,
    kept,
    window,
    kept_per_block,
    BLOCK_SIZE: tl.constexpr,
    VALUES: tl.constexpr,
    TILE: tl.constexpr,
    ONE_TILE: tl.constexpr,
):
    kept = tl.cast(kept, tl.int64)
    block = tl.program_id(0).to(tl.int64)
    add_rows(
        out_ptr + block * BLOCK_SIZE, indices_ptr, values_ptr, lo_ptr, step_ptr, weights_ptr, block,
        tl.num_programs(0), kept, window, kept_per_block, VALUES, TILE, ONE_TILE,
    )  # fmt: skip


@triton.jit
def place_of(index, indices_ptr, length, LOG: tl.constexpr, VALUES: tl.constexpr):
    """Where int16 ``indices_ptr[:length]``, which ascend, reach ``index``; length is at most 2^LOG."""
    place = index * 0
    for half in tl.static_range(LOG):
        step = 1 << (LOG - 1 - half)
        probe = place + (step - 1)
        before = index_of(tl.load(indices_ptr + probe, mask=probe < length, other=32767), VALUES) < index
        place = tl.where(before, place + step, place)
    return place


@triton.jit(do_not_specialize=["row"])
def _gram_row_kernel(
    table_ptr,  # [tensors, 7]: first program, indices, values, number of blocks, entries of a row, lo, step
    owners_ptr,
    partial_ptr,  # [programs, window]
    row,
    window,
    kept_per_block,
    blocks_each,  # of a program
    VALUES: tl.constexpr,
    ROWS: tl.constexpr,
    ENTRIES: tl.constexpr,
    LOG: tl.constexpr,  # kept_per_block is at most 2^LOG
):
    row = by_value(row)
    program = tl.program_id(0)
    record, chunk = owner_and_block(owners_ptr, table_ptr, program, 7)
    indices_ptr = pointer(record, 1, tl.int16, False)
    values_ptr = pointer(record, 2, VALUES, False)
    blocks = tl.load(record + 3)
    kept = tl.load(record + 4)
    lo_ptr = pointer(record, 5, tl.float32, False)
    step_ptr = pointer(record, 6, tl.float32, False)
    others = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    total = tl.zeros([ROWS, ENTRIES], tl.float64)
    for block in range(chunk * blocks_each, tl.minimum((chunk + 1) * blocks_each, blocks)):
        first = block * kept_per_block
        length = tl.minimum(kept - first, kept_per_block).to(tl.int32)
        newest = row * kept + first
        lo, step = load_grid(lo_ptr, step_ptr, others[:, None] * blocks + block, others[:, None] < window, VALUES)
        newest_lo, newest_step = load_grid(lo_ptr, step_ptr, row * blocks + block, True, VALUES)
        for entry in range(0, kept_per_block, ENTRIES):
            column = entry + tl.arange(0, ENTRIES)[None, :]
            there = (others[:, None] < window) & (column < length)
            at = others[:, None] * kept + first + column
            index, stored = load_stored(indices_ptr, values_ptr, at, there, VALUES)
            value = value_of(stored, lo, step, VALUES)
            place = place_of(index, indices_ptr + newest, length, LOG, VALUES)
            inside = there & (place < length)
            found, stored = load_stored(indices_ptr, values_ptr, newest + place, inside, VALUES)
            match = inside & (found == index)
            factor = tl.where(match, value_of(stored, newest_lo, newest_step, VALUES), 0.0)
            total += factor.to(tl.float64) * tl.where(match, value, 0.0).to(tl.float64)
    tl.store(partial_ptr + program.to(tl.int64) * window + others, tl.sum(total, 1), mask=others < window)


@triton.jit
def _sum_kernel(table_ptr, partial_ptr, out_ptr, num_programs, window, WINDOW: tl.constexpr, TILE: tl.constexpr):
    """Add up the programs of each tensor, in an order that depends on their number only."""
    tensor = tl.program_id(0)
    first = tl.load(table_ptr + tensor * 7)
    stop = tl.load(table_ptr + tensor * 7 + 7, mask=tensor + 1 < tl.num_programs(0), other=num_programs)
    row = tl.arange(0, WINDOW)[None, :]
    total = tl.zeros([TILE, WINDOW], tl.float64)
    for tile in range(first, stop, TILE):
        program = tile + tl.arange(0, TILE)[:, None]
        total += tl.load(partial_ptr + program * window + row, mask=(program < stop) & (row < window), other=0.0)
    at = tl.arange(0, WINDOW)
    tl.store(out_ptr + tensor * window + at, tl.sum(total, 0), mask=at < window)


@triton.jit
def _descend_kernel(
    table_ptr,  # [tensors, 10], see `step_launches`
    owners_ptr,
    weights_ptr,
    scratch_ptr,
    lr,
    decay,
    num_blocks,
    window,
    weights_each,  # from a tensor's weights to the next one's, 0 if they are the same
    kept_per_block,
    BLOCK_SIZE: tl.constexpr,
    SPARSE: tl.constexpr,
    ONE_TILE: tl.constexpr,  # whether SPARSE lanes are enough for a row of a block
    DENSE: tl.constexpr,
    HAS_DECAY: tl.constexpr,
    PARAM: tl.constexpr,
    CORRECTED: tl.constexpr,
    VALUES: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    lr, decay = by_value(lr), by_value(decay)
    program = tl.program_id(0)
    direction_ptr = scratch_ptr + program.to(tl.int64) * BLOCK_SIZE
    for number in range(program, num_blocks, tl.num_programs(0)):
        record, block = owner_and_block(owners_ptr, table_ptr, number, 10)
        param_ptr = pointer(record, 1, PARAM, ALIGNED)
        indices_ptr = pointer(record, 2, tl.int16, False)
        values_ptr = pointer(record, 3, VALUES, False)
        numel = size(record, 4, ALIGNED)
        kept = tl.load(record + 5)
        lo_ptr = pointer(record, 6, tl.float32, False)
        step_ptr = pointer(record, 7, tl.float32, False)
        own_weights_ptr = weights_ptr + tl.load(record + 8) * weights_each
        start = block * BLOCK_SIZE
        correction_ptr = pointer(record, 9, tl.int8, ALIGNED) + start if CORRECTED else None
        for tile in range(0, BLOCK_SIZE, DENSE):
            inner = tile + tl.arange(0, DENSE)
            tl.store(direction_ptr + inner, tl.zeros([DENSE], tl.float32), mask=inner < BLOCK_SIZE)
        tl.debug_barrier()

        # u ← Gᵀw
        add_rows(
            direction_ptr, indices_ptr, values_ptr, lo_ptr, step_ptr, own_weights_ptr, block,
            tl.cdiv(numel, BLOCK_SIZE), kept, window, kept_per_block, VALUES, SPARSE, ONE_TILE,
        )  # fmt: skip

        # W ← W·(1 − lr·wd) − lr·u
        for tile in range(0, BLOCK_SIZE, DENSE):
            inner = tile + tl.arange(0, DENSE)
            inside = (inner < BLOCK_SIZE) & (start + inner < numel)
            u = tl.load(direction_ptr + inner, mask=inside, other=0.0)
            weight = load_weight(param_ptr + start, correction_ptr, inner, inside).to(tl.float32)
            if HAS_DECAY:
                weight = weight * decay
            store_weight(param_ptr + start, correction_ptr, inner, weight - u * lr, inside)
        tl.debug_barrier()


def num_programs(num_blocks: int, block_size: int, blocks: int = 1) -> int:
    """Return how many programs with so many blocks of scratch memory each stay in the second-level cache."""
    return max(1, min(num_blocks, _SCRATCH_BYTES // (4 * block_size * blocks)))


def sparse_tile(kept: int) -> int:
    """Return the lanes for a loop over ``kept`` entries of a row."""
    return int(min(_SPARSE_TILE, max(64, triton.next_power_of_2(kept))))


def _num_warps(kept: int) -> int:
    """Return the warps that add up rows: more would have nothing to do."""
    return 2 if sparse_tile(kept) <= 128 else _NUM_WARPS


def step_launches(
    params: Sequence[Tensor], windows: Sequence[SparseWindow], memo: Memo, corrections: Sequence[Tensor] | None
) -> list[tuple[Launch, Tensor]]:
    """Return the launches that serve parameters, a program for each block, and the table of each.

    A record is: first program; addresses of parameter, indices, values; entries of the tensor, and of a row; addresses
    of lo and step; the tensor's place in the call; address of the correction of a compensated weight.
    """

    def record(place: int) -> tuple[int, ...]:
        window = windows[place]
        values, *grid = addresses(window.values, window.grids)
        correction = 0 if corrections is None else corrections[place].data_ptr()
        return window.indices.data_ptr(), values, window.numel, window.kept, *grid, place, correction

    def others(place: int) -> Sequence[Tensor]:
        return corrections[place : place + 1] if corrections else ()

    name = "steps in Triton" if corrections is None else "steps with corrections in Triton"
    found, places = launches(params, record, lambda place: windows[place].num_blocks, memo, name, others=others)
    return [(launch, launch.table(places)) for launch in found]


@register(_combine, "triton")
def combine(out: Tensor, window: SparseWindow, weights: Tensor) -> None:
    """Add the combination in one launch."""
    with on_device(out):
        _combine_kernel[(window.num_blocks,)](
            out,
            window.indices,
            window.indices if window.values is None else window.values,
            *(window.grids or (None, None)),
            weights,
            window.kept,
            window.window,
            window.kept_per_block,
            BLOCK_SIZE=window.block_size,
            VALUES=stored_as(window.values, window.grids),
            TILE=sparse_tile(window.kept_per_block),
            ONE_TILE=sparse_tile(window.kept_per_block) >= window.kept_per_block,
            num_warps=_num_warps(window.kept_per_block),
            enable_fp_fusion=False,
        )


@register(_gram_rows, "triton")
def gram_rows(windows: Sequence[SparseWindow], row: int, memo: Memo) -> Tensor:
    """Multiply and add up: two launches."""
    one, device = windows[0], windows[0].device
    if "products in Triton" not in memo:
        memo["products in Triton"] = _product_tables(windows)
    table, owners, each = memo["products in Triton"]
    kept(table)
    kept(owners)
    partial = torch.empty(len(owners), one.window, dtype=torch.float64, device=device)
    out = torch.empty(len(windows), one.window, dtype=torch.float64, device=device)
    with on_device(out):
        _gram_row_kernel[(len(owners), triton.cdiv(one.window, GRAM_ROWS))](
            table,
            owners,
            partial,
            argument(row, int),
            one.window,
            one.kept_per_block,
            each,
            VALUES=stored_as(one.values, one.grids),
            ROWS=GRAM_ROWS,
            ENTRIES=_GRAM_ENTRIES,
            LOG=(one.kept_per_block - 1).bit_length(),
            num_warps=_NUM_WARPS,
            enable_fp_fusion=False,
        )
        columns = triton.next_power_of_2(one.window)
        tile = max(1, _SUM_ENTRIES // columns)
        _sum_kernel[(len(windows),)](
            table, partial, out, len(owners), one.window, WINDOW=columns, TILE=tile, enable_fp_fusion=False
        )
    return out


def _product_tables(windows: Sequence[SparseWindow]) -> tuple[Tensor, Tensor, int]:
    """Return the tables of the launches for products, and how many blocks a program has."""
    blocks = [window.num_blocks for window in windows]
    each = -(-sum(blocks) // _GRAM_PROGRAMS)
    records = []
    for window in windows:
        values, *grid = addresses(window.values, window.grids)
        records.append((window.indices.data_ptr(), values, window.num_blocks, window.kept, *grid))
    return *block_tables(records, [-(-count // each) for count in blocks], windows[0].device), each


@register(_descend_all, "triton")
def descend_all(
    params: Sequence[Tensor], windows: Sequence[SparseWindow], weights: Tensor, rates: Rates, memo: Memo,
    corrections: Sequence[Tensor] | None,
) -> None:  # fmt: skip
    """Descend with all tensors in one launch, and another for those that are not aligned."""
    one, param = windows[0], params[0]
    for launch, table in step_launches(params, windows, memo, corrections):
        programs = num_programs(len(launch.owners), one.block_size)
        scratch = torch.empty(programs * one.block_size, dtype=torch.float32, device=param.device)
        with on_device(param):
            _descend_kernel[(programs,)](
                table,
                launch.owners,
                weights,
                scratch,
                argument(rates.lr),
                argument(1 - rates.lr * rates.weight_decay),
                len(launch.owners),
                one.window,
                one.window if weights.dim() == 2 else 0,
                one.kept_per_block,
                BLOCK_SIZE=one.block_size,
                SPARSE=sparse_tile(one.kept_per_block),
                ONE_TILE=sparse_tile(one.kept_per_block) >= one.kept_per_block,
                DENSE=int(min(_DENSE_TILE, max(128, triton.next_power_of_2(one.block_size)))),
                HAS_DECAY=rates.weight_decay != 0,
                PARAM=TYPES[param.dtype],
                CORRECTED=corrections is not None,
                VALUES=stored_as(one.values, one.grids),
                ALIGNED=launch.is_aligned,
                num_warps=_num_warps(one.kept_per_block),
                enable_fp_fusion=False,
            )
