"""The operations with numba, each one call: threads that update a matrix each meet in the interpreter less often.

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
from hf_lowmem_optim.kernels.subspace_adam.layout import PIECE
from hf_lowmem_optim.kernels.thin_products import (
    ROWS,
    add_product,
    add_product_at,
    product_with_transposed,
    transposed_product,
)
from hf_lowmem_optim.kernels.workers import run_pieces

__all__ = ["descend_", "sketch", "update_"]

_TILE = 64
_ALL = -1
_NO_BUFFER = (0, 0, 0, 0, 0, PIECE, 8)

# as in ``thin_products``
_index = np.uint64
_1, _2, _3, _4, _5, _6, _7, _8 = (np.uint64(i) for i in range(1, 9))
_loop: Callable[..., Callable[..., Any]] = numba.njit(
    cache=True, nogil=True, error_model="numpy", fastmath={"contract"}
)
_jit: Callable[..., Callable[..., Any]] = numba.njit(nogil=True, error_model="numpy", fastmath={"contract"})


@_jit
def _transpose(matrix, out):
    """Write the transpose of ``matrix`` to the first rows of ``out``."""
    for k in range(_index(matrix.shape[0])):
        for j in range(_index(matrix.shape[1])):
            out[j, k] = matrix[k, j]


@_loop
def _sketch(
    matrices, moments, bases, projections, old_bases, gradient, error, batch, sizes, scalars, stage, begin, end
):
    """A stage of :func:`sketch`, or all; ``begin`` and ``end`` count :data:`PIECE` of what the stage writes."""
    (n, columns, p, q, r), (share, rest) = sizes, scalars
    first = begin * PIECE
    mixed = np.empty((r, r), np.float32)
    codes, lows, highs, stat_kind, count, block_size, bits = error
    if count > 0 and (stage == _ALL or stage == 0):  # a = g + ξ
        start, stop = first // block_size, -(-min(end * PIECE, count) // block_size)
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
            np.float32(1.0),
            start,
            stop,
        )
    for one in range(batch):
        X, old = (
            float32_at(matrices + 4 * one * n * columns, (n, columns)),
            float32_at(bases + 8 * one * p * r, (r, p)),
        )
        m, v = float32_at(moments + 4 * one * r * q, (r, q)), float32_at(projections + 4 * one * r * q, (r, q))
        out = float32_at(bases + 8 * one * p * r + 4 * r * p, (r, p))
        if stage == _ALL or stage == 1:
            _transpose(float32_at(old_bases + 4 * one * p * r, (p, r)), old)
        if stage == _ALL or stage == 2:  # columns of Vᵀ = (1 − ρ)·U₋ᵀa + s·m
            stop = min(end * PIECE, q)
            if n == p:
                transposed_product(old.T, X, v, first, stop)
            else:
                product_with_transposed(X, old, v.T, first, stop)
            for i in range(_index(r)):
                for t in range(_index(first), _index(stop)):
                    v[i, t] = rest * v[i, t] + share * m[i, t]
        if stage == _ALL or stage == 3:  # columns of (aV)ᵀ
            stop = min(end * PIECE, p)
            if n == p:
                product_with_transposed(X, v, out.T, first, stop)
            else:
                transposed_product(v.T, X, out, first, stop)
        if stage == _ALL or stage == 4:  # Yᵀ = (1 − ρ)·(aV)ᵀ + s·(mV)ᵀU₋ᵀ
            product_with_transposed(v, m, mixed.T, 0, r)
            add_product(out, mixed.T, old, rest, share, 0, r)


def sketch(
    matrix: Tensor,
    old_basis: Tensor,
    m: Tensor,
    bases: Tensor,
    projected: Tensor,
    share: float,
    rest: float,
    *,
    gradient: Tensor | None,
    error: Quantized | None,
) -> Tensor:
    """See :func:`~hf_lowmem_optim.kernels.subspace_adam.power_iteration`; the matrix is contiguous."""
    sizes, batch = _sizes(matrix, m)
    tensors = (matrix, m, bases, projected, old_basis)
    source = (floats(gradient), _NO_BUFFER if error is None else buffer_arguments(error))
    scalars = np.float32(share), np.float32(rest)
    arguments = (*(tensor.data_ptr() for tensor in tensors), *source, batch, sizes, scalars)
    lengths = (source[1][4], 1, sizes[3], sizes[2], 1)
    _run_stages(_sketch, arguments, lengths, _pieces(matrix, batch))
    return bases[..., m.shape[-2] :, :].mT


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
def _finish(moved, x, m, v, projected, kept, taken, count, scalars):
    """Write a row's new moments, direction, and part of the right factor."""
    beta1, beta2, rest1, rest2, correction, damping = scalars
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
def _move(m, v, projected, old, basis, right, scalars, begin, end):
    """Columns of the moments, the direction and the right factor."""
    _, beta2, _, _, correction, _ = scalars
    r = m.shape[0]
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
                scalars,
            )


@_loop
def _update(
    matrices,
    moments,
    squares,
    bases,
    projections,
    rights,
    transposed,
    keeps,
    error,
    random,
    batch,
    sizes,
    scalars,
    stage,
    begin,
    end,
):
    """A stage of :func:`update_`, or all; ``begin`` and ``end`` count :data:`PIECE` columns, rows or entries."""
    n, columns, p, q, r = sizes
    first, unit = begin * PIECE, np.float32(1.0)
    for one in range(batch):
        X, left = float32_at(matrices + 4 * one * n * columns, (n, columns)), bases + 8 * one * p * r
        old, basis = float32_at(left, (r, p)), float32_at(left + 4 * p * r, (r, p))
        at = 4 * one * r * q
        right = float32_at(rights + 2 * at, (2 * r, q))
        if stage == _ALL or stage == 0:
            new = float32_at(transposed + 4 * one * p * r, (r, p))
            for i in range(_index(r)):
                for k in range(_index(p)):
                    basis[i, k] = new[i, k]
        if stage == _ALL or stage == 1:
            m, v, projected = (
                float32_at(moments + at, (r, q)),
                float32_at(squares + at, (r, q)),
                float32_at(projections + at, (r, q)),
            )
            stop = min(end * PIECE, q)
            if n == p:
                transposed_product(basis.T, X, projected, first, stop)
            else:
                product_with_transposed(X, basis, projected.T, first, stop)
            _move(m, v, projected, old, basis, right, scalars, first, stop)
        if keeps and (stage == _ALL or stage == 2):
            both, stop = float32_at(left, (2 * r, p)), min(end * PIECE, n)
            if n == p:
                add_product(X, both.T, right, unit, unit, first, stop)
            else:
                add_product(X, right.T, both, unit, unit, first, stop)
    codes, lows, highs, stat_kind, count, block_size, bits = error
    if count > 0 and (stage == _ALL or stage == 3):  # what is left is the error
        start, stop = first // block_size, -(-min(end * PIECE, count) // block_size)
        quantize_blocks(matrices, 0, codes, lows, highs, stat_kind, count, block_size, bits, random, start, stop)


def update_(
    matrix: Tensor,
    basis: Tensor,
    m: Tensor,
    v: Tensor,
    bases: Tensor,
    projected: Tensor,
    right: Tensor,
    betas: tuple[float, float],
    correction: float,
    damping: float,
    *,
    keeps_rest: bool,
    error: Quantized | None,
    seed: int | None,
) -> None:
    """See :func:`~hf_lowmem_optim.kernels.subspace_adam.subspace_adam_`; the matrix is contiguous."""
    beta1, beta2 = betas
    scalars = tuple(map(np.float32, (beta1, beta2, 1 - beta1, 1 - beta2, correction, damping)))
    sizes, batch = _sizes(matrix, m)
    transposed = basis.mT.contiguous()  # QR gives columns: no copy
    addresses = (tensor.data_ptr() for tensor in (matrix, m, v, bases, projected, right, transposed))
    target = (_NO_BUFFER if error is None else buffer_arguments(error), random_argument(seed))
    arguments = (*addresses, keeps_rest, *target, batch, sizes, scalars)
    _run_stages(_update, arguments, (1, sizes[3], sizes[0], target[0][4]), _pieces(matrix, batch))


@_loop
def _descend(weights, kind, transposed, directions, batch, sizes, scalars, begin, end):
    n, columns, p, q, r = sizes
    decay, alpha = scalars
    for one in range(batch):
        basis = float32_at(transposed + 4 * one * p * r, (r, p))
        direction = float32_at(directions + 4 * one * r * q, (r, q))
        weight = weights + (4 if kind == 0 else 2) * one * n * columns
        first, stop = begin * ROWS, min(end * ROWS, n)
        if n == p:
            add_product_at(weight, kind, n, columns, basis.T, direction, decay, alpha, first, stop)
        else:
            add_product_at(weight, kind, n, columns, direction.T, basis, decay, alpha, first, stop)


def descend_(
    param: Tensor, basis: Tensor, direction: Tensor, decay: float, step_size: float, wide: Callable[[], Tensor]
) -> None:
    """See :func:`~hf_lowmem_optim.kernels.subspace_adam.descend_`; W is contiguous, and a wide copy not needed."""
    sizes, batch = _sizes(param, direction)
    transposed = basis.mT.contiguous()
    scalars = np.float32(decay), np.float32(-step_size)
    arguments = (*floats(param), transposed.data_ptr(), direction.data_ptr(), batch, sizes, scalars)
    run_pieces(_descend, arguments, -(-sizes[0] // ROWS), _pieces(param, batch))


def _run_stages(loop: Callable[..., Any], arguments: tuple[object, ...], lengths: tuple[int, ...], pieces: int) -> None:
    """Run all stages in one call, or each in pieces of so many columns, rows or entries, if there are any."""
    if pieces == 1:
        loop(*arguments, _ALL, 0, -(-max(lengths) // PIECE))
        return
    for stage, length in enumerate(lengths):
        if length > 0:
            blocks = -(-length // PIECE)
            run_pieces(loop, (*arguments, stage), blocks, min(pieces, blocks))


def _sizes(matrix: Tensor, moment: Tensor) -> tuple[tuple[int, int, int, int, int], int]:
    """Return rows and columns of the matrix, the smaller and the larger of both, the rank; and how many there are."""
    n, columns = matrix.shape[-2:]
    r, q = moment.shape[-2:]
    return (n, columns, n + columns - q, q, r), 1 if matrix.dim() == 2 else matrix.shape[0]


def _pieces(matrix: Tensor, batch: int) -> int:
    """Into how many pieces a stage is cut."""
    n, columns = matrix.shape[-2:]
    most = -(-min(n, columns) // PIECE)
    return min(most, num_pieces(-(-n // ROWS), ROWS * columns)) if batch == 1 else 1
