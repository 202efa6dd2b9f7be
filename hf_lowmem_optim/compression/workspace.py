"""Temporary buffers shared by all tensors of one ``step()``."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["Workspace"]


class Workspace:
    """Hands out float32 buffers by name; a name's memory is reused by the next tensor that asks for it.

    On the CPU a fresh buffer of some hundred kilobytes costs more in page faults than the arithmetic done in it
    (``benchmarks/step_time.py``, with and without its malloc setting). A workspace lives for one step, so that
    nothing is held between steps.
    """

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, torch.device], Tensor] = {}
        self._views: dict[tuple[str, torch.device, tuple[int, ...]], Tensor] = {}

    def take(self, name: str, shape: Sequence[int], device: torch.device) -> Tensor:
        """Return an uninitialized float32 tensor, valid until the same name is taken again.

        Args:
            name: Which buffer.
            shape: Shape of the tensor.
            device: Where it lies.

        Returns:
            A contiguous view of the buffer.
        """
        shape = tuple(shape)
        view = self._views.get((name, device, shape))
        if view is None:
            view = self._buffer(name, math.prod(shape), device)[: math.prod(shape)].view(shape)
            self._views[name, device, shape] = view
        return view

    def _buffer(self, name: str, numel: int, device: torch.device) -> Tensor:
        """The buffer of a name, with ``numel`` entries at least."""
        buffer = self._buffers.get((name, device))
        if buffer is None or buffer.numel() < numel:
            # The smaller one goes first, so that the two are never there together.
            buffer = None
            self._buffers.pop((name, device), None)
            self._views = {key: view for key, view in self._views.items() if key[:2] != (name, device)}
            buffer = torch.empty(numel, dtype=torch.float32, device=device)
            self._buffers[name, device] = buffer
        return buffer
