"""A later step of LDAdam in Triton: a = g + ξ is formed in registers wherever it is needed, and never written.

Up to rank 16, a batch of equal matrices takes three launches for the next basis (``sketch.py``) and one for all the
rest (``finish.py``); no operation of torch computes anything. Where stripes are long, or blocks of ξ cross rows, the
rest is a launch each for p̃, the moments (``ldadam.py``), and ξ and W (``residual_update.py``). With higher ranks,
sketches are products of ``residual.py`` beside torch's of r × r, and ``low_rank.py`` makes columns orthonormal.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hf_lowmem_optim.ops.dispatch import register
from hf_lowmem_optim.ops.low_rank import (
    MOST_FACTOR_BYTES,
    Coefficients,
    of_safe_size,
    precision_of_products,
    projection_noise,
)
from hf_lowmem_optim.ops.step_numbers import factor as factor_of
from hf_lowmem_optim.ops.triton.finish import Moments, finish_, finishes
from hf_lowmem_optim.ops.triton.ldadam import update_moments_
from hf_lowmem_optim.ops.triton.low_rank import orthonormal_columns
from hf_lowmem_optim.ops.triton.residual import Residual, why_not_residual
from hf_lowmem_optim.ops.triton.residual_update import Descent, update_
from hf_lowmem_optim.ops.triton.sketch import move_basis_, tracks
from hf_lowmem_optim.ops.weight_correction import CORRECTION

__all__ = ["later_step_"]

#: What a matrix allocates for a moment, at most if not for a rank below 4, in float32 copies of its state: as
#: ``LDAdam.method`` says.
_FACTOR_COPIES = 6


def _why_not(W: Sequence[Tensor], g: Sequence[Tensor], state: Mapping[str, Tensor], t: int, o: Any) -> str | None:
    if t == 1:
        return "the first step takes a singular value decomposition"
    return why_not_residual(W, g, state)


@register("ldadam_update_", "triton", why_not=_why_not, composed=True)
def later_step_(W: Sequence[Tensor], g: Sequence[Tensor], state: Mapping[str, Tensor], t: int, o: Any) -> None:
    """See :func:`hf_lowmem_optim.optimizers.ldadam.ldadam_update_`."""
    entries = 2 * state["exp_avg"][0].numel() + state["basis"][0].numel()
    most = max(1, MOST_FACTOR_BYTES // (4 * _FACTOR_COPIES * entries))
    for start in range(0, len(W), most):
        part = slice(start, start + most)
        _step_(W[part], g[part], {key: stacked[part] for key, stacked in state.items()}, t, o)


def _step_(W: Sequence[Tensor], g: Sequence[Tensor], state: Mapping[str, Tensor], t: int, o: Any) -> None:
    numbers = Coefficients.of_step(t, o)
    m, v, old = (state[key].float().contiguous() for key in ("exp_avg", "exp_avg_sq", "basis"))  # [n, r, q], [n, p, r]
    tall, products = W[0].shape[0] > W[0].shape[1], precision_of_products(o.error_feedback, o.rank)
    # of factors, which every stripe reads again, half the bytes where products round them anyhow
    kind = torch.bfloat16 if products == "bf16" else torch.float32
    # 1. a ← g + ξ
    a = Residual(g, state, o.error_feedback, products)
    # 3. V ← bᵀU₋;  Y ← bV;  U ← orthonormalize(Y);  R ← UᵀU₋, with b = s·U₋m + (1 − ρ)·a
    if tracks(old.shape[2]):
        U = old
        old, R = move_basis_(a, U, m, numbers)
    else:
        s, rest = numbers.momentum_weight, numbers.gradient_weight
        V = torch.empty_like(m, dtype=kind).mT
        V = of_safe_size(a.multiply(old.to(kind), V, over_rows=not tall, weight=rest, onto=m.mT, onto_weight=s))
        Y = a.multiply(V, torch.empty_like(old), over_rows=tall, weight=rest)
        U = orthonormal_columns(Y.baddbmm_(old, (m @ V.float()).mul_(factor_of(s))))
        R = U.mT @ old
    noise, seed = projection_noise(products, old.shape[1]), t if o.stochastic_rounding else None
    corrections = state.get(CORRECTION)
    if finishes(a, old.shape[2]):
        finish_(a, Moments(U, old, R, m, v), W, numbers, noise, seed, corrections)
    else:
        # 4. p̃ ← Uᵀa
        factor, old_factor = U.to(kind), old.to(kind)
        p = a.multiply(factor, torch.empty_like(m).mT, over_rows=not tall).mT
        # 5. to 8. m̃, v, m, the direction of line 9; the factors are c·m over −(p̃ + c·m̃)
        right = torch.empty(len(m), 2 * m.shape[1], m.shape[2], dtype=kind, device=m.device)
        direction = torch.empty_like(p, dtype=kind)
        update_moments_(R, m, v, p, right, numbers, direction=direction, noise=noise)
        # 6. ξ ← a − U(p̃ + c·m̃) + c·U₋m;  9. W ← W·(1 − lr·weight_decay) − lr·U[m̂ / (√v̂ + eps)]
        kept, moved = right.chunk(2, dim=1)
        lifted = [(old_factor, kept), (factor, moved), (factor, direction)]
        change0, change1, descent = [(y.mT, x.mT) for x, y in lifted] if tall else lifted
        update_(a, (change0, change1), Descent(W, descent, numbers.decay, numbers.step_size, corrections), seed)
    for key, value in (("basis", U), ("exp_avg", m), ("exp_avg_sq", v)):
        if state[key] is not value:
            state[key].copy_(value)
