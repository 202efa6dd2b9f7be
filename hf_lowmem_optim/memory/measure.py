"""Bytes of optimizer state, observed: what is really allocated, by component and parameter group."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from hf_lowmem_optim.engine.optimizer import LowMemoryOptimizer
from hf_lowmem_optim.spec import TensorSpec

__all__ = ["StateReport", "StateTally", "measure_state", "unwrap_optimizer"]

ADAMW_FP32_BYTES_PER_PARAMETER = 8
"""Two float32 moments."""


@dataclass(frozen=True)
class StateReport:
    """How many bytes the state of an optimizer takes; the same for what is planned and for what is measured.

    Attributes:
        component_bytes: Bytes by component: ``"first_moment"``, ``"error"``, ``"dense"``, ... for the optimizers of
            this package, the keys of the state (``"exp_avg"``, ...) for others.
        group_bytes: Bytes by parameter group, in the optimizer's order; state that belongs to all parameters together
            is in none of them.
        num_parameters: Entries of all parameters of the optimizer.
        dtype_bytes: Bytes by storage dtype: ``"float32"``, ``"bfloat16"``, ``"uint8"``, ...
        in_gradient_bytes: Bytes of gradients in which an error is kept between steps (``error_feedback="grad"``): they
            count as gradients, and in none of the other figures.
    """

    component_bytes: Mapping[str, int]
    group_bytes: tuple[int, ...]
    num_parameters: int
    dtype_bytes: Mapping[str, int] = field(default_factory=dict)
    in_gradient_bytes: int = 0

    @property
    def total_bytes(self) -> int:
        """Bytes of the whole state."""
        return sum(self.component_bytes.values())

    @property
    def adamw_fp32_bytes(self) -> int:
        """Bytes that AdamW with float32 moments takes for the same parameters."""
        return ADAMW_FP32_BYTES_PER_PARAMETER * self.num_parameters


class StateTally:
    """Adds up bytes by component, group and dtype; planning and measuring both count with it."""

    def __init__(self) -> None:
        self._components: Counter[str] = Counter()
        self._dtypes: Counter[str] = Counter()
        self._groups: list[int] = []
        self._in_group = False
        self._in_gradient = 0

    def start_group(self) -> None:
        """Count what follows under the next parameter group."""
        self._groups.append(0)
        self._in_group = True

    def end_groups(self) -> None:
        """Count what follows under no group."""
        self._in_group = False

    def add(self, component: str, dtype: torch.dtype, nbytes: int) -> None:
        """Count some bytes; none are no entry."""
        if not nbytes:
            return
        self._components[component] += nbytes
        self._dtypes[str(dtype).removeprefix("torch.")] += nbytes
        if self._in_group:
            self._groups[-1] += nbytes

    def add_in_gradient(self, nbytes: int) -> None:
        """Count some bytes of what is kept in a gradient's buffer."""
        self._in_gradient += nbytes

    def report(self, num_parameters: int) -> StateReport:
        """Return what was counted."""
        return StateReport(
            dict(self._components), tuple(self._groups), num_parameters, dict(self._dtypes), self._in_gradient
        )


def measure_state(optimizer: Optimizer, *, local: bool = False) -> StateReport:
    """Count the bytes of all tensors in an optimizer's state, as they are now.

    State is allocated at a parameter's first gradient, so before the first step the report is empty. A tensor counts
    with the bytes of its own entries (not of a storage it may be a view of), and once, however many parameters share
    it; a quantized tensor with the bytes of its codes and statistics; Python numbers count nothing. An error that is
    kept in the gradient's buffer counts as state only while the parameter has another gradient beside it.

    Args:
        optimizer: Any torch optimizer, or accelerate's wrapper around one.
        local: Count this process's part of sharded tensors (DTensors) instead of all parts together.

    Returns:
        The report.
    """
    optimizer = unwrap_optimizer(optimizer)
    tally, seen = StateTally(), set[int]()

    def count(state: Mapping[str, Any], specs: Mapping[str, TensorSpec], grad: Tensor | None = None) -> None:
        """Count one parameter's state; a key without a component counts under its own name."""
        for key, value in state.items():
            spec = specs.get(key)
            for tensor in _tensors(value, seen):
                in_gradient = spec is not None and spec.in_gradient and _is_or_becomes(tensor, grad)
                for dtype, nbytes in _stored(tensor, local):
                    if in_gradient:
                        tally.add_in_gradient(nbytes)
                    else:
                        tally.add(spec.component if spec else str(key), dtype, nbytes)

    in_groups = set()
    for group in optimizer.param_groups:
        tally.start_group()
        for parameter in group["params"]:
            in_groups.add(parameter)
            # `get`, because torch's state is a defaultdict: looking must not create entries.
            state = optimizer.state.get(parameter)
            if state:
                method = optimizer.method if isinstance(optimizer, LowMemoryOptimizer) else None
                count(state, {} if method is None else method.state_specs(parameter, group), parameter.grad)
    # What an optimizer keeps for all its parameters together belongs to no group.
    tally.end_groups()
    for key, state in optimizer.state.items():
        if key not in in_groups:
            count(state if isinstance(state, Mapping) else {str(key): state}, {})
    return tally.report(sum(parameter.numel() for group in optimizer.param_groups for parameter in group["params"]))


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


def _is_or_becomes(tensor: Tensor, grad: Tensor | None) -> bool:
    """Return whether a state tensor is the buffer of the parameter's gradient, or waits to be it."""
    return grad is None or grad.data_ptr() == tensor.data_ptr()


def _tensors(value: Any, seen: set[int]) -> Iterator[Tensor]:
    """Yield the tensors in a state value, each once, also inside containers and objects that some optimizers keep."""
    pending = [value]
    while pending:
        item = pending.pop()
        # The state keeps every item alive, so that an id stands for one item only.
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
            pending.extend(vars(item).values())


def _stored(tensor: Tensor, local: bool) -> Iterator[tuple[torch.dtype, int]]:
    """Yield dtype and bytes of what a tensor really stores: itself, or what a wrapper (quantized, DTensor) holds."""
    # A DTensor knows the shape of the whole: no need to ask the other processes.
    inner = _wrapped(tensor)
    whole = hasattr(tensor, "placements") and not local and not any(_wrapped(part) for part in inner)
    if whole or not inner:
        yield tensor.dtype, tensor.numel() * tensor.element_size()
        return
    for part in inner:
        yield from _stored(part, local)


def _wrapped(tensor: Any) -> list[Tensor]:
    """Return the tensors inside a wrapper subclass, none for a plain tensor."""
    if not is_traceable_wrapper_subclass(tensor):
        return []
    inner = (getattr(tensor, name) for name in tensor.__tensor_flatten__()[0])
    # A DTensor names its mesh as well.
    return [part for part in inner if isinstance(part, Tensor)]
