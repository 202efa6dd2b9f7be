"""Constants: tensors that a few numbers and a device determine, made when first needed and never saved.

All optimizers of a process share them, for as long as it lives. Planner and report count those that an optimizer uses,
once each, beside its state.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

__all__ = ["constant", "held_constant", "keeping", "kept", "to_device"]

_HELD: dict[Hashable, Tensor] = {}
#: Where tables that launches read are noted, while they are recorded.
_KEPT: list[list[Tensor]] = []


def constant(key: Hashable, make: Callable[[], Tensor]) -> Tensor:
    """Return the constant of a key, made at its first use.

    Args:
        key: What determines it, the device included.
        make: Makes it.
    """
    found = _HELD.get(key)
    if found is None:
        found = _HELD.setdefault(key, make())
    return found


def held_constant(key: Hashable) -> Tensor | None:
    """Return the constant of a key if it has been made."""
    return _HELD.get(key)


def kept(table: Tensor) -> Tensor:
    """Return a table that a launch reads, and that may be forgotten for another one: a recording needs it for good."""
    for tables in _KEPT:
        tables.append(table)
    return table


@contextmanager
def keeping() -> Iterator[list[Tensor]]:
    """Give a list to which all tables come that are read from now on."""
    tables: list[Tensor] = []
    _KEPT.append(tables)
    try:
        yield tables
    finally:
        _KEPT.pop()


def to_device(numbers: Tensor, device: torch.device) -> Tensor:
    """Copy numbers of the host to a device without waiting for it.

    Raises:
        RuntimeError: A CUDA graph is captured, which would copy again what is no longer there.
    """
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("numbers of the host were asked for while a CUDA graph is captured: take the step without")
    return numbers.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else numbers.to(device)
