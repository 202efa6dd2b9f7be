"""The operation with torch, on any device."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from hf_lowmem_optim.kernels.products import addmm, mm
from hf_lowmem_optim.kernels.subspace_adam.layout import Buffers, Coefficients

__all__ = ["descend_", "move_"]


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
) -> None:
    """Lines 3 to 8 of :func:`~hf_lowmem_optim.kernels.subspace_adam.subspace_adam_`, for ``new_basis`` 4 to 8."""
    a = _short_side_first(matrix)
    if new_basis is None:
        new_basis = torch.linalg.qr(_sketch(a, basis, m, buffers.projected, coefficients))[0]
    old, new = buffers.bases.tensor_split(2, -2)
    old.copy_(basis.mT)
    new.copy_(new_basis.mT)
    basis.copy_(new_basis)
    _update_moments(a, m, v, buffers, coefficients)
    if keeps_rest:
        addmm(a, buffers.bases.mT, buffers.right, out=a)


def _sketch(a: Tensor, basis: Tensor, m: Tensor, projected: Tensor, coefficients: Coefficients) -> Tensor:
    """Line 3: Y."""
    share, rest = coefficients.momentum_weight, coefficients.gradient_weight
    V = addmm(m, basis.mT, a, beta=share, alpha=rest, out=projected).mT
    return addmm(mm(basis, mm(m, V)), a, V, beta=share, alpha=rest)


def _update_moments(a: Tensor, m: Tensor, v: Tensor, buffers: Buffers, coefficients: Coefficients) -> None:
    """Lines 4 to 8 but the error; leaves d, c·m and −(p̃ + c·m̃) in the buffers."""
    beta1, beta2, projected = coefficients.beta1, coefficients.beta2, buffers.projected
    old, new = buffers.bases.tensor_split(2, -2)
    mm(new, a, out=projected)
    x, moved = buffers.right.tensor_split(2, -2)
    R = mm(new, old.mT)
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
    weight, decay, step_size = _short_side_first(param), coefficients.decay, coefficients.step_size
    if param.dtype == torch.float32:
        addmm(weight, basis, direction, beta=decay, alpha=-step_size, out=weight)
        return
    copy = wide()
    W = _short_side_first(copy.copy_(param))
    addmm(W, basis, direction, beta=decay, alpha=-step_size, out=W)
    param.copy_(copy)  # rounded once


def _short_side_first(matrix: Tensor) -> Tensor:
    return matrix.mT if matrix.shape[-2] > matrix.shape[-1] else matrix
