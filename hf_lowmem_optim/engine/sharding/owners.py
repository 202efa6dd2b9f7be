"""Which process updates which tensor: nothing of it is saved, and all processes find the same."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["assign_owners"]


def assign_owners(sizes: Sequence[int], loads: list[int]) -> list[int]:
    """Give each tensor to the process that has least to do, the largest tensor first.

    Args:
        sizes: Bytes of the tensors.
        loads: Bytes that each process has been given already; those of these tensors are added.

    Returns:
        The owner of each tensor.
    """
    owners = [0] * len(sizes)
    for index in sorted(range(len(sizes)), key=lambda index: -sizes[index]):
        owner = min(range(len(loads)), key=loads.__getitem__)
        owners[index] = owner
        loads[owner] += sizes[index]
    return owners
