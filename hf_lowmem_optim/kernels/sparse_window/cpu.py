# mypy: disable-error-code="no-untyped-def, untyped-decorator, call-arg"
"""The same operations with numba: one pass per block over scratch memory that stays in the first-level cache.

Bit for bit the reference, but for which NaN it is: the rows are added in the order of their storage, nothing is
contracted or reassociated.
What the rows add up to is applied to the whole block: hardly a line of the cache is without an entry of some row, and
vectors of all entries take less time than a list of those that the rows touch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from numba import njit
from torch import Tensor

from hf_lowmem_optim.kernels.cpu_calls import Record, Sizes, claimed_blocks, enters, run_calls
from hf_lowmem_optim.kernels.cpu_floats import (
    float32_at,
    int16_at,
    load_floats,
    narrow,
    prefetch,
    uint16_at,
    widen,
)
from hf_lowmem_optim.kernels.native_loops import NativeLoop
from hf_lowmem_optim.kernels.sparse_records import (
    FORM,
    layout_fields,
    loop_arguments,
    rule_fields,
    sparse_loop,
    sparse_record,
)
from hf_lowmem_optim.kernels.sparse_window.layout import SparseWindow, WindowStep

__all__ = [
    "combine_",
    "descend_all_",
    "descend_blocks",
    "dots",
    "gram_block",
    "gram_row",
    "gram_scratch",
    "update_all_",
    "update_block",
    "update_scratch",
]

_jit: Callable[..., Callable[..., Any]] = njit(nogil=True, error_model="numpy")
_inlined: Callable[..., Callable[..., Any]] = njit(inline="always", error_model="numpy")

# unsigned: an index that could be negative for all that the compiler knows is checked, and not vectorized
_index = np.uint64
_zero, _no_rows = np.float32(0.0), np.uint32(0x80000000)  # the bits of −0


@_inlined
def _matrix(call):
    """What the rows lie in; taken out of the record once, since what is stored in between might be the record."""
    layout = call.layout
    return layout.indices, layout.values, layout.value_kind, layout.kept


@_inlined
def _bounds(call, block):
    """A block's first column and the number of its columns; its first entry and the number of its entries."""
    layout = call.layout
    first, start = block * layout.kept_per_block, block * layout.block_size
    return first, min(layout.kept_per_block, layout.kept - first), start, min(layout.block_size, layout.numel - start)


@_inlined
def _load_row(matrix, row, first, count, segment):
    """Write a row's values of a block to ``segment``, and return their indices."""
    indices, values, value_kind, kept = matrix
    load_floats(values, value_kind, row * kept + first, count, segment)
    return int16_at(indices + 2 * (row * kept + first), count)


@_inlined
def _prefetch_row(matrix, row, first):
    """Ask for a row's entries of a block: some 80 bytes here, the next ones a row away, no stream is recognized."""
    indices, values, value_kind, kept = matrix
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


@_inlined
def update_scratch(block_size):
    """Memory that :func:`update_block` works in, and leaves as it was."""
    return np.zeros(block_size, np.float32), np.full(block_size, np.float32(-0.0)), np.empty(block_size, np.float32)


@_jit
def update_block(call, block, scratch):
    """Adam's statistics of one block of one tensor, and the step there."""
    z1, z2, segment = scratch
    z2_bits = z2.view(np.uint32)
    matrix, window, rule = _matrix(call), call.layout.window, call.rule
    lr, eps, weight = rule.lr, rule.eps, float32_at(rule.weights, (2, window))
    first, columns, start, count = _bounds(call, block)
    for row in range(window):
        w1, w2 = weight[0, row], weight[1, row]
        if w1 == 0 and w2 == 0:
            continue
        index = _load_row(matrix, row, first, columns, segment)
        for j in range(_index(columns)):
            i, value = _index(index[j]), segment[j]
            z1[i] += w1 * value
            z2[i] += w2 * (value * value)
    for i in range(_index(count)):
        update = lr * (z1[i] / (np.sqrt(z2[i]) + eps))
        # an entry that no row has touched stays what it is, whatever eps: see reference.UNTOUCHED_BITS
        z1[i] = _zero if z2_bits[i] == _no_rows else update
    _descend_block(z1, count, rule.decay, call.dense, call.layout.dense_kind, start)
    for i in range(_index(count)):
        z1[i], z2[i] = _zero, -_zero


@sparse_loop
def _update_blocks(arguments):
    calls, queue, threads, group, largest, _ = loop_arguments(arguments)
    if not enters(queue, threads):
        return
    scratch = update_scratch(largest)
    for number, begin, end, _ in claimed_blocks(calls, queue, group):
        for block in range(begin, end):
            update_block(calls[number], block, scratch)


@_inlined
def _add_products(matrix, window, first, columns, x, segment, sums):
    """Add the products of a block's rows with ``x`` to ``sums``."""
    for row in range(window):
        _prefetch_row(matrix, row, first + columns)
        index = _load_row(matrix, row, first, columns, segment)
        total = 0.0
        for j in range(_index(columns)):
            total += np.float64(x[_index(index[j])]) * np.float64(segment[j])
        sums[row] += total


@sparse_loop
def _dots(arguments):
    calls, queue, threads, group, largest, sums = loop_arguments(arguments)
    if not enters(queue, threads):
        return
    segment = np.empty(largest, np.float32)
    for number, begin, end, place in claimed_blocks(calls, queue, group):
        for block in range(begin, end):
            call = calls[number]
            first, columns, start, count = _bounds(call, block)
            x = float32_at(call.dense + 4 * start, count)
            _add_products(_matrix(call), call.layout.window, first, columns, x, segment, sums[place])


@_inlined
def _add_rows(call, first, columns, segment, out):
    """Add the weighted rows of a block to ``out``."""
    matrix, window = _matrix(call), call.layout.window
    weight = float32_at(call.rule.weights, window)
    for row in range(window):
        w = weight[row]
        if w == 0:
            continue
        index = _load_row(matrix, row, first, columns, segment)
        for j in range(_index(columns)):
            out[_index(index[j])] += w * segment[j]


@sparse_loop
def _combine(arguments):
    calls, queue, threads, group, largest, _ = loop_arguments(arguments)
    if not enters(queue, threads):
        return
    segment = np.empty(largest, np.float32)
    for number, begin, end, _ in claimed_blocks(calls, queue, group):
        for block in range(begin, end):
            call = calls[number]
            first, columns, start, count = _bounds(call, block)
            _add_rows(call, first, columns, segment, float32_at(call.dense + 4 * start, count))


@_inlined
def gram_scratch(block_size):
    """Memory that :func:`gram_block` works in, and leaves as it was."""
    return np.zeros(block_size, np.float32), np.empty(block_size, np.float32)


@_jit
def gram_block(call, block, scratch, sums):
    """Add one block's share of the products of all rows with the newest one to ``sums``."""
    newest, segment = scratch
    matrix, window = _matrix(call), call.layout.window
    first, columns, _, _ = _bounds(call, block)
    own = _load_row(matrix, call.rule.row, first, columns, segment)
    for j in range(_index(columns)):
        newest[_index(own[j])] = segment[j]
    _add_products(matrix, window, first, columns, newest, segment, sums)
    for j in range(_index(columns)):
        newest[_index(own[j])] = _zero


@sparse_loop
def _gram_row(arguments):
    calls, queue, threads, group, largest, sums = loop_arguments(arguments)
    if not enters(queue, threads):
        return
    scratch = gram_scratch(largest)
    for number, begin, end, place in claimed_blocks(calls, queue, group):
        for block in range(begin, end):
            gram_block(calls[number], block, scratch, sums[place])


@sparse_loop
def descend_blocks(arguments):
    """The descent along the weighted rows of each tensor; for :func:`~hf_lowmem_optim.kernels.cpu_calls.run_calls`."""
    calls, queue, threads, group, largest, _ = loop_arguments(arguments)
    if not enters(queue, threads):
        return
    direction, segment = np.zeros(largest, np.float32), np.empty(largest, np.float32)
    for number, begin, end, _ in claimed_blocks(calls, queue, group):
        for block in range(begin, end):
            call = calls[number]
            lr = call.rule.lr
            first, columns, start, count = _bounds(call, block)
            _add_rows(call, first, columns, segment, direction)
            for i in range(_index(count)):
                direction[i] *= lr
            _descend_block(direction, count, call.rule.decay, call.dense, call.layout.dense_kind, start)
            for i in range(_index(count)):
                direction[i] = _zero


def _record(rows: SparseWindow, dense: Tensor | None = None, **rule: Any) -> Record:
    """The record of a tensor; ``rule`` are arguments of :func:`rule_fields`."""
    layout = layout_fields(
        rows.indices,
        rows.values,
        numel=rows.numel,
        block_size=rows.block_size,
        kept_per_block=rows.kept_per_block,
        dense=dense,
    )
    return sparse_record(layout, rule_fields(**rule), rows.num_blocks, None, dense)


def _step_record(step: WindowStep) -> Record:
    """The record of a tensor for an update or a descent."""
    param, rows, weights, lr, weight_decay, eps = step
    return _record(rows, param, weights=weights, lr=lr, eps=eps, weight_decay=weight_decay)


def _run(loop: NativeLoop, windows: Sequence[SparseWindow], calls: Iterable[Record], sums: int = 0) -> Any:
    """Run a loop over all blocks of some windows."""
    sizes = Sizes.of([rows.numel for rows in windows], [rows.block_size for rows in windows])
    return run_calls(loop, np.zeros(len(windows), FORM), sizes, calls, sums)


def update_all_(windows: Sequence[SparseWindow], steps: Iterable[WindowStep]) -> None:
    """See :func:`hf_lowmem_optim.kernels.sparse_window.foreach_window_update_`."""
    _run(_update_blocks, windows, map(_step_record, steps))


def dots(window: SparseWindow, dense: Tensor) -> Tensor:
    """See :func:`hf_lowmem_optim.kernels.sparse_window.window_dots`."""
    return torch.from_numpy(_run(_dots, [window], [_record(window, dense)], window.window))


def combine_(out: Tensor, window: SparseWindow, weights: Tensor) -> None:
    """See :func:`hf_lowmem_optim.kernels.sparse_window.window_combine_`."""
    _run(_combine, [window], [_record(window, out, weights=weights)])


def gram_row(window: SparseWindow, row: int) -> Tensor:
    """See :func:`hf_lowmem_optim.kernels.sparse_window.window_gram_row`."""
    return torch.from_numpy(_run(_gram_row, [window], [_record(window, row=row)], window.window))


def descend_all_(windows: Sequence[SparseWindow], steps: Iterable[WindowStep]) -> None:
    """See :func:`hf_lowmem_optim.kernels.sparse_window.foreach_window_descend_`."""
    _run(descend_blocks, windows, map(_step_record, steps))
