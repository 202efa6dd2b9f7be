"""Error-feedback Top-K with numba: each thread takes blocks one by one, in scratch memory of a block's size.

Selection: the block is cut into chunks of 16 entries. At least k entries are not below a number that k of the chunks'
maxima reach, so only chunks that reach it can hold one of the k largest entries: at 1% density some 45 of 256. Their
entries that reach it, some 60, decide. Where k is not small against the number of chunks, all entries do.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, misc"
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numba
import numpy as np
from torch import Tensor

from hf_lowmem_optim.kernels.block_quant.cpu import block_range, decode, encode
from hf_lowmem_optim.kernels.block_topk.layout import Selection
from hf_lowmem_optim.kernels.cpu_calls import Record, Sizes, claimed_blocks, enters, run_calls
from hf_lowmem_optim.kernels.cpu_floats import (
    int16_at,
    load_float,
    load_floats,
    narrow,
    store_float,
    store_floats,
    uint8_at,
    widen,
)
from hf_lowmem_optim.kernels.sparse_records import (
    DENSE,
    FORM,
    QUANTIZED,
    layout_fields,
    loop_arguments,
    rule_fields,
    sparse_loop,
    sparse_record,
)

__all__ = ["select_all", "topk_block", "topk_layout", "topk_scratch"]

_jit = numba.njit(cache=True, error_model="numpy")

_CHUNK = 16
# unsigned: an index that could be negative for all that the compiler knows is checked, and not vectorized
_index = np.uint64


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


@_jit
def _accumulate(call, start, count, a, e):
    """Write a ← g + s·Q⁻¹(e) for the ``count`` entries from ``start`` on; ``e`` is scratch memory."""
    layout, grad, error_scale = call.layout, call.grad, call.rule.error_scale
    # elsewhere the gradient cannot be added to where it lies; and in ``a`` it would not be vectorized
    direct = layout.grad_kind == 0 and grad % 8 == 0
    if layout.error != QUANTIZED:
        load_floats(grad, layout.grad_kind, start, count, a)
    elif not direct:
        load_floats(grad, layout.grad_kind, start, count, e)
    if layout.error == DENSE:
        load_floats(layout.error_at, layout.error_kind, start, count, e)
        for i in range(count):
            a[i] += error_scale * e[i]
    elif layout.error == QUANTIZED:
        bits, quant_block, stat_kind = layout.bits, layout.quant_block, layout.stat_kind
        packed = uint8_at(layout.codes, (layout.numel * bits + 7) // 8)
        for at in range(0, count, quant_block):
            q = (start + at) // quant_block
            lo, hi = load_float(layout.lows, stat_kind, q), load_float(layout.highs, stat_kind, q)
            x = a.ctypes.data + 4 * at
            base = grad + 4 * (start + at) if direct else e.ctypes.data + 4 * at
            decode(packed, start + at, lo, hi, bits, error_scale, base, True, x, min(quant_block, count - at))


@_jit
def _retain(call, start, count, a):
    """Write e ← Q(a) for the ``count`` entries from ``start`` on."""
    layout, rule = call.layout, call.rule
    if layout.error == DENSE:
        store_floats(a, count, layout.error_at, layout.error_kind, start)
    elif layout.error == QUANTIZED:
        bits, quant_block, stat_kind = layout.bits, layout.quant_block, layout.stat_kind
        random = rule.stochastic != 0, rule.key0, rule.key1
        packed = uint8_at(layout.codes, (layout.numel * bits + 7) // 8)
        for at in range(0, count, quant_block):
            q, length = (start + at) // quant_block, min(quant_block, count - at)
            x = a.ctypes.data + 4 * at
            lo, hi = block_range(x, length, stat_kind != 0)
            encode(x, length, lo, hi, bits, random, packed, start + at)
            store_float(lo, layout.lows, stat_kind, q)
            store_float(hi, layout.highs, stat_kind, q)


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
    layout = call.layout
    # entries before the row
    before = call.rule.row * layout.kept
    indices = int16_at(layout.indices + 2 * before, layout.kept)
    values = layout.values + (4 if layout.value_kind == 0 else 2) * before
    start, first = block * layout.block_size, block * layout.kept_per_block
    count, k = min(layout.block_size, layout.numel - start), min(layout.kept_per_block, layout.kept - first)
    _accumulate(call, start, count, a, e)
    chunks = _magnitudes(a, count, magnitude, chunk_max)
    _select(magnitude, count, chunk_max, chunks, k, candidate, reach)
    _take(a, candidate, k, first, indices, values, layout.value_kind)
    _retain(call, start, count, a)


@sparse_loop
def _topk_blocks(arguments):
    calls, queue, threads, group, largest, _ = loop_arguments(arguments)
    if not enters(queue, threads):
        return
    scratch = topk_scratch(largest)
    for number, begin, end, _ in claimed_blocks(calls, queue, group):
        for block in range(begin, end):
            topk_block(calls[number], block, scratch)


def select_all(selections: Sequence[Selection]) -> None:
    """Numba version of :func:`~hf_lowmem_optim.kernels.block_topk.foreach_block_topk_`; tensors may have any shape."""
    sizes = Sizes.of([each.grad.numel() for each in selections], [each.block_size for each in selections])
    run_calls(_topk_blocks, np.zeros(len(selections), FORM), sizes, map(_record, selections))


def _record(each: Selection) -> Record:
    rule = rule_fields(row=each.row, seed=each.seed, error_scale=each.error_scale)
    return sparse_record(topk_layout(each), rule, each.num_blocks, each.grad, None)


def topk_layout(each: Selection, dense: Tensor | None = None) -> tuple[Any, ...]:
    """The fields of a tensor's layout; with ``dense`` for what follows Top-K, too."""
    return layout_fields(
        each.indices,
        each.values,
        numel=each.grad.numel(),
        block_size=each.block_size,
        kept_per_block=each.k,
        grad=each.grad,
        dense=dense,
        error=each.error,
    )
