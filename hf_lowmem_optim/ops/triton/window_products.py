# mypy: disable-error-code="no-untyped-def, untyped-decorator, attr-defined"
"""Products of a sparse window's rows in Triton: with one of the rows, and with weights.

A block of a dense vector that is needed in between lies in a program's own scratch memory, as in ``sparse_window.py``;
blocks of the parameter are read and written once.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_lowmem_optim.ops.dispatch import register
from hf_lowmem_optim.ops.sparse_window import SparseWindow, WindowStep, _combine, _descend_all, _gram_rows
from hf_lowmem_optim.ops.triton.device import on_device

__all__ = ["GRAM_ROWS", "combine", "descend_all", "gram_rows", "num_programs", "sparse_tile"]

#: Rows that a program multiplies with one of them, in scratch memory of its own.
GRAM_ROWS = 32
#: Scratch memory at most, which stays in the second-level cache.
_SCRATCH_BYTES = 1 << 25
_SPARSE_TILE = 1024
_DENSE_TILE = 1024
_GRAM_ENTRIES = 128
_NUM_WARPS = 4


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


def num_programs(window: SparseWindow, blocks: int = 1) -> int:
    """Return how many programs with so many blocks of scratch memory each stay in the second-level cache."""
    return max(1, min(window.num_blocks, _SCRATCH_BYTES // (4 * window.block_size * blocks)))


def sparse_tile(kept: int) -> int:
    """Return the lanes for a loop over ``kept`` entries of a row."""
    return int(min(_SPARSE_TILE, max(128, triton.next_power_of_2(kept))))


@register(_combine, "triton")
def combine(out: Tensor, window: SparseWindow, weights: Tensor) -> None:
    """Add the combination in one launch."""
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


@register(_gram_rows, "triton")
def gram_rows(windows: Sequence[SparseWindow], row: int) -> Tensor:
    """Multiply and add up, in two launches for each tensor."""
    products = torch.empty(len(windows), windows[0].window, dtype=torch.float64, device=windows[0].device)
    for out, window in zip(products, windows, strict=True):
        _gram_row(out, window, row)
    return products


def _gram_row(out: Tensor, window: SparseWindow, row: int) -> None:
    parts = triton.cdiv(window.window, GRAM_ROWS)
    programs = num_programs(window, parts)
    scratch = torch.empty(programs * parts * window.block_size, dtype=torch.float32, device=out.device)
    partial = torch.empty(window.window, programs, dtype=torch.float64, device=out.device)
    with on_device(out):
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
    torch.sum(partial, dim=1, out=out)


@register(_descend_all, "triton")
def descend_all(steps: Sequence[WindowStep]) -> None:
    """Descend, in one launch for each tensor."""
    for step in steps:
        _descend(step)


def _descend(step: WindowStep) -> None:
    param, window, weights, lr, weight_decay, _ = step
    programs = num_programs(window)
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
