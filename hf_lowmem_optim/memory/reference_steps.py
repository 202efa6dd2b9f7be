"""What ``step()`` of other optimizers allocates for a moment: their code followed tensor by tensor.

A name of Python keeps its tensor until it is bound again, so what one parameter leaves behind is still there while the
next one is served; the order of the parameters matters. The tests hold each function against the class itself.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Protocol

import torch

__all__ = ["GALORE_RANK", "adafactor_step", "foreach_step", "galore_step", "in_place_step", "is_projected"]

#: The Trainer's.
GALORE_RANK = 128


class Parameter(Protocol):
    """What a parameter's temporaries depend on; see :class:`~hf_lowmem_optim.memory.references.ParameterFacts`."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def matrix(self) -> bool: ...


def in_place_step(_: Iterable[Parameter]) -> int:
    """A kernel that updates in place: torch's fused AdamW, bitsandbytes on GPUs."""
    return 0


def foreach_step(parameters: Iterable[Parameter]) -> int:
    """Torch's foreach AdamW takes the root of all second moments at once."""
    return sum(math.prod(parameter.shape) * parameter.dtype.itemsize for parameter in parameters)


def adafactor_step(parameters: Iterable[Parameter]) -> int:
    """transformers.Adafactor squares the gradient and adds to the square, in float32.

    A half-precision gradient and parameter are copied to float32 first. The last update stays until there is a new one.
    """
    peak = left = 0
    for parameter in parameters:
        wide = 4 * math.prod(parameter.shape)
        copies = 0 if parameter.dtype == torch.float32 else 2
        peak = max(peak, left + (2 + copies) * wide)
        left = wide
    return peak


def galore_step(parameters: Iterable[Parameter], *, refresh: bool = True) -> int:
    """galore_torch.GaLoreAdamW: the root and the quotient, projected back and then scaled into a second tensor.

    Every 200 steps, and in the first (``refresh``), an SVD in float32 comes before: its copy of the gradient and its
    factors are counted, the workspace of the library that computes it is not.
    """
    peak = left_root = left_update = 0
    for parameter in parameters:
        whole = math.prod(parameter.shape) * parameter.dtype.itemsize
        left = left_root + left_update
        if is_projected(parameter):
            p, q = parameter.shape
            small = min(p, q)
            projected = min(GALORE_RANK, small) * max(p, q) * parameter.dtype.itemsize
            copies = 1 if parameter.dtype == torch.float32 else 2
            svd = 4 * (copies * p * q + p * small + small + small * q) if refresh else 0
            peak = max(peak, left + svd, left + 2 * projected, left_update + 3 * projected, 3 * projected + 2 * whole)
            left_root = projected
        else:
            peak = max(peak, left + whole, left_update + 2 * whole)
            left_root = whole
        left_update = whole
    return peak


def is_projected(parameter: Parameter) -> bool:
    """Whether GaLore projects it: the weight of a linear layer."""
    return parameter.matrix and len(parameter.shape) == 2
