# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""The same operations with numba: one pass per block over scratch memory that stays in the first-level cache.

Bit for bit the reference: the rows are added in the order of their storage, nothing is contracted or reassociated.
Parameters and values are widened to float32 on the way, since most of them are read one here and one there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numba import njit
from torch import Tensor

from hf_lowmem_optim.kernels.cpu_floats import (
    float32_at,
    floats,
    int16_at,
    load_float,
    num_pieces,
    store_float,
)
from hf_lowmem_optim.kernels.sparse_window.layout import SparseWindow
from hf_lowmem_optim.kernels.workers import run_pieces

__all__ = [
    "combine_",
    "descend_",
    "dots",
    "gram_row",
    "update_",
]

_loop: Callable[..., Callable[..., Any]] = njit(cache=True, nogil=True, error_model="numpy")


@_loop
def _update_blocks(
    indices,
    values,
    value_kind,
    window,
    kept,
    numel,
    block_size,
    kept_per_block,
    weights,
    param,
    kind,
    scalars,
    begin,
    end,
):
    index = int16_at(indices, (window, kept))
    weight = float32_at(weights, (2, window))
    lr, eps, decay = scalars
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
        start, stop = block * block_size, min((block + 1) * block_size, numel)
        count = 0
        for row in range(window):
            w1, w2 = weight[0, row], weight[1, row]
            if w1 == 0 and w2 == 0:
                continue
            for column in range(first, last):
                value = load_float(values, value_kind, row * kept + column)
                i = np.int64(index[row, column])
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
            old[j] = load_float(param, kind, start + touched[j])
        if decay != np.float32(1.0):
            for i in range(start, stop):
                store_float(load_float(param, kind, i) * decay, param, kind, i)
        for j in range(count):
            store_float(old[j] * decay - update[j], param, kind, start + touched[j])


@_loop
def _dots(indices, values, value_kind, window, kept, numel, block_size, kept_per_block, dense, begin, end):
    index = int16_at(indices, (window, kept))
    partial = np.zeros(window)
    for block in range(begin, end):
        first, last = block * kept_per_block, min((block + 1) * kept_per_block, kept)
        start = block * block_size
        x = float32_at(dense + 4 * start, min(block_size, numel - start))
        for row in range(window):
            total = 0.0
            for column in range(first, last):
                value = load_float(values, value_kind, row * kept + column)
                total += np.float64(x[index[row, column]]) * np.float64(value)
            partial[row] += total
    return partial


@_loop
def _combine(indices, values, value_kind, window, kept, numel, block_size, kept_per_block, weights, dense, begin, end):
    index, weight = int16_at(indices, (window, kept)), float32_at(weights, window)
    for block in range(begin, end):
        first, last = block * kept_per_block, min((block + 1) * kept_per_block, kept)
        start = block * block_size
        out = float32_at(dense + 4 * start, min(block_size, numel - start))
        for row in range(window):
            w = weight[row]
            if w == 0:
                continue
            for column in range(first, last):
                out[index[row, column]] += w * load_float(values, value_kind, row * kept + column)


@_loop
def _gram_row(indices, values, value_kind, window, kept, _, block_size, kept_per_block, newest, begin, end):
    index = int16_at(indices, (window, kept))
    scratch = np.zeros(block_size, np.float32)
    partial = np.zeros(window)
    for block in range(begin, end):
        first, last = block * kept_per_block, min((block + 1) * kept_per_block, kept)
        for column in range(first, last):
            scratch[index[newest, column]] = load_float(values, value_kind, newest * kept + column)
        for row in range(window):
            total = 0.0
            for column in range(first, last):
                value = load_float(values, value_kind, row * kept + column)
                total += np.float64(scratch[index[row, column]]) * np.float64(value)
            partial[row] += total
        for column in range(first, last):
            scratch[index[newest, column]] = np.float32(0.0)
    return partial


@_loop
def _descend(
    indices,
    values,
    value_kind,
    window,
    kept,
    numel,
    block_size,
    kept_per_block,
    weights,
    param,
    kind,
    scalars,
    begin,
    end,
):
    index, weight = int16_at(indices, (window, kept)), float32_at(weights, window)
    lr, decay = scalars
    direction = np.zeros(block_size, np.float32)
    is_touched = np.zeros(block_size, np.bool_)
    touched = np.empty(block_size + 1, np.int32)
    for block in range(begin, end):
        first, last = block * kept_per_block, min((block + 1) * kept_per_block, kept)
        start, stop = block * block_size, min((block + 1) * block_size, numel)
        count = 0
        for row in range(window):
            w = weight[row]
            if w == 0:
                continue
            for column in range(first, last):
                i = np.int64(index[row, column])
                touched[count] = i
                count += 0 if is_touched[i] else 1
                is_touched[i] = True
                direction[i] += w * load_float(values, value_kind, row * kept + column)
        if decay != np.float32(1.0):
            for i in range(stop - start):
                new = load_float(param, kind, start + i) * decay - lr * direction[i]
                store_float(new, param, kind, start + i)
        else:
            for j in range(count):
                i = touched[j]
                new = load_float(param, kind, start + i) - lr * direction[i]
                store_float(new, param, kind, start + i)
        for j in range(count):
            direction[touched[j]] = np.float32(0.0)
            is_touched[touched[j]] = False


def _run(loop: Callable[..., Any], window: SparseWindow, *arguments: object) -> list[Any]:
    """Run a loop over the blocks of a window, in pieces; all loops begin with what describes it."""
    described = (
        window.indices.data_ptr(),
        *floats(window.values),
        *window.indices.shape,
        window.numel,
        window.block_size,
        window.kept_per_block,
    )
    blocks = window.num_blocks
    return run_pieces(loop, (*described, *arguments), blocks, num_pieces(blocks, window.block_size))


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
    scalars = np.float32(lr), np.float32(eps), np.float32(decay)
    _run(_update_blocks, window, weights.data_ptr(), *floats(param), scalars)


def dots(window: SparseWindow, dense: Tensor) -> Tensor:
    """See :func:`hf_lowmem_optim.kernels.sparse_window.window_dots`."""
    return torch.from_numpy(np.sum(_run(_dots, window, dense.data_ptr()), axis=0))


def combine_(out: Tensor, window: SparseWindow, weights: Tensor) -> None:
    """See :func:`hf_lowmem_optim.kernels.sparse_window.window_combine_`."""
    _run(_combine, window, weights.data_ptr(), out.data_ptr())


def gram_row(window: SparseWindow, row: int) -> Tensor:
    """See :func:`hf_lowmem_optim.kernels.sparse_window.window_gram_row`."""
    return torch.from_numpy(np.sum(_run(_gram_row, window, row), axis=0))


def descend_(param: Tensor, window: SparseWindow, weights: Tensor, *, lr: float, weight_decay: float) -> None:
    """See :func:`hf_lowmem_optim.kernels.sparse_window.window_descend_`."""
    decay = 1 - lr * weight_decay if weight_decay != 0 else 1.0
    scalars = np.float32(lr), np.float32(decay)
    _run(_descend, window, weights.data_ptr(), *floats(param), scalars)
