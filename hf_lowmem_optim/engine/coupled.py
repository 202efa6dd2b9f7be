"""Methods whose tensors share a system: one over all parameters (``scope="model"``), or one for each (``"tensor"``).

A system's state, such as the Gram matrix of a window of gradients, is in ``optimizer.state["shared"]`` or in the state
of its tensor. A tensor that has no gradient in a step of the common system counts as zero there and is not moved.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from torch.optim.optimizer import Optimizer

from hf_lowmem_optim.engine.buckets import TensorUpdate
from hf_lowmem_optim.engine.method import Method

__all__ = ["Scope", "check_agreement", "note_absent_"]

Scope = Literal["model", "tensor"]
"""``"model"`` for one system over all parameters, ``"tensor"`` for one for each."""


def check_agreement(method: Method, groups: Sequence[Mapping[str, Any]], who: str) -> None:
    """Raise ValueError for groups, with every option, that differ in one on which a system's must agree."""
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


def note_absent_(optimizer: Optimizer, method: Method, updates: Sequence[TensorUpdate], t: int) -> None:
    """Tell the tensors of the system that have no gradient in this step."""
    present = {id(update.state) for update in updates}
    for group in optimizer.param_groups:
        for param in group["params"]:
            # `get`, because looking must not create entries
            state = optimizer.state.get(param)
            if state and id(state) not in present and method.compresses(param.shape, group):
                assert method.absent_ is not None
                method.absent_(state, t)
