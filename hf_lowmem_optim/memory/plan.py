"""Bytes of optimizer state, predicted: the sum of the same specs from which the optimizers allocate."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from hf_lowmem_optim.memory.measure import StateReport, unwrap_optimizer
from hf_lowmem_optim.optimizers.base import LowMemoryOptimizer
from hf_lowmem_optim.registry import get_entry

__all__ = ["plan_optimizer", "plan_state"]


def plan_optimizer(optimizer: torch.optim.Optimizer) -> StateReport:
    """Predict the state of an optimizer once every one of its parameters has had a gradient.

    Args:
        optimizer: An optimizer of this package, stepped or not, or accelerate's wrapper around one.

    Returns:
        The report; equal to :func:`~hf_lowmem_optim.memory.measure.measure_state` after a step, to the byte.

    Raises:
        TypeError: It is not an optimizer of this package, so nothing describes its state.
    """
    inner = unwrap_optimizer(optimizer)
    if not isinstance(inner, LowMemoryOptimizer):
        raise TypeError(
            f"plan_optimizer cannot predict the state of {type(inner).__name__}; it knows the optimizers of "
            "hf_lowmem_optim. Use measure_state after the first step"
        )
    return _plan(type(inner), inner.param_groups)


def plan_state(
    optimizer: str | type[LowMemoryOptimizer],
    tensors: Mapping[str, tuple[Sequence[int], torch.dtype]],
    **hyper: Any,
) -> StateReport:
    """Predict the state for parameters that need not exist.

    Args:
        optimizer: Its string or class.
        tensors: Shape and dtype by name, all of them in one parameter group.
        **hyper: Hyper-parameters that differ from the optimizer's defaults.

    Returns:
        The report.

    Raises:
        TypeError: A hyper-parameter is unknown or has the wrong type.
        ValueError: A hyper-parameter is out of range, or there is no optimizer of that name.
    """
    optimizer_class = get_entry(optimizer).optimizer_class if isinstance(optimizer, str) else optimizer
    optimizer_class.check_hyperparameters(hyper)
    # On the meta device a tensor is a description: nothing is allocated for a model of any size.
    params = [torch.empty(tuple(shape), dtype=dtype, device="meta") for shape, dtype in tensors.values()]
    return _plan(optimizer_class, [{**optimizer_class.default_hyperparameters(), **hyper, "params": params}])


def _plan(optimizer_class: type[LowMemoryOptimizer], groups: Sequence[Mapping[str, Any]]) -> StateReport:
    """Sum the specs of all parameters in the groups."""
    components: Counter[str] = Counter()
    group_bytes = []
    for group in groups:
        of_group: Counter[str] = Counter()
        for param in group["params"]:
            for spec in optimizer_class.state_specs(param, group).values():
                of_group[spec.component] += spec.nbytes
        components.update(of_group)
        group_bytes.append(of_group.total())
    # What belongs to all parameters together belongs to no group.
    for spec in optimizer_class.shared_specs(groups).values():
        components[spec.component] += spec.nbytes
    num_parameters = sum(param.numel() for group in groups for param in group["params"])
    return StateReport({key: count for key, count in components.items() if count}, tuple(group_bytes), num_parameters)
