# mypy: disable-error-code="no-untyped-def, untyped-decorator, attr-defined"
"""Products of a sparse window's rows in Triton: with a vector, with one of the rows, with weights.

A block of a dense vector that is needed in between lies in a program's own scratch memory, as in ``kernel.py``; blocks
of the parameter are read and written once.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_lowmem_optim.kernels.backend import on_device
from hf_lowmem_optim.kernels.sparse_window.layout import GRAM_ROWS, SparseWindow, WindowStep, num_programs

__all__ = ["combine_", "descend_all_", "dots", "gram_row", "sparse_tile"]

SPARSE_TILE = 1024
DOTS_PROGRAMS = 256
_DENSE_TILE = 1024
_GRAM_ENTRIES = 128
_NUM_WARPS = 4


@triton.jit
def _dots_kernel(
    dense_ptr,
    indices_ptr,
    values_ptr,
    partial_ptr,
    kept,
    BLOCK_SIZE: tl.constexpr,
    KEPT_PER_BLOCK: tl.constexpr,
    TILE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    total = tl.zeros([TILE], tl.float64)
    for tile in range(tl.program_id(1), tl.cdiv(kept, TILE), tl.num_programs(1)):
        column = tile * TILE + tl.arange(0, TILE)
        entry = row * kept + column
        index = tl.load(indices_ptr + entry, mask=column < kept, other=0).to(tl.int64)
        position = (column // KEPT_PER_BLOCK).to(tl.int64) * BLOCK_SIZE + index
        dense = tl.load(dense_ptr + position, mask=column < kept, other=0.0).to(tl.float64)
        value = tl.load(values_ptr + entry, mask=column < kept, other=0.0).to(tl.float32).to(tl.float64)
        total += dense * value
    tl.store(partial_ptr + row * tl.num_programs(1) + tl.program_id(1), tl.sum(total, 0))


@triton.jit
def add_rows(dense_ptr, indices_ptr, values_ptr, weights_ptr, first, kept, window, kept_per_block, TILE: tl.constexpr):
    """Add weighted rows of the block whose columns begin at ``first`` to a dense block, row after row."""
    last = tl.minimum(first + kept_per_block, kept)
    for row in range(window):
        weight = tl.load(weights_ptr + row)
        if weight != 0:
            for tile in range(0, kept_per_block, TILE):
                column = first + tile + tl.arange(0, TILE)
                entry = row * kept + column
                index = tl.load(indices_ptr + entry, mask=column < last, other=0)
                value = tl.load(values_ptr + entry, mask=column < last, other=0.0).to(tl.float32)
                dense = tl.load(dense_ptr + index, mask=column < last, other=0.0)
                tl.store(dense_ptr + index, dense + weight * value, mask=column < last)
        tl.debug_barrier()


@triton.jit
def _combine_kernel(
    out_ptr,
    indices_ptr,
    values_ptr,
    weights_ptr,
    kept,
    window,
    kept_per_block,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
):
    kept = tl.cast(kept, tl.int64)
    block = tl.program_id(0).to(tl.int64)
    first, block_ptr = block * kept_per_block, out_ptr + block * BLOCK_SIZE
    add_rows(block_ptr, indices_ptr, values_ptr, weights_ptr, first, kept, window, kept_per_block, TILE)


@triton.jit(do_not_specialize=["row"])
def _gram_row_kernel(
    indices_ptr,
    values_ptr,
    scratch_ptr,
    partial_ptr,  # [window, programs]
    row,
    kept,
    num_blocks,
    window,
    kept_per_block,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    ROWS: tl.constexpr,
    ENTRIES: tl.constexpr,
):
    kept = tl.cast(kept, tl.int64)
    program = tl.program_id(0)
    dense_ptr = scratch_ptr + (tl.program_id(1) * tl.num_programs(0) + program).to(tl.int64) * BLOCK_SIZE
    lane = tl.arange(0, TILE)
    others = tl.program_id(1) * ROWS + tl.arange(0, ROWS)[:, None]
    total = tl.zeros([ROWS, ENTRIES], tl.float64)
    for tile in range(0, BLOCK_SIZE, TILE):
        tl.store(dense_ptr + tile + lane, tl.zeros([TILE], tl.float32), mask=tile + lane < BLOCK_SIZE)
    tl.debug_barrier()
    for block in range(program, num_blocks, tl.num_programs(0)):
        first = tl.cast(block, tl.int64) * kept_per_block
        last = tl.minimum(first + kept_per_block, kept)
        # the row's block becomes dense, is gathered from, and is zero again
        for tile in range(0, kept_per_block, TILE):
            column = first + tile + lane
            index = tl.load(indices_ptr + row * kept + column, mask=column < last, other=0)
            value = tl.load(values_ptr + row * kept + column, mask=column < last, other=0.0).to(tl.float32)
            tl.store(dense_ptr + index, value, mask=column < last)
        tl.debug_barrier()
        for entry in range(0, kept_per_block, ENTRIES):
            column = first + entry + tl.arange(0, ENTRIES)[None, :]
            there = (others < window) & (column < last)
            index = tl.load(indices_ptr + others * kept + column, mask=there, other=0)
            value = tl.load(values_ptr + others * kept + column, mask=there, other=0.0).to(tl.float32)
            dense = tl.load(dense_ptr + index, mask=there, other=0.0)
            total += dense.to(tl.float64) * value.to(tl.float64)
        tl.debug_barrier()
        for tile in range(0, kept_per_block, TILE):
            column = first + tile + lane
            index = tl.load(indices_ptr + row * kept + column, mask=column < last, other=0)
            tl.store(dense_ptr + index, tl.zeros([TILE], tl.float32), mask=column < last)
        tl.debug_barrier()
    other = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    tl.store(partial_ptr + other * tl.num_programs(0) + program, tl.sum(total, 1), mask=other < window)


@triton.jit
def _descend_kernel(
    param_ptr,
    indices_ptr,
    values_ptr,
    weights_ptr,
    scratch_ptr,
    lr,
    decay,
    numel,
    kept,
    num_blocks,
    window,
    kept_per_block,
    BLOCK_SIZE: tl.constexpr,
    SPARSE: tl.constexpr,
    DENSE: tl.constexpr,
    HAS_DECAY: tl.constexpr,
):
    kept = tl.cast(kept, tl.int64)
    program = tl.program_id(0)
    direction_ptr = scratch_ptr + program.to(tl.int64) * BLOCK_SIZE
    for block in range(program, num_blocks, tl.num_programs(0)):
        first = tl.cast(block, tl.int64) * kept_per_block
        start = tl.cast(block, tl.int64) * BLOCK_SIZE
        for tile in range(0, BLOCK_SIZE, DENSE):
            inner = tile + tl.arange(0, DENSE)
            tl.store(direction_ptr + inner, tl.zeros([DENSE], tl.float32), mask=inner < BLOCK_SIZE)
        tl.debug_barrier()

        # u ← Gᵀw
        add_rows(direction_ptr, indices_ptr, values_ptr, weights_ptr, first, kept, window, kept_per_block, SPARSE)

        # W ← W·(1 − lr·wd) − lr·u
        for tile in range(0, BLOCK_SIZE, DENSE):
            inner = tile + tl.arange(0, DENSE)
            inside = (inner < BLOCK_SIZE) & (start + inner < numel)
            u = tl.load(direction_ptr + inner, mask=inside, other=0.0)
            weight = tl.load(param_ptr + start + inner, mask=inside, other=0.0).to(tl.float32)
            if HAS_DECAY:
                weight = weight * decay
            tl.store(param_ptr + start + inner, (weight - u * lr).to(param_ptr.dtype.element_ty), mask=inside)
        tl.debug_barrier()


def sparse_tile(kept: int) -> int:
    """Lanes for a loop over ``kept`` entries of a row."""
    return int(min(SPARSE_TILE, max(128, triton.next_power_of_2(kept))))


def dots(window: SparseWindow, dense: Tensor) -> Tensor:
    """See :func:`hf_lowmem_optim.kernels.sparse_window.window_dots`."""
    tile = sparse_tile(window.kept)
    programs = min(triton.cdiv(window.kept, tile), DOTS_PROGRAMS)
    partial = torch.empty(window.window, programs, dtype=torch.float64, device=dense.device)
    with on_device(dense):
        _dots_kernel[(window.window, programs)](
            dense,
            window.indices,
            window.values,
            partial,
            window.kept,
            BLOCK_SIZE=window.block_size,
            KEPT_PER_BLOCK=window.kept_per_block,
            TILE=tile,
            num_warps=_NUM_WARPS,
            enable_fp_fusion=False,
        )
    return partial.sum(dim=1)


def combine_(out: Tensor, window: SparseWindow, weights: Tensor) -> None:
    """See :func:`hf_lowmem_optim.kernels.sparse_window.window_combine_`."""
    with on_device(out):
        _combine_kernel[(window.num_blocks,)](
            out,
            window.indices,
            window.values,
            weights,
            window.kept,
            window.window,
            window.kept_per_block,
            BLOCK_SIZE=window.block_size,
            TILE=sparse_tile(window.kept_per_block),
            num_warps=_NUM_WARPS,
            enable_fp_fusion=False,
        )


def gram_row(window: SparseWindow, row: int) -> Tensor:
    """See :func:`hf_lowmem_optim.kernels.sparse_window.window_gram_row`."""
    device = window.indices.device
    parts = triton.cdiv(window.window, GRAM_ROWS)
    programs = num_programs(window.numel, window.block_size, parts)
    scratch = torch.empty(programs * parts * window.block_size, dtype=torch.float32, device=device)
    partial = torch.empty(window.window, programs, dtype=torch.float64, device=device)
    with on_device(window.indices):
        _gram_row_kernel[(programs, parts)](
            window.indices,
            window.values,
            scratch,
            partial,
            row,
            window.kept,
            window.num_blocks,
            window.window,
            window.kept_per_block,
            BLOCK_SIZE=window.block_size,
            TILE=sparse_tile(window.kept_per_block),
            ROWS=GRAM_ROWS,
            ENTRIES=int(min(_GRAM_ENTRIES, max(16, triton.next_power_of_2(window.kept_per_block)))),
            num_warps=_NUM_WARPS,
            enable_fp_fusion=False,
        )
    return partial.sum(dim=1)


def descend_all_(windows: Sequence[SparseWindow], steps: Iterable[WindowStep]) -> None:
    """See :func:`hf_lowmem_optim.kernels.sparse_window.foreach_window_descend_`."""
    for param, rows, weights, lr, weight_decay, _ in steps:
        _descend_(param, rows, weights, lr, weight_decay)


def _descend_(param: Tensor, window: SparseWindow, weights: Tensor, lr: float, weight_decay: float) -> None:
    programs = num_programs(window.numel, window.block_size)
    scratch = torch.empty(programs * window.block_size, dtype=torch.float32, device=param.device)
    with on_device(param):
        _descend_kernel[(programs,)](
            param,
            window.indices,
            window.values,
            weights,
            scratch,
            lr,
            1 - lr * weight_decay,
            window.numel,
            window.kept,
            window.num_blocks,
            window.window,
            window.kept_per_block,
            BLOCK_SIZE=window.block_size,
            SPARSE=sparse_tile(window.kept_per_block),
            DENSE=int(min(_DENSE_TILE, max(128, triton.next_power_of_2(window.block_size)))),
            HAS_DECAY=weight_decay != 0,
            num_warps=_NUM_WARPS,
            enable_fp_fusion=False,
        )
