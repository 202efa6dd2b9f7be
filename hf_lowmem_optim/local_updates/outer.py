"""The outer step of DiLoCo (Douillard et al., arXiv 2311.08105): what workers moved on average, taken as a gradient.

At a sync, with W of each worker and what all had at the sync before:

    Δ ← mean(W_anchor − W)
    b ← momentum·b + Δ
    W, W_anchor ← W_anchor − lr·(Δ + momentum·b)

| letter   | state key        | shape   | dtype     | bytes per parameter |
|----------|------------------|---------|-----------|---------------------|
| W_anchor | `anchor`         | shape W | that of W | 4 (fp32), 2 (bf16)  |
| b        | `outer_momentum` | shape W | float32   | 4                   |
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_lowmem_optim.engine.averaging import average_
from hf_lowmem_optim.engine.options import POSITIVE, UNIT, check_number
from hf_lowmem_optim.engine.sharding.owners import waves_of
from hf_lowmem_optim.spec import TensorSpec

__all__ = ["OuterNesterov"]

#: Of displacements in float32 that there are at a time.
_WAVE_BYTES = 64 << 20

States = Mapping[Tensor, Mapping[str, Tensor]]


@dataclass(frozen=True)
class OuterNesterov:
    """The mean displacement of a period, applied as a gradient with Nesterov momentum, as in DiLoCo.

    Args:
        lr: Its learning rate. ``OuterNesterov(1.0, 0.0)`` is the plain mean.
        momentum: Its momentum, in [0, 1).

    Raises:
        TypeError: One is not a number.
        ValueError: One is out of range.
    """

    lr: float = 0.7
    momentum: float = 0.9

    def __post_init__(self) -> None:
        """Check the fields."""
        check_number("lr", self.lr, POSITIVE)
        check_number("momentum", self.momentum, UNIT)

    def specs(self, param: Tensor) -> dict[str, TensorSpec]:
        """Describe the state of a parameter."""
        shape, wide = tuple(param.shape), torch.promote_types(param.dtype, torch.float32)
        return {"anchor": TensorSpec(shape, param.dtype, "outer"), "outer_momentum": TensorSpec(shape, wide, "outer")}

    def start(self, param: Tensor) -> dict[str, Tensor]:
        """Return the state of a parameter that is now equal on all workers."""
        momentum = self.specs(param)["outer_momentum"].allocate(param.device)
        return {"anchor": param.detach().clone(), "outer_momentum": momentum}

    def step_(self, params: Sequence[Tensor], states: States, group: Any, dtype: torch.dtype | None) -> int:
        """Move the anchors, and the weights to them.

        Args:
            params: The weights.
            states: Their state.
            group: The workers.
            dtype: What is sent of displacements, as in :func:`~hf_lowmem_optim.engine.averaging.average_`.

        Returns:
            The bytes that this worker sent.
        """
        sent_bytes = 0
        for wave in waves_of([4 * param.numel() for param in params], _WAVE_BYTES):
            weights = [params[index] for index in wave]
            anchors, momenta = ([states[w][key] for w in weights] for key in ("anchor", "outer_momentum"))
            # where the anchor is float32, it moves itself
            moving = [anchor.to(b.dtype) for anchor, b in zip(anchors, momenta, strict=True)]
            deltas = [anchor - w for anchor, w in zip(moving, weights, strict=True)]
            sent_bytes += average_(deltas, group, dtype=dtype)
            for anchor, delta, b in zip(moving, deltas, momenta, strict=True):
                b.mul_(self.momentum).add_(delta)
                anchor.sub_(delta.add_(b, alpha=self.momentum), alpha=self.lr)
            torch._foreach_copy_(anchors, moving)
            torch._foreach_copy_(weights, anchors)
        return sent_bytes
