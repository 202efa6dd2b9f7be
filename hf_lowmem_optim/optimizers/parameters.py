"""What parameters and their gradients must be like, and what they are called in errors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import Parameter

from hf_lowmem_optim.optimizers.dense import rounds_stochastically

if TYPE_CHECKING:
    from hf_lowmem_optim.optimizers.base import LowMemoryOptimizer

__all__ = ["check_gradient", "check_parameter", "check_rounding", "describe_parameter"]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def check_parameter(param: Any, who: str, rule: str) -> None:
    """Refuse at construction what could not be updated later; frozen parameters may be anything."""
    if not isinstance(param, Tensor) or not param.requires_grad:
        return
    if param.dtype not in _DTYPES:
        raise TypeError(f"{who} has dtype {param.dtype}; {rule} supports float32, bfloat16 and float16")
    if not param.is_leaf:
        raise ValueError(
            f"{who} of shape {tuple(param.shape)} is not a leaf: it is the result of an operation, so that an update "
            "of it would be lost; pass the tensors that it was computed from, such as model.parameters()"
        )


def describe_parameter(param: Tensor, group: Mapping[str, Any]) -> str:
    """Name a parameter in an error: its own name if the group has names, else its place and shape."""
    index = next(i for i, p in enumerate(group["params"]) if p is param)
    names = group.get("param_names")
    return f"parameter {names[index]!r}" if names else f"parameter {index} (shape {tuple(param.shape)})"


def check_gradient(optimizer: LowMemoryOptimizer, param: Tensor, group: Mapping[str, Any]) -> None:
    """Refuse what the optimizer's rules cannot do, before anything is touched.

    Args:
        optimizer: The optimizer.
        param: A parameter that has a gradient.
        group: Its group.

    Raises:
        RuntimeError: The gradient is sparse or complex, or for the dense rule of another dtype than the parameter.
        NotImplementedError: The parameter is a sharded DTensor, which its group's settings do not serve.
    """
    grad, rule = param.grad, type(optimizer).__name__
    assert grad is not None
    if grad.layout != torch.strided:
        raise RuntimeError(
            f"{describe_parameter(param, group)} has a sparse gradient, which {rule} does not support; "
            "build its module with sparse=False"
        )
    if grad.is_complex() or param.dtype not in _DTYPES:
        raise RuntimeError(
            f"{describe_parameter(param, group)} is {param.dtype} with a gradient of {grad.dtype}; "
            f"{rule} supports float32, bfloat16 and float16"
        )
    if grad.dtype != param.dtype and not optimizer.compresses(param.shape, group):
        raise RuntimeError(
            f"{describe_parameter(param, group)} is {param.dtype} with a gradient of {grad.dtype}; the dense rule "
            "needs both alike"
        )
    if type(param) is Parameter or not hasattr(param, "placements"):
        return
    if not optimizer.supports_sharding and optimizer.compresses(param.shape, group):
        raise NotImplementedError(
            f"{describe_parameter(param, group)} is sharded (DTensor), which {rule} cannot compress; "
            f"give its group {optimizer.dense_key}=None for the dense rule, or train without FSDP or tensor parallelism"
        )
    for key, plain in (("dense_state", "param"), ("weight_rounding", "nearest")):
        if group[key] != plain:
            raise NotImplementedError(
                f"{describe_parameter(param, group)} is sharded (DTensor), for which there is no "
                f"{key}={group[key]!r}; give its group {key}={plain!r}"
            )


def check_rounding(groups: Sequence[Mapping[str, Any]]) -> None:
    """Refuse stochastic rounding that would round nothing.

    Args:
        groups: Parameter groups, with ``"params"``.

    Raises:
        ValueError: It is asked for, and no weight is narrower than float32.
    """
    asked = [group for group in groups if group["weight_rounding"] == "stochastic"]
    if asked and not any(rounds_stochastically(param, group) for group in asked for param in group["params"]):
        raise ValueError(
            "weight_rounding='stochastic' has no effect here: every parameter is float32, and only bfloat16 and "
            "float16 weights are rounded. Load the model in bfloat16, or leave weight_rounding='nearest'"
        )
