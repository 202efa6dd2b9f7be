"""The dense rule, AdamW, with the storage of its moments and the rounding of its weights that a group asks for.

Where torch's fused kernel can work in place, it does. Elsewhere the tensors are cut into slices, so that what is
allocated for float32 copies does not grow with them; small tensors share a slice, and so a call.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from hf_lowmem_optim.compression.rounding import StochasticRounding, rounding_bytes
from hf_lowmem_optim.compression.workspace import Workspace
from hf_lowmem_optim.optimizers.adamw import adamw_update_
from hf_lowmem_optim.optimizers.adamw8bit import MAX_ENTRIES, adamw8bit_update_, operation_bytes
from hf_lowmem_optim.optimizers.pending import PendingUpdate
from hf_lowmem_optim.optimizers.side_by_side import Job, goes_side_by_side
from hf_lowmem_optim.state import StepTemporaries

__all__ = [
    "WEIGHT_ROUNDINGS",
    "WeightRounding",
    "dense_batch_temporaries",
    "dense_jobs",
    "dense_temporaries",
    "dense_update_",
    "rounds_stochastically",
]

WeightRounding = Literal["nearest", "stochastic"]
"""How an updated weight is rounded to bfloat16 or float16."""

WEIGHT_ROUNDINGS: tuple[str, ...] = get_args(WeightRounding)

_HYPER = ("lr", "betas", "eps", "weight_decay")
_MOMENTS = ("exp_avg", "exp_avg_sq")

#: Entries of a large tensor, whole cache lines, and small tensors that are one job.
_JOB_ENTRIES, _JOB_TENSORS = 1 << 20, 32


def rounds_stochastically(param: Tensor, group: Mapping[str, Any]) -> bool:
    """Whether the weights of this parameter are rounded stochastically; float32 weights are not rounded."""
    return group["weight_rounding"] == "stochastic" and param.dtype != torch.float32


def dense_temporaries(param: Tensor, group: Mapping[str, Any]) -> StepTemporaries:
    """What :func:`dense_update_` allocates for one tensor.

    Args:
        param: The parameter; its shape, dtype and device matter, the meta device stands for a GPU.
        group: Its group.

    Returns:
        Nothing where a fused kernel works in place. Else slices in float32: shared, of weight and gradient, and of
        moments that are narrower; own, what rounding one slice or bitsandbytes' operation on it takes.
    """
    eight_bit, stochastic = group["dense_state"] == "8bit", rounds_stochastically(param, group)
    entries = min(param.numel(), _slice_entries(param.device))
    own = rounding_bytes(entries, param.device) if stochastic else 0
    if eight_bit:
        dtype = torch.float32 if stochastic else param.dtype
        own = max(own, operation_bytes(entries, dtype, param.device))
    return StepTemporaries({f"dense {key}": 4 * entries for key in _copied(param, group)}, own)


def dense_batch_temporaries(params: Sequence[Tensor], group: Mapping[str, Any]) -> StepTemporaries:
    """What the slices take that several small tensors share.

    Args:
        params: The parameters of one group that take the dense rule.
        group: Their group.

    Returns:
        The shared buffers.
    """
    if group["dense_state"] == "8bit":
        return StepTemporaries()
    sizes: dict[str, int] = {}
    for param in params:
        for key in _copied(param, group):
            limit = 4 * _slice_entries(param.device)
            sizes[f"dense {key}"] = min(sizes.get(f"dense {key}", 0) + 4 * param.numel(), limit)
    return StepTemporaries(sizes)


def dense_update_(updates: Sequence[PendingUpdate], *, workspace: Workspace) -> None:
    """One AdamW step of tensors of one group, in place; the gradients are only read.

    Args:
        updates: The tensors, with states as :func:`~hf_lowmem_optim.optimizers.adamw.adamw_state` describes them.
        workspace: Temporary buffers.
    """
    group = updates[0].group
    in_place = [u for u in updates if _is_in_place(u)]
    if in_place:
        adamw_update_(
            [u.param for u in in_place],
            [u.grad for u in in_place],
            [u.state for u in in_place],
            steps=[u.state["step"] for u in in_place],
            **{key: group[key] for key in _HYPER},
        )
    flat = [_Flat.of(u) for u in updates if not _is_in_place(u)]
    if group["dense_state"] == "8bit":
        for tensor in flat:
            _update_8bit_(tensor, workspace)
    else:
        for pieces in _shared_slices(flat):
            _update_slice_(pieces, workspace)
    for tensor in flat:
        tensor.write_back_()


def dense_jobs(updates: Sequence[PendingUpdate]) -> list[Job]:
    """Cut :func:`dense_update_` of tensors of one group into jobs: on a CPU of about one size, with the same result.

    Args:
        updates: As for :func:`dense_update_`.

    Returns:
        The jobs.
    """
    small = [u for u in updates if goes_side_by_side(u.param) and u.param.numel() <= _JOB_ENTRIES]
    large = [u for u in updates if _is_in_place(u) and _has_pieces(u)]
    chosen = {id(u) for u in (*small, *large)}
    rest = [u for u in updates if id(u) not in chosen]
    together = [small[start : start + _JOB_TENSORS] for start in range(0, len(small), _JOB_TENSORS)]
    pieces = [[piece] for u in large for piece in _cut(u)]
    return [
        Job([u.param for u in some], functools.partial(_dense_update_, some))
        for some in (*together, *pieces, rest)
        if some
    ]


def _dense_update_(updates: Sequence[PendingUpdate], _: Workspace) -> None:
    # with buffers of its own, which are gone when the compressed tensors take theirs
    dense_update_(updates, workspace=Workspace())


def _has_pieces(update: PendingUpdate) -> bool:
    """Whether a tensor is a large one of a CPU that can be cut without a copy."""
    param, grad = update.param, update.grad
    plain = type(param) is Tensor and param.device.type == "cpu" and param.numel() > _JOB_ENTRIES
    return plain and param.is_contiguous() and grad.is_contiguous()


def _cut(update: PendingUpdate) -> Iterator[PendingUpdate]:
    """The same update, of one part of the tensor after the other."""
    for start in range(0, update.param.numel(), _JOB_ENTRIES):
        part = slice(start, start + _JOB_ENTRIES)
        state = {**update.state, **{key: update.state[key].view(-1)[part] for key in _MOMENTS}}
        yield replace(update, param=update.param.view(-1)[part], grad=update.grad.view(-1)[part], state=state)


def _is_in_place(update: PendingUpdate) -> bool:
    """Whether torch's AdamW takes the tensors as they are."""
    return update.group["dense_state"] != "8bit" and not _copied(update.param, update.group)


def _copied(param: Tensor, group: Mapping[str, Any]) -> list[str]:
    """What is copied to float32 in slices."""
    stochastic = rounds_stochastically(param, group)
    if stochastic and group["dense_state"] == "param":
        return ["weight", "gradient", *_MOMENTS]
    return ["weight", "gradient"] if stochastic or _is_mixed(param, group) else []


def _is_mixed(param: Tensor, group: Mapping[str, Any]) -> bool:
    """Whether the moments are float32 and the weights are not."""
    return group["dense_state"] == "fp32" and param.dtype != torch.float32


def _slice_entries(device: torch.device) -> int:
    """Entries of a slice, whole quantization blocks: what a CPU's cache holds, and few launches elsewhere."""
    return 1 << 16 if device.type == "cpu" else 1 << 21


@dataclass(frozen=True)
class _Flat:
    """A tensor as a row of entries: views where its layout has them, else copies."""

    update: PendingUpdate
    weight: Tensor
    grad: Tensor
    rounding: StochasticRounding | None

    @classmethod
    def of(cls, update: PendingUpdate) -> _Flat:
        weight, grad = (tensor.reshape(-1).contiguous() for tensor in (update.param, update.grad))
        return cls(update, weight, grad, update.rounding)

    def write_back_(self) -> None:
        param = self.update.param
        if not param.is_contiguous():
            param.copy_(self.weight.view(param.shape))


@dataclass(frozen=True)
class _Piece:
    """Some entries of a tensor."""

    tensor: _Flat
    start: int
    stop: int

    @property
    def weight(self) -> Tensor:
        return self.tensor.weight[self.start : self.stop]

    @property
    def grad(self) -> Tensor:
        return self.tensor.grad[self.start : self.stop]

    def moment(self, key: str) -> Tensor:
        whole: Tensor = self.tensor.update.state[key]
        return whole.view(-1)[self.start : self.stop]

    def write_(self, wide: Tensor) -> None:
        """Round ``wide`` to the weights."""
        if self.tensor.rounding is None:
            self.weight.copy_(wide)
        else:
            self.tensor.rounding.round_(self.weight, wide)


def _pieces(tensor: _Flat, length: int) -> Iterator[_Piece]:
    numel = tensor.weight.numel()
    for start in range(0, numel, length):
        yield _Piece(tensor, start, min(start + length, numel))


def _shared_slices(tensors: Sequence[_Flat]) -> Iterator[list[_Piece]]:
    """Cut tensors into pieces and put pieces together, as many as fit into a slice of their device."""
    by_device: dict[torch.device, list[_Flat]] = {}
    for tensor in tensors:
        by_device.setdefault(tensor.weight.device, []).append(tensor)
    for device, there in by_device.items():
        limit = _slice_entries(device)
        together: list[_Piece] = []
        room = limit
        for piece in (piece for tensor in there for piece in _pieces(tensor, limit)):
            size = piece.stop - piece.start
            if size > room:
                yield together
                together, room = [], limit
            together.append(piece)
            room -= size
        if together:
            yield together


def _update_slice_(pieces: Sequence[_Piece], workspace: Workspace) -> None:
    """Update pieces of one device in float32, with the moments that are float32 in place."""
    device = pieces[0].weight.device
    sizes = [piece.stop - piece.start for piece in pieces]

    def widen(key: str, narrow: list[Tensor]) -> list[Tensor]:
        wide = list(torch.split(workspace.take(f"dense {key}", (sum(sizes),), device), sizes))
        torch._foreach_copy_(wide, narrow)
        return wide

    weights = widen("weight", [piece.weight for piece in pieces])
    grads = widen("gradient", [piece.grad for piece in pieces])
    stored = {key: [piece.moment(key) for piece in pieces] for key in _MOMENTS}
    moments = {key: kept if kept[0].dtype == torch.float32 else widen(key, kept) for key, kept in stored.items()}
    adamw_update_(
        weights,
        grads,
        [dict(zip(_MOMENTS, pair, strict=True)) for pair in zip(*moments.values(), strict=True)],
        steps=[piece.tensor.update.state["step"] for piece in pieces],
        **{key: pieces[0].tensor.update.group[key] for key in _HYPER},
    )
    for piece, weight in zip(pieces, weights, strict=True):
        piece.write_(weight)
    for key, kept in stored.items():
        if kept is not moments[key]:
            torch._foreach_copy_(kept, moments[key])


def _update_8bit_(tensor: _Flat, workspace: Workspace) -> None:
    """Update a tensor with 8-bit moments by bitsandbytes, which takes weights of any dtype and rounds to nearest."""
    update, device = tensor.update, tensor.weight.device
    in_one_kernel = device.type != "cpu" and tensor.rounding is None
    for piece in _pieces(tensor, MAX_ENTRIES if in_one_kernel else _slice_entries(device)):
        weight, grad = piece.weight, piece.grad
        if tensor.rounding is not None:
            weight = workspace.take("dense weight", weight.shape, device).copy_(weight)
            grad = workspace.take("dense gradient", grad.shape, device).copy_(grad)
        adamw8bit_update_(
            weight,
            grad,
            update.state,
            start=piece.start,
            step=update.state["step"],
            **{key: update.group[key] for key in _HYPER},
        )
        if tensor.rounding is not None:
            piece.write_(weight)
