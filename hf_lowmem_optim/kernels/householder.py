"""Orthonormal rows by Householder reflections, in numba: faster than LAPACK where there are few rows.

The reflections are found for :data:`REFLECTIONS` rows at a time and applied to the rest together, as thin products
(``benchmarks/orthonormalize.py`` has the loops beside LAPACK). That they are compiled lets an update be one call.

Source: Golub & Van Loan, Matrix Computations, 4th edition, sections 5.1 and 5.2; signs as in LAPACK's ``geqrf``.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
import numpy as np

from hf_lowmem_optim.kernels.cpu_floats import float32_at
from hf_lowmem_optim.kernels.thin_products import add_product, product_with_transposed

__all__ = ["REFLECTIONS", "orthonormalize_rows"]

REFLECTIONS = 8

# as in ``thin_products``
_index = np.uint64
_1, _2, _3 = (np.uint64(i) for i in range(1, 4))
_unit = np.float32(1.0)
#: Where the square of a vector's length has all its digits, and is no overflow.
_LEAST, _LARGEST = np.float32(2.0**-60), np.float32(2.0**100)
_jit: Callable[..., Callable[..., Any]] = numba.njit(nogil=True, error_model="numpy", fastmath={"contract"})
_sums: Callable[..., Callable[..., Any]] = numba.njit(nogil=True, error_model="numpy", fastmath={"contract", "reassoc"})


@_jit
def orthonormalize_rows(address, r, p):
    """Overwrite the rows of a matrix with orthonormal ones: the columns of Q in a QR of its transpose.

    The first i rows span what they did, if that has i dimensions; where it has fewer, they are orthonormal all the
    same. NaN or Inf in a row makes it, and those after it, not finite.

    Args:
        address: Of the matrix, float32 (r, p), contiguous.
        r: Number of rows, at most p.
        p: Number of columns.
    """
    A = float32_at(address, (r, p))
    taus, weights = np.empty(r, np.float32), np.empty(r, np.float32)
    # H = I − VᵀTV for so many reflections; C·Vᵀ and that times T, for the rows to which they are applied
    V, T = np.empty((REFLECTIONS, p), np.float32), np.zeros((r, REFLECTIONS), np.float32)
    products, factors = np.empty((REFLECTIONS, r), np.float32), np.empty((REFLECTIONS, r), np.float32)
    for first in range(0, r, REFLECTIONS):
        stop = min(first + REFLECTIONS, r)
        for j in range(first, stop):
            taus[j] = _find_reflection(A[j], j, p)
            _reflect(A, A[j], taus[j], weights, j, p, j + 1, stop)
        _join(A, taus, T[first:stop], weights, first, stop, p)
        if stop < r:
            rest = float32_at(address + 4 * stop * p, (r - stop, p))
            _reflect_together(rest, A, T[first:stop].T, V, products, factors, first, stop, p)
    # Q = H₁H₂…·I, from the last reflection to the first
    for first in range((r - 1) // REFLECTIONS * REFLECTIONS, -1, -REFLECTIONS):
        stop = min(first + REFLECTIONS, r)
        if stop < r:
            rest = float32_at(address + 4 * stop * p, (r - stop, p))
            _reflect_together(rest, A, T[first:stop], V, products, factors, first, stop, p)
        for j in range(stop - 1, first - 1, -1):
            _reflect(A, A[j], taus[j], weights, j, p, j + 1, stop)
            _reflect_unit(A[j], taus[j], j, p)


@_jit
def _find_reflection(x, j, p):
    """Overwrite ``x[j:]`` with v, v[0] = 1, and return τ: I − τ·v·vᵀ reflects it onto the first axis."""
    rest = _squares(x, j + 1, p)
    square = x[j] * x[j] + rest
    if not _LEAST < square < _LARGEST:
        _scale(x, j, p)
        rest = _squares(x, j + 1, p)
    alpha, tau = x[j], np.float32(0.0)
    if rest != np.float32(0.0) or not np.isfinite(alpha):
        beta = -np.copysign(np.sqrt(alpha * alpha + rest), alpha)
        tau, factor = (beta - alpha) / beta, _unit / (alpha - beta)
        for t in range(_index(j + 1), _index(p)):
            x[t] *= factor
    x[j] = _unit
    return tau


@_sums
def _squares(x, first, stop):
    """Return the sum of the squares of some entries."""
    total = np.float32(0.0)
    for t in range(_index(first), _index(stop)):
        total += x[t] * x[t]
    return total


@_jit
def _scale(x, first, stop):
    """Divide some entries by the largest: then their squares neither overflow nor vanish."""
    largest = np.float32(0.0)
    for t in range(_index(first), _index(stop)):
        largest = max(largest, np.abs(x[t]))
    if np.float32(0.0) < largest < np.float32(np.inf):
        for t in range(_index(first), _index(stop)):
            x[t] = np.float32(np.float64(x[t]) / largest)


@_jit
def _reflect(A, v, tau, weights, j, p, first, stop):
    """Apply I − τ·v·vᵀ to rows ``first`` to ``stop``."""
    _dots(A, v, weights, j, p, first, stop)
    for row in range(first, stop):
        weights[row] *= tau
    for i in range(_index(first), _index(stop - (stop - first) % 4), _index(4)):
        i1, i2, i3 = i + _1, i + _2, i + _3
        a0, a1, a2, a3 = weights[i], weights[i1], weights[i2], weights[i3]
        for t in range(_index(j), _index(p)):
            x = v[t]
            A[i, t] -= a0 * x
            A[i1, t] -= a1 * x
            A[i2, t] -= a2 * x
            A[i3, t] -= a3 * x
    for i in range(_index(stop - (stop - first) % 4), _index(stop)):
        a0 = weights[i]
        for t in range(_index(j), _index(p)):
            A[i, t] -= a0 * v[t]


@_sums
def _dots(A, v, out, j, p, first, stop):
    """Write the products of ``v`` and rows ``first`` to ``stop``, from column j on, to the same places of ``out``."""
    for i in range(_index(first), _index(stop - (stop - first) % 4), _index(4)):
        i1, i2, i3 = i + _1, i + _2, i + _3
        s0 = s1 = s2 = s3 = np.float32(0.0)
        for t in range(_index(j), _index(p)):
            x = v[t]
            s0, s1, s2, s3 = s0 + A[i, t] * x, s1 + A[i1, t] * x, s2 + A[i2, t] * x, s3 + A[i3, t] * x
        out[i], out[i1], out[i2], out[i3] = s0, s1, s2, s3
    for i in range(_index(stop - (stop - first) % 4), _index(stop)):
        s0 = np.float32(0.0)
        for t in range(_index(j), _index(p)):
            s0 += A[i, t] * v[t]
        out[i] = s0


@_jit
def _reflect_unit(v, tau, j, p):
    """Overwrite the reflection's v with what it makes of unit vector j."""
    for t in range(_index(j)):
        v[t] = np.float32(0.0)
    v[j] = _unit - tau
    for t in range(_index(j + 1), _index(p)):
        v[t] *= -tau


@_jit
def _join(A, taus, T, weights, first, stop, p):
    """Write T of the reflections ``first`` to ``stop``, upper triangular: their product is I − VᵀTV."""
    for j in range(stop - first):
        _dots(A, A[first + j], weights, first + j, p, first, first + j)
        for i in range(j):
            total = np.float32(0.0)
            for k in range(i, j):
                total += T[i, k] * weights[first + k]
            T[i, j] = -taus[first + j] * total
        T[j, j] = taus[first + j]


@_jit
def _reflect_together(C, A, T, V, products, factors, first, stop, p):
    """Write C ← C − C·Vᵀ·Tᵀ·V, which applies I − VᵀTV to every row; with Tᵀ for T, its transpose."""
    count, rows = stop - first, C.shape[0]
    for j in range(count):
        for t in range(_index(first + j)):
            V[j, t] = np.float32(0.0)
        for t in range(_index(first + j), _index(p)):
            V[j, t] = A[first + j, t]
    product_with_transposed(C, V[:count], products.T, 0, rows)
    for a in range(count):
        for i in range(_index(rows)):
            factors[a, i] = np.float32(0.0)
        for k in range(count):
            weight = T[a, k]
            for i in range(_index(rows)):
                factors[a, i] += weight * products[k, i]
    add_product(C, factors.T, V[:count], _unit, -_unit, 0, rows)
