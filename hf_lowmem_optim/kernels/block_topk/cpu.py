"""Error-feedback Top-K with numba: each thread takes blocks one by one, in scratch memory of a block's size.

Selection: the block is cut into chunks of 16 entries. At least k entries are not below a number that k of the chunks'
maxima reach, so only chunks that reach it can hold one of the k largest entries: at 1% density some 45 of 256. Their
entries that reach it, some 60, decide. Where k is not small against the number of chunks, all entries do.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, misc"
from __future__ import annotations

from collections.abc import Sequence

import numba
import numpy as np

from hf_lowmem_optim.kernels.block_quant.cpu import (
    block_range,
    buffer_arguments,
    decode,
    encode,
    random_argument,
)
from hf_lowmem_optim.kernels.block_quant.layout import Quantized
from hf_lowmem_optim.kernels.block_topk.layout import Selection
from hf_lowmem_optim.kernels.cpu_calls import FLOAT, INT, Record, Sizes, claimed_blocks, record, run_calls
from hf_lowmem_optim.kernels.cpu_floats import (
    floats,
    int16_at,
    load_float,
    load_floats,
    narrow,
    store_float,
    store_floats,
    uint8_at,
    widen,
)

__all__ = ["TOPK_FORM", "select_all", "topk_block", "topk_record", "topk_scratch"]

_jit = numba.njit(cache=True, error_model="numpy")
_loop = numba.njit(cache=True, nogil=True, error_model="numpy")

_CHUNK = 16
# unsigned: an index that could be negative for all that the compiler knows is checked, and not vectorized
_index = np.uint64
_NONE, _DENSE, _QUANTIZED = 0, 1, 2


@_jit
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


@_jit
def _magnitudes(a, count, magnitude, chunk_max):
    """Bits of |a|, every NaN just above infinity, padded with 0 to whole chunks; and each chunk's maximum."""
    for i in range(count):
        bits = np.int32(np.float32(a[i]).view(np.int32) & np.int32(0x7FFFFFFF))
        magnitude[i] = min(bits, np.int32(0x7F800001))
    chunks = (count + _CHUNK - 1) // _CHUNK
    for i in range(count, chunks * _CHUNK):
        magnitude[i] = 0
    for chunk in range(chunks):
        largest = np.int32(0)
        for i in range(_index(chunk * _CHUNK), _index((chunk + 1) * _CHUNK)):
            largest = max(largest, magnitude[i])
        chunk_max[chunk] = largest
    return chunks


@_jit
def _select(magnitude, count, chunk_max, chunks, k, candidate, reach):
    """Write the ascending indices of the k largest magnitudes to ``candidate[:k]``, ties to the lowest index."""
    few = 2 * k <= chunks
    floor = _kth_largest(chunk_max, chunks, k) if few else _kth_largest(magnitude, count, k)
    found = _index(0)
    for chunk in range(chunks):
        if chunk_max[chunk] >= floor:
            for i in range(_index(chunk * _CHUNK), _index(min((chunk + 1) * _CHUNK, count))):
                candidate[found] = i
                reach[found] = magnitude[i]
                found += _index(magnitude[i] >= floor)
    threshold = _kth_largest(reach, found, k) if few else floor
    above = 0
    for j in range(found):
        above += 1 if reach[j] > threshold else 0
    room, kept = k - above, 0
    for j in range(found):
        if reach[j] > threshold:
            candidate[kept] = candidate[j]
            kept += 1
        elif reach[j] == threshold and room > 0:
            candidate[kept] = candidate[j]
            kept += 1
            room -= 1


@_jit
def _take(a, chosen, k, first, indices, values, value_kind):
    """Store the chosen entries as index and value, and leave in ``a`` what rounding cut off the value."""
    for j in range(k):
        i = _index(chosen[j])
        indices[first + j] = i
        x = a[i]
        wide = x if value_kind == 0 else widen(narrow(x, 1), 1)
        store_float(wide, values, value_kind, first + j)
        a[i] = x - wide if np.isfinite(wide) else np.float32(0.0)


#: The record of a tensor for :func:`topk_block`.
TOPK_FORM = record(
    grad=INT,
    grad_kind=INT,
    error=INT,
    dense=INT,
    dense_kind=INT,
    codes=INT,
    lows=INT,
    highs=INT,
    stat_kind=INT,
    numel=INT,
    quant_block=INT,
    bits=INT,
    stochastic=INT,
    key0=INT,
    key1=INT,
    error_scale=FLOAT,
    indices=INT,
    values=INT,
    value_kind=INT,
    block_size=INT,
    k_full=INT,
    k_last=INT,
)


@_jit
def _accumulate(call, start, count, a, e):
    """Write a ← g + s·Q⁻¹(e) for the ``count`` entries from ``start`` on; ``e`` is scratch memory."""
    error_scale = call.error_scale
    # elsewhere the gradient cannot be added to where it lies; and in ``a`` it would not be vectorized
    direct = call.grad_kind == 0 and call.grad % 8 == 0
    if call.error != _QUANTIZED:
        load_floats(call.grad, call.grad_kind, start, count, a)
    elif not direct:
        load_floats(call.grad, call.grad_kind, start, count, e)
    if call.error == _DENSE:
        load_floats(call.dense, call.dense_kind, start, count, e)
        for i in range(count):
            a[i] += error_scale * e[i]
    elif call.error == _QUANTIZED:
        bits, quant_block, stat_kind = call.bits, call.quant_block, call.stat_kind
        packed = uint8_at(call.codes, (call.numel * bits + 7) // 8)
        for at in range(0, count, quant_block):
            q = (start + at) // quant_block
            lo, hi = load_float(call.lows, stat_kind, q), load_float(call.highs, stat_kind, q)
            x = a.ctypes.data + 4 * at
            base = call.grad + 4 * (start + at) if direct else e.ctypes.data + 4 * at
            decode(packed, start + at, lo, hi, bits, error_scale, base, True, x, min(quant_block, count - at))


@_jit
def _retain(call, start, count, a):
    """Write e ← Q(a) for the ``count`` entries from ``start`` on."""
    if call.error == _DENSE:
        store_floats(a, count, call.dense, call.dense_kind, start)
    elif call.error == _QUANTIZED:
        bits, quant_block, stat_kind = call.bits, call.quant_block, call.stat_kind
        random = call.stochastic != 0, call.key0, call.key1
        packed = uint8_at(call.codes, (call.numel * bits + 7) // 8)
        for at in range(0, count, quant_block):
            q, length = (start + at) // quant_block, min(quant_block, count - at)
            x = a.ctypes.data + 4 * at
            lo, hi = block_range(x, length, stat_kind != 0)
            encode(x, length, lo, hi, bits, random, packed, start + at)
            store_float(lo, call.lows, stat_kind, q)
            store_float(hi, call.highs, stat_kind, q)


@numba.njit(inline="always", error_model="numpy")
def topk_scratch(block_size):
    """Memory that :func:`topk_block` works in, for blocks of this size or less."""
    return (
        np.empty(block_size, np.float32),
        np.empty(block_size, np.float32),
        np.empty(block_size + _CHUNK, np.int32),
        np.empty(block_size // _CHUNK + 1, np.int32),
        np.empty(block_size + 1, np.int32),
        np.empty(block_size + 1, np.int32),
    )


@numba.njit(inline="always", error_model="numpy")
def topk_block(call, block, scratch):
    """One block of one tensor, from the gradient and the error to the row and the error."""
    a, e, magnitude, chunk_max, candidate, reach = scratch
    row = int16_at(call.indices, (call.blocks - 1) * call.k_full + call.k_last)
    start = block * call.block_size
    count = min(call.block_size, call.numel - start)
    k = call.k_last if block == call.blocks - 1 else call.k_full
    _accumulate(call, start, count, a, e)
    chunks = _magnitudes(a, count, magnitude, chunk_max)
    _select(magnitude, count, chunk_max, chunks, k, candidate, reach)
    _take(a, candidate, k, block * call.k_full, row, call.values, call.value_kind)
    _retain(call, start, count, a)


@_loop
def _topk_blocks(calls, queue, group, own, largest, _):
    scratch = topk_scratch(largest)
    for number, begin, end, _ in claimed_blocks(calls, queue, group, own):
        for block in range(begin, end):
            topk_block(calls[number], block, scratch)


def select_all(selections: Sequence[Selection]) -> None:
    """Numba version of :func:`~hf_lowmem_optim.kernels.block_topk.foreach_block_topk_`."""
    sizes = Sizes.of([each.grad.numel() for each in selections], [each.block_size for each in selections])
    run_calls(_topk_blocks, TOPK_FORM, map(topk_record, selections), sizes)


def topk_record(each: Selection) -> Record:
    """The fields of :data:`TOPK_FORM` for a tensor, which may have any shape."""
    error, numel = each.error, each.grad.numel()
    if isinstance(error, Quantized):
        buffer = (_QUANTIZED, 0, 0, *buffer_arguments(error))
    else:
        # no codes of 8 bits, in blocks of two entries
        buffer = (_NONE if error is None else _DENSE, *floats(error), 0, 0, 0, 0, numel, 2, 8)
    # not a view of the row: a call of torch lets go of Python's lock, for which other threads wait
    first, (values, value_kind) = each.row * each.kept, floats(each.values)
    row = (each.indices.data_ptr() + 2 * first, values + each.values.itemsize * first, value_kind)
    how = (*random_argument(each.seed), each.error_scale)
    return (*floats(each.grad), *buffer, *how, *row, each.block_size, each.k, each.k_last, each.num_blocks)
