"""Products of a matrix with a thin one, in numba: a library's are made for factors that are not thin.

The matrix X is (n, m) and contiguous, the thin factor has some r columns or rows. X and the factors are taken in tiles,
so that what is read again and again lies in the first-level cache (``benchmarks/thin_products.py`` has the loops beside
torch's products). That they are compiled also lets an update be one call, without the interpreter.

A part of the result does not depend on what else is computed: of ``transposed_product`` columns, of the others rows.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
import numpy as np

from hf_lowmem_optim.kernels.cpu_floats import float32_at, load_floats, store_floats

__all__ = ["COLUMNS", "ROWS", "add_product", "add_product_at", "product_with_transposed", "transposed_product"]

#: Columns of a tile, and rows.
COLUMNS, ROWS = 512, 64
#: Rows or columns of the thin factor.
_THIN = 16

# unsigned: an index that could be negative for all that the compiler knows would not be vectorized
_index = np.uint64
_columns, _rows, _thin = np.uint64(COLUMNS), np.uint64(ROWS), np.uint64(_THIN)
#: Rows that are summed by themselves, as one long sum would lose more, and columns.
_summed, _summed_columns = np.uint64(256), np.uint64(256)
_0, _1, _2, _3, _4, _5, _6, _7, _8 = (np.uint64(i) for i in range(9))

# "contract": a product and a sum in one rounding
_jit: Callable[..., Callable[..., Any]] = numba.njit(nogil=True, error_model="numpy", fastmath={"contract"})
_inlined: Callable[..., Callable[..., Any]] = numba.njit(inline="always", error_model="numpy")
# a sum along a row is one of many partial sums
_sums: Callable[..., Callable[..., Any]] = numba.njit(nogil=True, error_model="numpy", fastmath={"contract", "reassoc"})


@_jit
def transposed_product(left, X, out, first, stop):
    """Write columns ``first`` to ``stop`` of leftᵀX, (r, m).

    Args:
        left: (n, r), in columns.
        X: (n, m).
        out: (r, m).
        first: First column.
        stop: Column after the last one.
    """
    n, r, stop = _index(X.shape[0]), _index(left.shape[1]), _index(stop)
    part = np.empty((_thin, _summed_columns), np.float32)
    for begin in range(_index(first), stop, _summed_columns):
        width = min(_summed_columns, stop - begin)
        for top in range(_0, n, _summed):
            bottom = min(top + _summed, n)
            for i in range(_0, r, _thin):
                count = min(_thin, r - i)
                _sum_rows(left, X, part, top, bottom, i, count, begin, width)
                for j in range(count):
                    for t in range(width):
                        out[i + j, begin + t] = part[j, t] if top == _0 else out[i + j, begin + t] + part[j, t]


@_jit
def _sum_rows(left, X, part, top, bottom, first, count, begin, width):
    """Write leftᵀX of some rows, for some columns of either, to ``part[:count, :width]``."""
    whole = top + (bottom - top) // _8 * _8
    for j in range(count):
        for t in range(width):
            part[j, t] = np.float32(0.0)
    for k in range(top, whole, _8):
        for j in range(count):
            i = first + j
            a0, a1, a2, a3 = left[k, i], left[k + _1, i], left[k + _2, i], left[k + _3, i]
            a4, a5, a6, a7 = left[k + _4, i], left[k + _5, i], left[k + _6, i], left[k + _7, i]
            for t in range(width):
                column = begin + t
                total = part[j, t] + a0 * X[k, column]
                total = total + a1 * X[k + _1, column]
                total = total + a2 * X[k + _2, column]
                total = total + a3 * X[k + _3, column]
                total = total + a4 * X[k + _4, column]
                total = total + a5 * X[k + _5, column]
                total = total + a6 * X[k + _6, column]
                part[j, t] = total + a7 * X[k + _7, column]
    for k in range(whole, bottom):
        for j in range(count):
            a0 = left[k, first + j]
            for t in range(width):
                part[j, t] = part[j, t] + a0 * X[k, begin + t]


@_jit
def product_with_transposed(X, right, out, first, stop):
    """Write rows ``first`` to ``stop`` of X·rightᵀ, (n, r).

    Args:
        X: (n, m).
        right: (r, m).
        out: (n, r), in columns.
        first: First row.
        stop: Row after the last one.
    """
    m, r, stop = _index(X.shape[1]), _index(right.shape[0]), _index(stop)
    tile = np.empty((_thin, _columns), np.float32)
    for top in range(_index(first), stop, _rows):
        bottom = min(top + _rows, stop)
        for begin in range(_0, m, _columns):
            end = min(begin + _columns, m)
            for i in range(_0, r, _thin):
                last = min(i + _thin, r)
                _sum_columns(X, _packed(right, tile, i, last, begin, end), out, top, bottom, i, last, begin, end)


@_jit
def _packed(right, tile, first, stop, begin, end):
    """Copy rows ``first`` to ``stop`` and columns ``begin`` to ``end`` to a tile; return it with their indices.

    Rows that are apart by a power of two would drive each other out of the cache.
    """
    for i in range(first, stop):
        for t in range(begin, end):
            tile[i - first, t - begin] = right[i, t]
    return float32_at(tile.ctypes.data - 4 * np.int64(first * _columns + begin), (_THIN, COLUMNS))


@_sums
def _sum_columns(X, right, out, top, bottom, first, stop, begin, end):
    """Add X·rightᵀ of some columns, for some rows of either, to ``out``, or begin it."""
    pairs, fours = top + (bottom - top) // _2 * _2, first + (stop - first) // _4 * _4
    for k in range(top, pairs, _2):
        k1 = k + _1
        for i in range(first, fours, _4):
            i1, i2, i3 = i + _1, i + _2, i + _3
            s0 = s1 = s2 = s3 = z0 = z1 = z2 = z3 = np.float32(0.0)
            for t in range(begin, end):
                x, y = X[k, t], X[k1, t]
                b0, b1, b2, b3 = right[i, t], right[i1, t], right[i2, t], right[i3, t]
                s0, s1, s2, s3 = s0 + x * b0, s1 + x * b1, s2 + x * b2, s3 + x * b3
                z0, z1, z2, z3 = z0 + y * b0, z1 + y * b1, z2 + y * b2, z3 + y * b3
            if begin == _0:
                out[k, i], out[k, i1], out[k, i2], out[k, i3] = s0, s1, s2, s3
                out[k1, i], out[k1, i1], out[k1, i2], out[k1, i3] = z0, z1, z2, z3
            else:
                out[k, i], out[k, i1], out[k, i2], out[k, i3] = (
                    out[k, i] + s0,
                    out[k, i1] + s1,
                    out[k, i2] + s2,
                    out[k, i3] + s3,
                )
                out[k1, i], out[k1, i1], out[k1, i2], out[k1, i3] = (
                    out[k1, i] + z0,
                    out[k1, i1] + z1,
                    out[k1, i2] + z2,
                    out[k1, i3] + z3,
                )
        for i in range(fours, stop):
            s0 = z0 = np.float32(0.0)
            for t in range(begin, end):
                s0, z0 = s0 + X[k, t] * right[i, t], z0 + X[k1, t] * right[i, t]
            out[k, i] = s0 if begin == _0 else out[k, i] + s0
            out[k1, i] = z0 if begin == _0 else out[k1, i] + z0
    for k in range(pairs, bottom):
        for i in range(first, stop):
            s0 = np.float32(0.0)
            for t in range(begin, end):
                s0 = s0 + X[k, t] * right[i, t]
            out[k, i] = s0 if begin == _0 else out[k, i] + s0


@_jit
def add_product(X, left, right, beta, alpha, first, stop):
    """Write rows ``first`` to ``stop`` of beta·X + alpha·left·right to X, (n, m).

    Args:
        X: (n, m).
        left: (n, r), in columns.
        right: (r, m).
        beta: Float32.
        alpha: Float32.
        first: First row.
        stop: Row after the last one.
    """
    m, stop = _index(X.shape[1]), _index(stop)
    for top in range(_index(first), stop, _rows):
        for begin in range(_0, m, _columns):
            _add_tile(X, _0, left, right, beta, alpha, top, min(top + _rows, stop), begin, min(begin + _columns, m))


@_jit
def add_product_at(x, kind, n, m, left, right, beta, alpha, first, stop):
    """The same for a matrix of any kind of floats at an address; each entry is rounded once to its kind."""
    if kind == 0:
        add_product(float32_at(x, (n, m)), left, right, beta, alpha, first, stop)
        return
    tile = np.empty((_rows, _columns), np.float32)
    columns, stop = _index(m), _index(stop)
    for top in range(_index(first), stop, _rows):
        bottom = min(top + _rows, stop)
        for begin in range(_0, columns, _columns):
            end = min(begin + _columns, columns)
            for k in range(top, bottom):
                load_floats(x, kind, np.int64(k * columns + begin), np.int64(end - begin), tile[k - top])
            # the tile has the columns from 0, where the right factor has those from ``begin``
            shifted = float32_at(tile.ctypes.data - 4 * np.int64(begin), (ROWS, COLUMNS))
            _add_tile(shifted, top, left, right, beta, alpha, top, bottom, begin, end)
            for k in range(top, bottom):
                store_floats(tile[k - top], np.int64(end - begin), x, kind, np.int64(k * columns + begin))


@_jit
def _add_tile(X, offset, left, right, beta, alpha, top, bottom, begin, end):
    """Rows ``top`` to ``bottom`` and columns ``begin`` to ``end``; row k is the row k − offset of X."""
    r = _index(right.shape[0])
    tile = np.empty((_thin, _columns), np.float32)
    for middle in range(_0, r, _thin):
        stop = min(middle + _thin, r)
        part = _packed(right, tile, middle, stop, begin, end)
        whole = middle + (stop - middle) // _8 * _8
        scale = beta if middle == _0 else np.float32(1.0)
        if whole == middle and scale != np.float32(1.0):  # nothing below scales
            for k in range(top, bottom):
                for t in range(begin, end):
                    X[k - offset, t] = scale * X[k - offset, t]
        for k in range(top, bottom, _2):
            # the last of an odd number of rows is both of a pair
            k1 = min(k + _1, bottom - _1)
            for c in range(middle, whole, _8):
                factor = scale if c == middle else np.float32(1.0)
                _add_terms(X, k - offset, k1 - offset, left, part, factor, alpha, k, k1, c, begin, end)
            for c in range(whole, stop):
                a = alpha * left[k, c]
                for t in range(begin, end):
                    X[k - offset, t] += a * part[c, t]
                if k1 != k:
                    a = alpha * left[k1, c]
                    for t in range(begin, end):
                        X[k1 - offset, t] += a * part[c, t]


@_inlined
def _add_terms(X, row, row1, left, right, beta, alpha, k, k1, c, begin, end):
    """Add eight terms to two rows, of which both are read before either is written."""
    c1, c2, c3, c4, c5, c6, c7 = c + _1, c + _2, c + _3, c + _4, c + _5, c + _6, c + _7
    a0, a1, a2, a3 = alpha * left[k, c], alpha * left[k, c1], alpha * left[k, c2], alpha * left[k, c3]
    a4, a5, a6, a7 = alpha * left[k, c4], alpha * left[k, c5], alpha * left[k, c6], alpha * left[k, c7]
    e0, e1, e2, e3 = alpha * left[k1, c], alpha * left[k1, c1], alpha * left[k1, c2], alpha * left[k1, c3]
    e4, e5, e6, e7 = alpha * left[k1, c4], alpha * left[k1, c5], alpha * left[k1, c6], alpha * left[k1, c7]
    for t in range(begin, end):
        b = right[c, t]
        s, z = beta * X[row, t] + a0 * b, beta * X[row1, t] + e0 * b
        b = right[c1, t]
        s, z = s + a1 * b, z + e1 * b
        b = right[c2, t]
        s, z = s + a2 * b, z + e2 * b
        b = right[c3, t]
        s, z = s + a3 * b, z + e3 * b
        b = right[c4, t]
        s, z = s + a4 * b, z + e4 * b
        b = right[c5, t]
        s, z = s + a5 * b, z + e5 * b
        b = right[c6, t]
        s, z = s + a6 * b, z + e6 * b
        b = right[c7, t]
        X[row, t], X[row1, t] = s + a7 * b, z + e7 * b
