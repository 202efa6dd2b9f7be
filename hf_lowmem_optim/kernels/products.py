"""Matrix products for one matrix or a batch of equal ones.

On the CPU a batch is a loop over the same calls as for single matrices: a batched routine may round otherwise, and an
update must not depend on which other tensors are there. On GPUs, where each call is a launch, it is one batched call.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["addmm", "mm"]


def mm(left: Tensor, right: Tensor, *, out: Tensor | None = None) -> Tensor:
    """Return ``left @ right``, written to ``out`` if given.

    Args:
        left: Shape (p, k) or (batch, p, k).
        right: Shape (k, q) or (batch, k, q).
        out: Shape (p, q) or (batch, p, q).

    Returns:
        ``out``, or a new tensor.
    """
    if left.dim() == 2:
        return torch.mm(left, right, out=out)
    if left.device.type != "cpu":
        return torch.bmm(left, right, out=out)
    if out is None:
        out = left.new_empty(len(left), left.shape[1], right.shape[2])
    for into, one, other in zip(out.unbind(), left.unbind(), right.unbind(), strict=True):
        torch.mm(one, other, out=into)
    return out


def addmm(
    onto: Tensor, left: Tensor, right: Tensor, *, beta: float = 1.0, alpha: float = 1.0, out: Tensor | None = None
) -> Tensor:
    """Return ``beta · onto + alpha · left @ right``, written to ``out`` if given, which may be ``onto``.

    Shapes are those of :func:`mm`.
    """
    if left.dim() == 2:
        return torch.addmm(onto, left, right, beta=beta, alpha=alpha, out=out)
    if left.device.type != "cpu":
        return torch.baddbmm(onto, left, right, beta=beta, alpha=alpha, out=out)
    if out is None:
        out = torch.empty_like(onto)
    for into, base, one, other in zip(out.unbind(), onto.unbind(), left.unbind(), right.unbind(), strict=True):
        torch.addmm(base, one, other, beta=beta, alpha=alpha, out=into)
    return out
