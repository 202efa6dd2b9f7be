"""Updates of sharded tensors as wholes: every method, every placement, bit for bit what one process computes.

A tensor's gradient, weights and state go to the process that owns it in this step, which takes the unchanged update;
weights and state go back to where they lie. That is one collective there and one back for each wave of tensors. For
every entry the processes send, together, its gradient once, its weight and its state twice, less the owner's own part.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from hf_lowmem_optim.engine.buckets import SHARED_PREFIX, TensorUpdate, batches, own_tensors
from hf_lowmem_optim.engine.coupled import SHARED_STEP, absent_members, clear_row_
from hf_lowmem_optim.engine.method import Method
from hf_lowmem_optim.engine.sharding.layout import as_bytes, as_indices, local_of, sharded_dims
from hf_lowmem_optim.engine.sharding.owners import assign_owners
from hf_lowmem_optim.engine.sharding.transport import Move, Team, gather, scatter
from hf_lowmem_optim.engine.state import fault_of_values

__all__ = ["check_system", "gathered_bytes", "update_sharded_"]

#: Whole tensors that a process has at a time, in bytes, unless one tensor has more.
_WAVE_BYTES = 512 << 20
Apply = Callable[[Sequence[TensorUpdate], Sequence[Sequence[TensorUpdate]]], None]


@dataclass(slots=True)
class _Task:
    """A tensor that is updated as a whole, or, without weights and gradient, told that it has no gradient."""

    update: TensorUpdate
    compressed: bool
    state: dict[str, Move]
    W: Move | None = None
    g: Move | None = None

    @classmethod
    def of(cls, update: TensorUpdate, compressed: bool, *, absent: bool = False) -> _Task:
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


def update_sharded_(
    optimizer: Any, updates: Sequence[tuple[TensorUpdate, bool]], system: dict[str, Any] | None, apply_: Apply
) -> None:
    """Take a step of sharded tensors.

    Args:
        optimizer: The optimizer.
        updates: The tensors, the same on all processes, and whether each takes the compressed rule.
        system: The state that has the system over all compressed tensors; None if there is none.
        apply_: Takes the updates of whole tensors: those that are compressed, and lists of those of a group that are
            not.
    """
    parts: dict[int, list[TensorUpdate]] = {}
    tasks, members = list[_Task](), list[_Task]()
    for update, compressed in updates:
        if update.grad.placements != update.param.placements:  # type: ignore[attr-defined]  # a DTensor
            grad = update.grad.redistribute(placements=update.param.placements)  # type: ignore[attr-defined]  # a DTensor
            update = replace(update, grad=grad)
        if not compressed and update.options.dense_state != "8bit" and update.rounding_seed is None:
            parts.setdefault(id(update.options), []).append(_part(update))
        else:
            (members if compressed and system is not None else tasks).append(_Task.of(update, compressed))
    if parts:
        apply_([], list(parts.values()))
    for team, wave in _waves(tasks):
        _update_wave_(optimizer, team, wave, apply_)
    if members:
        assert system is not None
        _system_step_(optimizer, members, system)


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
            compressed = method.compressed_state(param.shape, param.dtype, options) is not None
            at_once |= compressed and method.shared_state is not None and options.scope == "model"
            rounded = options.weight_rounding == "stochastic" and param.dtype != torch.float32
            if compressed or rounded or options.dense_state == "8bit":
                specs = method.specs(param.shape, param.dtype, options).values()
                sizes.append(2 * param.numel() * param.element_size() + sum([spec.stored_bytes for spec in specs]))
    # the process with the most has at most the largest tensor more than an equal share
    most = sum(sizes) // num_shards + max(sizes)
    return 3 * (most if at_once else min(most, _WAVE_BYTES + max(sizes)))


def _part(update: TensorUpdate) -> TensorUpdate:
    """Return the update of this process's part alone, for a rule that goes entry by entry."""
    state = {key: local_of(value) if isinstance(value, Tensor) else value for key, value in update.state.items()}
    return replace(update, param=local_of(update.param), grad=local_of(update.grad), state=state)


def _waves(tasks: Sequence[_Task]) -> Iterator[tuple[Team, list[_Task]]]:
    """Yield as many tensors at a time as the processes of a team may have whole together, owners assigned."""
    teams: dict[tuple[Any, tuple[int, ...]], list[_Task]] = {}
    for task in tasks:
        param: Any = task.update.param
        teams.setdefault((param.device_mesh, sharded_dims(param.placements)), []).append(task)
    for (mesh, dims), of_team in teams.items():
        team = Team.of(mesh, dims)
        loads, wave, nbytes = [0] * len(team), list[_Task](), 0
        for task in of_team:
            nbytes += task.nbytes
            if wave and nbytes > _WAVE_BYTES * len(team):
                yield team, _owned(wave, loads)
                wave, nbytes = [], task.nbytes
            wave.append(task)
        yield team, _owned(wave, loads)


def _owned(tasks: list[_Task], loads: list[int]) -> list[_Task]:
    for task, owner in zip(tasks, assign_owners([task.nbytes for task in tasks], loads), strict=True):
        for move in task.moves:
            move.owner = owner
    return tasks


def _mine(tasks: Sequence[_Task], team: Team) -> list[_Task]:
    return [task for task in tasks if task.moves[0].owner == team.rank]


def _update_wave_(optimizer: Any, team: Team, wave: Sequence[_Task], apply_: Apply) -> None:
    """Update tensors, each on its owner."""
    gather(team, [move for task in wave for move in task.moves])
    mine = [(task, task.whole(optimizer.method)) for task in _mine(wave, team)]
    _check_loaded(optimizer, wave, mine)
    dense: dict[int, list[TensorUpdate]] = {}
    for task, update in mine:
        if not task.compressed:
            dense.setdefault(id(update.options), []).append(update)
    apply_([update for task, update in mine if task.compressed], list(dense.values()))
    for task, update in mine:
        task.take(update)
    scatter(team, [move for task in wave for move in task.back])


def _check_loaded(optimizer: Any, tasks: Sequence[_Task], mine: Sequence[tuple[_Task, TensorUpdate]]) -> None:
    """Check what was loaded in parts, of which none tells whether a kernel can be handed the whole."""
    if not optimizer.unchecked:
        return
    for task, whole in mine:
        shape = whole.param.shape
        fault = fault_of_values(whole.state, shape, optimizer.method, whole.options) if task.compressed else None
        if fault is not None:
            raise ValueError(f"the state that was loaded for a tensor of shape {tuple(shape)} is damaged: {fault}")
    optimizer.unchecked -= {id(task.update.state) for task in tasks}


def check_system(optimizer: Any) -> None:
    """Raise NotImplementedError for tensors of one system that are not sharded over the same processes."""
    method = optimizer.method
    members = [p for group in optimizer.param_groups for p in group["params"] if method.compresses(p.shape, group)]
    trained = [param for param in members if param.requires_grad]
    meshes: set[Any] = {getattr(param, "device_mesh", None) for param in trained}
    dims = {sharded_dims(getattr(param, "placements", ())) for param in trained} - {()}
    # several dimensions together need a group of all processes
    if len(meshes) > 1 or (len(dims) > 1 and meshes.pop().size() != torch.distributed.get_world_size()):
        raise NotImplementedError(
            f"{type(optimizer).__name__} with scope='model' needs all tensors of its system on the same processes, and "
            "they are sharded over different ones, or some are not sharded. Give it scope='tensor'"
        )


def _system_step_(optimizer: Any, members: list[_Task], system: dict[str, Any]) -> None:
    """Take a step of the tensors' common system: each on its owner, and what they share on every process alike."""
    method: Method = optimizer.method
    t = system[SHARED_STEP] = system[SHARED_STEP] + 1
    absent = [
        _Task.of(TensorUpdate(param, param, state, method.options_of(group), t), True, absent=True)
        for param, group, state in absent_members(optimizer, method, [task.update for task in members])
    ]
    tasks, first = [*members, *absent], members[0].update.param
    dims = {dim for task in tasks for dim in sharded_dims(task.update.param.placements)}  # type: ignore[attr-defined]  # a DTensor
    team = Team.of(first.device_mesh, sorted(dims))  # type: ignore[attr-defined]  # a DTensor
    _owned(tasks, [0] * len(team))
    gather(team, [move for task in tasks for move in task.moves])
    for task in _mine(absent, team):
        whole = task.whole(method)
        clear_row_(own_tensors(whole.state), whole.param, whole.options, method, t)
    mine = [(task, task.whole(method)) for task in _mine(members, team)]
    _check_loaded(optimizer, members, mine)
    shared = {key.removeprefix(SHARED_PREFIX): value for key, value in system.items() if key.startswith(SHARED_PREFIX)}
    table = _Table(team, members, whole=method.whole is True)
    assert method.coupled_update_ is not None
    if mine:
        rows = list(batches([update for _, update in mine], whole=method.whole))
        method.coupled_update_(rows, shared, t, table.everywhere)
    else:
        first_shared = next(value for value in shared.values() if isinstance(value, Tensor))
        table.everywhere(first_shared.new_empty(0, first_shared.shape[-1]))
    if len({task.moves[0].owner for task in members}) < len(team):  # some process has not computed it
        for key in sorted(shared.keys() - {"step"}):
            source = torch.distributed.get_global_rank(team.group, members[0].moves[0].owner)
            torch.distributed.broadcast(shared[key], source, group=team.group)
    for task, update in mine:
        task.take(update)
    scatter(team, [move for task in tasks for move in task.back])


class _Table:
    """The rows of a system's tensors, in the order in which one process would have them: sums depend on it."""

    def __init__(self, team: Team, tasks: Sequence[_Task], *, whole: bool) -> None:
        self._team = team
        rows: list[tuple[tuple[Hashable, bool], int]] = []
        for task in tasks:
            update = task.update
            stacked = update.options.is_stack(update.param.shape)
            count, shape = (len(update.param), update.param.shape[1:]) if stacked else (1, update.param.shape)
            key = (id(update.options), None if whole else shape, update.param.dtype, update.param.device, update.step)
            rows += [((key, whole and update.rounding_seed is not None), task.moves[0].owner)] * count
        places = {row: place for place, row in enumerate(_as_batches(rows, range(len(rows))))}
        mine = [row for row, (_, owner) in enumerate(rows) if owner == team.rank]
        self._count, self._mine = len(rows), [places[row] for row in _as_batches(rows, mine)]

    def everywhere(self, rows: Tensor) -> Tensor:
        """Return the rows of all tensors for those of the tensors here."""
        if len(self._team) == 1:
            return rows
        table = rows.new_zeros(self._count, rows.shape[1])
        table[self._mine] = rows
        torch.distributed.all_reduce(table, group=self._team.group)
        return table


def _as_batches(rows: Sequence[tuple[tuple[Hashable, bool], int]], some: Sequence[int]) -> list[int]:
    """Return some rows in the order in which the batches of their tensors come."""
    buckets: dict[Hashable, list[int]] = {}
    for row in some:
        buckets.setdefault(rows[row][0][0], []).append(row)
    return [row for bucket in buckets.values() for row in sorted(bucket, key=lambda row: rows[row][0][1])]
