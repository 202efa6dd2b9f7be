"""Float32 weights of a model that is trained with ``weight_rounding="compensated"``: export and import."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer

from hf_lowmem_optim.engine.allocation import follow_options_
from hf_lowmem_optim.engine.optimizer import LowMemoryOptimizer
from hf_lowmem_optim.ops.weight_correction import CORRECTION, join_weights, split_weights_

__all__ = ["fp32_state_dict", "load_fp32_state_dict_"]

_NARROW = (torch.bfloat16, torch.float16)


@torch.no_grad()
def fp32_state_dict(model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    """Return the state dict of a model with its bfloat16 and float16 tensors in float32, corrections included.

    Args:
        model: The model, or a wrapper: the names are those of its own ``state_dict()``.
        optimizer: The optimizer that trains it, or accelerate's wrapper around that.

    Returns:
        The tensors by name, on their devices: new ones for narrow tensors, the model's own for all others.

    Raises:
        TypeError: It is not an optimizer of this package.

    Example:
        >>> model32.load_state_dict(fp32_state_dict(model, trainer.optimizer))
    """
    state = _inner(optimizer).state
    result = model.state_dict()
    for name, value in model.state_dict(keep_vars=True).items():
        if isinstance(value, Tensor) and value.dtype in _NARROW:
            correction = state.get(value, {}).get(CORRECTION)
            narrow = value.detach()
            result[name] = narrow.float() if correction is None else join_weights([narrow], [correction])[0]
    return result


@torch.no_grad()
def load_fp32_state_dict_(model: nn.Module, optimizer: Optimizer, state_dict: Mapping[str, Any]) -> None:
    """Load weights into a model, and what its dtype rounds off into the corrections of its optimizer.

    State is allocated for parameters that have none yet. A model's own ``load_state_dict`` does not reach corrections:
    those of before would stay, and move each weight by half the distance to its neighbour at most.

    Args:
        model: The model, or a wrapper.
        optimizer: The optimizer that trains it, with the model's parameters, or accelerate's wrapper around that.
        state_dict: What :func:`fp32_state_dict` gave, or any state dict of the model.

    Raises:
        RuntimeError: Names or shapes are not the model's. Nothing has been changed then.
        TypeError: It is not an optimizer of this package.
        ValueError: A narrow weight has no correction, without which a value would be rounded. Likewise.
    """
    inner, own = _inner(optimizer), model.state_dict(keep_vars=True)
    if odd := sorted(own.keys() ^ state_dict.keys()):
        where = "the model" if odd[0] in own else "the state dict"
        raise RuntimeError(f"{len(odd)} names are not in both, {odd[0]!r} only in {where}")
    for name, value in own.items():
        given = state_dict[name]
        if isinstance(value, Tensor) and (not isinstance(given, Tensor) or given.shape != value.shape):
            found = tuple(given.shape) if isinstance(given, Tensor) else type(given).__name__
            raise RuntimeError(f"{name!r} is {found} in the state dict and {tuple(value.shape)} in the model")
    group_of = {id(param): group for group in inner.param_groups for param in group["params"]}
    for name, param in own.items():
        group = group_of.get(id(param))
        if getattr(param, "dtype", None) in _NARROW and (group is None or group["weight_rounding"] != "compensated"):
            value = state_dict[name]
            if not bool((value.to(param.dtype).to(value.dtype) == value).logical_or_(value.isnan()).all()):
                why = "is in none of the optimizer's groups"
                if group is not None:
                    why = f"is in a group with weight_rounding={group['weight_rounding']!r} instead of 'compensated'"
                raise ValueError(
                    f"{name!r} is {param.dtype} and {why}, so that the state dict's values would be rounded: "
                    "model.load_state_dict rounds them"
                )
    model.load_state_dict(state_dict)
    for name, param in own.items():
        group = group_of.get(id(param))
        if group is None or group["weight_rounding"] != "compensated" or param.dtype not in _NARROW:
            continue
        _, specs, state = inner._prepared(param, group)
        follow_options_(state, specs, inner.method.follows, param)
        value = state_dict[name].to(param.device, torch.float32).contiguous()
        split_weights_([param.detach()], [state[CORRECTION]], [value])
        torch.autograd.graph.increment_version([param])


def _inner(optimizer: Optimizer) -> LowMemoryOptimizer:
    inner = getattr(optimizer, "optimizer", optimizer)
    if not isinstance(inner, LowMemoryOptimizer):
        raise TypeError(f"{type(inner).__name__} is not an optimizer of hf_lowmem_optim, and keeps no corrections")
    return inner
