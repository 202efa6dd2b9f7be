"""The operation with numba: all of it for a small rank, where a call costs as much as a product; else the rest.

The columns of the moments are taken in tiles, so that a tile of both is in the first-level cache while R goes over it.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
from __future__ import annotations

from collections.abc import Callable

import numba
import numpy as np
from torch import Tensor

from hf_lowmem_optim.kernels.cpu_floats import float32_at, num_pieces
from hf_lowmem_optim.kernels.subspace_adam.reference import move_moments_
from hf_lowmem_optim.kernels.workers import run_pieces

__all__ = ["update_"]

#: Up to which the loops are faster than the calls of a library (``benchmarks/step_time.py``).
_SMALL_RANK = 32

_TILE = 64
_ROWS = 64

# unsigned: an index that could be negative for all that the compiler knows would not be vectorized
_index = np.uint64
_ONE, _TWO, _THREE, _FOUR = np.uint64(1), np.uint64(2), np.uint64(3), np.uint64(4)

# "contract": a product and a sum in one rounding
_loop: Callable[..., Callable[..., None]] = numba.njit(
    cache=True, nogil=True, error_model="numpy", fastmath={"contract"}
)


@_loop
def _overlap(basis, old_basis, part, out):
    """Write UᵀU₋, summed over some rows at a time, which loses less than one long sum."""
    p, r = basis.shape
    out[:] = np.float32(0.0)
    for first in range(0, p, _ROWS):
        stop = min(first + _ROWS, p)
        whole = first + (stop - first) // 4 * 4
        part[:] = np.float32(0.0)
        for k in range(_index(first), _index(whole), _FOUR):
            k1, k2, k3 = k + _ONE, k + _TWO, k + _THREE
            for i in range(_index(r)):
                u0, u1, u2, u3 = basis[k, i], basis[k1, i], basis[k2, i], basis[k3, i]
                for j in range(_index(r)):
                    total = part[i, j] + u0 * old_basis[k, j]
                    total = total + u1 * old_basis[k1, j]
                    total = total + u2 * old_basis[k2, j]
                    part[i, j] = total + u3 * old_basis[k3, j]
        for k in range(_index(whole), _index(stop)):
            for i in range(_index(r)):
                u0 = basis[k, i]
                for j in range(_index(r)):
                    part[i, j] += u0 * old_basis[k, j]
        for i in range(_index(r)):
            for j in range(_index(r)):
                out[i, j] += part[i, j]


@_loop
def _rotate(overlap, row, rows, moment, square, m_moved, x):
    """Write a row of R m and of (R∘R)s for a tile of both moments; ``rows`` is a multiple of four."""
    for t in range(_index(_TILE)):
        m_moved[t], x[t] = np.float32(0.0), np.float32(0.0)
    for j in range(_index(0), _index(rows), _FOUR):
        j1, j2, j3 = j + _ONE, j + _TWO, j + _THREE
        a0, a1, a2, a3 = overlap[row, j], overlap[row, j1], overlap[row, j2], overlap[row, j3]
        b0, b1, b2, b3 = a0 * a0, a1 * a1, a2 * a2, a3 * a3
        for t in range(_index(_TILE)):
            total = m_moved[t] + a0 * moment[j, t]
            total = total + a1 * moment[j1, t]
            total = total + a2 * moment[j2, t]
            m_moved[t] = total + a3 * moment[j3, t]
        for t in range(_index(_TILE)):
            total = x[t] + b0 * square[j, t]
            total = total + b1 * square[j1, t]
            total = total + b2 * square[j2, t]
            x[t] = total + b3 * square[j3, t]


@_loop
def _finish(m_moved, x, m, v, projected, kept, taken, count, scalars):
    """Write the new moments, the direction and the right factor, entry by entry; ``kept`` may be x, ``taken`` m̃."""
    beta1, beta2, rest1, rest2, correction, damping = scalars
    back, factor = beta1 / rest1, beta2 * correction
    for i in range(_index(count)):
        p, moved, old = projected[i], m_moved[i], m[i]
        second = np.abs(x[i] + factor * (moved * moved)) + rest2 * (p * p)
        first = beta1 * moved + rest1 * p
        v[i] = second
        m[i] = first
        projected[i] = first / (np.sqrt(second) + damping)
        kept[i] = back * old
        taken[i] = -first / rest1


@_loop
def _update_tiles(old_bases, bases, moments, squares, gradients, lefts, rights, batch, p, r, q, scalars, begin, end):
    _, beta2, _, _, correction, _ = scalars
    padded = (r + 3) // 4 * 4
    part, overlap = np.empty((r, r), np.float32), np.zeros((padded, padded), np.float32)
    moment, square = np.zeros((padded, _TILE), np.float32), np.zeros((padded, _TILE), np.float32)
    m_moved, x = np.empty(_TILE, np.float32), np.empty(_TILE, np.float32)
    for one in range(batch):
        old_basis = float32_at(old_bases + 4 * one * p * r, (p, r))
        basis = float32_at(bases + 4 * one * p * r, (p, r))
        m = float32_at(moments + 4 * one * r * q, (r, q))
        v = float32_at(squares + 4 * one * r * q, (r, q))
        projected = float32_at(gradients + 4 * one * r * q, (r, q))
        left = float32_at(lefts + 8 * one * p * r, (p, 2 * r))
        right = float32_at(rights + 8 * one * r * q, (2 * r, q))
        _overlap(basis, old_basis, part, overlap)
        for tile in range(begin, end):
            start = tile * _TILE
            stop = min(start + _TILE, q)
            for j in range(_index(r)):
                for t in range(_index(stop - start)):
                    old = m[j, _index(start) + t]
                    moment[j, t] = old
                    square[j, t] = beta2 * (v[j, _index(start) + t] - correction * (old * old))
            for i in range(r):
                _rotate(overlap, i, padded, moment, square, m_moved, x)
                columns = slice(start, stop)
                _finish(
                    m_moved,
                    x,
                    m[i, columns],
                    v[i, columns],
                    projected[i, columns],
                    right[i, columns],
                    right[r + i, columns],
                    stop - start,
                    scalars,
                )
        if begin == 0:  # the first of several pieces
            for k in range(_index(p)):
                for j in range(_index(r)):
                    left[k, j] = old_basis[k, j]
                    left[k, _index(r) + j] = basis[k, j]


@_loop
def _finish_entries(moments, squares, gradients, rights, batch, entries, scalars, begin, end):
    count = end - begin
    for one in range(batch):
        at = 4 * (one * entries + begin)
        m, v = float32_at(moments + at, count), float32_at(squares + at, count)
        projected = float32_at(gradients + at, count)
        x = float32_at(rights + at + 4 * one * entries, count)
        moved = float32_at(rights + at + 4 * (one + 1) * entries, count)
        _finish(moved, x, m, v, projected, x, moved, count, scalars)


def update_(
    old_basis: Tensor,
    basis: Tensor,
    m: Tensor,
    v: Tensor,
    projected: Tensor,
    left: Tensor,
    right: Tensor,
    betas: tuple[float, float],
    correction: float,
    damping: float,
) -> None:
    """See :func:`~hf_lowmem_optim.kernels.subspace_adam.subspace_adam_`."""
    beta1, beta2 = betas
    scalars = tuple(map(np.float32, (beta1, beta2, 1 - beta1, 1 - beta2, correction, damping)))
    p, r = basis.shape[-2:]
    q = m.shape[-1]
    batch = 1 if basis.dim() == 2 else basis.shape[0]
    addresses = m.data_ptr(), v.data_ptr(), projected.data_ptr()
    if r <= _SMALL_RANK:
        bases, factors = (old_basis.data_ptr(), basis.data_ptr()), (left.data_ptr(), right.data_ptr())
        tiles = -(-q // _TILE)
        tiled = (*bases, *addresses, *factors, batch, p, r, q, scalars)
        run_pieces(_update_tiles, tiled, tiles, num_pieces(tiles, r * _TILE))
    else:
        move_moments_(old_basis, basis, m, v, left, right, beta2, correction)
        flat = (*addresses, right.data_ptr(), batch, r * q, scalars)
        run_pieces(_finish_entries, flat, r * q, num_pieces(r * q, 1))
