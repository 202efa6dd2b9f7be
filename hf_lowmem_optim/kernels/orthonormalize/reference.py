"""Orthonormal columns with torch, on any device."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["orthonormal_columns"]


def orthonormal_columns(Y: Tensor) -> Tensor:
    """See :func:`hf_lowmem_optim.kernels.orthonormalize.orthonormalize`: Householder QR, LAPACK's on a CPU."""
    basis: Tensor = torch.linalg.qr(Y)[0]
    return basis
