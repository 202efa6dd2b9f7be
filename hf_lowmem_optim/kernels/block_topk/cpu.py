"""Error-feedback Top-K with numba: each thread takes blocks one by one, in scratch memory of a block's size.

Selection: the block is cut into chunks of 16 entries. At least k entries are not below the k-th largest of the chunks'
maxima, so only chunks that reach it can hold one of the k largest entries: at 1% density some 45 of 256. Their entries
that reach it, some 60, decide. Where k is not small against the number of chunks, all entries do.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, misc"
from __future__ import annotations

import numba
import numpy as np
from torch import Tensor

from hf_lowmem_optim.kernels.block_quant.cpu import (
    block_range,
    decode,
    encode,
    load_stat,
    random_argument,
    store_stat,
)
from hf_lowmem_optim.kernels.block_quant.layout import Quantized
from hf_lowmem_optim.kernels.block_topk.layout import Selection
from hf_lowmem_optim.kernels.cpu_floats import (
    float_views,
    load_floats,
    narrow,
    num_pieces,
    store_floats,
    widen,
)
from hf_lowmem_optim.kernels.workers import run_pieces

__all__ = ["select_into"]

_jit = numba.njit(cache=True, error_model="numpy")

_index = np.uint64  # as in block_quant: a signed index would not be vectorized
_CHUNK = 16
_EMPTY_CODES = np.empty(0, np.uint8)
_NONE, _DENSE, _QUANTIZED = 0, 1, 2


@_jit
def _kth_largest(magnitude, count, k):
    """The k-th largest of ``magnitude[:count]`` (int32, not negative): the largest t with count(≥ t) ≥ k."""
    t = np.int32(0)
    for bit in range(30, -1, -1):
        candidate = np.int32(t | np.int32(1 << bit))
        reached = np.int32(0)
        for i in range(count):
            reached = np.int32(reached + np.int32(magnitude[i] >= candidate))
        if reached >= k:
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
        for i in range(chunk * _CHUNK, (chunk + 1) * _CHUNK):
            largest = max(largest, magnitude[i])
        chunk_max[chunk] = largest
    return chunks


@_jit
def _select(magnitude, count, chunk_max, chunks, k, candidate, reach):
    """Write the ascending indices of the k largest magnitudes to ``candidate[:k]``, ties to the lowest index."""
    few = 2 * k <= chunks
    floor = _kth_largest(chunk_max, chunks, k) if few else _kth_largest(magnitude, count, k)
    found = 0
    for chunk in range(chunks):
        if chunk_max[chunk] >= floor:
            for i in range(chunk * _CHUNK, min((chunk + 1) * _CHUNK, count)):
                candidate[found] = i
                reach[found] = magnitude[i]
                found += 1 if magnitude[i] >= floor else 0
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
def _take(a, chosen, k, first, indices, values32, values16):
    """Store the chosen entries as index and value, and leave in ``a`` what rounding cut off the value."""
    for j in range(k):
        i = chosen[j]
        indices[first + j] = i
        x = a[i]
        if values16.size == 0:
            wide = x
            values32[first + j] = x
        else:
            bits = narrow(x, 1)
            wide = widen(bits, 1)
            values16[first + j] = bits
        a[i] = x - wide if np.isfinite(wide) else np.float32(0.0)


@numba.njit(cache=True, nogil=True, error_model="numpy")
def _topk_blocks(
    grad32,
    grad16,
    grad_kind,
    dense32,
    dense16,
    dense_kind,
    codes,
    lo32,
    lo16,
    hi32,
    hi16,
    quant_block,
    bits,
    random,
    error,
    error_scale,
    indices,
    values32,
    values16,
    numel,
    block_size,
    k_full,
    k_last,
    first,
    stop,
):
    blocks = (numel + block_size - 1) // block_size
    a = np.empty(block_size, np.float32)
    e = np.empty(block_size if error == _DENSE else 1, np.float32)
    part = np.empty(quant_block, np.float32)
    magnitude = np.empty(block_size + _CHUNK, np.int32)
    chunk_max = np.empty(block_size // _CHUNK + 1, np.int32)
    candidate = np.empty(block_size + 1, np.int32)
    reach = np.empty(block_size + 1, np.int32)
    for block in range(first, stop):
        start = block * block_size
        count = min(block_size, numel - start)
        k = k_last if block == blocks - 1 else k_full
        load_floats(grad32, grad16, grad_kind, start, count, a)
        if error == _DENSE:
            load_floats(dense32, dense16, dense_kind, start, count, e)
            for i in range(count):
                a[i] += error_scale * e[i]
        elif error == _QUANTIZED:
            for at in range(0, count, quant_block):
                q = (start + at) // quant_block
                lo, hi = load_stat(lo32, lo16, q), load_stat(hi32, hi16, q)
                length = min(quant_block, count - at)
                decode(codes, start + at, lo, hi, bits, part, length)
                for i in range(_index(length)):
                    a[_index(at) + i] += error_scale * part[i]
        chunks = _magnitudes(a, count, magnitude, chunk_max)
        _select(magnitude, count, chunk_max, chunks, k, candidate, reach)
        _take(a, candidate, k, block * k_full, indices, values32, values16)
        if error == _DENSE:
            store_floats(a, count, dense32, dense16, dense_kind, start)
        elif error == _QUANTIZED:
            for at in range(0, count, quant_block):
                q = (start + at) // quant_block
                length = min(quant_block, count - at)
                for i in range(_index(length)):
                    part[i] = a[_index(at) + i]
                lo, hi = block_range(part, length, lo32.size == 0)
                encode(part, length, lo, hi, bits, random, codes, start + at)
                store_stat(lo, lo32, lo16, q)
                store_stat(hi, hi32, hi16, q)


def select_into(out: Selection, grad: Tensor, error: Quantized | Tensor | None) -> None:
    """Numba version of :func:`~hf_lowmem_optim.kernels.block_topk.block_topk_`; dense tensors may have any shape."""
    if isinstance(error, Quantized):
        kind, dense, codes = _QUANTIZED, float_views(None), error.codes.numpy()
        lo32, lo16, _ = float_views(error.lo)
        hi32, hi16, _ = float_views(error.hi)
        stats, quant = (lo32, lo16, hi32, hi16), (error.format.block_size, error.format.bits)
    else:
        kind, dense, codes = _NONE if error is None else _DENSE, float_views(error), _EMPTY_CODES
        stats, quant = (*float_views(None)[:2], *float_views(None)[:2]), (2, 8)
    values32, values16, _ = float_views(out.values)
    numel = grad.numel()
    arguments = (
        *float_views(grad),
        *dense,
        codes,
        *stats,
        *quant,
        random_argument(out.seed),
        kind,
        np.float32(out.error_scale),
        out.indices.numpy().reshape(-1),
        values32,
        values16,
        numel,
        out.block_size,
        out.k,
        out.k_last,
    )
    blocks = -(-numel // out.block_size)
    run_pieces(lambda _, first, stop: _topk_blocks(*arguments, first, stop), blocks, num_pieces(blocks, out.block_size))
