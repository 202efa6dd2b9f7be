# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""What Triton does of the operation beside torch's products: short operations in a row that would be many launches."""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_lowmem_optim.kernels.backend import on_device
from hf_lowmem_optim.kernels.subspace_adam import reference
from hf_lowmem_optim.kernels.subspace_adam.layout import FEW_TERMS, Coefficients
from hf_lowmem_optim.kernels.subspace_adam.reference import short_side_first

__all__ = ["descend_", "update_moments_"]

_MOMENT_COLUMNS, _MOMENT_TERMS = 32, 16
#: A program has all rows of its columns, as it overwrites them; more would not fit into its shared memory.
_MOST_ROWS = 256
_TILE = 64


@triton.jit
def _moments_kernel(
    R_ptr,  # [batch, r, r]
    m_ptr,  # [batch, r, q]
    v_ptr,
    projected_ptr,
    right_ptr,  # [batch, 2·r, q]
    r,
    q,
    beta1,
    beta2,
    correction,
    damping,
    RANK: tl.constexpr,  # r rounded up
    TERMS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    batch = tl.program_id(1).to(tl.int64)
    R_ptr += batch * r * r
    first = batch * r * q
    row = tl.arange(0, RANK)[:, None]
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)[None, :]

    # m̃ ← R m;  x ← (R∘R)(v − k·m²)
    moved = tl.zeros([RANK, COLUMNS], tl.float32)
    x = tl.zeros([RANK, COLUMNS], tl.float32)
    for k in range(0, r, TERMS):
        across, down = k + tl.arange(0, TERMS)[None, :], k + tl.arange(0, TERMS)[:, None]
        R = tl.load(R_ptr + row * r + across, mask=(row < r) & (across < r), other=0.0)
        inside = (down < r) & (column < q)
        m = tl.load(m_ptr + first + down * q + column, mask=inside, other=0.0)
        v = tl.load(v_ptr + first + down * q + column, mask=inside, other=0.0)
        moved = tl.dot(R, m, moved, input_precision="ieee")
        x = tl.dot(R * R, v - correction * m * m, x, input_precision="ieee")
    inside = (row < r) & (column < q)
    at = first + row * q + column
    m = tl.load(m_ptr + at, mask=inside, other=0.0)
    p = tl.load(projected_ptr + at, mask=inside, other=0.0)
    # everything is read before anything is written
    tl.debug_barrier()

    # v ← β2·|x + k·m̃²| + (1 − β2)·p̃²;  m ← β1·m̃ + (1 − β1)·p̃;  d ← m / (√v + δ)
    v = tl.abs(beta2 * x + beta2 * correction * moved * moved) + (1 - beta2) * p * p
    new_m = beta1 * moved + (1 - beta1) * p
    tl.store(m_ptr + at, new_m, mask=inside)
    tl.store(v_ptr + at, v, mask=inside)
    tl.store(projected_ptr + at, tl.div_rn(new_m, tl.sqrt_rn(v) + damping), mask=inside)
    right = 2 * first + row * q + column
    tl.store(right_ptr + right, m * (beta1 / (1 - beta1)), mask=inside)
    tl.store(right_ptr + right + r * q, new_m * (-1 / (1 - beta1)), mask=inside)


def update_moments_(
    R: Tensor, m: Tensor, v: Tensor, projected: Tensor, right: Tensor, coefficients: Coefficients
) -> None:
    """Lines 5 to 8 but the error; p̃ in ``projected`` becomes d, and ``right`` holds c·m and −(p̃ + c·m̃)."""
    r, q = m.shape[-2:]
    if r > _MOST_ROWS:
        reference.update_moments_(R, m, v, projected, right, coefficients)
        return
    rank = max(16, triton.next_power_of_2(r))
    with on_device(m):
        _moments_kernel[(triton.cdiv(q, _MOMENT_COLUMNS), m.numel() // (r * q))](
            R,
            m,
            v,
            projected,
            right,
            r,
            q,
            float(coefficients.beta1),
            float(coefficients.beta2),
            float(coefficients.correction),
            float(coefficients.damping),
            RANK=rank,
            TERMS=_MOMENT_TERMS,
            COLUMNS=_MOMENT_COLUMNS,
            num_warps=4 if rank <= 64 else 8,
        )


@triton.jit
def _descend_kernel(
    param_ptr,  # [batch, n, m]
    left_ptr,  # [batch, n, r], any strides
    right_ptr,  # [batch, r, m], any strides
    n,
    m,
    r,
    left_row,
    left_column,
    right_row,
    right_column,
    decay,
    step_size,
    TERMS: tl.constexpr,  # r rounded up
    TILE: tl.constexpr,
):
    batch = tl.program_id(1).to(tl.int64)
    # the only dimension of a grid that has room for the tiles of any matrix
    across = tl.cdiv(m, TILE)
    row = tl.program_id(0) // across * TILE + tl.arange(0, TILE)[:, None]
    column = tl.program_id(0) % across * TILE + tl.arange(0, TILE)[None, :]
    term = tl.arange(0, TERMS)
    at_left = batch * n * r + row * left_row + term[None, :] * left_column
    at_right = batch * r * m + term[:, None] * right_row + column * right_column
    left = tl.load(left_ptr + at_left, mask=(row < n) & (term[None, :] < r), other=0.0)
    right = tl.load(right_ptr + at_right, mask=(term[:, None] < r) & (column < m), other=0.0)
    at = (batch * n + row) * m + column
    inside = (row < n) & (column < m)
    weight = tl.load(param_ptr + at, mask=inside, other=0.0).to(tl.float32)
    weight = decay * weight - step_size * tl.dot(left, right, input_precision="ieee")
    tl.store(param_ptr + at, weight.to(param_ptr.dtype.element_ty), mask=inside)


def descend_(
    param: Tensor, basis: Tensor, direction: Tensor, coefficients: Coefficients, wide: Callable[[], Tensor]
) -> None:
    """Line 9 of :func:`~hf_lowmem_optim.kernels.subspace_adam.subspace_adam_`; narrow weights in one pass."""
    rank = basis.shape[-1]
    if param.dtype == torch.float32 or rank > FEW_TERMS or not param.is_contiguous():
        reference.descend_(param, basis, direction, coefficients, wide)
        return
    weight = short_side_first(param)
    left, right = (basis, direction) if weight is param else (direction.mT, basis.mT)
    n, m = param.shape[-2:]
    with on_device(param):
        _descend_kernel[(triton.cdiv(m, _TILE) * triton.cdiv(n, _TILE), param.numel() // (n * m))](
            param,
            left,
            right,
            n,
            m,
            rank,
            left.stride(-2),
            left.stride(-1),
            right.stride(-2),
            right.stride(-1),
            float(coefficients.decay),
            float(coefficients.step_size),
            TERMS=max(16, triton.next_power_of_2(rank)),
            TILE=_TILE,
            num_warps=4,
        )
