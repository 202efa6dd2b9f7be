"""Error-feedback Top-K with numba, bit for bit the torch version: block by block in scratch memory of a block's size.

Selection: the block is cut into chunks of 16 entries. At least k entries are not below a number that k of the chunks'
maxima reach, so only chunks that reach it can hold one of the k largest entries: at 1% density some 45 of 256. Their
entries that reach it, some 60, decide. Where k is not small against the number of chunks, all entries do.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hf_lowmem_optim.ops.block_quant import Quantized
from hf_lowmem_optim.ops.block_topk import Errors, Selection, _select_all
from hf_lowmem_optim.ops.cpu.block_quant import decode_blocks, encode_blocks, random_keys
from hf_lowmem_optim.ops.cpu.floats import load_floats, store_floats
from hf_lowmem_optim.ops.cpu.jit import inlined, loop
from hf_lowmem_optim.ops.cpu.launch import (
    DTYPE_CODES,
    NO_BYTES,
    block_ranges,
    buffer_arguments,
    run_pieces,
    window_arguments,
)
from hf_lowmem_optim.ops.cpu.window import store_values
from hf_lowmem_optim.ops.dispatch import register
from hf_lowmem_optim.ops.window import Memo, SparseWindow

__all__ = ["select_all"]

_CHUNK = 16
_NO_ERROR, _DENSE, _QUANTIZED = 0, 1, 2
# unsigned: an index that could be negative for all that the compiler knows is checked, and not vectorized
_index = np.uint64


@inlined
def _kth_largest(magnitude, count, k):
    """A t that k of ``magnitude[:count]`` (int32, not negative) reach, or more only where others equal the k-th."""
    t = np.int32(0)
    for bit in range(30, -1, -1):
        candidate = np.int32(t | np.int32(1 << bit))
        reached = np.int32(0)
        for i in range(count):
            reached = np.int32(reached + np.int32(magnitude[i] >= candidate))
        if reached == k:  # no smaller step would take one in or leave one out
            return candidate
        if reached > k:
            t = candidate
    return t


@inlined
def _magnitudes(a, count, magnitude, chunk_max):
    """Bits of |a|, every NaN just above infinity, padded with 0 to whole chunks; and each chunk's maximum."""
    for i in range(count):
        bits = np.int32(np.float32(a[i]).view(np.int32) & np.int32(0x7FFFFFFF))
        magnitude[i] = min(bits, np.int32(0x7F800001))
    chunks = (count + _index(_CHUNK - 1)) // _index(_CHUNK)
    for i in range(count, chunks * _index(_CHUNK)):
        magnitude[i] = 0
    for chunk in range(chunks):
        largest = np.int32(0)
        for i in range(_index(_CHUNK)):
            largest = max(largest, magnitude[chunk * _index(_CHUNK) + i])
        chunk_max[chunk] = largest
    return chunks


@inlined
def _select(magnitude, count, chunk_max, chunks, k, candidate, reach):
    """Write the ascending indices of the k largest magnitudes to ``candidate[:k]``, ties to the lowest index."""
    few = _index(2 * k) <= chunks
    floor = _kth_largest(chunk_max if few else magnitude, chunks if few else count, k)
    found = _index(0)
    for chunk in range(chunks):
        if chunk_max[chunk] >= floor:
            for i in range(chunk * _index(_CHUNK), min((chunk + _index(1)) * _index(_CHUNK), count)):
                candidate[found] = i
                reach[found] = magnitude[i]
                found += _index(magnitude[i] >= floor)
    threshold = _kth_largest(reach, found, k) if few else floor
    above = 0
    for j in range(found):
        above += 1 if reach[j] > threshold else 0
    room, kept = k - above, _index(0)
    for j in range(found):
        tied = reach[j] == threshold and room > 0
        if reach[j] > threshold or tied:
            candidate[kept] = candidate[j]
            kept += _index(1)
            room -= 1 if tied else 0


@loop
def _topk(
    grad,
    grad_code,
    numel,
    indices,
    values,
    value_code,
    lows_of_values,
    steps,
    block_size,
    k,
    form,
    error_scale,
    codes,
    lows,
    highs,
    error_code,
    bits,
    quant_block,
    stochastic,
    key0,
    key1,
    first,
    stop,
):
    """Top-K of the blocks from ``first`` to ``stop``. ``codes``: those of the error, or the bytes of a dense one."""
    # an even number of entries, so that they can be taken as words
    a, e = np.empty((block_size + 1) // 2 * 2, np.float32), np.empty((block_size + 1) // 2 * 2, np.float32)
    magnitude, chunk_max = np.empty(block_size + _CHUNK, np.int32), np.empty(block_size // _CHUNK + 1, np.int32)
    candidate, reach = np.empty(block_size + 1, np.int32), np.empty(block_size + 1, np.int32)
    scratch = np.empty((2, block_size // quant_block + 1), np.float32)
    scale, error = np.float32(error_scale), (codes, lows, highs, error_code, bits, quant_block)
    rows = indices, values, value_code, lows_of_values, steps
    for block in range(first, stop):
        start = _index(block * block_size)
        count = _index(min(block_size, numel - block * block_size))
        column = _index(block * k)
        # the last block keeps what is left of the row
        kept = min(k, len(indices) - block * k)
        load_floats(grad, grad_code, start, count, a)
        # a ← g + s·Q⁻¹(e)
        if form == _DENSE:
            load_floats(codes, error_code, start, count, e)
            for i in range(count):
                a[i] += scale * e[i]
        elif form == _QUANTIZED:
            decode_blocks(e, start, count, error, scale, scratch)
            for i in range(count):
                a[i] += e[i]
        chunks = _magnitudes(a, count, magnitude, chunk_max)
        _select(magnitude, count, chunk_max, chunks, kept, candidate, reach)
        store_values(a, candidate, kept, column, _index(block), rows)
        # e ← Q(a)
        if form == _DENSE:
            store_floats(a, count, codes, error_code, start)
        elif form == _QUANTIZED:
            encode_blocks(a, start, count, error, (stochastic, key0, key1), scratch)


@register(_select_all, "cpu")
def select_all(
    grads: Sequence[Tensor], windows: Sequence[SparseWindow], errors: Errors, how: Selection, memo: Memo
) -> None:
    """See :func:`hf_lowmem_optim.ops.block_topk.foreach_block_topk_`."""
    rounding = (False, 0, 0) if how.seed is None else random_keys(how.seed)
    pieces = [
        (*_arguments(grad, window, how.row), *_error_arguments(error, how.error_scale), *rounding, *ends)
        for grad, window, error in zip(grads, windows, errors, strict=True)
        for ends in block_ranges(window.numel, window.block_size)
    ]
    run_pieces(_topk.run, pieces, sum([window.numel for window in windows]))


def _arguments(tensor: Tensor, window: SparseWindow, at: int) -> tuple[Any, ...]:
    """Return what the loop takes for a gradient and its window."""
    grad = tensor.detach().view(-1)
    gradient = grad.view(torch.uint8).numpy(), DTYPE_CODES[grad.dtype], grad.numel()
    indices, values, value_code, lo, step = window_arguments(window)
    row = indices[at], values[at % len(values)], value_code, lo[at % len(lo)], step[at % len(step)]
    return *gradient, *row, window.block_size, window.kept_per_block


def _error_arguments(error: Quantized | Tensor | None, scale: float) -> tuple[Any, ...]:
    """Return what the loop takes for an error."""
    form = _NO_ERROR
    buffer: tuple[Any, ...] = NO_BYTES, NO_BYTES, NO_BYTES, 0, 8, 1
    if isinstance(error, Quantized):
        form, buffer = _QUANTIZED, buffer_arguments(error)
    elif error is not None:
        dense = error.detach().view(-1).view(torch.uint8).numpy()
        form, buffer = _DENSE, (dense, NO_BYTES, NO_BYTES, DTYPE_CODES[error.dtype], 8, 1)
    return form, float(scale), *buffer
