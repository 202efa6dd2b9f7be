"""Averages over workers that train apart for some steps: what a sync sends, and what is checked before it.

Everything here is called by all workers of a group alike. One process alone, with no group, sends nothing.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

__all__ = [
    "SyncedOptimizer",
    "average_",
    "broadcast_",
    "check_agreement",
    "check_finite",
    "fingerprint",
    "keep_gradients_local",
    "num_workers",
    "refuse_scaler",
    "warn_of_equal_gradients",
]

logger = logging.getLogger(__name__)

#: Of one collective; larger tensors take several, smaller ones share one.
BUCKET_BYTES = 25 << 20
_HALF = (torch.bfloat16, torch.float16)


@runtime_checkable
class SyncedOptimizer(Protocol):
    """An optimizer whose workers step apart, and average what they have every so many steps, in ``step()``."""

    @property
    def sync_every(self) -> int:
        """Steps after which all workers are equal again: a checkpoint of one is then that of all."""
        ...

    @property
    def steps_since_sync(self) -> int:
        """Steps since the workers were equal; 0 right after a sync."""
        ...

    @property
    def communicated_bytes(self) -> int:
        """Bytes that this worker has put into collectives so far, as :func:`average_` counts them."""
        ...

    def sync(self) -> None:
        """Make all workers equal now, also between two syncs; all workers call it after the same step."""
        ...

    def own_state(self) -> str | None:
        """Return, as a clause, what each worker has of its own also after a sync; None if all are equal then."""
        ...


def num_workers(group: Any = None) -> int:
    """Return how many processes a group has: the default one if it is None, and 1 where there is none."""
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_world_size(group) if distributed else 1


@torch.no_grad()
def average_(tensors: Sequence[Tensor], group: Any = None, *, dtype: torch.dtype | None = None) -> int:
    """Replace each tensor by its mean over all workers, equal on all of them to the bit.

    Args:
        tensors: Floating-point tensors, of the same shapes and dtypes on every worker.
        group: The workers' process group; None for the default one.
        dtype: What is sent and added up; None for the tensor's own, or float32 if that has 16 bits. The mean is rounded
            to the tensor's dtype once.

    Returns:
        The bytes that this worker put into all-reduces: entries times bytes of each as sent. A ring sends
        2·(workers − 1)/workers times as many from each.
    """
    workers, sent_bytes = num_workers(group), 0
    if workers == 1:
        return 0
    kinds: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for tensor in tensors:
        kinds.setdefault((tensor.dtype, tensor.device), []).append(tensor)
    for (own, _), alike in kinds.items():
        sent_dtype = dtype or (torch.float32 if own in _HALF else own)
        for parts in _buckets(alike, BUCKET_BYTES // sent_dtype.itemsize):
            # what would be copied into a buffer of its own is sent as it is
            in_place = len(parts) == 1 and own == sent_dtype
            buffer = parts[0] if in_place else torch.cat([part.to(sent_dtype) for part in parts])
            torch.distributed.all_reduce(buffer, group=group)
            sent_bytes += buffer.numel() * buffer.element_size()
            if own.itemsize <= sent_dtype.itemsize:
                buffer.div_(workers)
            if not in_place:
                torch._foreach_copy_(parts, torch.split(buffer, [part.numel() for part in parts]))
            if own.itemsize > sent_dtype.itemsize:
                torch._foreach_div_(parts, workers)
    return sent_bytes


@torch.no_grad()
def broadcast_(tensors: Sequence[Tensor], group: Any = None, source: int = 0) -> int:
    """Replace each tensor by that of one worker.

    Args:
        tensors: Tensors of any dtype, of the same shapes and dtypes on every worker.
        group: The workers' process group; None for the default one.
        source: The worker, by its rank in the group.

    Returns:
        The bytes of the tensors; 0 for one worker.
    """
    if num_workers(group) == 1:
        return 0
    sent_bytes, devices = 0, dict[torch.device, list[Tensor]]()
    for tensor in tensors:
        devices.setdefault(tensor.device, []).append(tensor)
    for on_device in devices.values():
        for parts in _buckets(on_device, BUCKET_BYTES, as_bytes=True):
            buffer = parts[0] if len(parts) == 1 else torch.cat(parts)
            torch.distributed.broadcast(buffer, _ranks(group)[source], group=group)
            sent_bytes += buffer.numel()
            if len(parts) > 1:
                torch._foreach_copy_(parts, torch.split(buffer, [part.numel() for part in parts]))
    return sent_bytes


def check_agreement(description: str, group: Any = None) -> None:
    """Raise ValueError, on all workers, if they are not set up alike.

    Args:
        description: What must be equal on all workers, in lines: options, and shape and dtype of each tensor.
        group: The workers' process group; None for the default one.
    """
    if num_workers(group) == 1:
        return
    hashes = _gather_hashes(description.encode(), group)
    if len(set(hashes)) == 1:
        return
    descriptions: list[Any] = [None] * len(hashes)
    torch.distributed.all_gather_object(descriptions, description, group=group)
    ranks, first = _ranks(group), descriptions[0].splitlines()
    differ = [place for place, each in enumerate(hashes) if each != hashes[0]]
    other = descriptions[differ[0]].splitlines()
    lines = next((pair for pair in zip(first, other, strict=False) if pair[0] != pair[1]), None)
    has, lacks = lines if lines is not None else (f"{len(first)} lines", f"{len(other)} lines")
    raise ValueError(
        f"the workers are not set up alike: rank {', '.join(str(ranks[place]) for place in differ)} differ from rank "
        f"{ranks[0]}, which has {has!r} where rank {ranks[differ[0]]} has {lacks!r}. Give every worker the same model "
        "and options"
    )


def check_finite(tensors: Sequence[Tensor], names: Sequence[str], group: Any = None) -> None:
    """Raise RuntimeError, on all workers, if one of them has NaN or infinity in a tensor: before it spreads.

    Args:
        tensors: What is about to be averaged, in the same order on every worker.
        names: What the message calls each.
        group: The workers' process group; None for the default one.
    """
    if num_workers(group) == 1:
        return
    found = torch.tensor([_first_not_finite(tensors)], device=_device(group))
    places = [torch.empty_like(found) for _ in range(num_workers(group))]
    torch.distributed.all_gather(places, found, group=group)
    faults = [
        f"rank {rank} has NaN or infinity in {names[int(place)]!r}"
        for rank, place in zip(_ranks(group), places, strict=True)
        if place >= 0
    ]
    if faults:
        raise RuntimeError(
            f"{' and '.join(faults)}: nothing was averaged, so the other workers' weights are as they were. Go back to "
            "the last checkpoint with a lower learning rate, clipped gradients, or without the data that did it"
        )


def warn_of_equal_gradients(gradients: Sequence[Tensor], group: Any = None) -> None:
    """Warn if all workers have the same gradients, other than zero: then somebody has averaged them.

    Args:
        gradients: Of any parameters, in the same order on every worker.
        group: The workers' process group; None for the default one.
    """
    if num_workers(group) == 1:
        return
    # equal to everybody's is not enough for what says nothing
    told = [fingerprint(each) for each in gradients] if any(bool(each.any()) for each in gradients) else None
    hashes = _gather_hashes(None if told is None else repr(told).encode(), group)
    if hashes[0] != 0 and len(set(hashes)) == 1:
        logger.warning(
            "all workers have the same gradients: either they have the same data, or DistributedDataParallel "
            "averages gradients at every step. In a Trainer add LocalUpdatesCallback(trainer), in a loop of your "
            "own call keep_gradients_local(ddp_model)"
        )


def fingerprint(tensor: Tensor) -> int:
    """Return the sum of a tensor's bits as integers: of equal tensors the same on any device, unlike a norm."""
    integers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    return int(tensor.detach().reshape(-1).view(integers).sum(dtype=torch.int64))


def refuse_scaler(group: Any = None) -> None:
    """Raise RuntimeError if there are several workers: a gradient scaler asked for a step.

    Args:
        group: The workers' process group; None for the default one.
    """
    if num_workers(group) > 1:
        raise RuntimeError(
            "a gradient scaler skips a worker's step where its gradients overflow, and the worker falls out of "
            "step with the others. Train in bfloat16 or float32"
        )


def keep_gradients_local(model: nn.Module) -> None:
    """Have DistributedDataParallel leave each worker its own gradients: once, before the first backward pass.

    Args:
        model: ``DistributedDataParallel(module, broadcast_buffers=False)``, also as ``torch.compile`` returned it.

    Raises:
        TypeError: It is another module.
        ValueError: It was built to communicate at every step: with ``broadcast_buffers=True`` (the default), or with
            ``find_unused_parameters=True``.
    """
    from torch.distributed.algorithms.ddp_comm_hooks.debugging_hooks import noop_hook

    ddp: Any = getattr(model, "_orig_mod", model)
    if not isinstance(ddp, nn.parallel.DistributedDataParallel):
        raise TypeError(f"keep_gradients_local takes DistributedDataParallel(module), not {type(ddp).__name__}")
    if ddp.broadcast_buffers:
        raise ValueError(
            "DistributedDataParallel sends buffers at every step: build it with broadcast_buffers=False, or with "
            "forward_sync_buffers=False where torch has that"
        )
    if ddp.find_unused_parameters:
        raise ValueError(
            "DistributedDataParallel with find_unused_parameters=True communicates at every step, and lets a parameter "
            "have a gradient on one worker only: build it with find_unused_parameters=False"
        )
    ddp.register_comm_hook(None, noop_hook)


def _first_not_finite(tensors: Sequence[Tensor]) -> int:
    """Return the place of the first tensor that has NaN or infinity; -1 if none has."""
    extremes: dict[torch.device, list[tuple[int, Tensor]]] = {}
    for place, tensor in enumerate(tensors):
        if tensor.numel():
            low, high = torch.aminmax(tensor.detach())
            extremes.setdefault(tensor.device, []).append((place, torch.stack([low, high]).double()))
    wrong = []
    for pairs in extremes.values():
        finite = torch.stack([pair for _, pair in pairs]).isfinite().all(1).tolist()
        wrong += [place for (place, _), fine in zip(pairs, finite, strict=True) if not fine]
    return min(wrong, default=-1)


def _buckets(tensors: Sequence[Tensor], max_entries: int, *, as_bytes: bool = False) -> Iterator[list[Tensor]]:
    """Yield flat parts of tensors, together all of them, in lists of at most so many entries.

    What does not lie in one piece in memory is copied, and copied back when its parts have been used.
    """
    bucket, room, copies = list[Tensor](), max_entries, list[tuple[Tensor, Tensor]]()
    for tensor in tensors:
        whole = tensor.detach().contiguous()
        if whole.data_ptr() != tensor.data_ptr():
            copies.append((tensor, whole))
        rest = whole.view(-1).view(torch.uint8) if as_bytes else whole.view(-1)
        while rest.numel():
            bucket.append(rest[:room])
            rest, room = rest[room:], room - bucket[-1].numel()
            if not room:
                yield bucket
                bucket, room = [], max_entries
    if bucket:
        yield bucket
    for tensor, whole in copies:
        tensor.copy_(whole)


def _gather_hashes(text: bytes | None, group: Any) -> list[int]:
    """Return every worker's hash of its text, in the order of the ranks; 0 for None."""
    digest = 0 if text is None else int.from_bytes(hashlib.blake2b(text, digest_size=7).digest(), "big")
    own = torch.tensor([digest], device=_device(group))
    hashes = [torch.empty_like(own) for _ in range(num_workers(group))]
    torch.distributed.all_gather(hashes, own, group=group)
    return [int(each) for each in hashes]


def _device(group: Any) -> str:
    """Return where a group's own small tensors are: gloo takes them from the CPU, NCCL from its GPU."""
    return "cuda" if torch.distributed.get_backend(group) == "nccl" else "cpu"


def _ranks(group: Any) -> list[int]:
    """Return the global ranks of a group's processes."""
    ranks: list[int] = torch.distributed.get_process_group_ranks(group or torch.distributed.group.WORLD)
    return ranks
