"""Bytes of optimizer state, observed: what is really allocated, by component and parameter group."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from hf_lowmem_optim.engine.buckets import SHARED_PREFIX
from hf_lowmem_optim.engine.optimizer import LowMemoryOptimizer
from hf_lowmem_optim.local_updates.optimizer import find_local_updates
from hf_lowmem_optim.memory.byte_sizes import format_bytes
from hf_lowmem_optim.memory.plan_table import align
from hf_lowmem_optim.ops.constants import held_constant
from hf_lowmem_optim.spec import TensorSpec

__all__ = ["Piece", "StateReport", "add_up", "measure_state", "unwrap_optimizer"]

Specs = Mapping[str, TensorSpec]


@dataclass(frozen=True)
class StateReport:
    """How many bytes the state of an optimizer takes; the same for what is planned and for what is measured.

    Attributes:
        component_bytes: Bytes by component: ``"first_moment"``, ``"error"``, ``"dense"``, ... for the optimizers of
            this package, the keys of the state (``"exp_avg"``, ...) for others.
        group_bytes: Bytes by parameter group, in the optimizer's order; state that belongs to all parameters together,
            and constants that all optimizers of the process share (``"dct_basis"``), are in none of them.
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
        return 8 * self.num_parameters

    def __str__(self) -> str:
        """Return a table: bytes by component, the total, what AdamW with float32 moments would take."""
        rows = [(f"  {name}", format_bytes(count)) for name, count in self.component_bytes.items()]
        per_parameter = f"{self.total_bytes / self.num_parameters:.3g} B/param" if self.num_parameters else ""
        rows += [("  all", format_bytes(self.total_bytes)), ("  AdamW fp32", format_bytes(self.adamw_fp32_bytes))]
        return "\n".join([f"State of {self.num_parameters:,} parameters: {per_parameter}".rstrip(": "), *align(rows)])

    def breakdown(self) -> dict[str, Any]:
        """Return the figures below the total as JSON values."""
        return {
            "component_bytes": dict(self.component_bytes),
            "group_bytes": list(self.group_bytes),
            "dtype_bytes": dict(self.dtype_bytes),
            "in_gradient_bytes": self.in_gradient_bytes,
        }


class Piece(NamedTuple):
    """Bytes of state of one kind, in a gradient's buffer or not; planning and measuring both count such."""

    group: int | None  # None for what belongs to all parameters together
    component: str
    dtype: torch.dtype
    nbytes: int
    in_gradient: bool = False


def add_up(pieces: Iterable[Piece], num_groups: int, num_parameters: int) -> StateReport:
    """Return the report of some pieces of state; those of no bytes have no entry."""
    components, dtypes, groups, in_gradient = Counter[str](), Counter[str](), [0] * num_groups, 0
    for piece in pieces:
        if piece.in_gradient:
            in_gradient += piece.nbytes
        elif piece.nbytes:
            components[piece.component] += piece.nbytes
            dtypes[str(piece.dtype).removeprefix("torch.")] += piece.nbytes
            if piece.group is not None:
                groups[piece.group] += piece.nbytes
    return StateReport(dict(components), tuple(groups), num_parameters, dict(dtypes), in_gradient)


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
    inner = unwrap_optimizer(optimizer)
    groups = inner.param_groups
    numel = sum(parameter.numel() for group in groups for parameter in group["params"])
    local_updates = find_local_updates(optimizer)
    outer = {} if local_updates is None else local_updates.outer_state
    return add_up([*_pieces(inner, local), *_outer_pieces(groups, outer)], len(groups), numel)


def _pieces(optimizer: Optimizer, local: bool) -> Iterator[Piece]:
    """Yield the state of every parameter, and what an optimizer keeps for all of them together."""
    seen, in_groups = set[int](), set()
    method = optimizer.method if isinstance(optimizer, LowMemoryOptimizer) else None
    common = {} if method is None else method.shared_specs(optimizer.param_groups)
    shared_specs = {SHARED_PREFIX + key: spec for key, spec in common.items()}
    for index, group in enumerate(optimizer.param_groups):
        for parameter in group["params"]:
            in_groups.add(parameter)
            # `get`, because torch's state is a defaultdict: looking must not create entries.
            if state := optimizer.state.get(parameter):
                specs = {} if method is None else method.state_specs(parameter, group)
                shared = {key: value for key, value in state.items() if specs and str(key).startswith(SHARED_PREFIX)}
                own = {key: value for key, value in state.items() if key not in shared}
                yield from _pieces_of(own, index, specs, parameter.grad, seen, local)
                yield from _pieces_of(shared, None, shared_specs, None, seen, local)
    if method is not None:
        stepped = [{**g, "params": [p for p in g["params"] if optimizer.state.get(p)]} for g in optimizer.param_groups]
        for key, spec in method.constants_of(stepped).items():
            if (held := held_constant(key)) is not None:
                yield Piece(None, spec.component, held.dtype, held.nbytes)
    for key, state in optimizer.state.items():
        if key not in in_groups:
            entry = state if isinstance(state, Mapping) else {str(key): state}
            yield from _pieces_of(entry, None, {}, None, seen, local)


def _outer_pieces(groups: Sequence[Mapping[str, Any]], outer: Mapping[Tensor, Mapping[str, Tensor]]) -> Iterator[Piece]:
    """Yield what the outer step of local updates keeps of every parameter."""
    for index, group in enumerate(groups):
        for param in group["params"]:
            for tensor in outer.get(param, {}).values():
                yield Piece(index, "outer", tensor.dtype, tensor.nbytes)


def _pieces_of(
    state: Mapping[str, Any], group: int | None, specs: Specs, grad: Tensor | None, seen: set[int], local: bool
) -> Iterator[Piece]:
    """Yield one parameter's state; a key without a component counts under its own name."""
    for key, value in state.items():
        spec = specs.get(key)
        for tensor in _tensors(value, seen):
            # it is the buffer of the gradient, or waits to be it
            is_gradient = grad is None or grad.data_ptr() == tensor.data_ptr()
            in_gradient = spec is not None and spec.in_gradient and is_gradient
            for dtype, nbytes in _stored(tensor, local):
                yield Piece(group, spec.component if spec else str(key), dtype, nbytes, in_gradient)


def unwrap_optimizer(optimizer: Optimizer) -> Optimizer:
    """Return the optimizer inside accelerate's (or a similar) wrapper, which is an ``Optimizer`` holding another."""
    while isinstance(inner := getattr(optimizer, "optimizer", None), Optimizer):
        optimizer = inner
    return optimizer


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
        elif isinstance(item, (list, tuple)):
            pending.extend(item)
        elif isinstance(item, Mapping):
            pending.extend(item.values())
        elif hasattr(item, "__dict__") and not callable(item):  # GaLore's projector, for example
            pending.extend(vars(item).values())


def _stored(tensor: Tensor, local: bool) -> Iterator[tuple[torch.dtype, int]]:
    """Yield dtype and bytes of what a tensor really stores: itself, or what a wrapper (quantized, DTensor) holds."""
    inner = _wrapped(tensor)
    # A DTensor knows the shape of the whole: no need to ask the other processes.
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
