"""The column by LAPACK, or what torch has on a GPU."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["inverse_column"]


def inverse_column(gram: Tensor, column: int, shift: float) -> tuple[Tensor, float]:
    """See :func:`hf_lowmem_optim.kernels.gram_solve.damped_inverse_column`."""
    norm = gram.diagonal().sqrt()
    alive = norm > 0
    scale = norm.reciprocal().where(alive, 0.0)  # D
    # K; rows of zeros become rows of the identity
    unit = (gram * scale).mul_(scale[:, None])
    unit.diagonal().masked_fill_(~alive, 1.0)
    # 0 · x is NaN if x is not finite; one number, so that a GPU is waited for once
    smallest = float(torch.linalg.cholesky_ex(unit)[0].diagonal().min() + 0.0 * gram.sum())
    unit.diagonal().addcmul_(scale, scale, value=shift)
    target = torch.zeros_like(norm)
    target[column] = scale[column]
    factor = torch.linalg.cholesky_ex(unit)[0]
    return torch.cholesky_solve(target[:, None], factor)[:, 0].mul_(scale), smallest
