# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""The same operations with numba: one pass per block over scratch memory that stays in the first-level cache.

Bit for bit the reference: the rows are added in the order of their storage, nothing is contracted or reassociated.
Parameters and values are passed as unsigned integers of their own width and widened to float32 on the way, since most
of them are read one here and one there.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numba import njit, prange
from torch import Tensor

from hf_lowmem_optim.kernels.cpu_floats import narrow, num_pieces, widen, with_threads
from hf_lowmem_optim.kernels.sparse_window.layout import SparseWindow

__all__ = [
    "window_combine_cpu_",
    "window_descend_cpu_",
    "window_dots_cpu",
    "window_gram_row_cpu",
    "window_update_cpu_",
]

_KIND = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_UNSIGNED = {4: torch.uint32, 2: torch.uint16}


@njit(cache=True)
def _read(bits, kind):
    """Bits of a float32 (kind 0), bfloat16 (1) or float16 (2) number → float32."""
    return np.uint32(bits).view(np.float32) if kind == 0 else widen(bits, kind)


@njit(cache=True)
def _write(number, kind):
    """float32 → uint32 bits of kind 0, 1 or 2, rounded to nearest, ties to even."""
    return np.float32(number).view(np.uint32) if kind == 0 else np.uint32(narrow(number, kind))


@with_threads
@njit(cache=True, parallel=True, nogil=True, error_model="numpy")
def _update_blocks(param, kind, indices, values, value_kind, weights, block_size, kept_per_block, scalars, pieces):
    window, kept = indices.shape
    num_blocks = (param.size + block_size - 1) // block_size
    lr, eps, decay = scalars[0], scalars[1], scalars[2]
    for piece in prange(pieces):
        z = np.empty((block_size, 2), np.float32)
        z_bits = z.view(np.uint32)
        touched = np.empty(block_size + 1, np.int32)
        update = np.empty(block_size, np.float32)
        old = np.empty(block_size, np.float32)
        for i in range(block_size):
            z[i, 0] = np.float32(0.0)
            z[i, 1] = np.float32(-0.0)  # marks an entry that no row has touched: see reference.UNTOUCHED_BITS
        for block in range(piece * num_blocks // pieces, (piece + 1) * num_blocks // pieces):
            first, last = block * kept_per_block, min((block + 1) * kept_per_block, kept)
            start, stop = block * block_size, min((block + 1) * block_size, param.size)
            count = 0
            for row in range(window):
                w1, w2 = weights[0, row], weights[1, row]
                if w1 == 0 and w2 == 0:
                    continue
                for column in range(first, last):
                    value = _read(values[row, column], value_kind)
                    i = np.int64(indices[row, column])
                    touched[count] = i
                    count += 1 if z_bits[i, 1] == np.uint32(0x80000000) else 0
                    z[i, 0] += w1 * value
                    z[i, 1] += w2 * (value * value)
            for j in range(count):
                i = touched[j]
                update[j] = z[i, 0]
                old[j] = z[i, 1]
                z[i, 0] = np.float32(0.0)
                z[i, 1] = np.float32(-0.0)
            for j in range(count):  # apart from the gathers, so that it is vectorized
                update[j] = lr * (update[j] / (np.sqrt(old[j]) + eps))
            for j in range(count):
                old[j] = _read(param[start + touched[j]], kind)
            if decay != np.float32(1.0):
                for i in range(start, stop):
                    param[i] = _write(_read(param[i], kind) * decay, kind)
            for j in range(count):
                param[start + touched[j]] = _write(old[j] * decay - update[j], kind)


@with_threads
@njit(cache=True, parallel=True, nogil=True, error_model="numpy")
def _dots(dense, indices, values, value_kind, block_size, kept_per_block, partial):
    window, kept = indices.shape
    pieces = partial.shape[0]
    num_blocks = (dense.size + block_size - 1) // block_size
    for piece in prange(pieces):
        for block in range(piece * num_blocks // pieces, (piece + 1) * num_blocks // pieces):
            first, last = block * kept_per_block, min((block + 1) * kept_per_block, kept)
            start = block * block_size
            for row in range(window):
                total = 0.0
                for column in range(first, last):
                    total += np.float64(dense[start + indices[row, column]]) * np.float64(
                        _read(values[row, column], value_kind)
                    )
                partial[piece, row] += total


@with_threads
@njit(cache=True, parallel=True, nogil=True, error_model="numpy")
def _combine(out, indices, values, value_kind, weights, block_size, kept_per_block, pieces):
    window, kept = indices.shape
    num_blocks = (out.size + block_size - 1) // block_size
    for piece in prange(pieces):
        for block in range(piece * num_blocks // pieces, (piece + 1) * num_blocks // pieces):
            first, last = block * kept_per_block, min((block + 1) * kept_per_block, kept)
            start = block * block_size
            for row in range(window):
                weight = weights[row]
                if weight == 0:
                    continue
                for column in range(first, last):
                    out[start + indices[row, column]] += weight * _read(values[row, column], value_kind)


@with_threads
@njit(cache=True, parallel=True, nogil=True, error_model="numpy")
def _gram_row(numel, indices, values, value_kind, newest, block_size, kept_per_block, partial):
    window, kept = indices.shape
    pieces = partial.shape[0]
    num_blocks = (numel + block_size - 1) // block_size
    for piece in prange(pieces):
        scratch = np.zeros(block_size, np.float32)
        for block in range(piece * num_blocks // pieces, (piece + 1) * num_blocks // pieces):
            first, last = block * kept_per_block, min((block + 1) * kept_per_block, kept)
            for column in range(first, last):
                scratch[indices[newest, column]] = _read(values[newest, column], value_kind)
            for row in range(window):
                total = 0.0
                for column in range(first, last):
                    total += np.float64(scratch[indices[row, column]]) * np.float64(
                        _read(values[row, column], value_kind)
                    )
                partial[piece, row] += total
            for column in range(first, last):
                scratch[indices[newest, column]] = np.float32(0.0)


@with_threads
@njit(cache=True, parallel=True, nogil=True, error_model="numpy")
def _descend(param, kind, indices, values, value_kind, weights, block_size, kept_per_block, scalars, pieces):
    window, kept = indices.shape
    num_blocks = (param.size + block_size - 1) // block_size
    lr, decay = scalars[0], scalars[1]
    for piece in prange(pieces):
        direction = np.zeros(block_size, np.float32)
        is_touched = np.zeros(block_size, np.bool_)
        touched = np.empty(block_size + 1, np.int32)
        for block in range(piece * num_blocks // pieces, (piece + 1) * num_blocks // pieces):
            first, last = block * kept_per_block, min((block + 1) * kept_per_block, kept)
            start, stop = block * block_size, min((block + 1) * block_size, param.size)
            count = 0
            for row in range(window):
                weight = weights[row]
                if weight == 0:
                    continue
                for column in range(first, last):
                    i = np.int64(indices[row, column])
                    touched[count] = i
                    count += 0 if is_touched[i] else 1
                    is_touched[i] = True
                    direction[i] += weight * _read(values[row, column], value_kind)
            if decay != np.float32(1.0):
                for i in range(stop - start):
                    new = _read(param[start + i], kind) * decay - lr * direction[i]
                    param[start + i] = _write(new, kind)
            else:
                for j in range(count):
                    i = touched[j]
                    param[start + i] = _write(_read(param[start + i], kind) - lr * direction[i], kind)
            for j in range(count):
                direction[touched[j]] = np.float32(0.0)
                is_touched[touched[j]] = False


def _bits(tensor: Tensor) -> tuple[Any, int]:
    """The tensor's own memory as unsigned integers of its width, and its kind."""
    return tensor.view(_UNSIGNED[tensor.itemsize]).numpy(), _KIND[tensor.dtype]


def window_update_cpu_(
    param: Tensor,
    window: SparseWindow,
    weights: Tensor,
    *,
    lr: float,
    eps: float,
    weight_decay: float,
) -> None:
    """See :func:`hf_lowmem_optim.kernels.sparse_window.window_update_`."""
    decay = 1 - lr * weight_decay if weight_decay != 0 else 1.0
    _update_blocks(
        *_bits(param),
        window.indices.numpy(),
        *_bits(window.values),
        weights.numpy(),
        window.block_size,
        window.kept_per_block,
        np.array([lr, eps, decay], dtype=np.float32),
        num_pieces(window.num_blocks),
    )


def window_dots_cpu(window: SparseWindow, dense: Tensor) -> Tensor:
    """See :func:`hf_lowmem_optim.kernels.sparse_window.window_dots`."""
    partial = np.zeros((num_pieces(window.num_blocks), window.window))
    _dots(
        dense.numpy(),
        window.indices.numpy(),
        *_bits(window.values),
        window.block_size,
        window.kept_per_block,
        partial,
    )
    return torch.from_numpy(partial.sum(axis=0))


def window_combine_cpu_(out: Tensor, window: SparseWindow, weights: Tensor) -> None:
    """See :func:`hf_lowmem_optim.kernels.sparse_window.window_combine_`."""
    _combine(
        out.numpy(),
        window.indices.numpy(),
        *_bits(window.values),
        weights.numpy(),
        window.block_size,
        window.kept_per_block,
        num_pieces(window.num_blocks),
    )


def window_gram_row_cpu(window: SparseWindow, row: int) -> Tensor:
    """See :func:`hf_lowmem_optim.kernels.sparse_window.window_gram_row`."""
    partial = np.zeros((num_pieces(window.num_blocks), window.window))
    _gram_row(
        window.numel,
        window.indices.numpy(),
        *_bits(window.values),
        row,
        window.block_size,
        window.kept_per_block,
        partial,
    )
    return torch.from_numpy(partial.sum(axis=0))


def window_descend_cpu_(
    param: Tensor, window: SparseWindow, weights: Tensor, *, lr: float, weight_decay: float
) -> None:
    """See :func:`hf_lowmem_optim.kernels.sparse_window.window_descend_`."""
    decay = 1 - lr * weight_decay if weight_decay != 0 else 1.0
    _descend(
        *_bits(param),
        window.indices.numpy(),
        *_bits(window.values),
        weights.numpy(),
        window.block_size,
        window.kept_per_block,
        np.array([lr, decay], dtype=np.float32),
        num_pieces(window.num_blocks),
    )
