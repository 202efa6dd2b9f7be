"""The operation in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["update_"]


def update_(
    m: Tensor,
    v: Tensor,
    projected: Tensor,
    moved: Tensor,
    rotated: Tensor,
    betas: tuple[float, float],
    correction: float,
    damping: float,
) -> None:
    """See :func:`~hf_lowmem_optim.kernels.subspace_adam.subspace_adam_`."""
    beta1, beta2 = betas
    rotated.addcmul_(moved, moved, value=beta2 * correction).abs_()
    torch.addcmul(rotated, projected, projected, value=1 - beta2, out=v)
    torch.add(moved.mul_(beta1), projected, alpha=1 - beta1, out=m)
    torch.div(m, torch.sqrt(v, out=projected).add_(damping), out=projected)
