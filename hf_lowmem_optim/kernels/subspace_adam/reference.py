"""The operation with torch, on any device."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from hf_lowmem_optim.kernels.orthonormalize import orthonormalize
from hf_lowmem_optim.kernels.products import addmm, mm
from hf_lowmem_optim.kernels.subspace_adam.layout import Buffers, Coefficients

__all__ = ["descend_", "move_", "short_side_first", "update_moments_"]


def move_(
    matrix: Tensor,
    basis: Tensor,
    m: Tensor,
    v: Tensor,
    buffers: Buffers,
    coefficients: Coefficients,
    *,
    new_basis: Tensor | None,
    keeps_rest: bool,
    update_moments_: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Coefficients], None],
) -> None:
    """Lines 3 to 8 of :func:`~hf_lowmem_optim.kernels.subspace_adam.subspace_adam_`, for ``new_basis`` 4 to 8.

    ``update_moments_`` is that of this file, or a backend's own.
    """
    a = short_side_first(matrix)
    if new_basis is None:
        new_basis = orthonormalize(_sketch(a, basis, m, buffers.projected, coefficients))
    old, new = buffers.bases.tensor_split(2, -2)
    old.copy_(basis.mT)
    new.copy_(new_basis.mT)
    basis.copy_(new_basis)
    mm(new, a, out=buffers.projected)
    update_moments_(mm(new, old.mT), m, v, buffers.projected, buffers.right, coefficients)
    if keeps_rest:
        addmm(a, buffers.bases.mT, buffers.right, out=a)


def _sketch(a: Tensor, basis: Tensor, m: Tensor, projected: Tensor, coefficients: Coefficients) -> Tensor:
    """Line 3: Y."""
    share, rest = coefficients.momentum_weight, coefficients.gradient_weight
    V = addmm(m, basis.mT, a, beta=share, alpha=rest, out=projected).mT
    return addmm(mm(basis, mm(m, V)), a, V, beta=share, alpha=rest)


def update_moments_(
    R: Tensor, m: Tensor, v: Tensor, projected: Tensor, right: Tensor, coefficients: Coefficients
) -> None:
    """Lines 5 to 8 but the error; p̃ in ``projected`` becomes d, and ``right`` holds c·m and −(p̃ + c·m̃)."""
    beta1, beta2 = coefficients.beta1, coefficients.beta2
    x, moved = right.tensor_split(2, -2)
    mm(R, m, out=moved)
    addmm(x, R * R, v.addcmul_(m, m, value=-coefficients.correction), beta=0, alpha=beta2, out=x)
    x.addcmul_(moved, moved, value=beta2 * coefficients.correction).abs_()
    torch.addcmul(x, projected, projected, value=1 - beta2, out=v)
    torch.mul(m, beta1 / (1 - beta1), out=x)
    torch.add(moved.mul_(beta1), projected, alpha=1 - beta1, out=m)
    torch.mul(m, -1 / (1 - beta1), out=moved)
    torch.div(m, torch.sqrt(v, out=projected).add_(coefficients.damping), out=projected)


def descend_(
    param: Tensor, basis: Tensor, direction: Tensor, coefficients: Coefficients, wide: Callable[[], Tensor]
) -> None:
    """Line 9 of :func:`~hf_lowmem_optim.kernels.subspace_adam.subspace_adam_`."""
    weight, decay, step_size = short_side_first(param), coefficients.decay, coefficients.step_size
    if param.dtype == torch.float32:
        addmm(weight, basis, direction, beta=decay, alpha=-step_size, out=weight)
        return
    copy = wide()
    W = short_side_first(copy.copy_(param))
    addmm(W, basis, direction, beta=decay, alpha=-step_size, out=W)
    param.copy_(copy)  # rounded once


def short_side_first(matrix: Tensor) -> Tensor:
    """The matrix, or each of a batch, or its transpose: the one that is not tall."""
    return matrix.mT if matrix.shape[-2] > matrix.shape[-1] else matrix
