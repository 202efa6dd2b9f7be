"""What a piece of optimizer state is: its shape, its storage dtype and what it is called in the accounting.

Every optimizer describes its state as a ``dict[str, TensorSpec]``. The optimizer allocates from that description,
the planner sums it and the report groups it, so that predicted and measured bytes cannot differ.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch

__all__ = ["StepTemporaries", "TensorSpec"]


@dataclass(frozen=True)
class TensorSpec:
    """Description of one state tensor.

    Attributes:
        shape: Shape of the tensor.
        dtype: Storage dtype.
        component: Name under which its bytes are counted, for example ``"basis"`` or ``"error"``.
        in_gradient: Whether it is kept in the buffer of the parameter's gradient, which counts among the gradients.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    component: str
    in_gradient: bool = False

    @property
    def nbytes(self) -> int:
        """Bytes that it adds to weights and gradients: none for what is kept in a gradient's buffer."""
        return 0 if self.in_gradient else self._stored_bytes

    @property
    def in_gradient_bytes(self) -> int:
        """Bytes of a gradient's buffer that it occupies."""
        return self._stored_bytes if self.in_gradient else 0

    @property
    def _stored_bytes(self) -> int:
        """Number of entries times the size of one."""
        return math.prod(self.shape) * self.dtype.itemsize

    def allocate(self, device: torch.device | str) -> torch.Tensor:
        """Return a zero tensor of this description on ``device``."""
        return torch.zeros(self.shape, dtype=self.dtype, device=device)

    def shard(self, num_shards: int) -> TensorSpec:
        """Return the largest part when the tensor is split along its first dimension, as FSDP2 splits parameters."""
        if not self.shape:
            return self
        return replace(self, shape=(-(-self.shape[0] // num_shards), *self.shape[1:]))


@dataclass(frozen=True)
class StepTemporaries:
    """What the update of one tensor allocates besides its state and frees by the end of ``step()``.

    Attributes:
        shared: Bytes by name of the buffers that all tensors of a step take turns in (``compression/workspace.py``):
            over all tensors each counts with its largest size.
        own: Bytes that are freed before the next tensor's turn: over all tensors the largest counts.
        late: As ``shared``, for a method that goes over all tensors a second time: taken in that second pass.
        late_own: As ``own``, in the second pass.
    """

    shared: Mapping[str, int] = field(default_factory=dict)
    own: int = 0
    late: Mapping[str, int] = field(default_factory=dict)
    late_own: int = 0

    def largest(self, other: StepTemporaries) -> StepTemporaries:
        """Return what both tensors need, the one after the other, in each pass."""
        return StepTemporaries(
            _largest_of_each(self.shared, other.shared),
            max(self.own, other.own),
            _largest_of_each(self.late, other.late),
            max(self.late_own, other.late_own),
        )

    def times(self, count: int, *, beside: int) -> StepTemporaries:
        """Return what ``count`` equal tensors need that are updated together, with ``beside`` more bytes each."""
        return StepTemporaries(
            {name: count * nbytes for name, nbytes in self.shared.items()},
            count * (self.own + beside),
            {name: count * nbytes for name, nbytes in self.late.items()},
            count * self.late_own,
        )

    @property
    def peak_bytes(self) -> int:
        """Bytes at the worst moment; the shared buffers of the first pass are still there in the second."""
        return sum(self.shared.values()) + max(self.own, sum(self.late.values()) + self.late_own)


def _largest_of_each(left: Mapping[str, int], right: Mapping[str, int]) -> dict[str, int]:
    return {name: max(left.get(name, 0), right.get(name, 0)) for name in {**left, **right}}
