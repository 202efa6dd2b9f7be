"""The operation in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_lowmem_optim.kernels.products import addmm, mm

__all__ = ["move_moments_", "update_"]


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
    x, moved = move_moments_(old_basis, basis, m, v, left, right, beta2, correction)
    x.addcmul_(moved, moved, value=beta2 * correction).abs_()
    torch.addcmul(x, projected, projected, value=1 - beta2, out=v)
    torch.mul(m, beta1 / (1 - beta1), out=x)
    torch.add(moved.mul_(beta1), projected, alpha=1 - beta1, out=m)
    torch.mul(m, -1 / (1 - beta1), out=moved)
    torch.div(m, torch.sqrt(v, out=projected).add_(damping), out=projected)


def move_moments_(
    old_basis: Tensor,
    basis: Tensor,
    m: Tensor,
    v: Tensor,
    left: Tensor,
    right: Tensor,
    beta2: float,
    correction: float,
) -> tuple[Tensor, Tensor]:
    """Write ``left``, and x and m̃ to the two halves of ``right``, which are returned; v becomes v − k·m²."""
    torch.cat((old_basis, basis), -1, out=left)
    x, moved = right.tensor_split(2, -2)
    R = mm(basis.mT, old_basis)
    mm(R, m, out=moved)
    addmm(x, R * R, v.addcmul_(m, m, value=-correction), beta=0, alpha=beta2, out=x)
    return x, moved
