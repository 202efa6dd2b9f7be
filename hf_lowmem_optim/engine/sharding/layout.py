"""The state of a sharded parameter at rest: plain DTensors whose global shapes and bits are those of one process.

A compressed tensor's state is split along its longest dimension, over the processes over which its parameter is split;
AdamW's moments, and what has an entry for each of the parameter's, are split as the parameter is. So a checkpoint does
not depend on the number of processes: resharding is torch's work. int16 lies as pairs of bytes, because neither gloo
nor NCCL sends it.
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hf_lowmem_optim.spec import TensorSpec

__all__ = [
    "Split",
    "allocate_part",
    "as_bytes",
    "as_indices",
    "cut",
    "is_at_rest",
    "local_of",
    "own_part",
    "part_of_spec",
    "part_shape",
    "region",
    "sharded_dims",
    "sharding_problem",
    "specs_at_rest",
    "split_of",
]

logger = logging.getLogger(__name__)

#: torch leaves gaps in a full tensor whose rows were split unevenly, and sends them as if they were entries.
_HAS_GAPS = torch.__version__ < "2.13"

#: Slices of a tensor, one for each of its dimensions: what one process has of it.
Region = tuple[slice, ...]


def local_of(tensor: Any) -> Tensor:
    """Return this process's part of a tensor, the tensor itself if it is not sharded."""
    part: Tensor = tensor.to_local() if hasattr(tensor, "placements") else tensor
    return part


def sharded_dims(placements: Sequence[Any]) -> tuple[int, ...]:
    """Return the dimensions of a mesh over which a tensor is split."""
    return tuple([dim for dim, placement in enumerate(placements) if hasattr(placement, "dim")])


class Split(NamedTuple):
    """How a tensor is split over processes.

    Attributes:
        num_shards: Into how many parts.
        axis: The dimension along which it is cut once, as FSDP2 and tensor parallelism do; None if it is cut several
            times, or not at all.
    """

    num_shards: int
    axis: int | None = 0

    def is_even(self, shape: Sequence[int]) -> bool:
        """Return whether a tensor of a shape is cut along one dimension into equal parts, and really cut."""
        cut_once = self.axis is not None and len(shape) > self.axis and self.num_shards > 1
        return cut_once and shape[self.axis] % self.num_shards == 0  # type: ignore[index]  # it is not None


def split_of(param: Any) -> Split:
    """Return how a sharded parameter is split; all processes that share it find the same."""
    dims = sharded_dims(param.placements)
    cut_once = len(dims) == 1 and not hasattr(param.placements[dims[0]], "split_factor")
    axis = param.placements[dims[0]].dim if cut_once else None
    return Split(math.prod([param.device_mesh.size(dim) for dim in dims]), axis)


def part_shape(shape: Sequence[int], split: Split) -> tuple[int, ...]:
    """Return the shape of each part of a tensor that is split evenly."""
    assert split.axis is not None
    return tuple([n // split.num_shards if axis == split.axis else n for axis, n in enumerate(shape)])


def region(shape: Sequence[int], sizes: Sequence[int], placements: Sequence[Any], coordinate: Sequence[int]) -> Region:
    """Return what a process has of a tensor; of equal parts the last may be shorter, or empty.

    Args:
        shape: Shape of the whole.
        sizes: Sizes of the mesh.
        placements: One for each dimension of the mesh.
        coordinate: The process's place in the mesh.
    """
    starts, stops = [0] * len(shape), list(shape)
    dims = sharded_dims(placements)
    # what FSDP splits after tensor parallelism is "strided": it comes first in the mesh and last in the splitting
    for dim in sorted(dims, key=lambda dim: hasattr(placements[dim], "split_factor")):
        axis = placements[dim].dim
        start, stop = starts[axis], stops[axis]
        length = -(-(stop - start) // sizes[dim])
        starts[axis] = min(start + length * coordinate[dim], stop)
        stops[axis] = min(starts[axis] + length, stop)
    return tuple([slice(*ends) for ends in zip(starts, stops, strict=True)])


def sharding_problem(param: Any) -> str | None:
    """Return why a sharded parameter cannot be updated as a whole, as a clause; None if it can."""
    mesh, placements, local = param.device_mesh, param.placements, local_of(param)
    coordinate, sizes = mesh.get_coordinate(), tuple(mesh.shape)
    if coordinate is None:
        return "this process is not in its mesh"
    for dim, placement in enumerate(placements):
        later = [s for s, p in zip(sizes[dim + 1 :], placements[dim + 1 :], strict=True) if _splits(p, placement)]
        strided = getattr(placement, "split_factor", None)
        if placement.is_partial() or strided not in (None, math.prod(later)):
            return f"its placement is {placement}"
    ours = region(param.shape, sizes, placements, coordinate)
    if local.shape != tuple(place.stop - place.start for place in ours):
        return f"this process has {tuple(local.shape)} of it"
    if local.device.type != mesh.device_type:
        return f"it was moved to the {local.device.type}, away from its mesh on {mesh.device_type} (offloading)"
    if len(sharded_dims(placements)) > 1 and mesh.size() != torch.distributed.get_world_size():
        return "it is split along several dimensions of a mesh that does not have all processes"
    return None


def _splits(placement: Any, strided: Any) -> bool:
    """Return whether a placement splits the dimension that a strided one splits after it."""
    is_shard = hasattr(placement, "dim") and not hasattr(placement, "split_factor")
    return is_shard and placement.dim == getattr(strided, "dim", None)


def specs_at_rest(specs: Mapping[str, TensorSpec]) -> dict[str, TensorSpec]:
    """Describe the state of a sharded parameter: that of one process, int16 as pairs of bytes."""
    return {
        key: replace(spec, shape=(*spec.shape[:-1], 2 * spec.shape[-1]), dtype=torch.uint8)
        if spec.dtype == torch.int16
        else spec
        for key, spec in specs.items()
    }


def as_bytes(part: Tensor) -> Tensor:
    """Return a state tensor as it lies at rest: int16 as pairs of bytes."""
    return part.view(torch.uint8) if part.dtype == torch.int16 else part


def as_indices(part: Tensor, spec: TensorSpec) -> Tensor:
    """Return a whole state tensor as one process has it: pairs of bytes as int16, where that is its dtype."""
    is_pairs = spec.dtype == torch.int16 and part.dtype == torch.uint8 and part.is_contiguous()
    return part.view(torch.int16) if is_pairs and part.dim() and part.shape[-1] % 2 == 0 else part


def _placements_at_rest(shape: Sequence[int], param: Any, *, compressed: bool) -> tuple[Any, ...]:
    """Return how a state tensor of a sharded parameter is placed on the parameter's mesh."""
    from torch.distributed.tensor import Replicate, Shard

    if not compressed and tuple(shape) == tuple(param.shape):
        placements: tuple[Any, ...] = tuple(param.placements)
        return placements
    axis = _split_axis(shape, param.shape, split_of(param))
    split = sharded_dims(param.placements) if axis is not None else ()
    return tuple([Shard(axis or 0) if dim in split else Replicate() for dim in range(param.device_mesh.ndim)])


def _split_axis(shape: Sequence[int], of_param: Sequence[int], split: Split) -> int | None:
    """Return along which dimension a compressed tensor's state is split; None if it is too short."""
    if split.axis is not None and split.is_even(of_param):
        # an error may be that of the matrix (out, rest), and any state that of a stack of matrices
        of_rows = tuple(shape) == (of_param[0], math.prod(of_param[1:])) or (len(of_param) == 3 and len(shape) > 1)
        if tuple(shape) == tuple(of_param) or (split.axis == 0 and of_rows and shape[0] == of_param[0]):
            return split.axis
    longest = max(range(len(shape)), key=lambda axis: shape[axis], default=None)
    return longest if longest is not None and shape[longest] >= split.num_shards else None


def part_of_spec(spec: TensorSpec, shape: Sequence[int], split: Split, rank: int, *, compressed: bool) -> TensorSpec:
    """Describe what a process has of a state tensor of a parameter that is split along one dimension.

    Args:
        spec: The whole, as :func:`specs_at_rest` describes it.
        shape: Shape of the parameter.
        split: How it is split.
        rank: Which of the processes it is.
        compressed: Whether the parameter takes the compressed rule.
    """
    if not shape:
        return spec
    axis = _split_axis(spec.shape, shape, split)
    if not compressed and spec.shape == tuple(shape):
        axis = split.axis
    return spec if axis is None else spec.shard(split.num_shards, rank, axis=axis)


def allocate_part(spec: TensorSpec, param: Any, *, compressed: bool) -> Tensor:
    """Allocate this process's part of a state tensor, zeros, without a word to the others.

    Args:
        spec: The whole, as :func:`specs_at_rest` describes it.
        param: The parameter, sharded.
        compressed: Whether it takes the compressed rule.
    """
    part = own_part(spec, param, compressed=compressed)
    local = torch.zeros(part.shape, dtype=spec.dtype, device=local_of(param).device)
    return _sharded(local, spec.shape, param, compressed=compressed)


def own_part(spec: TensorSpec, param: Any, *, compressed: bool) -> TensorSpec:
    """Describe what :func:`allocate_part` allocates here."""
    ours = _part_at_rest(spec.shape, param, compressed=compressed)
    return replace(spec, shape=tuple([place.stop - place.start for place in ours]))


def cut(whole: Tensor, param: Any, *, compressed: bool) -> Tensor:
    """Return this process's part of a state tensor which every process has as a whole."""
    whole = as_bytes(whole)
    ours = whole[_part_at_rest(whole.shape, param, compressed=compressed)]
    local = ours.to(local_of(param).device).clone(memory_format=torch.contiguous_format)
    return _sharded(local, whole.shape, param, compressed=compressed)


def is_at_rest(part: Any, param: Any, *, compressed: bool) -> bool:
    """Return whether a state tensor is this process's part of what would be allocated for a parameter.

    One that was read from a file names the mesh as well, but as an object of its own: the file is that of one process,
    and its part that of the process which wrote it.
    """
    wanted = _placements_at_rest(part.shape, param, compressed=compressed)
    return part.device_mesh is param.device_mesh and tuple(part.placements) == wanted


def _part_at_rest(shape: Sequence[int], param: Any, *, compressed: bool) -> Region:
    mesh, placements = param.device_mesh, _placements_at_rest(shape, param, compressed=compressed)
    return region(shape, tuple(mesh.shape), placements, mesh.get_coordinate())


def _sharded(local: Tensor, shape: Sequence[int], param: Any, *, compressed: bool) -> Tensor:
    from torch.distributed.tensor import DTensor

    mesh, placements = param.device_mesh, _placements_at_rest(shape, param, compressed=compressed)
    cuts = [(shape[p.dim], n) for p, n in zip(placements, mesh.shape, strict=True) if getattr(p, "dim", 0)]
    if _HAS_GAPS and any(size % num_parts for size, num_parts in cuts):
        _warn_of_gaps()
    strides = torch.empty(tuple(shape), device="meta").stride()
    part: Tensor = DTensor.from_local(local, mesh, placements, run_check=False, shape=torch.Size(shape), stride=strides)
    return part


@functools.cache
def _warn_of_gaps() -> None:
    logger.warning(
        "%d processes do not divide all dimensions of the optimizer's state evenly, and torch %s scrambles such "
        "tensors when several processes load a full state dict: save sharded ones (fsdp_config state_dict_type "
        "SHARDED_STATE_DICT, or torch.distributed.checkpoint), or update torch to 2.13",
        torch.distributed.get_world_size(),
        torch.__version__,
    )
