"""Global and shared memory: what a launch reads and writes, and whether its threads race.

Memory is remembered by granules, the kernel's narrowest access: which warp wrote each last, and which warps have read
it since the last barrier. Epochs number the barriers; those of a launch pass together. Two accesses, one of them a
write, conflict when they are of different warps in one epoch, or of different CTAs whenever. Exempt is a write of
the value that is there already, and what replicas read: by one instruction, in which the writer took part. Where what
they have read matters, results depend on the order of the warps.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from .parse import TYPES, Program

if TYPE_CHECKING:
    from .machine import Machine

_SEVERAL, _PAGE = -1, 4096


class _AddressSpace:
    """The process's memory, from the second page on."""

    def __init__(self) -> None:
        self.__array_interface__ = {"shape": (1 << 47,), "typestr": "|u1", "data": (_PAGE, False), "version": 3}


_BYTES = np.asarray(_AddressSpace())


class Memory:
    """Bytes with an index for each, and granules with another."""

    name: str

    def __init__(self, data: np.ndarray, granule: int, num_granules: int) -> None:
        self.views = {width: data.view(TYPES[8 * width]) for width in (1, 2, 4, 8)}
        self.granule = granule
        # 0 is never, and nobody: pages that are not touched cost nothing
        self.wrote_epoch, self.wrote_warp, self.wrote_at = (np.zeros(num_granules, np.int32) for _ in range(3))
        self.read_epoch, self.read_cta, self.read_at = (np.zeros(num_granules, np.int32) for _ in range(3))
        self.read_warps = np.zeros(num_granules, np.uint32)

    def locate(self, m: Machine, lanes: np.ndarray, addresses: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the index of the first byte and of the first granule; a fault where there is none."""
        raise NotImplementedError("each memory has its own")

    def load(self, m: Machine, lanes: np.ndarray, addresses: np.ndarray, width: int, count: int) -> list[np.ndarray]:
        """Return ``count`` values of ``width`` bytes for each lane."""
        at, granules = self._find(m, lanes, addresses, width * count)
        self._read(m, *self._spread(granules, lanes, width * count))
        return [self.views[width][at // width + place] for place in range(count)]

    def store(self, m: Machine, lanes: np.ndarray, addresses: np.ndarray, values: list[np.ndarray]) -> None:
        """Write the values of each lane next to each other."""
        width = values[0].itemsize
        values = [np.broadcast_to(each, lanes.shape) for each in values]
        at, granules = self._find(m, lanes, addresses, width * len(values))
        at, view = at // width, self.views[width]
        changed = np.zeros(lanes.shape, bool)
        for place, value in enumerate(values):
            changed |= view[at + place] != value
        granules, of_lanes = self._spread(granules, lanes, width * len(values))
        self._write(m, granules, of_lanes, np.repeat(changed, granules.size // lanes.size))
        for place, value in enumerate(values):
            view[at + place] = value
        kept = np.all([view[at + place] == value for place, value in enumerate(values)], axis=0)
        m.check(kept, lanes, f"stores to {self.name} memory where another lane stores a different value")

    def add(self, m: Machine, lanes: np.ndarray, addresses: np.ndarray, values: np.ndarray) -> None:
        """Add to each address, atomically."""
        width = values.itemsize
        at, granules = self._find(m, lanes, addresses, width)
        granules, of_lanes = self._spread(granules, lanes, width)
        atomic = (self.wrote_at[granules] == m.now) & (self.wrote_epoch[granules] == m.epoch)
        self._write(m, granules, of_lanes, ~atomic)
        np.add.at(self.views[width], at // width, values)

    def _find(self, m: Machine, lanes: np.ndarray, addresses: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
        m.check(addresses % size == 0, lanes, f"accesses {size} bytes of {self.name} memory at a misaligned address")
        return self.locate(m, lanes, addresses, size)

    def _spread(self, granules: np.ndarray, lanes: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
        """Return every granule of an access, and the lane of each."""
        count = size // self.granule
        if count == 1:
            return granules, lanes
        return (granules[:, None] + np.arange(count)).reshape(-1), np.repeat(lanes, count)

    def _read(self, m: Machine, granules: np.ndarray, lanes: np.ndarray) -> None:
        """Check reads against earlier writes, and remember them."""
        warp, cta = m.warp[lanes], m.cta[lanes]
        then, writer = self.wrote_epoch[granules], self.wrote_warp[granules]
        safe = (then == 0) | (writer == warp) | ((then != m.epoch) & (writer // m.warps == cta))
        took_part = self.read_warps[granules] >> (writer % m.warps).astype(np.uint32) & 1 != 0
        replica = (self.read_epoch[granules] == m.epoch) & (self.read_at[granules] == m.now) & took_part
        safe |= replica & (writer // m.warps == cta)
        m.check(safe, lanes, f"reads {self.name} memory that another warp writes", self.wrote_at[granules])
        fresh = granules[self.read_epoch[granules] != m.epoch]
        self.read_epoch[fresh], self.read_warps[fresh], self.read_at[fresh] = m.epoch, 0, m.now
        self.read_at[granules[self.read_at[granules] != m.now]] = _SEVERAL
        np.bitwise_or.at(self.read_warps, granules, m.bit[lanes])
        reader = self.read_cta[granules]
        self.read_cta[granules] = np.where((reader == 0) | (reader == cta + 1), cta + 1, _SEVERAL)
        self.read_cta[granules[self.read_cta[granules] != cta + 1]] = _SEVERAL

    def _write(self, m: Machine, granules: np.ndarray, lanes: np.ndarray, changed: np.ndarray) -> None:
        """Check writes against earlier reads and writes, and remember them."""
        warp, cta, bit = m.warp[lanes], m.cta[lanes], m.bit[lanes]
        then, writer = self.wrote_epoch[granules], self.wrote_warp[granules]
        safe = ~changed | (then == 0) | (writer == warp) | ((then != m.epoch) & (writer // m.warps == cta))
        m.check(safe, lanes, f"writes {self.name} memory that another warp writes", self.wrote_at[granules])
        reader, at, warps = self.read_cta[granules], self.read_at[granules], self.read_warps[granules]
        replicas = (at != _SEVERAL) & ((warps & bit) != 0)
        alone = (self.read_epoch[granules] != m.epoch) | ((warps & ~bit) == 0) | replicas
        safe = ~changed | (reader == 0) | ((reader == cta + 1) & alone)
        m.check(safe, lanes, f"writes {self.name} memory that another warp reads", at)
        self.wrote_epoch[granules], self.wrote_warp[granules], self.wrote_at[granules] = m.epoch, warp, m.now


class Global(Memory):
    """The process's memory, as far as a tensor on the CPU owns it."""

    name = "global"

    def __init__(self, granule: int) -> None:
        self.starts, self.stops = _bounds()
        self.floors = self.starts // 16 * 16
        sizes = (self.stops - self.floors) // granule + 1
        self.first = np.cumsum(sizes) - sizes
        super().__init__(_BYTES, granule, int(sizes.sum()))

    def locate(self, m: Machine, lanes: np.ndarray, addresses: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
        addresses = addresses.astype(np.int64)
        tensor = np.searchsorted(self.starts, addresses, "right") - 1
        inside = addresses + size <= self.stops[tensor]
        m.check(inside, lanes, f"accesses {size} bytes of global memory outside the tensors")
        granules = self.first[tensor] + (addresses - self.floors[tensor]) // self.granule
        return addresses - _PAGE, granules


class Shared(Memory):
    """The shared memory of CTAs side by side."""

    name = "shared"

    def __init__(self, granule: int, size: int, num_ctas: int) -> None:
        self.used, self.size = size, -(-size // 16) * 16
        super().__init__(np.full(self.size * num_ctas, 0xFF, np.uint8), granule, self.size * num_ctas // granule)

    def locate(self, m: Machine, lanes: np.ndarray, addresses: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
        addresses = addresses.astype(np.int64)
        m.check(addresses + size <= self.used, lanes, f"accesses {size} bytes outside the shared memory")
        at = addresses + self.size * (m.cta[lanes] - m.cta[0])
        return at, at // self.granule


def narrowest(program: Program, space: str) -> int:
    """Return the bytes of a program's narrowest access to a space."""
    sizes = [16]
    for each in program.instructions:
        if each.opcode[0] in ("ld", "st", "atom") and space in each.opcode:
            count = next((int(part[1]) for part in each.opcode if part in ("v2", "v4")), 1)
            sizes.append(int(each.opcode[-1][1:]) // 8 * count)
        elif each.opcode[0] == "cp" and space in each.opcode:
            sizes.append(int(each.operands[2], 0))
        elif each.opcode[:2] == ["wgmma", "mma_async"] and space == "shared":
            sizes.append(2)
    return min(sizes)


#: Where storages start whose address somebody asked for: themselves, and where they stop.
_storages: dict[int, tuple[StorageWeakRef, int]] = {}
_data_ptr = torch.Tensor.data_ptr


def remember_addresses() -> None:
    """Have ``Tensor.data_ptr()`` note the storage, which kernels may then access: also through tables of addresses."""

    def data_ptr(self: torch.Tensor) -> int:
        address = _data_ptr(self)
        if address and self.device.type == "cpu":
            storage = self.untyped_storage()
            _storages[storage.data_ptr()] = StorageWeakRef(storage), storage.data_ptr() + storage.nbytes()
        return address

    torch.Tensor.data_ptr = data_ptr


def _bounds() -> tuple[np.ndarray, np.ndarray]:
    """Return where the storages that still exist start, ascending, and stop; those that overlap are one."""
    starts, stops = [0], [0]
    for start, (storage, stop) in sorted(_storages.items()):
        if storage.expired():
            del _storages[start]
        elif start < stops[-1]:
            stops[-1] = max(stop, stops[-1])
        else:
            starts.append(start)
            stops.append(stop)
    return np.array(starts), np.array(stops)
