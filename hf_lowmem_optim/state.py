"""What a piece of optimizer state is: its shape, its storage dtype and what it is called in the accounting.

Every optimizer describes its state as a ``dict[str, TensorSpec]``. The optimizer allocates from that description,
the planner sums it and the report groups it, so that predicted and measured bytes cannot differ.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

__all__ = ["TensorSpec"]


@dataclass(frozen=True)
class TensorSpec:
    """Description of one state tensor.

    Attributes:
        shape: Shape of the tensor.
        dtype: Storage dtype.
        component: Name under which its bytes are counted, for example ``"basis"`` or ``"error"``.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    component: str

    @property
    def nbytes(self) -> int:
        """Bytes of storage: number of entries times the size of one."""
        return math.prod(self.shape) * self.dtype.itemsize

    def allocate(self, device: torch.device | str) -> torch.Tensor:
        """Return a zero tensor of this description on ``device``."""
        return torch.zeros(self.shape, dtype=self.dtype, device=device)
