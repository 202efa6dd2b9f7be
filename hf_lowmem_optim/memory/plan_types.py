"""``MemoryPlan``: what a training run takes with each optimizer, as plain data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from hf_lowmem_optim.engine.sharding.traffic import StepTraffic
from hf_lowmem_optim.memory.measure import StateReport
from hf_lowmem_optim.memory.weights import Processes, WeightReport

__all__ = ["NOT_COUNTED", "PLAN_SCHEMA", "MemoryPlan", "OptimizerPlan", "Suggestion"]

PLAN_SCHEMA = "hf-lowmem-optim/plan/1"

NOT_COUNTED = "activations, inputs, layers that FSDP gathers, the device's context and allocator, library workspaces"


@dataclass(frozen=True)
class OptimizerPlan:
    """What one optimizer adds, on one process.

    Attributes:
        name: ``"ldadam"``, or a baseline's name.
        registered: Whether it is one of this package.
        summary: What it does, in a line.
        settings: The hyper-parameters on which its state depends.
        state: Its state, or None where it cannot be used.
        temporary_bytes: What ``step()`` allocates for a moment beside the state, at most; None where that is unknown.
        compressed_bytes_per_parameter: State per entry of the parameters that it compresses; None if there are none,
            and for baselines.
        problem: Why it cannot be used here, or None.
        largest: With a budget: the largest value that fits of each hyper-parameter that scales the state (``"rank"``,
            ``"window"``), the others as they are; 0 if none does.
        gradient_bytes: The gradients that are there at once, by kind; None if that is all of them.
        traffic: What a step after the first sends where FSDP2 splits the parameters; None elsewhere, and for baselines.
    """

    name: str
    registered: bool
    summary: str
    settings: Mapping[str, Any]
    state: StateReport | None
    temporary_bytes: int | None = None
    compressed_bytes_per_parameter: float | None = None
    problem: str | None = None
    largest: Mapping[str, int] = field(default_factory=dict)
    gradient_bytes: Mapping[str, int] | None = None
    traffic: StepTraffic | None = None

    @property
    def bytes_per_parameter(self) -> float | None:
        """Bytes of state on this process per trained parameter of the model."""
        return None if self.state is None else self.state.total_bytes / self.state.num_parameters

    @property
    def added_bytes(self) -> int | None:
        """State and temporaries together, without the temporaries where they are unknown."""
        return None if self.state is None else self.state.total_bytes + (self.temporary_bytes or 0)


@dataclass(frozen=True)
class Suggestion:
    """A change after which a budget is met, or which comes nearest to it, and what a process then takes."""

    change: str  # what to write: "--optim ldadam --optim-args error_feedback=none"
    total_bytes: int
    fits: bool


@dataclass(frozen=True)
class MemoryPlan:
    """What a training run takes at ``optimizer.step()``, on one process.

    Attributes:
        source: What was planned: a preset, a path, the class of a live model.
        description: Dtype, adapters, quantization, frozen parts in words.
        processes: How the training is shared.
        weights: Weights and gradients.
        optimizers: One plan per optimizer.
        budget_bytes: The budget, if there was one.
        suggestions: What to change to meet the budget, the smallest change first.
    """

    source: str
    description: str
    processes: Processes
    weights: WeightReport
    optimizers: tuple[OptimizerPlan, ...]
    budget_bytes: int | None = None
    suggestions: tuple[Suggestion, ...] = ()

    def total_bytes(self, optimizer: OptimizerPlan) -> int | None:
        """Return weights, gradients, state and temporaries with an optimizer; None where it cannot be used."""
        added = optimizer.added_bytes
        return None if added is None else self.held_bytes(optimizer) + added

    def gradient_bytes(self, optimizer: OptimizerPlan) -> Mapping[str, int]:
        """Return the gradients that are there at once with an optimizer, by kind."""
        return self.weights.gradient_bytes if optimizer.gradient_bytes is None else optimizer.gradient_bytes

    def held_bytes(self, optimizer: OptimizerPlan) -> int:
        """Return weights and gradients with an optimizer."""
        return sum(self.weights.weight_bytes.values()) + sum(self.gradient_bytes(optimizer).values())

    def fits(self, optimizer: OptimizerPlan) -> bool | None:
        """Return whether an optimizer stays within the budget; None without one."""
        if self.budget_bytes is None:
            return None
        total = self.total_bytes(optimizer)
        return optimizer.problem is None and total is not None and total <= self.budget_bytes

    def __getitem__(self, name: str) -> OptimizerPlan:
        """Return the plan of the optimizer of a name, or raise KeyError."""
        by_name = {optimizer.name: optimizer for optimizer in self.optimizers}
        if name not in by_name:
            raise KeyError(f"{name!r} was not planned; there are {', '.join(by_name)}")
        return by_name[name]

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON values; the layout is fixed by ``"schema"``."""
        weights = self.weights
        return {
            "schema": PLAN_SCHEMA,
            "source": self.source,
            "description": self.description,
            "num_parameters": weights.num_parameters,
            "num_trainable": weights.num_trainable,
            "parameters_by_dtype": dict(weights.dtypes),
            "gpus": self.processes.gpus,
            "sharding": self.processes.sharding,
            "weight_bytes": dict(weights.weight_bytes),
            "gradient_bytes": dict(weights.gradient_bytes),
            "budget_bytes": self.budget_bytes,
            "not_counted": NOT_COUNTED,
            "optimizers": [self._optimizer_dict(optimizer) for optimizer in self.optimizers],
            "suggestions": [asdict(suggestion) for suggestion in self.suggestions],
        }

    def _optimizer_dict(self, optimizer: OptimizerPlan) -> dict[str, Any]:
        state = StateReport({}, (), 0) if optimizer.state is None else optimizer.state
        return {
            "name": optimizer.name,
            "registered": optimizer.registered,
            "summary": optimizer.summary,
            "settings": dict(optimizer.settings),
            "problem": optimizer.problem,
            "state_bytes": None if optimizer.state is None else state.total_bytes,
            **state.breakdown(),
            "gradient_bytes": dict(self.gradient_bytes(optimizer)),
            "temporary_bytes": optimizer.temporary_bytes,
            "total_bytes": self.total_bytes(optimizer),
            "bytes_per_parameter": optimizer.bytes_per_parameter,
            "compressed_bytes_per_parameter": optimizer.compressed_bytes_per_parameter,
            "fits": self.fits(optimizer),
            "largest_that_fits": dict(optimizer.largest),
            "sent_bytes": {} if optimizer.traffic is None else dict(optimizer.traffic.sent_bytes),
            "calls": None if optimizer.traffic is None else optimizer.traffic.calls,
        }
