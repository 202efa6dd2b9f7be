"""LowRankMFAC in Triton: the combination of the window's rows and the step, for all matrices of a shape at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from hf_lowmem_optim.ops.dispatch import register
from hf_lowmem_optim.ops.triton.device import MAX_OFFSET
from hf_lowmem_optim.ops.triton.ldadam import descend_

__all__ = ["descend_along_rows_"]


def _why_not(W: Sequence[Tensor], left: Tensor, right: Tensor, *_: object) -> str | None:
    entries = max(left[0].numel(), right[0].numel())
    return None if entries <= MAX_OFFSET else f"{entries} entries of a window are more than a kernel counts"


@register("lowrank_descend_", "triton", why_not=_why_not)
def descend_along_rows_(W: Sequence[Tensor], left: Tensor, right: Tensor, w: Tensor, o: Any) -> None:
    """See :func:`hf_lowmem_optim.optimizers.lowrank_mfac.lowrank_descend_`."""
    weighted = (left * w[:, None, None]).flatten(1, 2)  # [n, m·r, p]
    descend_(W, weighted.mT, right.flatten(1, 2), 1 - o.lr * o.weight_decay, o.lr)
