"""The operations with torch, on any device."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from hf_lowmem_optim.kernels.products import addmm, mm

__all__ = ["descend_", "sketch", "update_"]


def sketch(
    matrix: Tensor, old_basis: Tensor, m: Tensor, bases: Tensor, projected: Tensor, share: float, rest: float
) -> Tensor:
    """See :func:`~hf_lowmem_optim.kernels.subspace_adam.power_iteration`."""
    a = _short_side_first(matrix)
    bases[..., : m.shape[-2], :].copy_(old_basis.mT)
    V = addmm(m, old_basis.mT, a, beta=share, alpha=rest, out=projected).mT
    return addmm(mm(old_basis, mm(m, V)), a, V, beta=share, alpha=rest)


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
) -> None:
    """See :func:`~hf_lowmem_optim.kernels.subspace_adam.subspace_adam_`."""
    beta1, beta2 = betas
    a = _short_side_first(matrix)
    old, new = bases.tensor_split(2, -2)
    new.copy_(basis.mT)
    mm(basis.mT, a, out=projected)
    x, moved = right.tensor_split(2, -2)
    R = mm(basis.mT, old.mT)
    mm(R, m, out=moved)
    addmm(x, R * R, v.addcmul_(m, m, value=-correction), beta=0, alpha=beta2, out=x)
    x.addcmul_(moved, moved, value=beta2 * correction).abs_()
    torch.addcmul(x, projected, projected, value=1 - beta2, out=v)
    torch.mul(m, beta1 / (1 - beta1), out=x)
    torch.add(moved.mul_(beta1), projected, alpha=1 - beta1, out=m)
    torch.mul(m, -1 / (1 - beta1), out=moved)
    torch.div(m, torch.sqrt(v, out=projected).add_(damping), out=projected)
    if keeps_rest:
        addmm(a, bases.mT, right, out=a)


def descend_(
    param: Tensor, basis: Tensor, direction: Tensor, decay: float, step_size: float, wide: Callable[[], Tensor]
) -> None:
    """See :func:`~hf_lowmem_optim.kernels.subspace_adam.descend_`."""
    weight = _short_side_first(param)
    if param.dtype == torch.float32:
        addmm(weight, basis, direction, beta=decay, alpha=-step_size, out=weight)
        return
    copy = wide()
    W = _short_side_first(copy.copy_(param))
    addmm(W, basis, direction, beta=decay, alpha=-step_size, out=W)
    param.copy_(copy)  # rounded once


def _short_side_first(matrix: Tensor) -> Tensor:
    return matrix.mT if matrix.shape[-2] > matrix.shape[-1] else matrix
