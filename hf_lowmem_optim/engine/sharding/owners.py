"""Which process updates which tensor, and when: nothing of it is saved, and all processes find the same."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

__all__ = ["assign_owners", "waves_of"]


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


def waves_of(sizes: Sequence[int], limit: int) -> Iterator[list[int]]:
    """Cut tensors into runs that together have at most so many bytes, unless one alone has more.

    Args:
        sizes: Bytes of the tensors.
        limit: Bytes of a run.

    Yields:
        Places of the tensors of a run.
    """
    run, nbytes = list[int](), 0
    for index, size in enumerate(sizes):
        if run and nbytes + size > limit:
            yield run
            run, nbytes = [], 0
        run.append(index)
        nbytes += size
    if run:
        yield run
