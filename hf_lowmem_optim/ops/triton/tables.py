"""How one launch reaches the blocks of several tensors: a record of each, and which of them a program serves.

Both lie on the device and are made anew only when an address or a size has changed. What changes from step to step is
passed beside them.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, misc, attr-defined"
from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Sequence
from itertools import accumulate
from typing import TypeVar

import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_lowmem_optim.ops.constants import to_device
from hf_lowmem_optim.ops.triton.device import aligned

__all__ = ["TYPES", "alike", "block_tables", "owner_and_block", "pointer", "size", "vectorizes"]

T = TypeVar("T")

TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit
def owner_and_block(owners_ptr, table_ptr, program, FIELDS: tl.constexpr):
    """The record of the tensor that a program serves, and the number of the program among that tensor's (int64)."""
    record = table_ptr + tl.load(owners_ptr + program).to(tl.int64) * FIELDS
    return record, program - tl.load(record)


@triton.jit
def pointer(record, FIELD: tl.constexpr, TYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """An address of a record; ALIGNED: a multiple of 16, as vectorized loads and stores demand."""
    address = tl.load(record + FIELD).to(tl.pointer_type(TYPE))
    if ALIGNED:
        address = tl.multiple_of(address, 16)
    return address


@triton.jit
def size(record, FIELD: tl.constexpr, ALIGNED: tl.constexpr):
    """A size of a record; ALIGNED: a multiple of 16, so that masks do not split vectors."""
    entries = tl.load(record + FIELD)
    if ALIGNED:
        entries = tl.multiple_of(entries, 16)
    return entries


def block_tables(
    records: Sequence[tuple[int, ...]], programs: Sequence[int], device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return what :func:`owner_and_block` reads, for one launch of ``sum(programs)`` programs.

    Args:
        records: Addresses and sizes of each tensor.
        programs: How many programs serve each tensor, one after the other.
        device: Where the tensors lie.

    Returns:
        int64 [tensors, 1 + length of a record]: the first program of each tensor, and its record; int32
        [programs]: the tensor of each program.
    """
    counts = tuple(programs)
    return _table(tuple(records), counts, device), _owners(counts, device)


@functools.lru_cache(maxsize=32)
def _table(records: tuple[tuple[int, ...], ...], programs: tuple[int, ...], device: torch.device) -> Tensor:
    firsts = accumulate(programs, initial=0)
    rows = [(first, *record) for first, record in zip(firsts, records, strict=False)]
    return to_device(torch.tensor(rows, dtype=torch.int64), device)


@functools.lru_cache(maxsize=32)
def _owners(programs: tuple[int, ...], device: torch.device) -> Tensor:
    tensors = torch.arange(len(programs), dtype=torch.int32)
    return to_device(tensors.repeat_interleave(torch.tensor(programs)), device)


def vectorizes(tensor: Tensor, *others: Tensor) -> bool:
    """Return whether a tensor's entries, and the addresses of it and of others, are multiples of 16."""
    return tensor.numel() % 16 == 0 and aligned((tensor, *others))


def alike(calls: Sequence[T], key: Callable[[T], Hashable]) -> dict[Hashable, list[T]]:
    """Put together what one launch serves: calls with one key."""
    groups: dict[Hashable, list[T]] = {}
    for call in calls:
        groups.setdefault(key(call), []).append(call)
    return groups
