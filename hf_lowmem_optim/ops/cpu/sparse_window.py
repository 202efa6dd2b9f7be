"""The operations on a sparse window with numba: one pass per block over scratch memory in the first-level cache.

Bit for bit the torch version, but for which NaN it is: the rows are added in the order of their storage, nothing is
contracted or reassociated. What the rows add up to is applied to the whole block: hardly a line of the cache is without
an entry of some row, and vectors of all entries take less time than a list of those that the rows touch.

A window may come from somebody else's checkpoint, and the compiled code checks no bounds: a row's indices are checked
before anything is read or written by them.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hf_lowmem_optim.ops.cpu.floats import BFLOAT16, FLOAT16, FLOAT32, narrow, widen
from hf_lowmem_optim.ops.cpu.jit import Loop, inlined, loop
from hf_lowmem_optim.ops.cpu.launch import DTYPE_CODES, block_ranges, run_pieces, window_arguments
from hf_lowmem_optim.ops.cpu.window import index_mask, load_values
from hf_lowmem_optim.ops.dispatch import register
from hf_lowmem_optim.ops.sparse_window import Rates, _combine, _descend_all, _gram_rows, _update_all
from hf_lowmem_optim.ops.weight_correction import join_weights, split_weights_
from hf_lowmem_optim.ops.window import Memo, SparseWindow, unpack

__all__ = ["combine", "descend_all", "gram_rows", "update_all"]

#: Entries that a loop works on at a time, in whole blocks. The rows are far apart in memory: the more of each are read
#: together, the better, as long as the second-level cache holds the dense scratch memory.
_ENTRIES_AT_A_TIME = 1 << 14
# unsigned: an index that could be negative for all that the compiler knows is checked, and not vectorized
_index = np.uint64
_ZERO, _UNTOUCHED = np.float32(0.0), np.uint32(0x80000000)  # the bits of −0


@inlined
def _blocks_at_a_time(block_size, blocks):
    return min(max(1, _ENTRIES_AT_A_TIME // block_size), blocks)


@inlined
def _bounds(matrix, first, stop):
    """Return the first column of some blocks and the number of columns; their first entry and the number of entries."""
    _, _, _, _, _, numel, kept, block_size, kept_per_block = matrix
    column, start = first * kept_per_block, first * block_size
    columns, count = min(stop * kept_per_block, kept) - column, min(stop * block_size, numel) - start
    return _index(column), _index(columns), _index(start), _index(count), _index(first)


@inlined
def _all_below(indices, mask, begin, end, limit):
    largest = np.uint16(0)
    for j in range(begin, end):  # as unsigned numbers, negative ones are large
        largest = max(largest, np.uint16(indices[j] & mask))
    return _index(largest) < limit


@inlined
def _load_row(matrix, row, bounds, segment):
    """Write a row's values of some blocks to ``segment``; return where they begin, and if its indices are in range."""
    indices, values, value_code, lows, steps, _, kept, block_size, kept_per_block = matrix
    column, columns, _, count, block = bounds
    begin, mask, k = _index(row * kept) + column, index_mask(value_code), _index(kept_per_block)
    grids = lows[row % len(lows), block:], steps[row % len(steps), block:]
    load_values(indices, values, value_code, begin, columns, k, grids, segment)
    size, rest = _index(block_size), count % _index(block_size)
    in_whole = begin + min(columns, count // size * k)
    valid = _all_below(indices, mask, begin, in_whole, size)
    # a shorter last block
    return begin, valid and (rest == 0 or _all_below(indices, mask, in_whole, begin + columns, rest))


@inlined
def _descend_blocks(update, count, decay, param, code, start):
    """W ← decay·W − update for the ``count`` entries from ``start`` on, rounded once to their dtype."""
    if code == FLOAT32:
        W = param.view(np.float32)
        for i in range(count):
            W[start + i] = W[start + i] * decay - update[i]
    elif code == BFLOAT16:
        _descend_narrow_block(update, count, decay, param.view(np.uint16), BFLOAT16, start)
    else:
        _descend_narrow_block(update, count, decay, param.view(np.uint16), FLOAT16, start)


@inlined
def _descend_narrow_block(update, count, decay, bits, code, start):
    for i in range(count):
        w = widen(bits[start + i], code)
        # a NaN stays the one that it is
        bits[start + i] = bits[start + i] if np.isnan(w) else narrow(w * decay - update[i], code)


@inlined
def _add_rows(matrix, weights, bounds, segment, out, start):
    """Add the weighted rows of some blocks to ``out`` from ``start`` on; return whether all indices are in range."""
    indices, size, kept_per_block, valid = matrix[0], _index(matrix[7]), _index(matrix[8]), True
    _, columns, _, _, _ = bounds
    mask = index_mask(matrix[2])
    for row in range(len(weights)):
        w = weights[row]
        if w != 0 and valid:
            begin, valid = _load_row(matrix, row, bounds, segment)
            if valid:
                base = start
                for left in range(_index(0), columns, kept_per_block):
                    for j in range(left, min(left + kept_per_block, columns)):
                        out[base + _index(indices[begin + j] & mask)] += w * segment[j]
                    base += size
    return valid


# Each loop returns −1, or the first of the blocks at which it stopped for an index that is out of range.


@loop
def _update(
    param,
    param_code,
    numel,
    indices,
    values,
    value_code,
    lows,
    steps,
    block_size,
    kept_per_block,
    weights,
    lr,
    eps,
    decay,
    first,
    stop,
):
    window, kept = indices.shape
    indices, mask = indices.reshape(-1), index_mask(value_code)
    matrix = indices, values.reshape(-1), value_code, lows, steps, numel, kept, block_size, kept_per_block
    rate, epsilon, decay_ = np.float32(lr), np.float32(eps), np.float32(decay)
    blocks, size, k = _blocks_at_a_time(block_size, stop - first), _index(block_size), _index(kept_per_block)
    z1, z2 = np.zeros(blocks * block_size, np.float32), np.full(blocks * block_size, np.float32(-0.0))
    z2_bits, segment = z2.view(np.uint32), np.empty(blocks * kept_per_block, np.float32)
    for block in range(first, stop, blocks):
        bounds = _bounds(matrix, block, min(block + blocks, stop))
        _, columns, start, count, _ = bounds
        for row in range(window):
            w1, w2 = weights[0, row], weights[1, row]
            if w1 != 0 or w2 != 0:
                begin, valid = _load_row(matrix, row, bounds, segment)
                if not valid:
                    return block
                base = _index(0)
                for left in range(_index(0), columns, k):
                    for j in range(left, min(left + k, columns)):
                        i, value = base + _index(indices[begin + j] & mask), segment[j]
                        z1[i] += w1 * value
                        z2[i] += w2 * (value * value)
                    base += size
        for i in range(count):
            step = rate * (z1[i] / (np.sqrt(z2[i]) + epsilon))
            # an entry that no row has touched stays what it is, whatever eps: a sum of any w2·V² is +0 or more, or NaN
            z1[i] = _ZERO if z2_bits[i] == _UNTOUCHED else step
        _descend_blocks(z1, count, decay_, param, param_code, start)
        for i in range(count):
            z1[i], z2[i] = _ZERO, -_ZERO
    return -1


@loop
def _descend(
    param,
    param_code,
    numel,
    indices,
    values,
    value_code,
    lows,
    steps,
    block_size,
    kept_per_block,
    weights,
    lr,
    decay,
    first,
    stop,
):
    kept, blocks = indices.shape[1], _blocks_at_a_time(block_size, stop - first)
    flat = indices.reshape(-1), values.reshape(-1)
    matrix = *flat, value_code, lows, steps, numel, kept, block_size, kept_per_block
    rate, decay_ = np.float32(lr), np.float32(decay)
    direction, segment = np.zeros(blocks * block_size, np.float32), np.empty(blocks * kept_per_block, np.float32)
    for block in range(first, stop, blocks):
        bounds = _bounds(matrix, block, min(block + blocks, stop))
        _, _, start, count, _ = bounds
        if not _add_rows(matrix, weights, bounds, segment, direction, _index(0)):
            return block
        for i in range(count):
            direction[i] *= rate
        _descend_blocks(direction, count, decay_, param, param_code, start)
        for i in range(count):
            direction[i] = _ZERO
    return -1


@loop
def _combine_rows(
    out, numel, indices, values, value_code, lows, steps, block_size, kept_per_block, weights, first, stop
):
    kept, blocks = indices.shape[1], _blocks_at_a_time(block_size, stop - first)
    flat = indices.reshape(-1), values.reshape(-1)
    matrix = *flat, value_code, lows, steps, numel, kept, block_size, kept_per_block
    segment = np.empty(blocks * kept_per_block, np.float32)
    for block in range(first, stop, blocks):
        bounds = _bounds(matrix, block, min(block + blocks, stop))
        if not _add_rows(matrix, weights, bounds, segment, out, bounds[2]):
            return block
    return -1


@loop
def _gram(numel, indices, values, value_code, lows, steps, block_size, kept_per_block, newest, sums, step, first, stop):
    """Write the products of all rows with row ``newest`` to the piece's row of ``sums`` (float64)."""
    window, kept = indices.shape
    indices, mask = indices.reshape(-1), index_mask(value_code)
    matrix = indices, values.reshape(-1), value_code, lows, steps, numel, kept, block_size, kept_per_block
    blocks, size, k = _blocks_at_a_time(block_size, stop - first), _index(block_size), _index(kept_per_block)
    dense, segment = np.zeros(blocks * block_size, np.float32), np.empty(blocks * kept_per_block, np.float32)
    own = sums[first // step]
    own[:] = 0.0
    for block in range(first, stop, blocks):
        bounds = _bounds(matrix, block, min(block + blocks, stop))
        _, columns, _, count, _ = bounds
        begin, valid = _load_row(matrix, newest, bounds, segment)
        if not valid:
            return block
        base = _index(0)
        for left in range(_index(0), columns, k):
            for j in range(left, min(left + k, columns)):
                dense[base + _index(indices[begin + j] & mask)] = segment[j]
            base += size
        for row in range(window):
            begin, valid = _load_row(matrix, row, bounds, segment)
            if not valid:
                return block
            total, base = 0.0, _index(0)
            for left in range(_index(0), columns, k):
                for j in range(left, min(left + k, columns)):
                    total += np.float64(dense[base + _index(indices[begin + j] & mask)]) * np.float64(segment[j])
                base += size
            own[row] += total
        for i in range(count):
            dense[i] = _ZERO
    return -1


@register(_update_all, "cpu")
def update_all(
    params: Sequence[Tensor], windows: Sequence[SparseWindow], weights: Tensor, rates: Rates, memo: Memo,
    corrections: Sequence[Tensor] | None,
) -> None:  # fmt: skip
    """See :func:`hf_lowmem_optim.ops.sparse_window.foreach_window_update_`."""
    how = weights.numpy(), float(rates.lr), float(rates.eps), 1.0 - rates.lr * rates.weight_decay
    W = params if corrections is None else join_weights(params, corrections)
    _run(_update, windows, [(*_arguments(*each), *how) for each in zip(W, windows, strict=True)])
    if corrections is not None:
        split_weights_(params, corrections, W)


@register(_descend_all, "cpu")
def descend_all(
    params: Sequence[Tensor], windows: Sequence[SparseWindow], weights: Tensor, rates: Rates, memo: Memo,
    corrections: Sequence[Tensor] | None,
) -> None:  # fmt: skip
    """See :func:`hf_lowmem_optim.ops.sparse_window.foreach_window_descend_`."""
    how, rows = (float(rates.lr), 1.0 - rates.lr * rates.weight_decay), weights.expand(len(params), -1).numpy()
    W = params if corrections is None else join_weights(params, corrections)
    given = zip(W, windows, rows, strict=True)
    _run(_descend, windows, [(*_arguments(param, window), row, *how) for param, window, row in given])
    if corrections is not None:
        split_weights_(params, corrections, W)


@register(_combine, "cpu")
def combine(out: Tensor, window: SparseWindow, weights: Tensor) -> None:
    """See :func:`hf_lowmem_optim.ops.sparse_window.window_combine_`."""
    given = window.numel, *window_arguments(window), window.block_size, window.kept_per_block
    _run(_combine_rows, [window], [(out.numpy(), *given, weights.numpy())])


@register(_gram_rows, "cpu")
def gram_rows(windows: Sequence[SparseWindow], row: int, memo: Memo) -> Tensor:
    """See :func:`hf_lowmem_optim.ops.sparse_window.foreach_window_gram_rows`."""
    # each piece of so many blocks has sums of its own, which are added up in a fixed order
    ranges = [block_ranges(window.numel, window.block_size) for window in windows]
    starts = np.cumsum([0, *map(len, ranges)])
    sums = np.empty((starts[-1], windows[0].indices.shape[0]))
    parts = zip(windows, ranges, starts[:-1], starts[1:], strict=True)
    # all pieces but the last have as many blocks as the first
    arguments = [
        (w.numel, *window_arguments(w), w.block_size, w.kept_per_block, row, sums[a:b], pieces[0][1])
        for w, pieces, a, b in parts
    ]
    _run(_gram, windows, arguments)
    return torch.from_numpy(np.add.reduceat(sums, starts[:-1]))


def _run(loop: Loop[int], windows: Sequence[SparseWindow], arguments: Sequence[tuple[Any, ...]]) -> None:
    """Run a loop over all blocks of some windows.

    Args:
        loop: Takes a window's arguments, the first block of a piece and the one after its last.
        windows: The windows.
        arguments: For each window.

    Raises:
        ValueError: An index is out of range.
    """
    pieces = [
        (window, (*given, *ends))
        for window, given in zip(windows, arguments, strict=True)
        for ends in block_ranges(window.numel, window.block_size)
    ]
    blocks = run_pieces(loop.run, [piece for _, piece in pieces], sum([window.numel for window in windows]))
    for (window, _), block in zip(pieces, blocks, strict=True):
        if block >= 0:
            raise _out_of_range(window, block)


def _out_of_range(window: SparseWindow, block: int) -> ValueError:
    """Return the error for an index that is out of range in this block or a later one."""
    first = block * window.kept_per_block
    blocks = torch.arange(first, window.kept) // window.kept_per_block
    entries = (window.numel - blocks * window.block_size).clamp(max=window.block_size)
    indices = window.indices[:, first:]
    if window.value_dtype == "4bit":
        indices = unpack(indices)[0]
    row, column = ((indices < 0) | (indices >= entries)).nonzero()[0].tolist()
    return ValueError(
        f"index {int(indices[row, column])} in row {row} of the window is out of range: "
        f"block {int(blocks[column])} has {int(entries[column])} entries"
    )


def _arguments(param: Tensor, window: SparseWindow) -> tuple[Any, ...]:
    """Return what the loops of the update and of the descent take for a tensor, but for weights and rates."""
    flat = param.detach().view(-1)
    weight = flat.view(torch.uint8).numpy(), DTYPE_CODES[flat.dtype]
    return *weight, window.numel, *window_arguments(window), window.block_size, window.kept_per_block
