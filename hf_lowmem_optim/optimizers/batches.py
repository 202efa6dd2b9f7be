"""Small matrices of one shape, updated together: a call costs as much as the arithmetic of a few thousand entries.

Parameters, gradients and states are stacked, updated as one three-dimensional tensor, and copied back. The result is
bit for bit that of updating each by itself on the CPU (``kernels/subspace_adam``), so it does not depend on which
tensors are there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

__all__ = ["BATCH_ENTRIES", "MATRIX_ENTRIES", "chunks_by_key", "is_aligned", "scatter_", "stack"]

#: Larger matrices are updated alone (``benchmarks/step_time.py --shapes small``).
MATRIX_ENTRIES = 1 << 16
#: Entries of a batch at most, which bounds what is allocated for it.
BATCH_ENTRIES = 1 << 18

_ALIGNMENT = 16
_T = TypeVar("_T")


def is_aligned(*shapes: Sequence[int]) -> bool:
    """Whether each matrix of a batch lies at a multiple of 64 bytes in float32, as a tensor by itself does.

    CPU routines may choose their instructions, and with them the rounding, by the address.
    """
    return all(math.prod(shape) % _ALIGNMENT == 0 for shape in shapes)


def chunks_by_key(items: Iterable[_T], key: Callable[[_T], Hashable], entries: Callable[[_T], int]) -> list[list[_T]]:
    """Put items of one key together, at most :data:`BATCH_ENTRIES` in a chunk.

    Args:
        items: The items.
        key: What must be equal in a chunk; None for an item that stays alone.
        entries: Size of an item.

    Returns:
        The chunks, in the order of their first items.
    """
    chunks: list[list[_T]] = []
    open_chunks: dict[Hashable, list[_T]] = {}
    for item in items:
        of_item = key(item)
        chunk = None if of_item is None else open_chunks.get(of_item)
        if chunk is None or (len(chunk) + 1) * entries(item) > BATCH_ENTRIES:
            chunk = []
            chunks.append(chunk)
            if of_item is not None:
                open_chunks[of_item] = chunk
        chunk.append(item)
    return chunks


def stack(tensors: Sequence[Tensor], shape: Sequence[int]) -> Tensor:
    """Return the tensors as one of shape (number of tensors, ...), each viewed as ``shape``."""
    if tensors[0].shape != tuple(shape):
        tensors = [tensor.reshape(tuple(shape)) for tensor in tensors]
    return torch.stack(list(tensors))


def scatter_(targets: Sequence[Tensor], stacked: Tensor) -> None:
    """Copy each part of ``stacked`` into its target."""
    parts: Sequence[Tensor] = stacked.view(len(targets), *targets[0].shape).unbind()
    torch._foreach_copy_(list(targets), list(parts))
