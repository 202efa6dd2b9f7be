"""What M-FAC and GGT, sparse or low-rank, share (EFCP, arXiv 2306.06098): options, state, and lines 4, 6 and 7.

| letter | state key  | shape  | dtype | bytes per parameter             |
|--------|------------|--------|-------|---------------------------------|
| GGᵀ    | `gram`     | (m, m) | fp64  | 8·m² in all, or for each tensor |
| vel    | `velocity` | W      | fp32  | 4 if μ > 0                      |
| t      | `step`     |        | int   |                                 |

With ``scope="model"`` GGᵀ and t belong to all parameters together, and a tensor that has no gradient in a step counts
as zero in that row and is not moved. With ``scope="tensor"`` they are in the tensor's own state; the systems of all
tensors are solved in one batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from hf_lowmem_optim.engine.coupled import Scope
from hf_lowmem_optim.engine.error_feedback import CompressedErrorFeedback
from hf_lowmem_optim.engine.options import COUNT, POSITIVE, UNIT, Options, option
from hf_lowmem_optim.ops.step_numbers import Number, factor
from hf_lowmem_optim.spec import TensorSpec

__all__ = ["PreconditionedOptions", "add_momentum_", "descend_", "gram_state", "own_state"]


@dataclass(frozen=True)
class PreconditionedOptions(Options):
    """Options of all preconditioned optimizers; ``betas`` and ``eps`` are those of AdamW, for dense groups."""

    window: int = option(
        32,
        "m, the number of gradients in the statistics, and their divisor also while there are fewer.",
        within=COUNT,
        shapes_state=True,
    )
    damping: float = option(
        1e-5,
        "λ in F = λI + (1/m)·Σ gᵢgᵢᵀ. The larger, the closer to gradient descent at the rate lr/λ.",
        within=POSITIVE,
    )
    momentum: float = option(
        0.0, "μ of the heavy ball vel ← μ·vel + u; if it is not 0, four bytes per parameter.", within=UNIT
    )
    error_feedback: CompressedErrorFeedback = option("8bit", "Storage of the error.", shapes_state=True)
    scope: Scope = option(
        "model",
        '``"model"`` for one system over all parameters, ``"tensor"`` for one per tensor: the coupling between tensors '
        "is lost and each tensor has its own step size, but nothing is shared.",
        shapes_state=True,
    )


def gram_state(o: PreconditionedOptions) -> dict[str, TensorSpec]:
    """Describe the state of a system: GGᵀ of a window of gradients."""
    return {"gram": TensorSpec((o.window, o.window), torch.float64, "gram")}


def own_state(shape: Sequence[int], o: PreconditionedOptions) -> dict[str, TensorSpec]:
    """Describe the part of a tensor's state that does not depend on the compression."""
    velocity = {"velocity": TensorSpec(tuple(shape), torch.float32, "velocity")} if o.momentum > 0 else {}
    return {**velocity, **(gram_state(o) if o.scope == "tensor" else {})}


def add_momentum_(velocity: Tensor, u: Tensor, momentum: float) -> Tensor:
    """Return vel ← μ·vel + u (line 6)."""
    return velocity.mul_(momentum).add_(u.view(velocity.shape))


def descend_(weight: Tensor, direction: Tensor, o: PreconditionedOptions) -> None:
    """Write W ← W·(1 − lr·weight_decay) − lr·direction, in float32 and rounded once (line 7)."""
    # slices, so that a narrower weight is not copied as a whole
    length, lr = 1 << 16 if weight.device.type == "cpu" else 1 << 21, cast("float | Number", o.lr)
    pieces = (torch.split(tensor.view(-1), length) for tensor in (weight, direction))
    for piece, step in zip(*pieces, strict=True):
        wide = piece.float()
        if o.weight_decay != 0:
            wide.mul_(factor(1 - o.lr * o.weight_decay))
        if isinstance(lr, Number):
            wide.addcmul_(step, lr.factor(), value=-1)
        else:
            wide.add_(step, alpha=-lr)
        if wide is not piece:
            piece.copy_(wide)
