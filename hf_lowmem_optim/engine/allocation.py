"""Allocates the state of parameters as its specs describe it: whole, stacked, or the part of a sharded one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

from hf_lowmem_optim.engine.buckets import allocate_stacked
from hf_lowmem_optim.engine.options import Options
from hf_lowmem_optim.engine.sharding.layout import allocate_part
from hf_lowmem_optim.spec import TensorSpec

__all__ = ["allocate_", "follow_options_", "saved_as_options_say"]


def allocate_(states: Any, fresh: Sequence[tuple[Tensor, tuple[Options, bool, dict[str, TensorSpec]]]]) -> None:
    """Allocate the state of parameters that have their first gradient: that of equal ones side by side."""
    equal: dict[tuple[Any, ...], list[Tensor]] = {}
    specs_of: dict[tuple[Any, ...], dict[str, TensorSpec]] = {}
    for param, (options, compressed, specs) in fresh:
        if hasattr(param, "placements"):
            parts = {key: allocate_part(spec, param, compressed=compressed) for key, spec in specs.items()}
            states[param] = {"step": 0, **parts}
            continue
        key = (id(options), param.shape, param.dtype, param.device, compressed)
        equal.setdefault(key, []).append(param)
        specs_of[key] = specs
    for key, params in equal.items():
        compressed, device = key[-1], key[-2]
        if compressed:
            made = allocate_stacked(specs_of[key], len(params), device)
        else:
            made = [{k: spec.allocate(device) for k, spec in specs_of[key].items()} for _ in params]
        for param, state in zip(params, made, strict=True):
            states[param] = {"step": 0, **state}


def follow_options_(
    state: dict[str, Any], specs: Mapping[str, TensorSpec], optional: Iterable[str], param: Tensor
) -> None:
    """Add optional state that the options now ask for, as zeros, and drop what they no longer do."""
    for key in optional:
        if key in specs and key not in state:
            sharded, spec = hasattr(param, "placements"), specs[key]
            state[key] = allocate_part(spec, param, compressed=True) if sharded else spec.allocate(param.device)
        elif key not in specs:
            state.pop(key, None)


def saved_as_options_say(optimizer: Any, saved: dict[str, Any]) -> dict[str, Any]:
    """Return a state dict in which what had no gradient since its group's options changed follows them, too."""
    for number, group in enumerate(optimizer.param_groups):
        try:
            options = optimizer._options_of(group)
        except (KeyError, TypeError, ValueError):  # the next step refuses them; a state can be saved meanwhile
            continue
        for place, param in enumerate(group["params"]):
            if state := optimizer.state.get(param):
                own = dict(state)
                follow_options_(own, optimizer._rule(param, options)[1], optimizer.method.follows, param)
                if own.keys() != state.keys():
                    saved["state"][saved["param_groups"][number]["params"][place]] = own
    return saved
