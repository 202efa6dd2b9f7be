"""A step of the common system of sharded tensors: each on its owner or in parts, and what they share on every process.

The processes exchange a row of the system's matrix for each tensor. The shares of a tensor's parts are added up in the
order of the processes, then those of the tensors in the order in which one process has them.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from hf_lowmem_optim.engine.buckets import SHARED_PREFIX, TensorUpdate, batches, own_tensors
from hf_lowmem_optim.engine.coupled import SHARED_STEP, absent_members, clear_row_
from hf_lowmem_optim.engine.method import Method
from hf_lowmem_optim.engine.sharding.aligned import part_of_update
from hf_lowmem_optim.engine.sharding.gathered import Task, assign, check_loaded
from hf_lowmem_optim.engine.sharding.layout import local_of, sharded_dims
from hf_lowmem_optim.engine.sharding.paths import path_of
from hf_lowmem_optim.engine.sharding.transport import Team, gather, scatter

__all__ = ["check_system", "system_step_"]


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


def system_step_(optimizer: Any, members: Sequence[TensorUpdate], system: dict[str, Any]) -> None:
    """Take a step of the tensors' common system."""
    method: Method = optimizer.method
    t = system[SHARED_STEP] = system[SHARED_STEP] + 1
    absent = [
        TensorUpdate(param, param, state, options, t)
        for param, options, state in absent_members(optimizer, method, members)
    ]
    dims = sorted({dim for one in (*members, *absent) for dim in sharded_dims(one.param.placements)})  # type: ignore[attr-defined]  # a DTensor
    team = Team.of(members[0].param.device_mesh, dims)  # type: ignore[attr-defined]  # a DTensor

    def in_parts(one: TensorUpdate) -> bool:
        # replicas among the processes would count several times
        over_all = sharded_dims(one.param.placements) == tuple(dims)  # type: ignore[attr-defined]  # a DTensor
        return over_all and path_of(optimizer, one.param, one.options, one.step) == "aligned"

    parts = {i: _contiguous(part_of_update(optimizer, one)) for i, one in enumerate(members) if in_parts(one)}
    tasks = {index: Task.of(one, True) for index, one in enumerate(members) if index not in parts}
    cleared = [Task.of(one, True, absent=True) for one in absent if not in_parts(one)]
    moved = assign([*tasks.values(), *cleared], [0] * len(team))
    if moved:
        gather(team, [move for task in moved for move in task.moves])
    without = [task.whole(method) for task in cleared if task.owner == team.rank]
    for one in [*without, *[part_of_update(optimizer, one) for one in absent if in_parts(one)]]:
        clear_row_(own_tensors(one.state), one.param, one.options, method, t)
    wholes = {index: task.whole(method) for index, task in tasks.items() if task.owner == team.rank}
    check_loaded(optimizer, list(tasks.values()), [(tasks[index], whole) for index, whole in wholes.items()])
    kept = {key.removeprefix(SHARED_PREFIX): value for key, value in system.items() if key.startswith(SHARED_PREFIX)}
    shared = {key: [value] for key, value in kept.items() if isinstance(value, Tensor)}
    owners = [tasks[index].owner if index in tasks else None for index in range(len(members))]
    table = _Table(team, members, owners, whole=method.whole is True)
    assert method.coupled_update_ is not None
    here = {**parts, **wholes}
    if here:
        rows = list(batches([here[index] for index in sorted(here)], whole=method.whole))
        method.coupled_update_(rows, shared, t, table.everywhere)
    else:
        (first,) = next(iter(shared.values()))
        table.everywhere(first.new_empty(0, first.shape[-1]))
    if not parts and len(set(owners)) < len(team):  # some process has not computed it
        source = torch.distributed.get_global_rank(team.group, tasks[0].owner)
        for key in sorted(shared):
            torch.distributed.broadcast(shared[key][0], source, group=team.group)
    for index, part in parts.items():
        if (weight := local_of(members[index].param)).data_ptr() != part.param.data_ptr():
            weight.copy_(part.param)
    for index, whole in wholes.items():
        tasks[index].take(whole)
    if moved:
        scatter(team, [move for task in moved for move in task.back])


def _contiguous(part: TensorUpdate) -> TensorUpdate:
    """Return an update with contiguous weights and gradient: the order of a batch must be that of all processes."""
    return replace(part, param=part.param.contiguous(), grad=part.grad.contiguous()) if part.is_odd else part


class _Table:
    """The rows of a system's tensors, in the order in which one process would have them: sums depend on it."""

    def __init__(
        self, team: Team, members: Sequence[TensorUpdate], owners: Sequence[int | None], *, whole: bool
    ) -> None:
        self._team = team
        rows: list[tuple[tuple[Hashable, bool], int | None]] = []
        for update, owner in zip(members, owners, strict=True):
            stacked = update.options.is_stack(update.param.shape)
            count, shape = (len(update.param), update.param.shape[1:]) if stacked else (1, update.param.shape)
            key = (id(update.options), None if whole else shape, update.param.dtype, update.param.device, update.step)
            rows += [((key, whole and update.rounding_seed is not None), owner)] * count
        places = {row: place for place, row in enumerate(_as_batches(rows, range(len(rows))))}
        mine = [row for row, (_, owner) in enumerate(rows) if owner in (None, team.rank)]
        self._count, self._mine = len(rows), [places[row] for row in _as_batches(rows, mine)]

    def everywhere(self, rows: Tensor) -> Tensor:
        """Return the rows of all tensors for those of the tensors, and parts of tensors, here."""
        if len(self._team) == 1:
            return rows
        table = rows.new_zeros(self._count, rows.shape[1])
        table[self._mine] = rows
        tables = table.new_empty(len(self._team), *table.shape)
        torch.distributed.all_gather(list(tables.unbind()), table, group=self._team.group)
        total = tables[0]
        for one in tables[1:]:
            total += one
        return total


def _as_batches(rows: Sequence[tuple[tuple[Hashable, bool], int | None]], some: Sequence[int]) -> list[int]:
    """Return some rows in the order in which the batches of their tensors come."""
    buckets: dict[Hashable, list[int]] = {}
    for row in some:
        buckets.setdefault(rows[row][0][0], []).append(row)
    return [row for bucket in buckets.values() for row in sorted(bucket, key=lambda row: rows[row][0][1])]
