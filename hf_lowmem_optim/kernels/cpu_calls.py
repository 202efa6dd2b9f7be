"""Compiled loops over the blocks of several tensors, each of which a record of one array describes.

A call for each tensor would make threads wait for each other, since every call lets go of Python's lock and takes it
back, and after each tensor what Python needs is no longer in the cache. So every thread enters a loop once for many
tensors. There it takes the next group of blocks until none is left, while the calling thread may still be writing the
records of later tensors. Which blocks are a group does not depend on the threads, nor does the order in which the
groups' sums are added.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, misc, attr-defined, call-arg, var-annotated, unreachable"
from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numba
import numpy as np
from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from hf_lowmem_optim.kernels.native_loops import NativeLoop, num_threads, run_native
from hf_lowmem_optim.kernels.workers import MAX_WORKERS

__all__ = [
    "ARGUMENTS",
    "FLOAT",
    "INT",
    "QUEUE",
    "Record",
    "Sizes",
    "claimed_blocks",
    "enters",
    "fetch_add",
    "record",
    "run_calls",
]

INT, FLOAT = np.int64, np.float32

#: Of a group: what takes much longer than to take it.
_GROUP_ENTRIES = 1 << 16
#: Groups at most, which bounds what their sums take.
_MOST_GROUPS = 1 << 12
# a second thread costs more than it gains below that
_LEAST_ENTRIES = 1 << 18
# what threads share lies in lines of the cache of its own
_THERE, _ENTERED, QUEUE = 8, 16, 24

#: What a loop finds at its pointer: addresses of the records, of the queue and of float64 [groups, num_sums], zeros,
#: for what it adds up in each group; how many threads are to work; blocks of a group; size of the largest block.
ARGUMENTS = np.dtype(
    [(name, INT) for name in ("calls", "tensors", "queue", "threads", "group", "largest", "sums", "groups", "num_sums")]
)

#: One tensor: the fields of its record, ``blocks`` being the last.
Record = tuple[Any, ...]


@intrinsic
def fetch_add(_, address, number):
    """Add to an int64 that several threads share, and return what it was; what was written before is seen after."""

    def generate(context, builder, signature, arguments):
        pointer = builder.inttoptr(arguments[0], ir.IntType(64).as_pointer())
        return builder.atomic_rmw("add", pointer, arguments[1], "acq_rel")

    return types.int64(types.int64, types.int64), generate


@intrinsic
def _load(_, address):
    """Read an int64 that several threads share; what was written before it was is seen after."""

    def generate(context, builder, signature, arguments):
        pointer = builder.inttoptr(arguments[0], ir.IntType(64).as_pointer())
        return builder.load_atomic(pointer, "acquire", 8)

    return types.int64(types.int64), generate


@numba.njit(cache=True, error_model="numpy")
def _tell(queue, tensors):
    """Say that more tensors, or a negative number of them, are there."""
    fetch_add(np.int64(queue.ctypes.data) + 8 * _THERE, tensors)


@numba.njit(error_model="numpy")
def enters(queue, most):
    """Whether this thread is one of those that work: a team may have more than it pays for, or should have memory."""
    return fetch_add(np.int64(queue.ctypes.data) + 8 * _ENTERED, 1) < most


@numba.njit(error_model="numpy")
def claimed_blocks(calls, queue, group):
    """Take groups of blocks until there are none, and yield them tensor by tensor.

    Args:
        calls: The records.
        queue: int64 [QUEUE]: at its start blocks that are taken, then tensors that are there; negative to come to an
            end.
        group: Blocks of a group.

    Yields:
        A tensor's number, its first block and the block after its last one in the group, and the group's number.
    """
    taken = np.int64(queue.ctypes.data)
    told = taken + 8 * _THERE
    number, before, there = 0, 0, 0
    while True:
        first = fetch_add(taken, group)
        block, end = first, first + group
        while block < end:
            while number < there and before + calls[number].blocks <= block:
                before += calls[number].blocks
                number += 1
            if number < there:
                stop = min(end, before + calls[number].blocks)
                yield number, block - before, stop - before, first // group
                block = stop
            elif number == len(calls) or there < 0:
                return
            else:
                there = _load(told)


class Sizes(NamedTuple):
    """What is known of some tensors before their records are made.

    Attributes:
        tensors: How many there are.
        blocks: Their blocks.
        entries: Their entries.
        largest: The size of the largest block.
    """

    tensors: int
    blocks: int
    entries: int
    largest: int

    @classmethod
    def of(cls, numels: Sequence[int], block_sizes: Sequence[int]) -> Sizes:
        """Of tensors of so many entries each in blocks of such a size."""
        blocks = sum([-(-numel // size) for numel, size in zip(numels, block_sizes, strict=True)])
        return cls(len(numels), blocks, sum(numels), max(block_sizes))


def record(**fields: Any) -> np.dtype[Any]:
    """Describe a tensor's record: its fields, in the order in which they are given, and then ``blocks``, int64."""
    return np.dtype([*fields.items(), ("blocks", INT)], align=True)


def run_calls(
    loop: NativeLoop,
    table: np.ndarray[Any, Any],
    sizes: Sizes,
    calls: Iterable[Record] | None = None,
    sums: int = 0,
) -> Any:
    """Run a compiled loop over the blocks of all tensors, on as many threads as pay.

    Args:
        loop: Finds :data:`ARGUMENTS` at its pointer.
        table: The records of all tensors.
        sizes: Of all of them.
        calls: What to write to the records, one by one: other threads begin with the first ones while the calling
            thread gets the others. None if it is there.
        sums: Numbers that the loop adds up.

    Returns:
        The sums over all groups, float64 [sums].
    """
    tensors, blocks, entries, largest = sizes
    group = max(1, min(blocks, blocks * _GROUP_ENTRIES // max(1, entries)), -(-blocks // _MOST_GROUPS))
    most = max(1, min(entries // _LEAST_ENTRIES, MAX_WORKERS))
    queue, partial = np.zeros(QUEUE, INT), np.zeros((-(-blocks // group) if sums else 0, sums))
    # compiled here, and not while others wait
    _tell(queue, tensors if calls is None else 0)
    where, sums_at = (table.ctypes.data, tensors, queue.ctypes.data), (partial.ctypes.data, *partial.shape)
    arguments = np.array([(*where, most, group, largest, *sums_at)], ARGUMENTS)

    def prepare() -> None:
        if calls is None:
            return
        # as many as there are, or the others would wait for more
        for number, call in zip(range(tensors), calls, strict=True):
            table[number] = call
            _tell(queue, 1)

    run_native(loop, arguments, num_threads(most), prepare, functools.partial(_tell, queue, -tensors - 1))
    if queue[0] < blocks:
        raise MemoryError("no thread had the memory for the blocks that it works in")
    return partial.sum(axis=0)
