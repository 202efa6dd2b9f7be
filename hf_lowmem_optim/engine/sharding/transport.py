"""Moves sharded tensors to one process each and back, or to all: one collective, whatever there is to move.

Everything travels as bytes, in one buffer for each pair of processes. Every tensor starts at a multiple of 8 bytes.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_lowmem_optim.engine.sharding.layout import Region, local_of, region, sharded_dims

__all__ = ["Move", "Team", "gather", "own_slice", "put_together", "scatter"]

_ALIGNMENT_BYTES = 8


@dataclass(frozen=True)
class Team:
    """The processes over which some tensors are split.

    Attributes:
        sizes: Sizes of the tensors' mesh.
        coordinates: The places of the processes in the mesh, in the order of their ranks in the group.
        rank: Which of them this one is.
        group: Their process group; None for one process alone.
    """

    sizes: tuple[int, ...]
    coordinates: tuple[tuple[int, ...], ...]
    rank: int
    group: Any

    @classmethod
    def of(cls, mesh: Any, dims: Sequence[int]) -> Team:
        """Return the processes along some dimensions of a mesh to which this one belongs.

        Args:
            mesh: The mesh.
            dims: None, one, or several if the mesh has all processes.
        """
        own, sizes = tuple(mesh.get_coordinate()), tuple(mesh.shape)
        if not dims:
            return cls(sizes, (own,), 0, None)
        if len(dims) > 1:
            dims, group = range(mesh.ndim), torch.distributed.group.WORLD
        else:
            group = mesh.get_group(dims[0])
        along = [range(size) if dim in dims else (own[dim],) for dim, size in enumerate(sizes)]
        place_of = {int(mesh.mesh[place]): place for place in itertools.product(*along)}
        coordinates = tuple([place_of[rank] for rank in torch.distributed.get_process_group_ranks(group)])
        return cls(sizes, coordinates, coordinates.index(own), group)

    def __len__(self) -> int:
        """Return how many processes there are."""
        return len(self.coordinates)


@dataclass(slots=True)
class Move:
    """A sharded tensor, and the process that gets the whole of it.

    Attributes:
        tensor: The DTensor.
        owner: The rank of that process in the team.
        whole: The whole, on the owner while it has it.
    """

    tensor: Any
    owner: int
    whole: Tensor | None = None

    def part(self, team: Team, rank: int) -> Region:
        """Return what a process has of the tensor."""
        return region(self.tensor.shape, team.sizes, self.tensor.placements, team.coordinates[rank])

    def sends(self, team: Team, rank: int) -> bool:
        """Return whether a process's part goes to the owner: of several equal ones, that in the owner's own slice."""
        split, here, there = sharded_dims(self.tensor.placements), team.coordinates[rank], team.coordinates[self.owner]
        return all(a == b for dim, (a, b) in enumerate(zip(here, there, strict=True)) if dim not in split)


def gather(team: Team, moves: Sequence[Move]) -> None:
    """Put the wholes of tensors together, each on its owner."""
    for move in moves:
        if len(team) == 1:
            move.whole = local_of(move.tensor)
        elif move.owner == team.rank:
            move.whole = torch.empty(move.tensor.shape, dtype=move.tensor.dtype, device=local_of(move.tensor).device)
    if len(team) == 1:
        return
    ranks = range(len(team))
    outgoing = [
        [local_of(move.tensor) for move in moves if move.owner == rank and move.sends(team, team.rank)]
        for rank in ranks
    ]
    incoming = [
        [move.whole[move.part(team, rank)] for move in moves if move.whole is not None and move.sends(team, rank)]
        for rank in ranks
    ]
    _exchange(team, outgoing, incoming)


def scatter(team: Team, moves: Sequence[Move]) -> None:
    """Write the wholes of tensors back, from each owner to all processes, and let them go."""
    if len(team) == 1:
        for move in moves:
            local = local_of(move.tensor)
            if move.whole is not None and move.whole.data_ptr() != local.data_ptr():
                local.copy_(move.whole)
    else:
        ranks = range(len(team))
        outgoing = [[move.whole[move.part(team, rank)] for move in moves if move.whole is not None] for rank in ranks]
        incoming = [[local_of(move.tensor) for move in moves if move.owner == rank] for rank in ranks]
        _exchange(team, outgoing, incoming)
    for move in moves:
        move.whole = None


def own_slice(team: Team, tensor: Any, whole: Tensor) -> Tensor:
    """Return of a whole what this process has of it."""
    return whole[region(tensor.shape, team.sizes, tensor.placements, team.coordinates[team.rank])]


def put_together(team: Team, tensors: Sequence[Any]) -> list[Tensor]:
    """Return the wholes of tensors that are split along one dimension of a mesh, or copied, on every process."""
    locals_, parts = [local_of(each) for each in tensors], list[tuple[int | None, list[int]]]()
    for each in tensors:
        axis = next((placement.dim for placement in each.placements if hasattr(placement, "dim")), None)
        length = [-(-n // len(team)) if dim == axis else n for dim, n in enumerate(each.shape)]
        parts.append((axis, length))
    rooms = [_room_of(math.prod(shape) * each.element_size()) for each, (_, shape) in zip(locals_, parts, strict=True)]
    sent = torch.zeros(sum(rooms), dtype=torch.uint8, device=locals_[0].device)
    received, starts = sent.new_empty(len(team), len(sent)), [0, *itertools.accumulate(rooms)]
    for start, each, (_, shape) in zip(starts, locals_, parts, strict=False):
        # the last part may be shorter: what follows it is cut off below
        _place(sent, start, each.dtype, shape)[tuple([slice(n) for n in each.shape])] = each
    torch.distributed.all_gather(list(received.unbind()), sent, group=team.group)
    wholes = []
    for start, each, (axis, shape) in zip(starts, tensors, parts, strict=False):
        nbytes = math.prod(shape) * each.element_size()
        stacked = received[:, start : start + nbytes].view(each.dtype).view(len(team), *shape)
        joined = stacked[0] if axis is None else stacked.movedim(0, axis).flatten(axis, axis + 1)
        wholes.append(joined[tuple([slice(n) for n in each.shape])].contiguous())
    return wholes


def _exchange(team: Team, outgoing: Sequence[Sequence[Tensor]], incoming: Sequence[Sequence[Tensor]]) -> None:
    """Send tensors to each process of a team, and fill those that each sends."""
    device = next(tensor.device for tensors in (*outgoing, *incoming) for tensor in tensors)
    sizes = [[sum([_room(tensor) for tensor in tensors]) for tensors in side] for side in (outgoing, incoming)]
    sent, received = (torch.empty(sum(side), dtype=torch.uint8, device=device) for side in sizes)
    for slot, tensor in _slots(sent, outgoing):
        slot.copy_(tensor)
    torch.distributed.all_to_all_single(received, sent, sizes[1], sizes[0], group=team.group)
    del sent
    for slot, tensor in _slots(received, incoming):
        tensor.copy_(slot)


def _slots(buffer: Tensor, tensors: Sequence[Sequence[Tensor]]) -> Any:
    """Yield the places of tensors in a buffer of bytes, in their own dtype and shape, with the tensors."""
    start = 0
    for tensor in itertools.chain.from_iterable(tensors):
        if tensor.numel():
            yield _place(buffer, start, tensor.dtype, tensor.shape), tensor
        start += _room(tensor)


def _place(buffer: Tensor, start: int, dtype: torch.dtype, shape: Sequence[int]) -> Tensor:
    """Return the bytes of a buffer from one on as a tensor."""
    return buffer[start : start + math.prod(shape) * dtype.itemsize].view(dtype).view(tuple(shape))


def _room(tensor: Tensor) -> int:
    """Return the bytes that a tensor takes in a buffer."""
    return _room_of(tensor.numel() * tensor.element_size())


def _room_of(nbytes: int) -> int:
    return -(-nbytes // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES
