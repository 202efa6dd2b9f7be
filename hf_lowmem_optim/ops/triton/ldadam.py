# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""LDAdam in Triton: what would be many launches of torch's short operations beside its products.

``update_moments_`` is lines 5 to 8 of Algorithm 1, on the moments of a batch of matrices; ``descend_`` is line 9, on
any number of weights of one shape where they lie. Both compute in float32, the products in full precision.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_lowmem_optim.ops.dispatch import register
from hf_lowmem_optim.ops.low_rank import MOST_PROJECTION, PROJECTION_NOISE, Coefficients
from hf_lowmem_optim.ops.step_numbers import argument
from hf_lowmem_optim.ops.triton.device import MAX_OFFSET, address_table, aligned, by_value, on_device

__all__ = ["descend_", "descend_weights_", "move_moments_", "update_moments_"]

#: Up to how many rows a program has all of its columns, which it then overwrites, and how many of them otherwise.
_MOST_MOMENT_ROWS, _FEW_MOMENT_ROWS = 256, 128
_MOMENT_COLUMNS, _MOMENT_TERMS = 32, 16
#: Rows and columns of a weight's tile, up to how many terms of the product it adds at once, and how many otherwise.
_TILE, _MOST_TERMS, _FEW_TERMS = 64, 32, 16
_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit
def _moments_kernel(
    R_ptr,  # [batch, r, r]
    m_ptr,  # [batch, r, q]
    v_ptr,
    projected_ptr,
    new_m_ptr,  # m, v or projected itself, if a program has all rows
    new_v_ptr,
    direction_ptr,
    right_ptr,  # [batch, 2·r, q]
    r,
    q,
    beta1,
    beta2,
    correction,
    damping,
    noise,
    most,
    ROWS: tl.constexpr,
    TERMS: tl.constexpr,
    COLUMNS: tl.constexpr,
    IN_PIECES: tl.constexpr,  # whether r > ROWS
):
    correction, damping = by_value(correction), by_value(damping)
    batch = tl.program_id(1).to(tl.int64)
    R_ptr += batch * r * r
    first = batch * r * q
    row = tl.arange(0, ROWS)[:, None]
    program = tl.program_id(0)
    if IN_PIECES:
        row += program % tl.cdiv(r, ROWS) * ROWS
        program = program // tl.cdiv(r, ROWS)
    column = program * COLUMNS + tl.arange(0, COLUMNS)[None, :]

    # m̃ ← R m;  x ← (R∘R)(v − k·m²)
    moved = tl.zeros([ROWS, COLUMNS], tl.float32)
    x = tl.zeros([ROWS, COLUMNS], tl.float32)
    largest = tl.zeros([TERMS, COLUMNS], tl.float32)
    for k in range(0, r, TERMS):
        across, down = k + tl.arange(0, TERMS)[None, :], k + tl.arange(0, TERMS)[:, None]
        R = tl.load(R_ptr + row * r + across, mask=(row < r) & (across < r), other=0.0)
        inside = (down < r) & (column < q)
        m = tl.load(m_ptr + first + down * q + column, mask=inside, other=0.0)
        v = tl.load(v_ptr + first + down * q + column, mask=inside, other=0.0)
        moved = tl.dot(R, m, moved, input_precision="ieee")
        x = tl.dot(R * R, v - correction * m * m, x, input_precision="ieee")
        if IN_PIECES:
            p = tl.load(projected_ptr + first + down * q + column, mask=inside, other=0.0)
            largest = tl.maximum(largest, tl.abs(p))
    inside = (row < r) & (column < q)
    at = first + row * q + column
    m = tl.load(m_ptr + at, mask=inside, other=0.0)
    p = tl.load(projected_ptr + at, mask=inside, other=0.0)
    size = tl.abs(p)
    largest = tl.max(largest if IN_PIECES else size, axis=0)
    p = tl.where(size < largest[None, :] * noise, 0.0, p)
    p = tl.where(size > most, p / size * most, p)  # infinity becomes NaN
    # everything is read before anything is written
    tl.debug_barrier()

    # v ← β2·|x + k·m̃²| + (1 − β2)·p̃²;  m ← β1·m̃ + (1 − β1)·p̃;  d ← m / (√v + δ)
    v = tl.abs(beta2 * x + beta2 * correction * moved * moved) + (1 - beta2) * p * p
    new_m = beta1 * moved + (1 - beta1) * p
    tl.store(new_m_ptr + at, new_m, mask=inside)
    tl.store(new_v_ptr + at, v, mask=inside)
    tl.store(direction_ptr + at, tl.div_rn(new_m, tl.sqrt_rn(v) + damping), mask=inside)
    right = 2 * first + row * q + column
    tl.store(right_ptr + right, m * (beta1 / (1 - beta1)), mask=inside)
    tl.store(right_ptr + right + r * q, new_m * (-1 / (1 - beta1)), mask=inside)


def update_moments_(
    R: Tensor, m: Tensor, v: Tensor, projected: Tensor, right: Tensor, coefficients: Coefficients,
    *, direction: Tensor | None = None, noise: float = PROJECTION_NOISE,
) -> None:  # fmt: skip
    """Move the moments to the new basis and update them, in one launch.

    Args:
        R: UᵀU₋, float32 [n, r, r]; contiguous, like all others.
        m: float32 [n, r, q]; written.
        v: Likewise.
        projected: p̃, likewise, only read.
        right: float32 or bfloat16 [n, 2·r, q]; written: c·m before the step and −(p̃ + c·m̃), where c = β1/(1 − β1).
        coefficients: The numbers of this step.
        direction: d, float32 or bfloat16 [n, r, q]; written. None for ``projected``.
        noise: What is smaller than this share of the largest entry of its column of p̃ counts as zero.
    """
    n, r, q = m.shape
    rows = max(16, triton.next_power_of_2(r)) if r <= _MOST_MOMENT_ROWS else _FEW_MOMENT_ROWS
    written = [m, v, projected if direction is None else direction]
    # where several programs share columns, none may overwrite what another reads
    new = [torch.empty_like(each) for each in written] if r > rows else written
    with on_device(m):
        _moments_kernel[(triton.cdiv(q, _MOMENT_COLUMNS) * triton.cdiv(r, rows), n)](
            R,
            m,
            v,
            projected,
            *new,
            right,
            r,
            q,
            float(coefficients.beta1),
            float(coefficients.beta2),
            argument(coefficients.correction),
            argument(coefficients.damping),
            float(noise),
            MOST_PROJECTION,
            ROWS=rows,
            TERMS=_MOMENT_TERMS,
            COLUMNS=_MOMENT_COLUMNS,
            IN_PIECES=r > rows,
            num_warps=4 if rows <= 64 else 8,
        )
    if new is not written:
        torch._foreach_copy_(written, new)


@triton.jit
def load_factors(
    left_ptr, right_ptr, row, column, first, rows, columns, r, left_row, left_term, right_term, right_column,
    TERMS: tl.constexpr,
):  # fmt: skip
    """Load TERMS terms from ``first`` on of the product, for the tile of weights at ``row`` and ``column``."""
    term = first + tl.arange(0, TERMS)
    at_left = row * left_row + term[None, :] * left_term
    at_right = term[:, None] * right_term + column * right_column
    left = tl.load(left_ptr + at_left, mask=(row < rows) & (term[None, :] < r), other=0.0)
    right = tl.load(right_ptr + at_right, mask=(term[:, None] < r) & (column < columns), other=0.0)
    return left, right


@triton.jit
def _descend_kernel(
    table_ptr,  # [n]: addresses of weights [rows, columns]
    left_ptr,  # [n, rows, r]
    right_ptr,  # [n, r, columns]
    rows,
    columns,
    r,
    weight_row,
    left_batch,
    left_row,
    left_term,
    right_batch,
    right_term,
    right_column,
    decay,
    step_size,
    DTYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
    MORE_TERMS: tl.constexpr,  # whether r > TERMS
    TERMS: tl.constexpr,
    TILE: tl.constexpr,
):
    decay, step_size = by_value(decay), by_value(step_size)
    number = tl.program_id(1).to(tl.int64)
    # the only dimension of a grid that has room for the tiles of any matrix
    across = tl.cdiv(columns, TILE)
    row = tl.program_id(0) // across * TILE + tl.arange(0, TILE)[:, None]
    column = tl.program_id(0) % across * TILE + tl.arange(0, TILE)[None, :]
    left_ptr += number * left_batch
    right_ptr += number * right_batch
    update = tl.zeros([TILE, TILE], tl.float32)
    if MORE_TERMS:
        for first in tl.range(TERMS, r, TERMS, num_stages=1):
            left, right = load_factors(
                left_ptr, right_ptr, row, column, first, rows, columns, r, left_row, left_term, right_term,
                right_column, TERMS,
            )  # fmt: skip
            update = tl.dot(left, right, update, input_precision="ieee")
    left, right = load_factors(
        left_ptr, right_ptr, row, column, 0, rows, columns, r, left_row, left_term, right_term, right_column, TERMS
    )
    weight_ptr = tl.load(table_ptr + number).to(tl.pointer_type(DTYPE))
    at = weight_ptr + row.to(tl.int64) * weight_row + column
    if ALIGNED:
        at = tl.multiple_of(at, (1, 16))
    inside = (row < rows) & (column < columns)
    weight = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    weight = decay * weight - step_size * tl.dot(left, right, update, input_precision="ieee")
    tl.store(at, weight.to(DTYPE), mask=inside)


def descend_(weights: Sequence[Tensor], left: Tensor, right: Tensor, decay: float, step_size: float) -> None:
    """Write W ← decay·W − step_size·left·right for every weight, rounded once to its dtype, in one launch.

    Args:
        weights: n matrices [rows, columns] of one shape and dtype (float32, bfloat16 or float16) and with the same
            strides, of which one is 1. Reached by their addresses, so that nothing is stacked.
        left: float32 [n, rows, r], any strides.
        right: float32 [n, r, columns], any strides.
        decay: Factor of the weights.
        step_size: Factor of the product.

    Raises:
        ValueError: The weights differ in shape, strides or dtype, or the entries of neither rows nor columns are
            neighbours.
    """
    if weights[0].stride(1) != 1:  # columns are in one piece: the transposes are matrices whose rows are
        weights, left, right = [weight.mT for weight in weights], right.mT, left.mT
    _check_alike(weights)
    rows, columns = weights[0].shape
    rank = left.shape[2]
    with on_device(left):
        _descend_kernel[(triton.cdiv(columns, _TILE) * triton.cdiv(rows, _TILE), len(weights))](
            address_table(weights),
            left,
            right,
            rows,
            columns,
            rank,
            weights[0].stride(0),
            *left.stride(),
            *right.stride(),
            argument(decay),
            argument(step_size),
            DTYPE=_TYPES[weights[0].dtype],
            ALIGNED=aligned(weights) and weights[0].stride(0) * weights[0].itemsize % 16 == 0,
            MORE_TERMS=rank > _MOST_TERMS,
            TERMS=max(16, triton.next_power_of_2(rank)) if rank <= _MOST_TERMS else _FEW_TERMS,
            TILE=_TILE,
            num_warps=4,
        )


def _check_alike(weights: Sequence[Tensor]) -> None:
    """Raise ValueError if one launch cannot address all weights alike."""
    first = weights[0]
    for weight in weights:
        if weight.shape != first.shape or weight.stride() != first.stride() or weight.dtype != first.dtype:
            raise ValueError(
                f"weights must have one shape, strides and dtype; got {weight.dtype} {[*weight.shape]} with strides "
                f"{weight.stride()} beside {first.dtype} {[*first.shape]} with strides {first.stride()}"
            )
    if first.stride(1) != 1:
        raise ValueError(f"one of the weights' strides must be 1, got {first.stride()}")


# ---- the method's own operations, which are registered by their names, since its module is in a higher layer ---------


def _why_no_moments(R: Tensor, m: Tensor, *_: object) -> str | None:
    entries = m[0].numel()
    return None if entries <= MAX_OFFSET else f"{entries} entries of a moment are more than a kernel counts"


@register("ldadam_moments_", "triton", why_not=_why_no_moments)
def move_moments_(R: Tensor, m: Tensor, v: Tensor, p: Tensor, numbers: Coefficients) -> None:
    """See :func:`hf_lowmem_optim.optimizers.ldadam.ldadam_moments_`."""
    n, r, q = m.shape
    # a first step's, or one's that is not fused: the factors are not asked for
    update_moments_(R, m, v, p, torch.empty(n, 2 * r, q, dtype=torch.float32, device=m.device), numbers)


def _why_no_descent(W: Sequence[Tensor], U: Tensor, direction: Tensor, *_: object) -> str | None:
    entries = max(U[0].numel(), direction[0].numel())
    return None if entries <= MAX_OFFSET else f"{entries} entries of a factor are more than a kernel counts"


@register("ldadam_descend_", "triton", why_not=_why_no_descent)
def descend_weights_(W: Sequence[Tensor], U: Tensor, direction: Tensor, decay: float, step_size: float) -> None:
    """See :func:`hf_lowmem_optim.optimizers.ldadam.ldadam_descend_`."""
    if len(W) > 1 or (W[0].dtype != torch.float32 and U.shape[2] <= _MOST_TERMS):
        descend_(W, U, direction, decay, step_size)
        return
    # one weight is one launch of the vendor's library, too, which is the faster the more terms there are
    wide = W[0].float()
    torch.addmm(wide, U[0], direction[0], beta=decay, alpha=-step_size, out=wide)
    if wide is not W[0]:
        W[0].copy_(wide)
