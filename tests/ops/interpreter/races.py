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

import math
from dataclasses import dataclass, field
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
    """The bytes from the first to the last entry of one or more overlapping arguments, and who touched them.

    They are counted in cells of ``unit`` bytes, as large as every access so far allows: each takes whole cells.
    """

    start: int
    stop: int
    unit: int = 0
    writer: np.ndarray = field(default_factory=lambda: np.empty(0, np.int32))
    reader: np.ndarray = field(default_factory=lambda: np.empty(0, np.int32))
    lane: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))

    def cells(self, addresses: np.ndarray, size: int) -> np.ndarray:
        """Return the places of what is accessed in ``writer`` and ``reader``."""
        offsets = addresses - self.start
        if not self.unit or size % self.unit or (offsets % self.unit).any():
            self._divide(math.gcd(self.unit, size, int(np.gcd.reduce(offsets))))
        places = offsets // self.unit
        each = size // self.unit
        return places if each == 1 else (places[:, None] + np.arange(each)).reshape(-1)

    def _divide(self, unit: int) -> None:
        if not self.unit:
            self.writer = np.full(-(-(self.stop - self.start) // unit), _NOBODY, np.int32)
            self.reader = self.writer.copy()
        else:
            self.writer, self.reader = (np.repeat(each, self.unit // unit) for each in (self.writer, self.reader))
        self.lane = np.empty(self.writer.size, np.int64)
        self.unit = unit

    def has_twice(self, at: np.ndarray) -> bool:
        """Return whether a cell is there more than once."""
        lanes = np.arange(at.size)
        self.lane[at] = lanes  # of equal ones the last stays
        return bool((self.lane[at] != lanes).any())


_regions: list[_Region] = []
#: Bounds of tensors whose address was asked for, by that address.
_asked_for: dict[int, tuple[int, int]] = {}


def _program(builder: Any) -> int:
    x, y, z = builder.grid_idx
    _, num_y, num_z = builder.grid_dim
    return (x * num_y + y) * num_z + z


def _touched(pointers: Any, mask: Any, what: str) -> list[tuple[_Region, np.ndarray]]:
    """Split the cells of the active lanes by region; raise for those in none."""
    active = np.broadcast_to(mask.data, pointers.data.shape)
    addresses = pointers.data[active].astype(np.int64)
    size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
    left = addresses
    touched = []
    for region in _regions:
        if not left.size:
            break
        inside = (left >= region.start) & (left + size <= region.stop)
        if inside.all():
            touched.append((region, region.cells(left, size)))
            left = left[:0]
        elif inside.any():
            touched.append((region, region.cells(left[inside], size)))
            left = left[~inside]
    if _regions and left.size:
        raise IndexError(f"{what} out of bounds: {left.size} of {addresses.size} lanes")
    return touched


def _store(self: Any, pointers: Any, value: Any, mask: Any, cache_policy: Any) -> Any:
    program = _program(self)
    for region, at in _touched(pointers, mask, "store"):
        if region.has_twice(at):
            raise RuntimeError("race: one tl.store writes an address more than once")
        writer, reader = region.writer[at], region.reader[at]
        if np.any((writer != _NOBODY) & (writer != program)):
            raise RuntimeError("race: two programs store to one address")
        if np.any((reader != _NOBODY) & (reader != program)):
            raise RuntimeError("race: a program stores to an address that another one loads")
        region.writer[at] = program
    return _stock_store(self, pointers, value, mask, cache_policy)


def _load(self: Any, pointers: Any, mask: Any, other: Any, cache_policy: Any, is_volatile: Any) -> Any:
    program = _program(self)
    for region, at in _touched(pointers, mask, "load"):
        writer, before = region.writer[at], region.reader[at]
        if np.any((writer != _NOBODY) & (writer != program)):
            raise RuntimeError("race: a program loads an address that another one stores to")
        if not (before == program).all():
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
        _regions.append(_Region(start, stop))
    return host_args, host_kwargs


def enable() -> None:
    """Check every load and store of every launch from now on."""
    interpreter.InterpreterBuilder.create_masked_store = _store
    interpreter.InterpreterBuilder.create_masked_load = _load
    interpreter.GridExecutor._init_args_hst = _init
    torch.Tensor.data_ptr = _data_ptr
