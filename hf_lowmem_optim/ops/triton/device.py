"""Where Triton launches, and how a kernel reaches several tensors in one launch."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import functools
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_lowmem_optim.ops.constants import kept, to_device

__all__ = ["MAX_OFFSET", "address_table", "aligned", "by_value", "on_device"]

_HERE: AbstractContextManager[Any] = nullcontext()

#: Kernels that count in 32 bits reach the entries up to here.
MAX_OFFSET = (1 << 31) - 1


@triton.jit
def by_value(x):
    """A number that a launch passes by itself, or by its place on the device: see ``ops/step_numbers.py``."""
    value = x
    if isinstance(x, float):  # in the interpreter, to which it is no float32
        value = tl.cast(x, tl.float32)
    else:
        if x.dtype.is_ptr():
            value = tl.load(x)
    return value


def on_device(tensor: Tensor) -> AbstractContextManager[Any]:
    """Make the GPU of a tensor the current one, where Triton launches; nothing to do if it is, or for a CPU tensor."""
    if not tensor.is_cuda or tensor.device.index == torch.cuda.current_device():
        return _HERE
    return torch.cuda.device(tensor.device)


def address_table(tensors: Sequence[Tensor] | Tensor) -> Tensor:
    """Return the addresses of tensors of one device, int64 [tensors] on that device.

    A table that was made before is used again, so that nothing is copied to the device while addresses stay.
    """
    return kept(_table(tuple(tensor.data_ptr() for tensor in tensors), tensors[0].device))


#: More than a step has: with fewer, each would be forgotten before the next step asks for it.
@functools.lru_cache(maxsize=1 << 12)
def _table(addresses: tuple[int, ...], device: torch.device) -> Tensor:
    return to_device(torch.tensor(addresses, dtype=torch.int64), device)


def aligned(tensors: Sequence[Tensor]) -> bool:
    """Return whether every tensor begins at a multiple of 16 bytes, as vectorized loads demand."""
    bits = 0
    for tensor in tensors:  # every step asks this of every tensor
        bits |= tensor.data_ptr()
    return bits % 16 == 0
