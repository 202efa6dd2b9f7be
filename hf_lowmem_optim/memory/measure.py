"""Bytes of optimizer state, observed: what is really allocated, by component and parameter group."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from hf_lowmem_optim.optimizers.base import LowMemoryOptimizer

__all__ = ["StateReport", "measure_state", "unwrap_optimizer"]

ADAMW_FP32_BYTES_PER_PARAMETER = 8
"""Two float32 moments."""


@dataclass(frozen=True)
class StateReport:
    """How many bytes the state of an optimizer takes; the same for what is planned and for what is measured.

    Attributes:
        component_bytes: Bytes by component: ``"first_moment"``, ``"error"``, ``"dense"``, ... for the optimizers of
            this package, the keys of the state (``"exp_avg"``, ...) for others.
        group_bytes: Bytes by parameter group, in the optimizer's order.
        num_parameters: Entries of all parameters of the optimizer.
    """

    component_bytes: Mapping[str, int]
    group_bytes: tuple[int, ...]
    num_parameters: int

    @property
    def total_bytes(self) -> int:
        """Bytes of the whole state."""
        return sum(self.component_bytes.values())

    @property
    def adamw_fp32_bytes(self) -> int:
        """Bytes that AdamW with float32 moments takes for the same parameters."""
        return ADAMW_FP32_BYTES_PER_PARAMETER * self.num_parameters


def measure_state(optimizer: Optimizer) -> StateReport:
    """Count the bytes of all tensors in an optimizer's state, as they are now.

    State is allocated at a parameter's first gradient, so before the first step the report is empty. A tensor counts
    with the bytes of its own entries (not of a storage it may be a view of); Python numbers count nothing.

    Args:
        optimizer: Any torch optimizer, or accelerate's wrapper around one.

    Returns:
        The report.
    """
    optimizer = unwrap_optimizer(optimizer)
    components: Counter[str] = Counter()
    group_bytes = []
    in_groups = set()
    for group in optimizer.param_groups:
        of_group: Counter[str] = Counter()
        for parameter in group["params"]:
            in_groups.add(parameter)
            # `get`, because torch's state is a defaultdict: looking must not create entries.
            state = optimizer.state.get(parameter)
            if state:
                of_group.update(_bytes_by_component(state, _component_names(optimizer, parameter, group)))
        components.update(of_group)
        group_bytes.append(of_group.total())
    # What an optimizer keeps for all its parameters together belongs to no group.
    for key, state in optimizer.state.items():
        if key not in in_groups:
            components.update(_bytes_by_component(state if isinstance(state, Mapping) else {str(key): state}, {}))
    num_parameters = sum(parameter.numel() for group in optimizer.param_groups for parameter in group["params"])
    return StateReport(dict(components), tuple(group_bytes), num_parameters)


def unwrap_optimizer(optimizer: Optimizer) -> Optimizer:
    """Return the optimizer inside accelerate's (or a similar) wrapper, which is an ``Optimizer`` holding another.

    Args:
        optimizer: A wrapped or plain optimizer.

    Returns:
        The innermost one.
    """
    while isinstance(inner := getattr(optimizer, "optimizer", None), Optimizer):
        optimizer = inner
    return optimizer


def _component_names(optimizer: Optimizer, parameter: Tensor, group: Mapping[str, Any]) -> dict[str, str]:
    """The component of each state key, where the optimizer says."""
    if not isinstance(optimizer, LowMemoryOptimizer):
        return {}
    return {key: spec.component for key, spec in optimizer.state_specs(parameter, group).items()}


def _bytes_by_component(state: Mapping[str, Any], names: Mapping[str, str]) -> Counter[str]:
    """Bytes of one parameter's state; a key without a component counts under its own name."""
    counted: Counter[str] = Counter()
    for key, value in state.items():
        nbytes = sum(tensor.numel() * tensor.element_size() for tensor in _tensors(value))
        if nbytes:
            counted[names.get(key, str(key))] += nbytes
    return counted


def _tensors(value: Any) -> Iterator[Tensor]:
    """The tensors in a state value, each once, also inside containers and objects that some optimizers keep there."""
    pending, seen = [value], set()
    while pending:
        item = pending.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, Tensor):
            yield item
        elif isinstance(item, Mapping):
            pending.extend(item.values())
        elif isinstance(item, (list, tuple)):
            pending.extend(item)
        elif hasattr(item, "__dict__") and not callable(item):
            # GaLore's projector, for example.
            pending.append(vars(item))
