"""``MemoryPlan``: what a training run takes with each optimizer, as plain data, as a table and as CSV."""

from __future__ import annotations

import csv
import io
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from hf_lowmem_optim.engine.sharding.traffic import StepTraffic
from hf_lowmem_optim.memory.byte_sizes import format_bytes
from hf_lowmem_optim.memory.communication import SyncTraffic, ddp_sent_bytes, fsdp_sent_bytes, sync_text, traffic_text
from hf_lowmem_optim.memory.learning_rates import LearningRate
from hf_lowmem_optim.memory.measure import StateReport
from hf_lowmem_optim.memory.plan_table import align
from hf_lowmem_optim.memory.weights import Processes, WeightReport

__all__ = ["PLAN_SCHEMA", "MemoryPlan", "OptimizerPlan", "Suggestion", "plan_csv", "plan_text"]

PLAN_SCHEMA = "hf-lowmem-optim/plan/2"

_NOT_COUNTED = "inputs, layers that FSDP gathers, the device's context and allocator, library workspaces"


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
            ``"window"``), the others as they are; 0 if none does. Without those of which every value fits.
        gradient_bytes: In layer-wise mode the gradients that are there at once, by kind; None if that is all of them.
        traffic: What a step after the first sends where FSDP2 splits the parameters; None elsewhere, and for baselines.
        sync: What its workers send to each other under DDP, if they step apart; None for any other optimizer.
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
    sync: SyncTraffic | None = None

    @property
    def bytes_per_parameter(self) -> float | None:
        """Bytes of state on this process per trained parameter of the model."""
        return None if self.state is None else self.state.total_bytes / self.state.num_parameters


@dataclass(frozen=True)
class Suggestion:
    """A change that brings a run nearer to a budget, and what a process then takes."""

    change: str  # what to write: "--optim ldadam_layerwise --optim-args dense_state=8bit"
    cost: str  # in quality, in time or in GPUs, in words
    total_bytes: int
    fits: bool


@dataclass(frozen=True)
class MemoryPlan:
    """What a training run takes, on one process; ``print`` gives a table.

    Attributes:
        source: What was planned: a preset, a path, the class of a live model.
        description: Dtype, adapters, quantization, frozen parts in words.
        processes: How the training is shared.
        weights: Weights and gradients.
        optimizers: One plan per optimizer.
        budget_bytes: The budget, if there was one.
        reserve_bytes: What of it stays free for what is not counted.
        suggestions: What to change to meet the budget; what costs nothing in quality comes first.
        activation_bytes: An estimate of activations, if a batch was given.
        notes: What else to know, in sentences.
        learning_rates: Rates to start from, if AdamW's was given.
    """

    source: str
    description: str
    processes: Processes
    weights: WeightReport
    optimizers: tuple[OptimizerPlan, ...]
    budget_bytes: int | None = None
    reserve_bytes: int = 0
    suggestions: tuple[Suggestion, ...] = ()
    activation_bytes: int | None = None
    notes: tuple[str, ...] = ()
    learning_rates: tuple[LearningRate, ...] = ()

    @property
    def usable_bytes(self) -> int | None:
        """The budget less the reserve."""
        return None if self.budget_bytes is None else self.budget_bytes - self.reserve_bytes

    @property
    def anything_fits(self) -> bool:
        """Whether an optimizer that was asked for stays within the budget, or there is none."""
        return self.budget_bytes is None or any(self.fits(optimizer) for optimizer in self.optimizers)

    def total_bytes(self, optimizer: OptimizerPlan) -> int | None:
        """Return weights, gradients, state, temporaries and activations with an optimizer; None if it has no state."""
        if optimizer.state is None:
            return None
        return self.sum_up(optimizer, optimizer.state.total_bytes, optimizer.temporary_bytes or 0)

    def sum_up(self, optimizer: OptimizerPlan, state: int, temporary: int) -> int:
        """Return what an optimizer takes with a state and temporaries of some bytes.

        Activations are gone when ``step()`` runs, so that the larger of them and what it allocates counts; but a
        layer-wise optimizer updates among them, and they have the gradient at hand in them.
        """
        activations = self.activation_bytes or 0
        weights, gradients = sum(self.weights.weight_bytes.values()), sum(self.gradient_bytes(optimizer).values())
        if optimizer.gradient_bytes is None:
            return weights + gradients + state + max(temporary, activations)
        return weights + max(gradients, activations) + state + temporary

    def gradient_bytes(self, optimizer: OptimizerPlan) -> Mapping[str, int]:
        """Return the gradients that are there at once with an optimizer, by kind."""
        return self.weights.gradient_bytes if optimizer.gradient_bytes is None else optimizer.gradient_bytes

    def fits(self, optimizer: OptimizerPlan) -> bool | None:
        """Return whether an optimizer stays within the budget less the reserve; None without one."""
        if (usable := self.usable_bytes) is None:
            return None
        total = self.total_bytes(optimizer)
        return optimizer.problem is None and total is not None and total <= usable

    def verdict(self, total_bytes: int | None) -> str:
        """Return in words how some bytes compare with the budget less the reserve."""
        if total_bytes is None or self.usable_bytes is None or self.budget_bytes is None:
            return "–"
        if total_bytes <= self.usable_bytes:
            return "fits"
        over = format_bytes(total_bytes - self.usable_bytes)
        return f"{over} into the reserve" if total_bytes <= self.budget_bytes else f"over by {over}"

    def __getitem__(self, name: str) -> OptimizerPlan:
        """Return the plan of the optimizer of a name, or raise KeyError."""
        by_name = {optimizer.name: optimizer for optimizer in self.optimizers}
        if name not in by_name:
            raise KeyError(f"{name!r} was not planned; there are {', '.join(by_name)}")
        return by_name[name]

    def __str__(self) -> str:
        return plan_text(self)

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
            "activation_bytes": self.activation_bytes,
            "budget_bytes": self.budget_bytes,
            "reserve_bytes": self.reserve_bytes,
            "not_counted": self.not_counted,
            "optimizers": [self._optimizer_dict(optimizer) for optimizer in self.optimizers],
            "suggestions": [asdict(suggestion) for suggestion in self.suggestions],
            "notes": list(self.notes),
            "learning_rates": [asdict(rate) for rate in self.learning_rates],
        }

    @property
    def not_counted(self) -> str:
        """What the totals leave out, in words."""
        return _NOT_COUNTED if self.activation_bytes is not None else f"activations, {_NOT_COUNTED}"

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
            "sync": None if optimizer.sync is None else asdict(optimizer.sync),
        }


def plan_text(plan: MemoryPlan) -> str:
    """Write a plan for people to read, also when it is piped: plain text, under 120 columns wide."""
    weights, processes = plan.weights, plan.processes
    share = f", per GPU of {processes.gpus} with {processes.sharding.upper()}" if processes.gpus > 1 else ""
    kinds = {"  weights": weights.weight_bytes, "  gradients": weights.gradient_bytes}
    sizes = [(name, _size(sum(parts.values())), _parts(parts)) for name, parts in kinds.items()]
    if plan.activation_bytes is not None:
        sizes.append(("  activations", f"{_size(plan.activation_bytes)}", "an estimate, see below"))
    if plan.budget_bytes is not None:
        reserve = (
            f"{plan.budget_bytes / 1e9:.3g} GB; {_size(plan.reserve_bytes)} of it are kept for what is not counted"
        )
        sizes.append(("  budget", _size(plan.budget_bytes), reserve))
    stepping = "the larger of step and activations" if plan.activation_bytes is not None else "step"
    lines = [
        f"{plan.source}: {weights.num_parameters:,} parameters, {weights.num_trainable:,} of them trained; "
        f"{plan.description}{share}",
        *align(sizes, left=3),
        "",
        *_optimizer_lines(plan),
        "",
        "B/param: state per trained parameter, and per parameter that is compressed. Step: what step() allocates and",
        f"frees, at most (–: not known). Total: weights, gradients, state, {stepping}.",
        f"Not counted: {plan.not_counted}.",
        *(line for note in plan.notes for line in textwrap.wrap(note, 116)),
    ]
    if plan.suggestions:
        lines += ["", "What to change for the budget; what costs nothing in quality comes first:"]
        lines += _suggestion_lines(plan)
    if plan.learning_rates:
        lines += ["", *_rate_lines(plan)]
    return "\n".join(lines)


def _suggestion_lines(plan: MemoryPlan) -> Iterator[str]:
    rows = [(f"  {plan.verdict(s.total_bytes)}", _total(s.total_bytes), s.change) for s in plan.suggestions]
    for line, suggestion in zip(align(rows, left=3), plan.suggestions, strict=True):
        yield line
        yield from _indented(suggestion.cost)


def _rate_lines(plan: MemoryPlan) -> Iterator[str]:
    yield f"Learning rates to start from where AdamW's is {plan.learning_rates[0].adamw:g}:"
    rows = [("  optimizer", "fine-tuning", "from scratch")]
    rows += [
        (f"  {rate.name}", _rate(rate, rate.fine_tuning), _rate(rate, rate.from_scratch))
        for rate in plan.learning_rates
    ]
    yield from align(rows)
    yield from textwrap.wrap(LearningRate.source, 116)


def _rate(rate: LearningRate, factor: float | None) -> str:
    return "not measured" if factor is None else f"{rate.adamw * factor:.3g} ({factor:g} ×)"


def _optimizer_lines(plan: MemoryPlan) -> Iterator[str]:
    """Yield the table of optimizers, each of ours with its settings and components below it."""
    header = ["optimizer", "state", "B/param", "compressed", "step", "total"]
    if plan.usable_bytes is not None:
        header += [f"≤ {_total(plan.usable_bytes)}", "largest that fits"]
    cells = [header, *(_cells(plan, row) for row in plan.optimizers)]
    aligned = align(cells)
    yield aligned[0]
    for line, row in zip(aligned[1:], plan.optimizers, strict=True):
        yield line
        if row.settings:
            yield from _indented(", ".join(f"{key}={value}" for key, value in row.settings.items()))
        if row.state is not None and row.registered:
            yield from _indented(_parts(row.state.component_bytes))
        if row.state is not None and (kept := row.state.in_gradient_bytes):
            yield f"    error: in {_size(kept)} of the gradients, which stay in memory between steps"
        if row.gradient_bytes is not None:
            yield f"    gradients: {_size(sum(row.gradient_bytes.values()))} at once, one tensor after the other"
        if row.traffic is not None:
            held, shards = plan.weights, plan.processes.num_shards
            own = fsdp_sent_bytes(sum(held.weight_bytes.values()), sum(held.gradient_bytes.values()), shards)
            yield from _indented(traffic_text(row.traffic, shards, own))
        if row.sync is not None:
            held, gpus = plan.weights, plan.processes.gpus
            gradients = held.gradient_bytes["gradients"]
            own = fsdp_sent_bytes(sum(held.weight_bytes.values()), gradients, gpus) // gpus
            yield from _indented(sync_text(row.sync, ddp_sent_bytes(gradients, gpus), own))
        if row.problem is not None:
            yield from _indented(f"cannot be used: {row.problem}")
        elif row.registered and row.compressed_bytes_per_parameter is None:
            yield "    compresses nothing at these settings: everything is plain AdamW"


def _indented(text: str) -> list[str]:
    """Return lines below an optimizer's own, no wider than a terminal of 120 columns."""
    return textwrap.wrap(text, 116, initial_indent="    ", subsequent_indent="      ", break_on_hyphens=False)


def _cells(plan: MemoryPlan, row: OptimizerPlan) -> list[str]:
    """Return one optimizer's line."""
    per_parameter = (row.bytes_per_parameter, row.compressed_bytes_per_parameter)
    total = plan.total_bytes(row)
    cells = [
        row.name,
        _size(None if row.state is None else row.state.total_bytes),
        *("–" if value is None else f"{value:.3g}" for value in per_parameter),
        _size(row.temporary_bytes),
        _total(total),
    ]
    if plan.budget_bytes is not None:
        largest = " ".join(f"{key}={value}" if value else f"no {key}" for key, value in row.largest.items())
        cells += ["no" if row.problem else plan.verdict(total), largest or "–"]
    return cells


def _size(count: int | None) -> str:
    return "–" if count is None else format_bytes(count)


def _total(count: int | None) -> str:
    """Write a size that is compared with others, by a digit more."""
    return "–" if count is None else format_bytes(count, 4)


def _parts(counts: Mapping[str, int]) -> str:
    """Return names with bytes, the largest first."""
    ordered = sorted(counts.items(), key=lambda item: -item[1])
    return ", ".join(f"{name} {format_bytes(count)}" for name, count in ordered)


def plan_csv(plan: MemoryPlan) -> str:
    """Write one line per optimizer, bytes as plain numbers, what is not known left empty."""
    content = plan.to_dict()
    before = ("name", "registered", "settings", "weight_bytes", "gradient_bytes", "activation_bytes")
    after = ("state_bytes", "temporary_bytes", "total_bytes", "bytes_per_parameter", "fits", "problem")
    text = io.StringIO()
    writer = csv.DictWriter(text, (*before, *after), extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for row in content["optimizers"]:
        row["settings"] = ",".join(f"{key}={value}" for key, value in row["settings"].items())
        row["weight_bytes"] = sum(content["weight_bytes"].values())
        row["gradient_bytes"] = sum(row["gradient_bytes"].values())
        row["activation_bytes"] = content["activation_bytes"]
        writer.writerow(row)
    return text.getvalue()
