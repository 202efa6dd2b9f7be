"""Packed triangles with numba, bit for bit the torch version: no index tensors, and each entry is touched once."""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import numpy as np
from torch import Tensor

from hf_lowmem_optim.ops.cpu.jit import loop
from hf_lowmem_optim.ops.cpu.launch import ENTRIES_PER_THREAD_BETWEEN, run_pieces
from hf_lowmem_optim.ops.dispatch import register
from hf_lowmem_optim.ops.packed_triangles import _fill_squares, _take_triangles

__all__ = ["fill_squares", "take_triangles"]

#: Side of the tiles in which rows become columns: a tile of each lies in the first-level cache.
_TILE = 16


@loop
def _fill(out, diagonal, lower, stride, mirrored, matrix):
    n = out.shape[1]
    square, start = out[matrix], matrix * stride
    for i in range(n):
        row, source = square[i], lower[start + i * (i - 1) // 2 :]
        for j in range(i):
            row[j] = source[j]
        row[i] = diagonal[matrix, i]
        if not mirrored:
            row[i + 1 :] = np.float32(0.0)
    if not mirrored:
        return
    for top in range(0, n, _TILE):
        bottom = min(top + _TILE, n)
        for left in range(top, n, _TILE):
            right = min(left + _TILE, n)
            for i in range(top, bottom):
                for j in range(max(left, i + 1), right):
                    square[i, j] = square[j, i]


@loop
def _take(square, by_columns, lower, matrix):
    n = square.shape[1]
    source, target = square[matrix], lower[matrix]
    if not by_columns:
        for i in range(n):
            row, into = source[i], target[i * (i - 1) // 2 :]
            for j in range(i):
                into[j] = row[j]
        return
    for top in range(0, n, _TILE):
        bottom = min(top + _TILE, n)
        for left in range(0, bottom, _TILE):
            for i in range(top, bottom):
                into = target[i * (i - 1) // 2 :]
                for j in range(left, min(left + _TILE, i)):
                    into[j] = source[j, i]


@register(_fill_squares, "cpu")
def fill_squares(out: Tensor, diagonal: Tensor, lower: Tensor, mirrored: bool) -> None:
    """See the torch version."""
    stride, width = lower.stride(0), lower.shape[1]
    flat = lower.as_strided((max(0, (len(lower) - 1) * stride + width),), (1,))
    arrays = out.numpy(), diagonal.contiguous().numpy(), flat.numpy(), stride, mirrored
    run_pieces(_fill.run, [(*arrays, i) for i in range(len(out))], out.numel(), each=ENTRIES_PER_THREAD_BETWEEN)


@register(_take_triangles, "cpu")
def take_triangles(square: Tensor, lower: Tensor) -> None:
    """See the torch version."""
    by_columns = not square.is_contiguous()
    rows = (square.mT if by_columns else square).contiguous().numpy()
    arrays = rows, by_columns, lower.numpy()
    run_pieces(_take.run, [(*arrays, i) for i in range(len(rows))], square.numel(), each=ENTRIES_PER_THREAD_BETWEEN)
