"""Allocates the state of parameters as its specs describe it: whole, stacked, or the part of a sharded one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

from hf_lowmem_optim.engine.buckets import allocate_stacked
from hf_lowmem_optim.engine.options import Options
from hf_lowmem_optim.engine.sharding.layout import allocate_part
from hf_lowmem_optim.spec import TensorSpec

__all__ = ["allocate_", "follow_all_options_", "follow_options_"]


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


def follow_all_options_(optimizer: Any) -> None:
    """Have every parameter follow its group's options, also those without a gradient since these changed."""
    for group in optimizer.param_groups:
        try:
            options = optimizer._options_of(group)
        except (TypeError, ValueError):  # the next step refuses it, and may follow a correction
            continue
        for param in group["params"]:
            if state := optimizer.state.get(param):
                follow_options_(state, optimizer._rule(param, options)[1], optimizer.method.follows, param)
