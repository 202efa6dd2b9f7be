# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""The same operations with numba: one pass per block over scratch memory that stays in the first-level cache.

Bit for bit the reference: the rows are added in the order of their storage, nothing is contracted or reassociated.
Parameters and values are passed as unsigned integers of their own width and widened to float32 on the way, since most
of them are read one here and one there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numba import njit
from torch import Tensor

from hf_lowmem_optim.kernels.cpu_floats import narrow, num_pieces, widen
from hf_lowmem_optim.kernels.sparse_window.layout import SparseWindow
from hf_lowmem_optim.kernels.workers import run_pieces

__all__ = [
    "combine_",
    "descend_",
    "dots",
    "gram_row",
    "update_",
]

_KIND = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_UNSIGNED = {4: torch.uint32, 2: torch.uint16}

_loop = njit(cache=True, nogil=True, error_model="numpy")


@njit(cache=True)
def _read(bits, kind):
    """Bits of a float32 (kind 0), bfloat16 (1) or float16 (2) number → float32."""
    return np.uint32(bits).view(np.float32) if kind == 0 else widen(bits, kind)


@njit(cache=True)
def _write(number, kind):
    """float32 → uint32 bits of kind 0, 1 or 2, rounded to nearest, ties to even."""
    return np.float32(number).view(np.uint32) if kind == 0 else np.uint32(narrow(number, kind))


@_loop
def _update_blocks(param, kind, indices, values, value_kind, weights, block_size, kept_per_block, scalars, begin, end):
    window, kept = indices.shape
    lr, eps, decay = scalars[0], scalars[1], scalars[2]
    z = np.empty((block_size, 2), np.float32)
    z_bits = z.view(np.uint32)
    touched = np.empty(block_size + 1, np.int32)
    update = np.empty(block_size, np.float32)
    old = np.empty(block_size, np.float32)
    for i in range(block_size):
        z[i, 0] = np.float32(0.0)
        z[i, 1] = np.float32(-0.0)  # marks an entry that no row has touched: see reference.UNTOUCHED_BITS
    for block in range(begin, end):
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


@_loop
def _dots(dense, indices, values, value_kind, block_size, kept_per_block, partial, begin, end):
    window, kept = indices.shape
    for block in range(begin, end):
        first, last = block * kept_per_block, min((block + 1) * kept_per_block, kept)
        start = block * block_size
        for row in range(window):
            total = 0.0
            for column in range(first, last):
                total += np.float64(dense[start + indices[row, column]]) * np.float64(
                    _read(values[row, column], value_kind)
                )
            partial[row] += total


@_loop
def _combine(out, indices, values, value_kind, weights, block_size, kept_per_block, begin, end):
    window, kept = indices.shape
    for block in range(begin, end):
        first, last = block * kept_per_block, min((block + 1) * kept_per_block, kept)
        start = block * block_size
        for row in range(window):
            weight = weights[row]
            if weight == 0:
                continue
            for column in range(first, last):
                out[start + indices[row, column]] += weight * _read(values[row, column], value_kind)


@_loop
def _gram_row(numel, indices, values, value_kind, newest, block_size, kept_per_block, partial, begin, end):
    window, kept = indices.shape
    scratch = np.zeros(block_size, np.float32)
    for block in range(begin, end):
        first, last = block * kept_per_block, min((block + 1) * kept_per_block, kept)
        for column in range(first, last):
            scratch[indices[newest, column]] = _read(values[newest, column], value_kind)
        for row in range(window):
            total = 0.0
            for column in range(first, last):
                total += np.float64(scratch[indices[row, column]]) * np.float64(_read(values[row, column], value_kind))
            partial[row] += total
        for column in range(first, last):
            scratch[indices[newest, column]] = np.float32(0.0)


@_loop
def _descend(param, kind, indices, values, value_kind, weights, block_size, kept_per_block, scalars, begin, end):
    window, kept = indices.shape
    lr, decay = scalars[0], scalars[1]
    direction = np.zeros(block_size, np.float32)
    is_touched = np.zeros(block_size, np.bool_)
    touched = np.empty(block_size + 1, np.int32)
    for block in range(begin, end):
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


def _run(loop: Callable[[int, int, int], None], window: SparseWindow) -> None:
    """Run a loop over the blocks of a window, in pieces."""
    run_pieces(loop, window.num_blocks, num_pieces(window.num_blocks, window.block_size))


def update_(
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
    arguments = (
        *_bits(param),
        window.indices.numpy(),
        *_bits(window.values),
        weights.numpy(),
        window.block_size,
        window.kept_per_block,
        np.array([lr, eps, decay], dtype=np.float32),
    )
    _run(lambda _, begin, end: _update_blocks(*arguments, begin, end), window)


def dots(window: SparseWindow, dense: Tensor) -> Tensor:
    """See :func:`hf_lowmem_optim.kernels.sparse_window.window_dots`."""
    arguments = (
        dense.numpy(),
        window.indices.numpy(),
        *_bits(window.values),
        window.block_size,
        window.kept_per_block,
    )
    sums = np.zeros((num_pieces(window.num_blocks, window.block_size), window.window))
    _run(lambda piece, begin, end: _dots(*arguments, sums[piece], begin, end), window)
    return torch.from_numpy(sums.sum(axis=0))


def combine_(out: Tensor, window: SparseWindow, weights: Tensor) -> None:
    """See :func:`hf_lowmem_optim.kernels.sparse_window.window_combine_`."""
    arguments = (
        out.numpy(),
        window.indices.numpy(),
        *_bits(window.values),
        weights.numpy(),
        window.block_size,
        window.kept_per_block,
    )
    _run(lambda _, begin, end: _combine(*arguments, begin, end), window)


def gram_row(window: SparseWindow, row: int) -> Tensor:
    """See :func:`hf_lowmem_optim.kernels.sparse_window.window_gram_row`."""
    arguments = (
        window.numel,
        window.indices.numpy(),
        *_bits(window.values),
        row,
        window.block_size,
        window.kept_per_block,
    )
    sums = np.zeros((num_pieces(window.num_blocks, window.block_size), window.window))
    _run(lambda piece, begin, end: _gram_row(*arguments, sums[piece], begin, end), window)
    return torch.from_numpy(sums.sum(axis=0))


def descend_(param: Tensor, window: SparseWindow, weights: Tensor, *, lr: float, weight_decay: float) -> None:
    """See :func:`hf_lowmem_optim.kernels.sparse_window.window_descend_`."""
    decay = 1 - lr * weight_decay if weight_decay != 0 else 1.0
    arguments = (
        *_bits(param),
        window.indices.numpy(),
        *_bits(window.values),
        weights.numpy(),
        window.block_size,
        window.kept_per_block,
        np.array([lr, decay], dtype=np.float32),
    )
    _run(lambda _, begin, end: _descend(*arguments, begin, end), window)
