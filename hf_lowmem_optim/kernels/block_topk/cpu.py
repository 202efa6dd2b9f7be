"""Error-feedback Top-K with numba: each thread takes blocks one by one, in scratch memory of a block's size.

Selection: the block is cut into chunks of 16 entries. At least k entries are not below a number that k of the chunks'
maxima reach, so only chunks that reach it can hold one of the k largest entries: at 1% density some 45 of 256. Their
entries that reach it, some 60, decide. Where k is not small against the number of chunks, all entries do.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, misc"
from __future__ import annotations

import numba
import numpy as np
from torch import Tensor

from hf_lowmem_optim.kernels.block_quant.cpu import (
    block_range,
    buffer_arguments,
    decode,
    encode,
    random_argument,
)
from hf_lowmem_optim.kernels.block_quant.layout import Quantized
from hf_lowmem_optim.kernels.block_topk.layout import Selection
from hf_lowmem_optim.kernels.cpu_floats import (
    floats,
    int16_at,
    load_float,
    load_floats,
    narrow,
    num_pieces,
    store_float,
    store_floats,
    uint8_at,
    widen,
)
from hf_lowmem_optim.kernels.workers import run_pieces

__all__ = ["select_into"]

_jit = numba.njit(cache=True, error_model="numpy")

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


@numba.njit(cache=True, nogil=True, error_model="numpy")
def _topk_blocks(
    grad,
    grad_kind,
    error,
    dense,
    dense_kind,
    codes,
    lows,
    highs,
    stat_kind,
    numel,
    quant_block,
    bits,
    random,
    error_scale,
    indices,
    values,
    value_kind,
    block_size,
    k_full,
    k_last,
    first,
    stop,
):
    blocks = (numel + block_size - 1) // block_size
    packed = uint8_at(codes, (numel * bits + 7) // 8)
    row = int16_at(indices, (blocks - 1) * k_full + k_last)
    direct = grad_kind == 0 and grad % 8 == 0
    a = np.empty(block_size, np.float32)
    # a dense error; or a gradient that cannot be added to where it lies, not in ``a``: in place nothing is vectorized
    e = np.empty(block_size if error == _DENSE or not direct else 1, np.float32)
    magnitude = np.empty(block_size + _CHUNK, np.int32)
    chunk_max = np.empty(block_size // _CHUNK + 1, np.int32)
    candidate = np.empty(block_size + 1, np.int32)
    reach = np.empty(block_size + 1, np.int32)
    for block in range(first, stop):
        start = block * block_size
        count = min(block_size, numel - start)
        k = k_last if block == blocks - 1 else k_full
        if error != _QUANTIZED:
            load_floats(grad, grad_kind, start, count, a)
        elif not direct:
            load_floats(grad, grad_kind, start, count, e)
        if error == _DENSE:
            load_floats(dense, dense_kind, start, count, e)
            for i in range(count):
                a[i] += error_scale * e[i]
        elif error == _QUANTIZED:
            for at in range(0, count, quant_block):
                q = (start + at) // quant_block
                lo, hi = load_float(lows, stat_kind, q), load_float(highs, stat_kind, q)
                length = min(quant_block, count - at)
                x = a.ctypes.data + 4 * at
                base = grad + 4 * (start + at) if direct else e.ctypes.data + 4 * at
                decode(packed, start + at, lo, hi, bits, error_scale, base, True, x, length)
        chunks = _magnitudes(a, count, magnitude, chunk_max)
        _select(magnitude, count, chunk_max, chunks, k, candidate, reach)
        _take(a, candidate, k, block * k_full, row, values, value_kind)
        if error == _DENSE:
            store_floats(a, count, dense, dense_kind, start)
        elif error == _QUANTIZED:
            for at in range(0, count, quant_block):
                q = (start + at) // quant_block
                length = min(quant_block, count - at)
                x = a.ctypes.data + 4 * at
                lo, hi = block_range(x, length, stat_kind != 0)
                encode(x, length, lo, hi, bits, random, packed, start + at)
                store_float(lo, lows, stat_kind, q)
                store_float(hi, highs, stat_kind, q)


def select_into(out: Selection, grad: Tensor, error: Quantized | Tensor | None) -> None:
    """Numba version of :func:`~hf_lowmem_optim.kernels.block_topk.block_topk_`; dense tensors may have any shape."""
    numel = grad.numel()
    if isinstance(error, Quantized):
        kept = (_QUANTIZED, 0, 0, *buffer_arguments(error))
    else:
        # no codes of 8 bits, in blocks of two entries
        kept = (_NONE if error is None else _DENSE, *floats(error), 0, 0, 0, 0, numel, 2, 8)
    selection = (out.indices.data_ptr(), *floats(out.values), out.block_size, out.k, out.k_last)
    arguments = (*floats(grad), *kept, random_argument(out.seed), np.float32(out.error_scale), *selection)
    blocks = -(-numel // out.block_size)
    run_pieces(_topk_blocks, arguments, blocks, num_pieces(blocks, out.block_size))
