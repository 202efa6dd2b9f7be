"""Loading a state dict exactly, and the state that belongs to all parameters together.

torch casts every loaded state tensor to the dtype of its parameter (int16 indices, codes and float32 moments of
bfloat16 parameters included). Here the state passes through torch's own ``load_state_dict`` in wrappers that it does
not look into, and is checked against what the optimizer would allocate.

What belongs to all parameters together (a Gram matrix) lies in ``optimizer.state["shared"]`` and travels in the first
parameter group of a state dict: ``torch.distributed.checkpoint`` rejects keys of the state that are no parameters, and
drops keys that it does not know beside ``"state"`` and ``"param_groups"``.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from hf_lowmem_optim.engine.method import Method
from hf_lowmem_optim.engine.options import as_plain
from hf_lowmem_optim.spec import TensorSpec

logger = logging.getLogger(__name__)

__all__ = ["SHARED", "exact_load", "pack_shared", "shared_device"]

#: Key of what belongs to all parameters together, in ``optimizer.state`` and in the packed parameter group.
SHARED = "shared"


class _AsSaved:
    """Carries one parameter's saved state past torch's casts."""

    def __init__(self, state: Mapping[str, Any]) -> None:
        self.state = state


def pack_shared(state_dict: dict[str, Any]) -> dict[str, Any]:
    """Return torch's state dict with the shared entry moved from its state to its first parameter group."""
    if SHARED not in state_dict["state"]:
        return state_dict
    state = {key: value for key, value in state_dict["state"].items() if key != SHARED}
    first, *rest = state_dict["param_groups"]
    return {**state_dict, "state": state, "param_groups": [{**first, SHARED: state_dict["state"][SHARED]}, *rest]}


def _unpack_shared(state_dict: dict[str, Any]) -> dict[str, Any]:
    """Undo :func:`pack_shared`."""
    groups = state_dict["param_groups"]
    if not groups or SHARED not in groups[0]:
        return state_dict
    first = {key: value for key, value in groups[0].items() if key != SHARED}
    state = {**state_dict["state"], SHARED: groups[0][SHARED]}
    return {**state_dict, "state": state, "param_groups": [first, *groups[1:]]}


@contextmanager
def exact_load(optimizer: Optimizer, method: Method) -> Iterator[None]:
    """Have ``Optimizer.load_state_dict`` check the state and keep it as it was saved, within this context.

    Our hooks run after the user's pre-hooks and before the user's post-hooks, so that those see what torch documents.
    """

    def wrap(_: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        _check_groups(optimizer, method, state_dict["param_groups"])
        state_dict = _unpack_shared(state_dict)
        _check_state(optimizer, method, state_dict)
        _check_shared(optimizer, method, state_dict)
        return {**state_dict, "state": {key: _AsSaved(value) for key, value in state_dict["state"].items()}}

    def unwrap(_: Optimizer) -> None:
        for param, saved in list(optimizer.state.items()):
            device = param.device if isinstance(param, Tensor) else shared_device(optimizer.param_groups)
            optimizer.state[param] = {
                key: value.to(device) if isinstance(value, Tensor) else value for key, value in saved.state.items()
            }

    before = optimizer.register_load_state_dict_pre_hook(wrap)
    after = optimizer.register_load_state_dict_post_hook(unwrap, prepend=True)
    try:
        yield
    finally:
        before.remove()
        after.remove()


def shared_device(groups: Sequence[Mapping[str, Any]]) -> torch.device:
    """Return where the shared state lies: with the first parameter."""
    first: Tensor = next(param for group in groups for param in group["params"])
    return first.device


def _check_groups(optimizer: Optimizer, method: Method, saved_groups: list[dict[str, Any]]) -> None:
    """Refuse the groups of another optimizer, of another model, or of a differently shaped state."""
    who = type(optimizer).__name__
    for saved in saved_groups:
        missing = [key for key in method.shaping if key not in saved]
        if missing:
            raise ValueError(
                f"{who} cannot load this state: its groups have no {missing[0]!r} (they have "
                f"{', '.join(sorted(set(saved) - {'params', 'param_names'}))}), so another optimizer wrote it. Resume "
                f"with that optimizer, or start {who} from the weights alone, without the old optimizer state"
            )
    own = optimizer.param_groups
    sizes, saved_sizes = ([len(g["params"]) for g in groups] for groups in (own, saved_groups))
    if sizes != saved_sizes:
        off, changed = method.switch[1], []
        for key in method.shaping:  # what is worth being compressed depends on them
            was, now = ({repr(group[key]) for group in groups} - {repr(off)} for groups in (saved_groups, own))
            if was and now and not was & now:
                changed.append(f"{key}={' or '.join(sorted(was))}, as it was saved")
        remedy = "; and ".join(changed) or "the same model, trainable parameters and target modules"
        raise ValueError(
            f"{who} cannot load this state: it was saved with groups of {saved_sizes} parameters, this optimizer has "
            f"{sizes}. Build it with {remedy}"
        )
    for index, (group, saved) in enumerate(zip(optimizer.param_groups, saved_groups, strict=True)):
        for key in sorted(optimizer.defaults.keys() & saved.keys() - {"lr", *method.shaping}):
            if group[key] != as_plain(saved[key]):
                logger.warning(
                    "parameter group %d goes on with %s=%r, as it was saved; the %s=%r of this %s has no effect",
                    *(index, key, saved[key], key, group[key], who),
                )
        for key in method.shaping:
            if group[key] != saved[key]:
                raise ValueError(
                    f"{who} cannot load this state: parameter group {index} was saved with {key}={saved[key]!r}, this "
                    f"optimizer has {key}={group[key]!r}. Build it with {key}={saved[key]!r} to resume"
                )


def _check_state(optimizer: Optimizer, method: Method, state_dict: dict[str, Any]) -> None:
    """Compare every saved tensor with what this optimizer would allocate for the same parameter."""
    for group, saved_group in zip(optimizer.param_groups, state_dict["param_groups"], strict=True):
        names = group.get("param_names") or saved_group["params"]
        for param, name, saved_id in zip(group["params"], names, saved_group["params"], strict=True):
            saved = state_dict["state"].get(saved_id)
            if not saved:
                continue
            # the saved options hold after the load
            options = method.options_of(
                {**group, **{key: saved_group.get(key, group[key]) for key in optimizer.defaults}}
            )
            specs = method.specs(param.shape, param.dtype, options)
            expected, found = _layout(specs), _found_layout(saved)
            if found != expected or not isinstance(saved.get("step"), int):
                key = next((k for k in {**expected, **found} if found.get(k) != expected.get(k)), "step")
                raise ValueError(
                    f"{type(optimizer).__name__} cannot load the state of parameter {name!r} (shape "
                    f"{tuple(param.shape)}): {key!r} was saved as {found.get(key, saved.get(key))}, this optimizer "
                    f"expects {expected.get(key, 'an int')}. It belongs to another optimizer, model or dtype"
                )


def _check_shared(optimizer: Optimizer, method: Method, state_dict: Mapping[str, Any]) -> None:
    """Compare what was saved for all parameters together with what this optimizer would allocate."""
    specs = method.shared_specs(optimizer.param_groups)
    saved = state_dict["state"].get(SHARED)
    if saved is None:
        # So it is before the first update of a compressed tensor.
        updated = {key for key, entry in state_dict["state"].items() if entry.get("step")}
        if not specs or not any(
            saved_id in updated and method.compresses(param.shape, group)
            for group, saved_group in zip(optimizer.param_groups, state_dict["param_groups"], strict=True)
            for param, saved_id in zip(group["params"], saved_group["params"], strict=True)
        ):
            return
        saved = {}
    expected, found = _layout(specs), _found_layout(saved)
    if found != expected or not isinstance(saved.get("step"), int):
        raise ValueError(
            f"{type(optimizer).__name__} cannot load this state: param_groups[0][{SHARED!r}], which belongs to all "
            f"parameters together, has {found or 'nothing'}, this optimizer expects {expected} and the int 'step'. "
            "Save and load the whole of optimizer.state_dict()"
        )


def _layout(specs: Mapping[str, TensorSpec]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    return {key: (spec.shape, spec.dtype) for key, spec in specs.items()}


def _found_layout(saved: Mapping[str, Any]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    return {key: (tuple(value.shape), value.dtype) for key, value in saved.items() if isinstance(value, Tensor)}
