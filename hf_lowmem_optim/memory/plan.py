"""Bytes of optimizer state, predicted: the sum of the same specs from which the optimizers allocate."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from hf_lowmem_optim.engine.optimizer import LowMemoryOptimizer
from hf_lowmem_optim.engine.sharding.gathered import gathered_bytes
from hf_lowmem_optim.engine.sharding.layout import Split, own_part, part_of_spec, specs_at_rest
from hf_lowmem_optim.local_updates.optimizer import find_local_updates
from hf_lowmem_optim.local_updates.outer import OuterNesterov
from hf_lowmem_optim.memory.measure import Piece, StateReport, add_up, unwrap_optimizer
from hf_lowmem_optim.registry import get_entry

__all__ = [
    "Groups",
    "compressed_bytes_per_parameter",
    "plan_groups",
    "plan_optimizer",
    "plan_state",
    "plan_temporaries",
]

Groups = Sequence[Mapping[str, Any]]
"""Parameter groups with every hyper-parameter, as ``optimizer.param_groups`` has them."""


def plan_optimizer(optimizer: torch.optim.Optimizer, *, local: bool = False) -> StateReport:
    """Predict the state of an optimizer once every one of its parameters has had a gradient.

    Args:
        optimizer: An optimizer of this package, stepped or not, or accelerate's wrapper around one.
        local: Count this process's part of sharded tensors (DTensors) instead of all parts together.

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
    local_updates = find_local_updates(optimizer)
    outer = None if local_updates is None else local_updates.outer
    return plan_groups(type(inner), inner.param_groups, local=local, outer=outer)


def plan_state(
    optimizer: str | type[LowMemoryOptimizer], tensors: Mapping[str, tuple[Sequence[int], torch.dtype]], **hyper: Any
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
    optimizer_class.method.check(hyper, optimizer_class.__name__)
    # On the meta device a tensor is a description: nothing is allocated for a model of any size.
    params = [torch.empty(tuple(shape), dtype=dtype, device="meta") for shape, dtype in tensors.values()]
    return plan_groups(optimizer_class, [{**optimizer_class.method.options.defaults(), **hyper, "params": params}])


def plan_groups(
    optimizer_class: type[LowMemoryOptimizer],
    groups: Groups,
    *,
    num_shards: int = 1,
    rank: int = 0,
    local: bool = False,
    outer: OuterNesterov | None = None,
) -> StateReport:
    """Sum the specs of all parameters in the groups.

    Args:
        optimizer_class: The optimizer.
        groups: Its parameter groups.
        num_shards: Over how many processes FSDP2 splits the parameters. What belongs to all parameters together, what
            is too small to be split, and constants are on every process.
        rank: For which of them the report is; the first has the largest parts.
        local: Count this process's part of the parameters that are sharded already.
        outer: The outer step of local updates.
    """
    method, pieces = optimizer_class.method, list[Piece]()
    for index, group in enumerate(groups):
        options = method.options_of(group)
        alike: dict[Any, list[Any]] = {}
        for param in group["params"]:
            placed = getattr(param, "device_mesh", None), getattr(param, "placements", None)
            alike.setdefault((param.shape, param.dtype, placed), []).append(param)
        for (shape, dtype, _), params in alike.items():
            specs, count = method.specs(shape, dtype, options), len(params)
            compressed = method.compressed_state(shape, dtype, options) is not None
            if num_shards > 1 or hasattr(params[0], "placements"):
                specs = specs_at_rest(specs)
            if num_shards > 1:
                split, parts = Split(num_shards), specs.items()
                specs = {key: part_of_spec(spec, shape, split, rank, compressed=compressed) for key, spec in parts}
            elif local and hasattr(params[0], "placements"):
                specs = {key: own_part(spec, params[0], compressed=compressed) for key, spec in specs.items()}
            if outer is not None:
                specs = {**specs, **outer.specs(params[0])}
            for spec in specs.values():
                pieces.append(Piece(index, spec.component, spec.dtype, count * spec.stored_bytes, spec.in_gradient))
    common = (*method.shared_specs(groups).values(), *method.constants_of(groups).values())
    pieces += [Piece(None, spec.component, spec.dtype, spec.nbytes) for spec in common]
    return add_up(pieces, len(groups), sum(param.numel() for group in groups for param in group["params"]))


def plan_temporaries(optimizer_class: type[LowMemoryOptimizer], groups: Groups, *, num_shards: int = 1) -> int:
    """Bound what a step allocates: :meth:`~hf_lowmem_optim.engine.method.Method.scratch_bytes`, and whole tensors."""
    method = optimizer_class.method
    return method.scratch_bytes(groups) + (gathered_bytes(method, groups, num_shards) if num_shards > 1 else 0)


def compressed_bytes_per_parameter(optimizer_class: type[LowMemoryOptimizer], groups: Groups) -> float | None:
    """Return the bytes of state per entry of the parameters that take the compressed rule; None if none does."""
    nbytes = entries = 0
    for group in groups:
        options = optimizer_class.method.options_of(group)
        for (shape, dtype), count in Counter((param.shape, param.dtype) for param in group["params"]).items():
            if optimizer_class.method.compressed_state(shape, dtype, options):
                specs = optimizer_class.method.specs(shape, dtype, options)
                entries += count * shape.numel()
                nbytes += count * sum(spec.nbytes for spec in specs.values())
    return nbytes / entries if entries else None
