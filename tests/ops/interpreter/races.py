"""Errors for what the interpreter's one-after-another execution hides: races and accesses outside the tensors.

Per launch, each byte of each tensor remembers which program wrote it and which read it. It is an error when

- one ``tl.store`` writes an address from two lanes,
- two programs write one address, or one reads what another writes (their order is undefined on a GPU),
- a load or store touches an address outside the tensors passed to the launch. A view narrows the bounds to its own
  entries, so that a row of a matrix cannot be left unseen.

A tensor that is reached through a table of addresses counts as passed: int64 arguments are searched for what
``Tensor.data_ptr()`` returned last for each tensor.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from triton.runtime import interpreter

_stock_store = interpreter.InterpreterBuilder.create_masked_store
_stock_load = interpreter.InterpreterBuilder.create_masked_load
_stock_init = interpreter.GridExecutor._init_args_hst
_stock_data_ptr = torch.Tensor.data_ptr

_NOBODY, _MANY = -1, -2


@dataclass
class _Region:
    """The bytes from the first to the last entry of one or more overlapping arguments, and who touched them."""

    start: int
    stop: int
    writer: np.ndarray
    reader: np.ndarray


_regions: list[_Region] = []
#: Bounds of tensors whose address was asked for, by that address.
_asked_for: dict[int, tuple[int, int]] = {}


def _program(builder: Any) -> int:
    x, y, z = builder.grid_idx
    _, num_y, num_z = builder.grid_dim
    return (x * num_y + y) * num_z + z


def _touched(pointers: Any, mask: Any, what: str) -> list[tuple[_Region, np.ndarray]]:
    """Split the byte addresses of the active lanes by region; raise for those in none."""
    active = np.broadcast_to(mask.data, pointers.data.shape)
    addresses = pointers.data[active].astype(np.int64)
    size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
    outside = np.ones(addresses.shape, bool)
    touched = []
    for region in _regions:
        inside = (addresses >= region.start) & (addresses + size <= region.stop)
        outside &= ~inside
        if inside.any():
            touched.append((region, ((addresses[inside] - region.start)[:, None] + np.arange(size)).reshape(-1)))
    if _regions and outside.any():
        raise IndexError(f"{what} out of bounds: {int(outside.sum())} of {outside.size} lanes")
    return touched


def _store(self: Any, pointers: Any, value: Any, mask: Any, cache_policy: Any) -> Any:
    program = _program(self)
    for region, at in _touched(pointers, mask, "store"):
        if np.unique(at).size != at.size:
            raise RuntimeError("race: one tl.store writes an address more than once")
        if np.any((region.writer[at] != _NOBODY) & (region.writer[at] != program)):
            raise RuntimeError("race: two programs store to one address")
        if np.any((region.reader[at] != _NOBODY) & (region.reader[at] != program)):
            raise RuntimeError("race: a program stores to an address that another one loads")
        region.writer[at] = program
    return _stock_store(self, pointers, value, mask, cache_policy)


def _load(self: Any, pointers: Any, mask: Any, other: Any, cache_policy: Any, is_volatile: Any) -> Any:
    program = _program(self)
    for region, at in _touched(pointers, mask, "load"):
        if np.any((region.writer[at] != _NOBODY) & (region.writer[at] != program)):
            raise RuntimeError("race: a program loads an address that another one stores to")
        before = region.reader[at]
        region.reader[at] = np.where((before == _NOBODY) | (before == program), program, _MANY)
    return _stock_load(self, pointers, mask, other, cache_policy, is_volatile)


def _extent(tensor: Any) -> tuple[int, int]:
    """First and one-past-last byte of a tensor's entries."""
    start = _stock_data_ptr(tensor)
    if tensor.numel() == 0:
        return start, start
    last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    return start, start + (last + 1) * tensor.element_size()


def _data_ptr(self: torch.Tensor) -> int:
    address = _stock_data_ptr(self)
    if self.device.type == "cpu":
        _asked_for[address] = _extent(self)
    return address


def _init(self: Any, args: Any, kwargs: Any) -> Any:
    host_args, host_kwargs = _stock_init(self, args, kwargs)
    _regions.clear()
    passed = [t for t in [*host_args, *host_kwargs.values()] if hasattr(t, "untyped_storage")]
    in_tables = {address for t in passed if t.dtype == torch.int64 for address in t.reshape(-1).tolist()}
    extents = sorted([_extent(t) for t in passed] + [_asked_for[at] for at in in_tables & _asked_for.keys()])
    merged: list[list[int]] = []
    for start, stop in extents:
        if merged and start < merged[-1][1]:
            merged[-1][1] = max(merged[-1][1], stop)
        else:
            merged.append([start, stop])
    for start, stop in merged:
        nobody = np.full(stop - start, _NOBODY, np.int32)
        _regions.append(_Region(start, stop, nobody, nobody.copy()))
    return host_args, host_kwargs


def enable() -> None:
    """Check every load and store of every launch from now on."""
    interpreter.InterpreterBuilder.create_masked_store = _store
    interpreter.InterpreterBuilder.create_masked_load = _load
    interpreter.GridExecutor._init_args_hst = _init
    torch.Tensor.data_ptr = _data_ptr
