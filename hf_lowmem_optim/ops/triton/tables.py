"""How one launch reaches the blocks of several tensors: a record of each, and which of them a program serves.

Both lie on the device and are made anew only when an address or a size has changed. What else changes from step to step
is passed beside them.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, misc, attr-defined"
from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from itertools import accumulate
from operator import or_
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_lowmem_optim.ops.constants import kept, to_device
from hf_lowmem_optim.ops.triton.device import aligned

__all__ = ["TYPES", "Launch", "block_tables", "launches", "owner_and_block", "pointer", "size", "vectorizes"]

#: Tables that a launch keeps: the addresses of gradients in a training loop have few patterns.
_MOST_TABLES = 8

TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit
def owner_and_block(owners_ptr, table_ptr, program, FIELDS: tl.constexpr):
    """The record of the tensor that a program serves, and the number of the program among that tensor's (int64)."""
    record = table_ptr + tl.load(owners_ptr + program).to(tl.int64) * FIELDS
    return record, program - tl.load(record)


@triton.jit
def pointer(record, field, TYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """An address of a record; ALIGNED: a multiple of 16, as vectorized loads and stores demand; of int8, of 8."""
    address = tl.load(record + field).to(tl.pointer_type(TYPE))
    if ALIGNED:
        # a thread is to take as many corrections as weights at a time, or they change places in shared memory
        address = tl.multiple_of(address, 8 if TYPE == tl.int8 else 16)  # noqa: SIM300 (TYPE is the argument)
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
    firsts = accumulate(programs, initial=0)
    rows = [(first, *record) for first, record in zip(firsts, records, strict=False)]
    tensors = torch.arange(len(programs), dtype=torch.int32)
    owners = tensors.repeat_interleave(torch.tensor(programs))
    return to_device(torch.tensor(rows, dtype=torch.int64), device), to_device(owners, device)


class Launch:
    """One launch for tensors of which only one address each changes from call to call.

    Attributes:
        which: Their places among the tensors of the call.
        is_aligned: Whether their addresses and sizes are multiples of 16.
        owners: See :func:`block_tables`.
    """

    def __init__(
        self,
        which: list[int],
        is_aligned: bool,
        records: list[tuple[int, ...]],
        programs: list[int],
        device: torch.device,
    ) -> None:
        """Build what stays of the tables; the records are what follows the address in them."""
        self.which, self.is_aligned, self._device = which, is_aligned, device
        self._rows, owners = block_tables([(0, *record) for record in records], programs, torch.device("cpu"))
        self.owners = to_device(owners, device)
        self._tables: dict[tuple[int, ...], Tensor] = {}

    def table(self, addresses: Sequence[int]) -> Tensor:
        """Return the table of :func:`block_tables`, with an address of each tensor of the call before its record.

        Nothing is copied to the device as long as the addresses are those of one of the last calls.
        """
        key = tuple(addresses) if len(addresses) == len(self.which) else tuple([addresses[i] for i in self.which])
        table = self._tables.get(key)
        if table is None:
            if len(self._tables) >= _MOST_TABLES:
                del self._tables[next(iter(self._tables))]
            self._rows[:, 1] = torch.tensor(key, dtype=torch.int64)
            table = self._tables[key] = to_device(self._rows.clone(), self._device)
        kept(self.owners)
        return kept(table)


def launches(
    tensors: Sequence[Tensor],
    record: Callable[[int], tuple[int, ...]],
    programs: Callable[[int], int],
    memo: dict[str, Any],
    name: str,
    *,
    others: Callable[[int], Sequence[Tensor]] = lambda place: (),
) -> tuple[list[Launch], list[int]]:
    """Return the launches that serve tensors, one for all that are aligned, and the tensors' addresses.

    Args:
        tensors: Those whose addresses change.
        record: Returns what follows the address in a tensor's record.
        programs: Returns how many programs serve it.
        memo: Where the launches are kept for the next call.
        name: Their name there.
        others: Returns what must be aligned, too.
    """
    addresses = list(map(Tensor.data_ptr, tensors))
    usual = functools.reduce(or_, addresses) % 16 == 0
    # of those that are not all aligned the last pattern is kept
    key, pattern = (name, None) if usual else (f"{name}, not aligned", [address % 16 for address in addresses])
    known, found = memo.get(key, (pattern, None))
    if found is None or known != pattern:
        groups: dict[bool, list[int]] = {}
        for place, tensor in enumerate(tensors):
            groups.setdefault(vectorizes(tensor, *others(place)), []).append(place)
        device = tensors[0].device
        found = [
            Launch(which, each, [record(i) for i in which], [programs(i) for i in which], device)
            for each, which in groups.items()
        ]
        memo[key] = pattern, found
    return found, addresses


def vectorizes(tensor: Tensor, *others: Tensor) -> bool:
    """Return whether a tensor's entries, and the addresses of it and of others, are multiples of 16."""
    return tensor.numel() % 16 == 0 and aligned((tensor, *others))
