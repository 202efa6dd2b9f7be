"""Methods whose tensors share a system: one over all parameters (``scope="model"``), or one for each (``"tensor"``).

A system's state, such as the Gram matrix of a window of gradients, is in the state of its tensor. That of the common
system, and the count of its steps, are in the state of one of its tensors, under keys that begin with ``"shared_"``:
so they travel wherever the state of a parameter does. A tensor that has no gradient in a step of the common system
counts as zero there and is not moved.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from hf_lowmem_optim.engine.buckets import SHARED_PREFIX, TensorUpdate, split_state
from hf_lowmem_optim.engine.checks import check_part, describe_parameter
from hf_lowmem_optim.engine.method import Method
from hf_lowmem_optim.engine.options import Options

__all__ = [
    "SHARED_STEP",
    "Scope",
    "absent_members",
    "check_agreement",
    "clear_row_",
    "note_absent_",
    "place_system_",
    "system_home",
]

#: Counts the steps of the common system.
SHARED_STEP = f"{SHARED_PREFIX}step"

Scope = Literal["model", "tensor"]
"""``"model"`` for one system over all parameters, ``"tensor"`` for one for each."""


def check_agreement(method: Method, groups: Sequence[Mapping[str, Any]], who: str) -> None:
    """Raise ValueError for groups, with every option, that differ in one on which a system's must agree.

    Without a system, all groups must agree on the method's shared options, also those that take AdamW.
    """
    if method.shared_state is None:
        for group in groups[1:]:
            for key in method.shared_options:
                if group[key] != groups[0][key]:
                    raise ValueError(
                        f"{key}={group[key]!r} of a parameter group differs from {key}={groups[0][key]!r} of another; "
                        f"all groups of {who} act together: give them the same {key}"
                    )
        return
    members = [group for group in groups if method.shared_options and not method.is_dense(group)]
    for group in members[1:]:
        for key in method.shared_options if members[0]["scope"] == "model" else ("scope",):
            if group[key] != members[0][key]:
                switch, off = method.switch
                raise ValueError(
                    f"{key}={group[key]!r} of a parameter group differs from {key}={members[0][key]!r} of another; "
                    f"all groups share one preconditioner. Give them the same {key}, opt the group out with "
                    f'{switch}={off!r}, or build {who} with scope="tensor"'
                )


def system_home(optimizer: Optimizer, method: Method) -> tuple[Tensor, dict[str, Any]]:
    """Return the parameter in whose state the common system is or is to be, and its group.

    That is the first parameter that takes part and is trained.

    Raises:
        ValueError: No state has it, although a tensor has rows of it.
    """
    members: list[tuple[Tensor, dict[str, Any]]] = [
        (param, group)
        for group in optimizer.param_groups
        for param in group["params"]
        if method.compresses(param.shape, group)
    ]
    for param, group in members:
        if SHARED_STEP in optimizer.state.get(param, ()):
            return param, group
    for param, group in members:
        if optimizer.state.get(param, {}).get("step"):
            raise ValueError(
                f"the state of {describe_parameter(param, group)} has a window of gradients, but no parameter's state "
                f"has {SHARED_STEP!r} and what belongs to all parameters together: it was lost with the parameter that "
                "kept it, or with a part of a state dict. Load the whole of optimizer.state_dict(), or build a new "
                "optimizer"
            )
    return next((member for member in members if member[0].requires_grad), members[0])


def place_system_(state: dict[str, Any], home: Tensor, group: Mapping[str, Any], method: Method, options: Any) -> None:
    """Check the common system in the state of a parameter, or allocate it there if there is none yet."""
    assert method.shared_state is not None
    for key, spec in method.shared_state(options).items():
        if SHARED_STEP not in state:
            state[SHARED_PREFIX + key] = spec.allocate(home.device)
        check_part(SHARED_PREFIX + key, state.get(SHARED_PREFIX + key), spec, home, group, method)
    state.setdefault(SHARED_STEP, 0)


def note_absent_(optimizer: Optimizer, method: Method, updates: Sequence[TensorUpdate], t: int) -> None:
    """Tell the tensors of the system that have no gradient in this step."""
    for param, options, state in absent_members(optimizer, method, updates):
        clear_row_(state, param, options, method, t)


def absent_members(
    optimizer: Optimizer, method: Method, updates: Sequence[TensorUpdate]
) -> Iterator[tuple[Tensor, Options, dict[str, Any]]]:
    """Yield the parameters of the system that have state but no gradient in this step, with options and state."""
    present = {id(update.state) for update in updates}
    for group in optimizer.param_groups:
        # `get`, because looking must not create entries
        states = [(param, optimizer.state.get(param)) for param in group["params"]]
        absent = [(param, state) for param, state in states if state and id(state) not in present]
        # made once: a model of many experts has as many absent ones
        options = method.options_of(group) if absent else None
        for param, state in absent:
            if options is not None and method.compressed_state(param.shape, torch.float32, options) is not None:
                yield param, options, state


def clear_row_(state: dict[str, Any], param: Tensor, options: Any, method: Method, t: int) -> None:
    """Note in the state of a tensor that it has no gradient in step ``t`` of the system."""
    assert method.absent_ is not None
    for each in split_state(state) if options.is_stack(param.shape) else [state]:
        method.absent_(each, t)
