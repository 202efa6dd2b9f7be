# mypy: disable-error-code="no-untyped-def, untyped-decorator, call-arg"
"""The same operations with numba: one pass per block over scratch memory that stays in the first-level cache.

Bit for bit the reference, but for which NaN it is: the rows are added in the order of their storage, nothing is
contracted or reassociated.
What the rows add up to is applied to the whole block: hardly a line of the cache is without an entry of some row, and
vectors of all entries take less time than a list of those that the rows touch.
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
    load_floats,
    narrow,
    num_pieces,
    prefetch,
    uint16_at,
    widen,
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
_jit: Callable[..., Callable[..., Any]] = njit(nogil=True, error_model="numpy")
_inlined: Callable[..., Callable[..., Any]] = njit(inline="always", error_model="numpy")

# unsigned: an index that could be negative for all that the compiler knows is checked, and not vectorized
_index = np.uint64
_zero, _no_rows = np.float32(0.0), np.uint32(0x80000000)  # the bits of −0


@_inlined
def _load_row(indices, values, value_kind, kept, row, first, count, segment):
    """Write a row's values of a block to ``segment``, and return their indices."""
    load_floats(values, value_kind, row * kept + first, count, segment)
    return int16_at(indices + 2 * (row * kept + first), count)


@_inlined
def _prefetch_row(indices, values, value_kind, kept, row, first):
    """Ask for a row's entries of a block: some 80 bytes here, the next ones a row away, no stream is recognized."""
    entry = row * kept + first
    for at in range(0, 128, 64):
        prefetch(indices + 2 * entry + at)
        prefetch(values + (4 if value_kind == 0 else 2) * entry + at)


@_jit
def _descend_block(update, count, decay, param, kind, start):
    """W ← decay·W − update for the ``count`` entries from ``start`` on, rounded once to their kind."""
    if kind == 0:
        W = float32_at(param + 4 * start, count)
        for i in range(_index(count)):
            W[i] = W[i] * decay - update[i]
    elif kind == 1:
        _descend_narrow_block(update, count, decay, uint16_at(param + 2 * start, count), 1)
    else:
        _descend_narrow_block(update, count, decay, uint16_at(param + 2 * start, count), 2)


@_inlined
def _descend_narrow_block(update, count, decay, bits, kind):
    for i in range(_index(count)):
        w = widen(bits[i], kind)
        # a NaN stays the one that it is
        bits[i] = bits[i] if np.isnan(w) else narrow(w * decay - update[i], kind)


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
    weight = float32_at(weights, (2, window))
    lr, eps, decay = scalars
    z1, z2 = np.zeros(block_size, np.float32), np.full(block_size, np.float32(-0.0))
    z2_bits = z2.view(np.uint32)
    segment = np.empty(kept_per_block, np.float32)
    for block in range(begin, end):
        first, last = block * kept_per_block, min((block + 1) * kept_per_block, kept)
        start, stop = block * block_size, min((block + 1) * block_size, numel)
        for row in range(window):
            w1, w2 = weight[0, row], weight[1, row]
            if w1 == 0 and w2 == 0:
                continue
            index = _load_row(indices, values, value_kind, kept, row, first, last - first, segment)
            for j in range(_index(last - first)):
                i, value = _index(index[j]), segment[j]
                z1[i] += w1 * value
                z2[i] += w2 * (value * value)
        for i in range(_index(stop - start)):
            update = lr * (z1[i] / (np.sqrt(z2[i]) + eps))
            # an entry that no row has touched stays what it is, whatever eps: see reference.UNTOUCHED_BITS
            z1[i] = _zero if z2_bits[i] == _no_rows else update
        _descend_block(z1, stop - start, decay, param, kind, start)
        for i in range(_index(stop - start)):
            z1[i], z2[i] = _zero, -_zero


@_loop
def _dots(indices, values, value_kind, window, kept, numel, block_size, kept_per_block, dense, begin, end):
    partial, segment = np.zeros(window), np.empty(kept_per_block, np.float32)
    for block in range(begin, end):
        first, last = block * kept_per_block, min((block + 1) * kept_per_block, kept)
        start = block * block_size
        x = float32_at(dense + 4 * start, min(block_size, numel - start))
        for row in range(window):
            _prefetch_row(indices, values, value_kind, kept, row, last)
            index = _load_row(indices, values, value_kind, kept, row, first, last - first, segment)
            total = 0.0
            for j in range(_index(last - first)):
                total += np.float64(x[_index(index[j])]) * np.float64(segment[j])
            partial[row] += total
    return partial


@_loop
def _combine(indices, values, value_kind, window, kept, numel, block_size, kept_per_block, weights, dense, begin, end):
    weight, segment = float32_at(weights, window), np.empty(kept_per_block, np.float32)
    for block in range(begin, end):
        first, last = block * kept_per_block, min((block + 1) * kept_per_block, kept)
        start = block * block_size
        out = float32_at(dense + 4 * start, min(block_size, numel - start))
        for row in range(window):
            w = weight[row]
            if w == 0:
                continue
            index = _load_row(indices, values, value_kind, kept, row, first, last - first, segment)
            for j in range(_index(last - first)):
                out[_index(index[j])] += w * segment[j]


@_loop
def _gram_row(indices, values, value_kind, window, kept, _, block_size, kept_per_block, newest, begin, end):
    scratch, segment = np.zeros(block_size, np.float32), np.empty(kept_per_block, np.float32)
    partial = np.zeros(window)
    for block in range(begin, end):
        first, last = block * kept_per_block, min((block + 1) * kept_per_block, kept)
        own = _load_row(indices, values, value_kind, kept, newest, first, last - first, segment)
        for j in range(_index(last - first)):
            scratch[_index(own[j])] = segment[j]
        for row in range(window):
            _prefetch_row(indices, values, value_kind, kept, row, last)
            index = _load_row(indices, values, value_kind, kept, row, first, last - first, segment)
            total = 0.0
            for j in range(_index(last - first)):
                total += np.float64(scratch[_index(index[j])]) * np.float64(segment[j])
            partial[row] += total
        for j in range(_index(last - first)):
            scratch[_index(own[j])] = _zero
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
    weight, (lr, decay) = float32_at(weights, window), scalars
    direction, segment = np.zeros(block_size, np.float32), np.empty(kept_per_block, np.float32)
    for block in range(begin, end):
        first, last = block * kept_per_block, min((block + 1) * kept_per_block, kept)
        start, stop = block * block_size, min((block + 1) * block_size, numel)
        for row in range(window):
            w = weight[row]
            if w == 0:
                continue
            index = _load_row(indices, values, value_kind, kept, row, first, last - first, segment)
            for j in range(_index(last - first)):
                direction[_index(index[j])] += w * segment[j]
        for i in range(_index(stop - start)):
            direction[i] *= lr
        _descend_block(direction, stop - start, decay, param, kind, start)
        for i in range(_index(stop - start)):
            direction[i] = _zero


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
