"""LowRankMFAC in Triton: acc = g + ξ is formed in registers wherever it is needed, and u never written.

Per batch of equal matrices: P is two launches up to rank 16, accᵀP and ξ ← acc − P·Qᵀ are one each, and so is
W ← decay·W − lr·Gᵀw.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hf_lowmem_optim.ops.dispatch import register
from hf_lowmem_optim.ops.low_rank import MOST_FACTOR_BYTES, of_safe_size, precision_of_products
from hf_lowmem_optim.ops.step_numbers import selected
from hf_lowmem_optim.ops.triton.low_rank import orthonormal_columns
from hf_lowmem_optim.ops.triton.residual import Residual, why_not_residual
from hf_lowmem_optim.ops.triton.residual_update import Descent, update_
from hf_lowmem_optim.ops.triton.sketch import orthonormal_range_, tracks
from hf_lowmem_optim.ops.weight_correction import CORRECTION

__all__ = ["compress_", "descend_by_factors_"]


def _why_no_compression(g: Sequence[Tensor], state: Mapping[str, Tensor], *_: object) -> str | None:
    return why_not_residual(g, g, state)


@register("lowrank_compress_", "triton", why_not=_why_no_compression, composed=True)
def compress_(g: Sequence[Tensor], state: Mapping[str, Tensor], start: Tensor, row: int, error_feedback: str) -> None:
    """See :func:`hf_lowmem_optim.optimizers.lowrank_mfac.lowrank_compress_`."""
    with selected(state["left"], 1, row) as left, selected(state["right"], 1, row) as Qt:
        _compress_(g, state, start, (left, Qt), error_feedback)


def _compress_(
    g: Sequence[Tensor],
    state: Mapping[str, Tensor],
    start: Tensor,
    written: tuple[Tensor, Tensor],
    error_feedback: str,
) -> None:
    left, Qt = written  # float32 [n, r, p], [n, r, q]
    # 1. acc ← ξ + g
    acc = Residual(g, state, error_feedback, precision_of_products(error_feedback, left.shape[1]))
    # 2. P ← orthonormalize(acc·Q₋);  Q ← accᵀP;  ξ ← acc − P·Qᵀ;  3. row of the window ← (P, Q)
    P = left.mT
    if tracks(left.shape[1]):
        minus = orthonormal_range_(acc, start, P)
    else:
        Y = torch.empty(len(g), left.shape[2], left.shape[1], dtype=torch.float32, device=left.device)
        P.copy_(orthonormal_columns(acc.multiply(of_safe_size(start.mT), Y, over_rows=False)))
        minus = P.neg()
    acc.multiply(P, Qt.mT, over_rows=True)
    update_(acc, [(minus, Qt)], None)


def _why_no_descent(W: Sequence[Tensor], state: Mapping[str, Tensor], *_: object) -> str | None:
    return "rows that are no factors" if "rows" in state else why_not_residual(W, W, {})


@register("lowrank_descend_", "triton", why_not=_why_no_descent, composed=True)
def descend_by_factors_(W: Sequence[Tensor], state: Mapping[str, Tensor], w: Tensor, o: Any) -> None:
    """See :func:`hf_lowmem_optim.optimizers.lowrank_mfac.lowrank_descend_`."""
    left, right = (state[key].flatten(1, 2) for key in ("left", "right"))  # [n, m·r, p], [n, m·r, q]
    corrections = state.get(CORRECTION)
    weights = w.repeat_interleave(state["left"].shape[2], dim=1)[:, :, None]  # [n, m·r, 1]
    # rows that resemble each other cancel in the sum, and no error feeds back what that loses
    products = precision_of_products("none", left.shape[1])
    most = max(1, MOST_FACTOR_BYTES // (4 * left[0].numel()))
    for start in range(0, len(W), most):
        part = slice(start, start + most)
        nothing = Residual(W[part], {}, "none", products)
        factors = ((left[part] * weights[part]).mT, right[part])
        own = None if corrections is None else corrections[part]
        update_(nothing, [], Descent(W[part], factors, 1 - o.lr * o.weight_decay, o.lr, own))
