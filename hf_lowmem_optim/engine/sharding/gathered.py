"""Updates of sharded tensors as wholes: every method, every placement, bit for bit what one process computes.

A tensor's gradient, weights and state go to the process that owns it in this step, which takes the unchanged update;
weights and state go back to where they lie. That is one collective there and one back for each wave of tensors. For
every entry the processes send, together, its gradient once, its weight and its state twice, less the owner's own part.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from hf_lowmem_optim.engine.buckets import TensorUpdate, own_tensors
from hf_lowmem_optim.engine.method import Method
from hf_lowmem_optim.engine.sharding.layout import Split, as_bytes, as_indices, sharded_dims
from hf_lowmem_optim.engine.sharding.owners import assign_owners, waves_of
from hf_lowmem_optim.engine.sharding.paths import path_of_shape
from hf_lowmem_optim.engine.sharding.transport import Move, Team, gather, scatter
from hf_lowmem_optim.engine.state import fault_of_values

__all__ = ["GATHERED_WAVE_BYTES", "Apply", "Task", "assign", "check_loaded", "gathered_bytes", "update_wave_", "waves"]

#: Whole tensors that a process has at a time, in bytes, unless one tensor has more.
GATHERED_WAVE_BYTES = 512 << 20
Apply = Callable[[Sequence[TensorUpdate], Sequence[Sequence[TensorUpdate]]], object]


@dataclass(slots=True)
class Task:
    """A tensor that is updated as a whole, or, without weights and gradient, told that it has no gradient."""

    update: TensorUpdate
    compressed: bool
    state: dict[str, Move]
    W: Move | None = None
    g: Move | None = None

    @classmethod
    def of(cls, update: TensorUpdate, compressed: bool, *, absent: bool = False) -> Task:
        """Describe what has to be moved; who owns it is not decided yet."""
        state = {key: Move(part, 0) for key, part in own_tensors(update.state).items()}
        if absent:
            return cls(update, compressed, state)
        return cls(update, compressed, state, Move(update.param, 0), Move(update.grad, 0))

    @property
    def back(self) -> list[Move]:
        """What changes."""
        return [*self.state.values(), *([] if self.W is None else [self.W])]

    @property
    def moves(self) -> list[Move]:
        """All of it."""
        return [*self.back, *([] if self.g is None else [self.g])]

    @property
    def owner(self) -> int:
        """The process that has the whole."""
        return self.moves[0].owner

    @property
    def nbytes(self) -> int:
        """Bytes of the whole."""
        return sum([move.tensor.numel() * move.tensor.element_size() for move in self.moves])

    def whole(self, method: Method) -> TensorUpdate:
        """Return the update of the whole, on its owner."""
        one, options = self.update, self.update.options
        specs = method.specs(one.param.shape, one.param.dtype, options)
        state = {key: as_indices(move.whole, specs[key]) for key, move in self.state.items()}  # type: ignore[arg-type]  # gathered by now
        W, g = (one.param if move is None else move.whole for move in (self.W, self.g))
        return replace(one, param=W, grad=g, state={"step": one.state["step"], **state})  # type: ignore[arg-type]  # gathered by now

    def take(self, whole: TensorUpdate) -> None:
        """Take the state of the whole after its update."""
        for key, move in self.state.items():
            move.whole = as_bytes(whole.state[key])


def gathered_bytes(method: Method, groups: Sequence[Any], num_shards: int) -> int:
    """Bound what a process has for a moment of whole tensors: these, and what it sends and receives.

    Args:
        method: The method.
        groups: The parameter groups, with ``"params"``.
        num_shards: How many processes share the parameters.
    """
    sizes, at_once = [0], False
    for group in groups:
        options: Any = method.options_of(group)
        for param in group["params"]:
            path = path_of_shape(method, options, param.shape, param.dtype, Split(num_shards))
            if path in ("gathered", "collective"):  # which has a first step
                compressed = method.compressed_state(param.shape, param.dtype, options) is not None
                at_once |= compressed and method.shared_state is not None and options.scope == "model"
                specs = method.specs(param.shape, param.dtype, options).values()
                sizes.append(2 * param.numel() * param.element_size() + sum([spec.stored_bytes for spec in specs]))
    # the process with the most has at most the largest tensor more than an equal share
    most = sum(sizes) // num_shards + max(sizes)
    return 3 * (most if at_once else min(most, GATHERED_WAVE_BYTES + max(sizes)))


def waves(tasks: Sequence[Task]) -> Iterator[tuple[Team, list[Task]]]:
    """Yield as many tensors at a time as the processes of a team may have whole together, owners assigned."""
    teams: dict[tuple[Any, tuple[int, ...]], list[Task]] = {}
    for task in tasks:
        param: Any = task.update.param
        teams.setdefault((param.device_mesh, sharded_dims(param.placements)), []).append(task)
    for (mesh, dims), of_team in teams.items():
        team = Team.of(mesh, dims)
        loads = [0] * len(team)
        for wave in waves_of([task.nbytes for task in of_team], GATHERED_WAVE_BYTES * len(team)):
            yield team, assign([of_team[index] for index in wave], loads)


def assign(tasks: list[Task], loads: list[int]) -> list[Task]:
    """Decide who owns which tensor; ``loads`` are bytes that each process has been given already."""
    for task, owner in zip(tasks, assign_owners([task.nbytes for task in tasks], loads), strict=True):
        for move in task.moves:
            move.owner = owner
    return tasks


def update_wave_(optimizer: Any, team: Team, wave: Sequence[Task], apply_: Apply) -> None:
    """Update tensors, each on its owner."""
    gather(team, [move for task in wave for move in task.moves])
    mine = [(task, task.whole(optimizer.method)) for task in wave if task.owner == team.rank]
    check_loaded(optimizer, wave, mine)
    dense: dict[int, list[TensorUpdate]] = {}
    for task, update in mine:
        if not task.compressed:
            dense.setdefault(id(update.options), []).append(update)
    apply_([update for task, update in mine if task.compressed], list(dense.values()))
    for task, update in mine:
        task.take(update)
    scatter(team, [move for task in wave for move in task.back])


def check_loaded(optimizer: Any, tasks: Sequence[Task], mine: Sequence[tuple[Task, TensorUpdate]]) -> None:
    """Check what was loaded in parts, of which none tells whether a kernel can be handed the whole."""
    if not optimizer.unchecked:
        return
    for task, whole in mine:
        shape = whole.param.shape
        fault = fault_of_values(whole.state, shape, optimizer.method, whole.options) if task.compressed else None
        if fault is not None:
            raise ValueError(f"the state that was loaded for a tensor of shape {tuple(shape)} is damaged: {fault}")
    optimizer.unchecked -= {id(task.update.state) for task in tasks}
