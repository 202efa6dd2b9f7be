"""Tensors of one shape, dtype, device, group and count: their state is stacked, and one call of an update serves them.

A parameter's state tensors are views of tensors that have all of a bucket's side by side, from their first step on.
Nothing else remembers a bucket: tensors that lie at equal distances in one storage are stacked, whoever made them.
Parameters and gradients stay where they are.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from hf_lowmem_optim.engine.options import Options
from hf_lowmem_optim.engine.rounding import StochasticRounding
from hf_lowmem_optim.spec import TensorSpec

__all__ = ["SHARED_PREFIX", "Batch", "TensorUpdate", "allocate_stacked", "batches", "most_tensors", "own_tensors"]

#: Begins the keys under which one parameter's state keeps what belongs to all parameters together.
SHARED_PREFIX = "shared_"

#: CPU instructions, and with them the rounding, may depend on an address modulo this.
_ALIGNMENT_BYTES = 64
#: Matrices of a multiple of this many float32 numbers are all aligned, one after the other.
_EVEN = 16


@dataclass(slots=True)
class TensorUpdate:
    """One tensor that this step updates.

    Attributes:
        param: The parameter, detached.
        grad: Its gradient; only read.
        state: Its state: ``"step"`` (already counted) and the tensors.
        options: Those of its group.
        step: t, 1 for the first update of this tensor.
        rounding_seed: Seed with which its weights are rounded stochastically; None if they are rounded to nearest.
    """

    param: Tensor
    grad: Tensor
    state: dict[str, Any]
    options: Options
    step: int
    rounding_seed: int | None = None

    @property
    def key(self) -> Hashable:
        """What the tensors of a bucket have in common."""
        param = self.param
        return id(self.options), param.shape, param.dtype, param.device, self.step

    def rounding(self) -> StochasticRounding | None:
        """Return the rounding of its weights in this step, from the start."""
        return None if self.rounding_seed is None else StochasticRounding(self.rounding_seed, self.param.device)


def own_tensors(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the tensors that a parameter's state has for the parameter itself."""
    return {key: value for key, value in state.items() if key != "step" and not key.startswith(SHARED_PREFIX)}


@dataclass(slots=True)
class Batch:
    """Tensors of one bucket that one call of an update serves.

    Attributes:
        updates: The tensors.
        g: Their gradients, contiguous; tensors of three and more dimensions as matrices (out, rest).
        state: Their state by key, stacked: [number of tensors, ...].
        step: t, 1 for the first update of these tensors.
        options: Those of their group.
    """

    updates: Sequence[TensorUpdate]
    g: list[Tensor]
    state: dict[str, Tensor]
    step: int
    options: Any

    @contextmanager
    def weights(self) -> Iterator[list[Tensor]]:
        """Give the weights, in the shapes of the gradients, to be updated in place.

        They are the parameters themselves where these are contiguous and rounded to nearest; else copies, which are
        written back: float32 ones to be rounded stochastically.
        """
        W = [update.param if update.rounding_seed is None else update.param.float() for update in self.updates]
        if not all(weight.is_contiguous() and weight.dim() <= 2 for weight in W):
            W = _matrices(W)
        yield W
        for update, weight in zip(self.updates, W, strict=True):
            param = update.param
            if update.rounding_seed is not None:
                StochasticRounding(update.rounding_seed, param.device).round_(param, weight.view(param.shape))
            elif not param.is_contiguous():
                param.copy_(weight.view(param.shape))
        # the caller's list would keep copies while those of the next batch are made
        W.clear()


def _matrices(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return contiguous tensors of at most two dimensions: views where there are such."""
    contiguous = [tensor if tensor.is_contiguous() else tensor.contiguous() for tensor in tensors]
    return [tensor if tensor.dim() <= 2 else tensor.view(tensor.shape[0], -1) for tensor in contiguous]


def allocate_stacked(specs: Mapping[str, TensorSpec], count: int, device: torch.device) -> list[dict[str, Tensor]]:
    """Allocate the state of equal tensors side by side, zeros.

    Args:
        specs: The state of one of them.
        count: How many there are.
        device: Where they lie.

    Returns:
        The state of each: contiguous views, aligned like tensors of their own.
    """
    states: list[dict[str, Tensor]] = [{} for _ in range(count)]
    for key, spec in specs.items():
        if spec.in_gradient:  # it will be a gradient's own buffer
            parts = [spec.allocate(device) for _ in states]
        else:
            entries = spec.stored_bytes // spec.dtype.itemsize
            padded = -(-spec.stored_bytes // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES // spec.dtype.itemsize
            whole = torch.zeros(count, padded if count > 1 else entries, dtype=spec.dtype, device=device)
            parts = [row[:entries].view(spec.shape) for row in whole.unbind()]
        for state, part in zip(states, parts, strict=True):
            state[key] = part
    return states


def batches(updates: Sequence[TensorUpdate], *, whole: bool | Literal["gpu"]) -> Iterator[Batch]:
    """Put tensors of one bucket together, as many as one call may serve.

    One after the other, so that contiguous copies of gradients do not exist all at once.

    Args:
        updates: The tensors, all with state; state that is not stacked yet is moved where that is due.
        whole: Whether a call may serve any number of tensors, because it bounds what it allocates; or "gpu": there.

    Returns:
        The batches, in the order of their first tensors.
    """
    return iter([_batch(updates)]) if len(updates) == 1 else _bucketed(updates, whole)


def _bucketed(updates: Sequence[TensorUpdate], whole: bool | Literal["gpu"]) -> Iterator[Batch]:
    buckets: dict[Hashable, list[TensorUpdate]] = {}
    for update in updates:
        buckets.setdefault(update.key, []).append(update)
    for bucket in buckets.values():
        if len(bucket) == 1:
            yield _batch(bucket)
            continue
        _stack_loose_(bucket)
        param = bucket[0].param
        any_number = whole is True or (whole == "gpu" and param.device.type != "cpu")
        if any_number and bucket[0].rounding_seed is None:
            most = len(bucket)
        else:
            most = most_tensors(param.numel(), param.device) if any_number or _rounds_alike(bucket[0]) else 1
        for run in _runs(bucket):
            for start in range(0, len(run), most):
                yield _batch(run[start : start + most])


def _rounds_alike(update: TensorUpdate) -> bool:
    """Return whether products of several tensors in one call are rounded like those of each alone.

    A GPU's need not be. A CPU's are where every matrix begins at an aligned address, the state's and those of the size
    of its smallest dimension among them; a product with a vector is another routine.
    """
    if update.param.device.type != "cpu":
        return True
    shapes = [update.param.shape, *[part.shape for part in own_tensors(update.state).values()]]
    matrices = [shape for shape in shapes if len(shape) >= 2]
    smallest = min([min(shape) for shape in matrices], default=1)
    sizes = [smallest**2, *[math.prod(shape) for shape in matrices]]
    return smallest > 1 and all(size % _EVEN == 0 for size in sizes)


def most_tensors(entries: int, device: torch.device) -> int:
    """Return how many tensors of a size one call may serve: what it allocates for them is to be bounded.

    Larger matrices gain nothing from company: their arithmetic takes far longer than the call.

    Args:
        entries: Entries of each tensor.
        device: Where they lie; the meta device counts as a GPU.
    """
    largest, together = (1 << 18, 1 << 20) if device.type == "cpu" else (1 << 22, 1 << 23)
    return max(1, together // max(1, entries)) if entries <= largest else 1


def _batch(updates: Sequence[TensorUpdate]) -> Batch:
    one = updates[0]
    keys = [key for key in one.state if key != "step" and not key.startswith(SHARED_PREFIX)]
    if len(updates) == 1:
        state = {key: one.state[key][None] for key in keys}
    else:
        state = {key: _stacked([update.state[key] for update in updates]) for key in keys}
    g = [update.grad for update in updates]
    if not all(grad.is_contiguous() and grad.dim() <= 2 for grad in g):
        g = _matrices(g)
    return Batch(updates, g, state, one.step, one.options)


def _stacked(parts: Sequence[Tensor]) -> Tensor:
    """Return tensors that lie at equal distances in one storage as one, [number of tensors, ...]."""
    first = parts[0]
    distance = parts[1].storage_offset() - first.storage_offset()
    return first.as_strided((len(parts), *first.shape), (distance, *first.stride()))


def _runs(bucket: Sequence[TensorUpdate]) -> Iterator[list[TensorUpdate]]:
    """Cut a bucket into tensors whose states lie at equal distances, one after the other."""
    run = [bucket[0]]
    for update in bucket[1:]:
        if not _continues(run, update):
            yield run
            run = []
        run.append(update)
    yield run


def _continues(run: Sequence[TensorUpdate], update: TensorUpdate) -> bool:
    """Return whether a tensor's state lies as far behind the run's last as that lies behind the one before."""
    last = run[-1]
    for key, part in own_tensors(update.state).items():
        before = last.state[key]
        distance = part.data_ptr() - before.data_ptr()
        if distance < part.nbytes or part.untyped_storage().data_ptr() != before.untyped_storage().data_ptr():
            return False
        if len(run) > 1 and distance != before.data_ptr() - run[-2].state[key].data_ptr():
            return False
    return True


def _stack_loose_(bucket: Sequence[TensorUpdate]) -> None:
    """Move states that have storages of their own, as after a load, into common ones."""
    loose = [update for update in bucket if _is_loose(update)]
    if len(loose) < 2:
        return
    for key in own_tensors(loose[0].state):
        first = loose[0].state[key]
        spec = {key: TensorSpec(tuple(first.shape), first.dtype, "")}
        for update, new in zip(loose, allocate_stacked(spec, len(loose), first.device), strict=True):
            update.state[key] = new[key].copy_(update.state[key])


def _is_loose(update: TensorUpdate) -> bool:
    """Return whether a state belongs to no stack; what is kept in a gradient's buffer never does."""
    parts = own_tensors(update.state).values()
    own = all(part.untyped_storage().nbytes() == part.nbytes for part in parts)
    return own and all(part.untyped_storage().data_ptr() != update.grad.untyped_storage().data_ptr() for part in parts)
