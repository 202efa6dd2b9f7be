"""One tensor that a step updates."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from hf_lowmem_optim.compression.rounding import StochasticRounding
from hf_lowmem_optim.compression.workspace import Workspace

__all__ = ["PendingUpdate", "weight_to_update"]


@dataclass(slots=True)
class PendingUpdate:
    """One tensor that this step updates.

    Attributes:
        param: The parameter, detached.
        grad: Its gradient; only read.
        state: Its state: ``"step"`` (already counted) and the tensors.
        group: The parameter group it is in.
        seed: Seed with which its weights are rounded stochastically; None if they are rounded to nearest.
    """

    param: Tensor
    grad: Tensor
    state: dict[str, Any]
    group: dict[str, Any]
    seed: int | None = None

    @property
    def rounding(self) -> StochasticRounding | None:
        """The rounding of its weights in this step, from the start."""
        return None if self.seed is None else StochasticRounding(self.seed, self.param.device)


@contextmanager
def weight_to_update(update: PendingUpdate, workspace: Workspace) -> Iterator[Tensor]:
    """Give the weight to an update: itself, or a float32 copy that is rounded stochastically when written back.

    Args:
        update: The tensor.
        workspace: Gives the copy.

    Yields:
        A tensor of the parameter's shape, to be updated in place.
    """
    rounding = update.rounding
    if rounding is None:
        yield update.param
        return
    wide = workspace.take("weight", update.param.shape, update.param.device).copy_(update.param)
    yield wide
    rounding.round_(update.param, wide)
