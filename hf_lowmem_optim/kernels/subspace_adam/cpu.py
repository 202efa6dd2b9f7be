"""The operation with numba, one call: threads that update a matrix each meet in the interpreter as seldom as can be.

Of a large matrix the stages are cut into pieces, of columns, rows or entries; no result depends on the pieces. Of
several small matrices each is updated by itself.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
import numpy as np
from torch import Tensor

from hf_lowmem_optim.kernels.block_quant.cpu import (
    buffer_arguments,
    dequantize_blocks,
    quantize_blocks,
    random_argument,
)
from hf_lowmem_optim.kernels.block_quant.layout import Quantized
from hf_lowmem_optim.kernels.cpu_floats import float32_at, floats, num_pieces
from hf_lowmem_optim.kernels.householder import orthonormalize_rows
from hf_lowmem_optim.kernels.subspace_adam.layout import PIECE, Buffers, Coefficients
from hf_lowmem_optim.kernels.thin_products import (
    ROWS,
    add_product,
    add_product_at,
    product_with_transposed,
    transposed_product,
)
from hf_lowmem_optim.kernels.workers import run_pieces

__all__ = ["step_"]

_TILE = 64
_ALL = -1
_NO_BUFFER = (0, 0, 0, 0, 0, PIECE, 8)

# as in ``thin_products``
_index = np.uint64
_1, _2, _3, _4, _5, _6, _7, _8 = (np.uint64(i) for i in range(1, 9))
_unit = np.float32(1.0)
_loop: Callable[..., Callable[..., Any]] = numba.njit(
    cache=True, nogil=True, error_model="numpy", fastmath={"contract"}
)
_jit: Callable[..., Callable[..., Any]] = numba.njit(nogil=True, error_model="numpy", fastmath={"contract"})


@_jit
def _transpose(matrix, out):
    """Write the transpose of ``matrix`` to ``out``."""
    rows, columns = _index(matrix.shape[0]), _index(matrix.shape[1])
    # a few at a time: lines of a cache that are far apart by powers of two drive each other out
    for top in range(_index(0), rows, _8):
        for left in range(_index(0), columns, _8):
            for k in range(top, min(top + _8, rows)):
                for j in range(left, min(left + _8, columns)):
                    out[j, k] = matrix[k, j]


@_jit
def _project(rows, X, over_rows, out, first, stop):
    """Write columns ``first`` to ``stop`` of rows·X, or of rows·Xᵀ: which sum over the rows of X, or its columns."""
    if over_rows:
        transposed_product(rows.T, X, out, first, stop)
    else:
        product_with_transposed(X, rows, out.T, first, stop)


@_jit
def _power_iteration(X, wide, m, projected, old, out, share, rest, stage, first, stop):
    """Line 3 without the QR: Yᵀ, or a stage of it. ``wide``: X is a, and not its transpose."""
    (r, p), q = old.shape, m.shape[1]
    if stage == _ALL or stage == 2:  # columns of Vᵀ = (1 − ρ)·U₋ᵀa + s·m
        last = min(stop, q)
        _project(old, X, wide, projected, first, last)
        for i in range(_index(r)):
            for t in range(_index(first), _index(last)):
                projected[i, t] = rest * projected[i, t] + share * m[i, t]
    if stage == _ALL or stage == 3:  # columns of (aV)ᵀ
        _project(projected, X, not wide, out, first, min(stop, p))
    if stage == _ALL or stage == 4:  # Yᵀ = (1 − ρ)·(aV)ᵀ + s·(mV)ᵀU₋ᵀ
        mixed = np.empty((r, r), np.float32)
        product_with_transposed(projected, m, mixed.T, 0, r)
        add_product(out, mixed.T, old, rest, share, 0, r)


@_jit
def _rotate(overlap, row, rows, moment, square, moved, x):
    """Write a row of R m and of (R∘R)s for a tile of both moments; ``rows`` is a multiple of eight."""
    for t in range(_index(_TILE)):
        moved[t], x[t] = np.float32(0.0), np.float32(0.0)
    for j in range(_index(0), _index(rows), _8):
        j1, j2, j3, j4, j5, j6, j7 = j + _1, j + _2, j + _3, j + _4, j + _5, j + _6, j + _7
        a0, a1, a2, a3 = overlap[row, j], overlap[row, j1], overlap[row, j2], overlap[row, j3]
        a4, a5, a6, a7 = overlap[row, j4], overlap[row, j5], overlap[row, j6], overlap[row, j7]
        for t in range(_index(_TILE)):
            total = moved[t] + a0 * moment[j, t]
            total = total + a1 * moment[j1, t]
            total = total + a2 * moment[j2, t]
            total = total + a3 * moment[j3, t]
            total = total + a4 * moment[j4, t]
            total = total + a5 * moment[j5, t]
            total = total + a6 * moment[j6, t]
            moved[t] = total + a7 * moment[j7, t]
        a0, a1, a2, a3, a4, a5, a6, a7 = a0 * a0, a1 * a1, a2 * a2, a3 * a3, a4 * a4, a5 * a5, a6 * a6, a7 * a7
        for t in range(_index(_TILE)):
            total = x[t] + a0 * square[j, t]
            total = total + a1 * square[j1, t]
            total = total + a2 * square[j2, t]
            total = total + a3 * square[j3, t]
            total = total + a4 * square[j4, t]
            total = total + a5 * square[j5, t]
            total = total + a6 * square[j6, t]
            x[t] = total + a7 * square[j7, t]


@_jit
def _finish(moved, x, m, v, projected, kept, taken, count, betas, correction, damping):
    """Write a row's new moments, direction, and part of the right factor."""
    beta1, beta2, rest1, rest2 = betas
    back, factor = beta1 / rest1, beta2 * correction
    for t in range(_index(count)):
        p, old = projected[t], m[t]
        second = np.abs(x[t] + factor * (moved[t] * moved[t])) + rest2 * (p * p)
        first = beta1 * moved[t] + rest1 * p
        v[t] = second
        m[t] = first
        projected[t] = first / (np.sqrt(second) + damping)
        kept[t] = back * old
        taken[t] = -first / rest1


@_jit
def _move(m, v, projected, old, basis, right, betas, correction, damping, begin, end):
    """Columns of the moments, the direction and the right factor."""
    r, beta2 = m.shape[0], betas[1]
    padded = (r + 7) // 8 * 8
    overlap = np.zeros((padded, padded), np.float32)
    product_with_transposed(old, basis, overlap.T, 0, r)
    moment, square = np.zeros((padded, _TILE), np.float32), np.zeros((padded, _TILE), np.float32)
    moved, x = np.empty(_TILE, np.float32), np.empty(_TILE, np.float32)
    for start in range(begin, end, _TILE):
        stop = min(start + _TILE, end)
        for j in range(_index(r)):
            for t in range(_index(stop - start)):
                first = m[j, _index(start) + t]
                moment[j, t] = first
                square[j, t] = beta2 * (v[j, _index(start) + t] - correction * (first * first))
        for i in range(r):
            _rotate(overlap, i, padded, moment, square, moved, x)
            _finish(
                moved,
                x,
                m[i, start:stop],
                v[i, start:stop],
                projected[i, start:stop],
                right[i, start:stop],
                right[r + i, start:stop],
                stop - start,
                betas,
                correction,
                damping,
            )


@_loop
def _step(
    weights,
    kind,
    matrices,
    old_bases,
    new_bases,
    moments,
    squares,
    buffers,
    gradient,
    error,
    random,
    keeps,
    batch,
    sizes,
    coefficients,
    stage,
    begin,
    end,
):
    """All stages, or one; ``begin`` and ``end`` count :data:`PIECE` of the columns, rows or entries that it writes."""
    (n, columns, p, q, r), (bases, projections, rights) = sizes, buffers
    wide = n == p
    share, rest = np.float32(coefficients[0]), np.float32(coefficients[1])
    beta1, beta2 = coefficients[2], coefficients[3]
    betas = np.float32(beta1), np.float32(beta2), np.float32(1 - beta1), np.float32(1 - beta2)
    correction, damping = np.float32(coefficients[4]), np.float32(coefficients[5])
    decay, alpha = np.float32(coefficients[6]), np.float32(-coefficients[7])
    first, stop = begin * PIECE, end * PIECE
    codes, lows, highs, stat_kind, count, block_size, bits = error
    first_block, stop_block = first // block_size, -(-min(stop, count) // block_size)
    if count > 0 and (stage == _ALL or stage == 0):  # a = g + ξ
        dequantize_blocks(
            matrices,
            0,
            gradient[0],
            gradient[1],
            True,
            codes,
            lows,
            highs,
            stat_kind,
            count,
            block_size,
            bits,
            _unit,
            first_block,
            stop_block,
        )
    for one in range(batch):
        X, left = float32_at(matrices + 4 * one * n * columns, (n, columns)), bases + 8 * one * p * r
        old, new, both = float32_at(left, (r, p)), float32_at(left + 4 * p * r, (r, p)), float32_at(left, (2 * r, p))
        at = 4 * one * r * q
        m, v = float32_at(moments + at, (r, q)), float32_at(squares + at, (r, q))
        projected, right = float32_at(projections + at, (r, q)), float32_at(rights + 2 * at, (2 * r, q))
        basis = float32_at(old_bases + 4 * one * p * r, (p, r))
        if stage == _ALL or stage == 1:
            _transpose(basis, old)
        if new_bases == 0:
            _power_iteration(X, wide, m, projected, old, new, share, rest, stage, first, stop)
        if stage == _ALL or stage == 4:
            if new_bases == 0:
                orthonormalize_rows(left + 4 * p * r, r, p)
            else:
                _transpose(float32_at(new_bases + 4 * one * p * r, (p, r)), new)
            _transpose(new, basis)
        if stage == _ALL or stage == 5:
            last = min(stop, q)
            _project(new, X, wide, projected, first, last)
            _move(m, v, projected, old, new, right, betas, correction, damping, first, last)
        last = min(stop, n)
        if keeps and (stage == _ALL or stage == 6):
            columnwise, rowwise = (both, right) if wide else (right, both)
            add_product(X, columnwise.T, rowwise, _unit, _unit, first, last)
        if stage == _ALL or stage == 7:
            weight = weights + (4 if kind == 0 else 2) * one * n * columns
            columnwise, rowwise = (new, projected) if wide else (projected, new)
            add_product_at(weight, kind, n, columns, columnwise.T, rowwise, decay, alpha, first, last)
    if count > 0 and (stage == _ALL or stage == 8):  # what is left is the error
        quantize_blocks(
            matrices, 0, codes, lows, highs, stat_kind, count, block_size, bits, random, first_block, stop_block
        )


def step_(
    param: Tensor,
    matrix: Tensor,
    basis: Tensor,
    m: Tensor,
    v: Tensor,
    buffers: Buffers,
    coefficients: Coefficients,
    *,
    new_basis: Tensor | None,
    keeps_rest: bool,
    gradient: Tensor | None,
    error: Quantized | None,
    seed: int | None,
) -> None:
    """See :func:`~hf_lowmem_optim.kernels.subspace_adam.subspace_adam_`; both matrices are contiguous."""
    n, columns = matrix.shape[-2:]
    (r, q), batch = m.shape[-2:], 1 if matrix.dim() == 2 else matrix.shape[0]
    p = n + columns - q
    given = None if new_basis is None else new_basis.contiguous()
    stored = _NO_BUFFER if error is None else buffer_arguments(error)
    arguments = (
        *floats(param),
        matrix.data_ptr(),
        basis.data_ptr(),
        0 if given is None else given.data_ptr(),
        m.data_ptr(),
        v.data_ptr(),
        tuple(buffer.data_ptr() for buffer in buffers),
        floats(gradient),
        stored,
        random_argument(seed),
        keeps_rest,
        batch,
        (n, columns, p, q, r),
        tuple(map(float, coefficients)),  # an integer among them would have the loop compiled anew
    )
    # what the stages write; the first and the last are the entries of all matrices
    lengths = (stored[4], 1, q, p, 1, q, n, n, stored[4])
    pieces = min(-(-p // PIECE), num_pieces(-(-n // ROWS), n * columns)) if batch == 1 else 1
    if pieces == 1:
        _step(*arguments, _ALL, 0, -(-max(lengths) // PIECE))
        return
    for stage, length in enumerate(lengths):
        if length > 0:
            blocks = -(-length // PIECE)
            run_pieces(_step, (*arguments, stage), blocks, min(pieces, blocks))
