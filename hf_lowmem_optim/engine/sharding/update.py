"""A step of sharded tensors: each takes the path that ``paths.py`` chooses for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from hf_lowmem_optim.engine.buckets import TensorUpdate
from hf_lowmem_optim.engine.sharding.aligned import part_of_update
from hf_lowmem_optim.engine.sharding.collective import update_in_stages_
from hf_lowmem_optim.engine.sharding.gathered import Apply, Task, update_wave_, waves
from hf_lowmem_optim.engine.sharding.paths import path_of
from hf_lowmem_optim.engine.sharding.system import system_step_

__all__ = ["update_sharded_"]


def update_sharded_(
    optimizer: Any, updates: Sequence[tuple[TensorUpdate, bool]], system: dict[str, Any] | None, apply_: Apply
) -> None:
    """Take a step of sharded tensors.

    Args:
        optimizer: The optimizer.
        updates: The tensors, the same on all processes, and whether each takes the compressed rule.
        system: The state that has the system over all compressed tensors; None if there is none.
        apply_: Takes the updates of tensors, wholes or parts: those that are compressed, and lists of those of a group
            that are not.
    """
    dense: dict[int, list[TensorUpdate]] = {}
    aligned, staged, members = list[TensorUpdate](), list[TensorUpdate](), list[TensorUpdate]()
    tasks: list[Task] = []
    for update, compressed in updates:
        if update.grad.placements != update.param.placements:  # type: ignore[attr-defined]  # a DTensor
            grad = update.grad.redistribute(placements=update.param.placements)  # type: ignore[attr-defined]  # a DTensor
            update = replace(update, grad=grad)
        if compressed and system is not None:
            members.append(update)
            continue
        path = path_of(optimizer, update.param, update.options, update.step)
        if path == "local":
            dense.setdefault(id(update.options), []).append(part_of_update(optimizer, update, compressed=False))
        elif path == "aligned":
            aligned.append(part_of_update(optimizer, update))
        elif path == "collective":
            staged.append(update)
        else:
            tasks.append(Task.of(update, compressed))
    if aligned or dense:
        apply_(aligned, list(dense.values()))
    tasks += [Task.of(update, True) for update in update_in_stages_(optimizer, staged)]
    for team, wave in waves(tasks):
        update_wave_(optimizer, team, wave, apply_)
    if members:
        assert system is not None
        system_step_(optimizer, members, system)
