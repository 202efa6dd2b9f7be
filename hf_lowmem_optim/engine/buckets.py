"""Tensors of one shape, dtype, device, group and count: their state is stacked, and one call of an update serves them.

A method that treats one tensor after the other in a call takes tensors of any shapes together, unstacked. A
parameter's state tensors are views of tensors that have all of a bucket's side by side, from their first step on.
Nothing else remembers a bucket: tensors that lie at equal distances in one storage are stacked, whoever made them.
Parameters and gradients stay where they are.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from hf_lowmem_optim.engine.options import Options
from hf_lowmem_optim.engine.rounding import StochasticRounding, seed_of_part
from hf_lowmem_optim.ops.weight_correction import CORRECTION, join_weights, split_weights_
from hf_lowmem_optim.spec import TensorSpec

__all__ = [
    "SHARED_PREFIX",
    "Batch",
    "Part",
    "TensorUpdate",
    "allocate_stacked",
    "arrange",
    "batches",
    "most_entries",
    "most_tensors",
    "own_tensors",
    "split_stacks",
    "split_state",
]

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
        place: Its place among all parameters of the optimizer.
        corrected: Whether the update takes weights with corrections as they are: see :attr:`Method.corrected`.
    """

    param: Tensor
    grad: Tensor
    state: dict[str, Any]
    options: Options
    step: int
    rounding_seed: int | None = None
    place: int = 0
    corrected: bool = False

    def key(self, *, whole: bool) -> Hashable:
        """Return what the tensors of a bucket have in common."""
        param = self.param
        return id(self.options), None if whole else param.shape, param.dtype, param.device, self.step

    @property
    def is_widened(self) -> bool:
        """Whether a step needs float32 copies of its weights, to round them otherwise than to nearest."""
        return self.rounding_seed is not None or (CORRECTION in self.state and not self.corrected)

    @property
    def is_odd(self) -> bool:
        """Whether its parameter or its gradient is not contiguous."""
        return not (self.param.is_contiguous() and self.grad.is_contiguous())

    @property
    def is_copied(self) -> bool:
        """Whether a step needs a copy of its weights or of its gradient."""
        return self.is_widened or self.is_odd

    def rounding(self) -> StochasticRounding | None:
        """Return the stochastic rounding of its weights in this step, from the start."""
        return None if self.rounding_seed is None else StochasticRounding(self.rounding_seed, self.param.device)


def own_tensors(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the tensors that a parameter's state has for the parameter itself."""
    return {key: value for key, value in state.items() if key != "step" and not key.startswith(SHARED_PREFIX)}


def split_state(state: Mapping[str, Any]) -> list[dict[str, Tensor]]:
    """Return the state of each matrix of a stack: views of the stack's."""
    tensors = own_tensors(state)
    return [dict(zip(tensors, parts, strict=True)) for parts in zip(*tensors.values(), strict=True)]


def split_stacks(updates: Sequence[TensorUpdate]) -> Sequence[TensorUpdate]:
    """Replace stacks of matrices by their matrices, which are updated as tensors of their own."""
    if not any(update.options.stacked for update in updates):
        return updates
    matrices: list[TensorUpdate] = []
    for update in updates:
        if not update.options.is_stack(update.param.shape):
            matrices.append(update)
            continue
        for index, parts in enumerate(zip(update.param, update.grad, split_state(update.state), strict=True)):
            seed = None if update.rounding_seed is None else seed_of_part(update.rounding_seed, index)
            corrected = update.corrected
            matrices.append(TensorUpdate(*parts, update.options, update.step, seed, corrected=corrected))
    return matrices


@dataclass(slots=True)
class Part:
    """Which tensors of a step one call of an update serves.

    Attributes:
        which: Their places in the step's list.
        memo: Where operations note what they found out about the tensors' state; numbers, and no tensors.
    """

    which: list[int]
    memo: dict[str, Any] = field(default_factory=dict)


@dataclass(slots=True)
class Batch:
    """Tensors of one bucket that one call of an update serves.

    Attributes:
        updates: The tensors.
        g: Their gradients, contiguous; tensors of three and more dimensions as matrices (out, rest).
        state: Their state by key: stacked, [number of tensors, ...]; or each tensor's own, for a method that is
            ``whole``, with ``"memo"``. And ``"places"``. Corrections are there only if the update is to write them.
        step: t, 1 for the first update of these tensors.
        options: Those of their group.
    """

    updates: Sequence[TensorUpdate]
    g: list[Tensor]
    state: dict[str, Any]
    step: int
    options: Any

    @contextmanager
    def weights(self) -> Iterator[list[Tensor]]:
        """Give the weights, in the shapes of the gradients, to be updated in place.

        They are the parameters themselves where these are contiguous and rounded to nearest; else copies, which are
        written back: float32 ones to be rounded otherwise, unless the update writes corrections itself.
        """
        params = [update.param for update in self.updates]
        # all alike: of one group and dtype
        joins = CORRECTION in self.updates[0].state and self.updates[0].is_widened
        corrections = [update.state[CORRECTION] for update in self.updates] if joins else []
        if corrections:
            W = join_weights(params, corrections)
        else:
            W = [update.param if update.rounding_seed is None else update.param.float() for update in self.updates]
        if not all(weight.is_contiguous() and weight.dim() <= 2 for weight in W):
            W = _matrices(W)
        yield W
        if corrections:
            split_weights_(params, corrections, W)
        else:
            for update, param, weight in zip(self.updates, params, W, strict=True):
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


def arrange(updates: Sequence[TensorUpdate], *, whole: bool | Literal["gpu"]) -> list[Part]:
    """Put tensors of one bucket together, as many as one call may serve.

    Args:
        updates: The tensors, all with state; state that is not stacked yet is moved where that is due.
        whole: Whether a call serves any number of tensors of any shapes, because it allocates nothing of their size; or
            ``"gpu"``: any number of one shape, there.

    Returns:
        The parts of the list, in the order of their first tensors.
    """
    if len(updates) == 1:
        return [Part([0])]
    place_of = {id(update): place for place, update in enumerate(updates)}
    return [Part([place_of[id(update)] for update in bucket]) for bucket in _bucketed(updates, whole)]


def batches(
    updates: Sequence[TensorUpdate], *, whole: bool | Literal["gpu"], parts: Sequence[Part] | None = None
) -> Iterator[Batch]:
    """Return what each call of an update serves.

    One after the other, so that contiguous copies of gradients do not exist all at once.

    Args:
        updates: The tensors, all with state.
        whole: As for :func:`arrange`.
        parts: What :func:`arrange` returned for them, stacks having been replaced by their matrices.
    """
    if parts is None:
        updates = split_stacks(updates)
        parts = arrange(updates, whole=whole)
    for part in parts:
        yield _batch([updates[place] for place in part.which], part.memo, whole=whole is True)


def _bucketed(updates: Sequence[TensorUpdate], whole: bool | Literal["gpu"]) -> Iterator[Sequence[TensorUpdate]]:
    buckets: dict[Hashable, list[TensorUpdate]] = {}
    for update in updates:
        buckets.setdefault(update.key(whole=whole is True), []).append(update)
    for bucket in buckets.values():
        if whole is True:
            copied = [update for update in bucket if update.is_copied]
            in_place = [update for update in bucket if not update.is_copied] if copied else bucket
            yield from (part for part in (in_place, *_bounded(copied)) if part)
        elif len(bucket) == 1:
            yield bucket
        else:
            stacked = _is_stacked(bucket)
            if not stacked:
                _stack_loose_(bucket)
            param = bucket[0].param
            if whole == "gpu" and param.device.type != "cpu" and not bucket[0].is_widened:
                most = len(bucket)
            else:
                most = most_tensors(param.numel(), param.device) if _rounds_alike(bucket[0]) else 1
            for run in [bucket] if stacked else _runs(bucket):
                for start in range(0, len(run), most):
                    yield run[start : start + most]


def _bounded(updates: Iterable[TensorUpdate]) -> Iterator[list[TensorUpdate]]:
    """Cut tensors into runs of so few entries that a copy of each may exist at a time."""
    run: list[TensorUpdate] = []
    entries = 0
    for update in updates:
        entries += update.param.numel()
        if run and entries > most_entries(update.param.device):
            yield run
            run, entries = [], update.param.numel()
        run.append(update)
    yield run


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
    largest = 1 << 18 if device.type == "cpu" else 1 << 22
    return max(1, most_entries(device) // max(1, entries)) if entries <= largest else 1


def most_entries(device: torch.device) -> int:
    """Return how many entries together one call may make copies of, unless one tensor has more."""
    return 1 << 20 if device.type == "cpu" else 1 << 23


def _batch(updates: Sequence[TensorUpdate], memo: dict[str, Any], *, whole: bool) -> Batch:
    one = updates[0]
    hidden = ("step",) if one.corrected else ("step", CORRECTION)
    keys = [key for key in one.state if key not in hidden and not key.startswith(SHARED_PREFIX)]
    state: dict[str, Any]
    if whole:
        state = {key: [update.state[key] for update in updates] for key in keys}
    elif len(updates) == 1:
        state = {key: one.state[key][None] for key in keys}
    else:
        state = {key: _stacked([update.state[key] for update in updates]) for key in keys}
    state["places"] = [update.place for update in updates]
    if whole:
        state["memo"] = memo
    g = [update.grad for update in updates]
    if not all(grad.is_contiguous() and grad.dim() <= 2 for grad in g):
        g = _matrices(g)
    return Batch(updates, g, state, one.step, one.options)


def _stacked(parts: Sequence[Tensor]) -> Tensor:
    """Return tensors that lie at equal distances in one storage as one, [number of tensors, ...]."""
    first = parts[0]
    distance = parts[1].storage_offset() - first.storage_offset()
    return first.as_strided((len(parts), *first.shape), (distance, *first.stride()))


def _is_stacked(bucket: Sequence[TensorUpdate]) -> bool:
    """Return whether the states of all tensors lie at equal distances: cheap, as every step asks it."""
    for key, first in own_tensors(bucket[0].state).items():
        places = [update.state[key].data_ptr() for update in bucket]
        distances, storage = {b - a for a, b in itertools.pairwise(places)}, first.untyped_storage()
        inside = places[-1] + first.nbytes <= storage.data_ptr() + storage.nbytes()
        if len(distances) > 1 or min(distances) < first.nbytes or not inside:
            return False
    return True


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
    if "step" not in update.state:  # that of a parameter's one matrix
        return False
    parts = own_tensors(update.state).values()
    own = all(part.untyped_storage().nbytes() == part.nbytes for part in parts)
    return own and all(part.untyped_storage().data_ptr() != update.grad.untyped_storage().data_ptr() for part in parts)
