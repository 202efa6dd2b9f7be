"""Steps of many optimizers in one process, one after the other in every round, so that noise meets all of them alike.

All optimizers of a workload share its parameters and gradients and have only their state to themselves: so 20 of them
fit into memory. An optimizer that changes the gradients would be unfair to the next, and is refused.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from machine import OtherLoad
from peers import FOREACH, FUSED, Candidate, trainable
from temporaries import peak_bytes
from torch import nn

from hf_lowmem_optim.kernels.workers import one_thread
from hf_lowmem_optim.memory.measure import measure_state

__all__ = ["MIN_ROUNDS", "SEED", "Contender", "Workload", "compare", "enter", "summarize"]

SEED = 0
#: Steps before the rounds at least: allocators settle in two, and a window is full only after its length.
_WARM_STEPS = 2
MIN_ROUNDS = 5


class Workload:
    """A model's parameters with fixed random gradients.

    Args:
        name: Of the shapes.
        model: The model; only its trainable parameters get gradients.
    """

    def __init__(self, name: str, model: nn.Module) -> None:
        self.name = name
        self.model = model
        self.parameters = trainable(model)
        self.device = self.parameters[0].device
        self.num_parameters = sum(parameter.numel() for parameter in self.parameters)
        generator = torch.Generator(self.device).manual_seed(SEED)
        for parameter in self.parameters:
            gradient = torch.randn(parameter.shape, generator=generator, device=self.device) * 1e-3
            parameter.grad = gradient.to(parameter.dtype)
        self._fingerprint = self._gradient_sums()

    def _gradient_sums(self) -> list[float]:
        return [float("nan") if p.grad is None else p.grad.sum(dtype=torch.float64).item() for p in self.parameters]

    def gradients_changed(self) -> bool:
        """Whether a gradient is not what it was."""
        return self._gradient_sums() != self._fingerprint

    def is_finite(self) -> bool:
        """Whether every parameter is still a number."""
        return all(bool(parameter.isfinite().all()) for parameter in self.parameters)


@dataclass
class Contender:
    """An optimizer on a workload, and the times of its steps."""

    candidate: Candidate
    workload: Workload
    optimizer: torch.optim.Optimizer
    first_step_ms: float
    times_ms: list[float] = field(default_factory=list)

    def step_ms(self) -> float:
        """Take one step; return its milliseconds."""
        return timed_step_ms(self.optimizer, self.workload.device)


def timed_step_ms(optimizer: torch.optim.Optimizer, device: torch.device) -> float:
    """Milliseconds of one step, until the device has finished it."""
    if device.type == "cuda":
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(device)
        begin.record()
        optimizer.step()
        end.record()
        torch.cuda.synchronize(device)
        return begin.elapsed_time(end)
    start = time.perf_counter()
    optimizer.step()
    return 1e3 * (time.perf_counter() - start)


def enter(candidate: Candidate, workload: Workload) -> Contender | str:
    """Build an optimizer and take its first steps.

    Args:
        candidate: The optimizer.
        workload: What it steps over.

    Returns:
        The contender; or, for an optimizer that is not ours, why it cannot take part.
    """
    if candidate.problem is not None:
        return candidate.problem
    if candidate.ours:
        # kernels are compiled, and libraries set themselves up, before the first step is timed
        model = nn.ModuleList([nn.Linear(192, 160), nn.Linear(160, 192)])
        small = Workload("warm-up", model.to(workload.device, workload.parameters[0].dtype))
        optimizer = candidate.build(small.model)
        for _ in range(2):
            optimizer.step()
    try:
        optimizer = candidate.build(workload.model)
        contender = Contender(candidate, workload, optimizer, timed_step_ms(optimizer, workload.device))
    except Exception as error:
        if candidate.ours:
            raise
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    if workload.gradients_changed():
        raise RuntimeError(f"{candidate.name} changes the gradients, which it shares with the others")
    window = max((group.get("window") or 0 for group in optimizer.param_groups), default=0)
    for _ in range(max(_WARM_STEPS, int(window))):
        optimizer.step()
    return contender


def compare(contenders: Sequence[Contender], rounds: int, seconds: float) -> float:
    """Run the rounds, each one step of everyone in an order of its own.

    Args:
        contenders: Who takes part; their ``times_ms`` are filled.
        rounds: How many at most.
        seconds: Stop after this time, but not before five rounds.

    Returns:
        How many cores others used meanwhile.
    """
    order, shuffle = list(contenders), random.Random(SEED)
    others, deadline = OtherLoad(), time.monotonic() + seconds
    for number in range(rounds):
        if number >= MIN_ROUNDS and time.monotonic() > deadline:
            break
        shuffle.shuffle(order)
        for contender in order:
            contender.times_ms.append(contender.step_ms())
    for workload in {id(c.workload): c.workload for c in contenders}.values():
        if not workload.is_finite():
            raise RuntimeError(f"a parameter of {workload.name} is not finite any more: times of nonsense")
    return others.cores()


def summarize(contender: Contender, others: Sequence[Contender]) -> dict[str, Any]:
    """One line of the table: medians over the rounds, ratios round by round to the AdamW of the same workload.

    Args:
        contender: Whose line.
        others: All contenders, in which the two AdamW are looked for.

    Returns:
        Median and spread (90th minus 10th percentile) in ms, ratios, first step, bytes of state per parameter, and the
        most bytes that a step allocates on one thread.
    """
    times = contender.times_ms
    row: dict[str, Any] = {
        "median_ms": round(statistics.median(times), 4),
        "spread_ms": round(_spread(times), 4),
        "ns_per_parameter": round(1e6 * statistics.median(times) / contender.workload.num_parameters, 4),
    }
    for key, name in (("foreach", FOREACH), ("fused", FUSED)):
        base = [c for c in others if c.candidate.name == name and c.workload is contender.workload]
        if base:
            low, middle, high = ratio(contender, base[0])
            row |= {f"ratio_to_{key}": middle, f"ratio_to_{key}_p10": low, f"ratio_to_{key}_p90": high}
    return {
        **row,
        "first_step_ms": round(contender.first_step_ms, 4),
        "state_bytes_per_parameter": measure_state(contender.optimizer).total_bytes / contender.workload.num_parameters,
        "peak_temporary_bytes": _peak_of_one_thread(contender),
        "rounds": len(times),
    }


def _peak_of_one_thread(contender: Contender) -> int:
    """Most bytes that a step allocates on one thread; on a CPU ours take as much for each that there is."""
    with one_thread():
        return peak_bytes(contender.optimizer.step, contender.workload.device)


def ratio(numerator: Contender, denominator: Contender) -> tuple[float, float, float]:
    """10th percentile, median and 90th percentile of the ratios round by round."""
    ratios = [a / b for a, b in zip(numerator.times_ms, denominator.times_ms, strict=True)]
    deciles = statistics.quantiles(ratios, n=10)
    return round(deciles[0], 4), round(statistics.median(ratios), 4), round(deciles[8], 4)


def _spread(times: Sequence[float]) -> float:
    deciles = statistics.quantiles(times, n=10)
    return deciles[8] - deciles[0]
