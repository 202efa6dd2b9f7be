"""Step many optimizers in one process, one after the other in every round, so that noise meets all of them alike.

All optimizers of a workload share its parameters and gradients and have only their state to themselves: so 20 of them
fit into memory. An optimizer that changes the gradients would be unfair to the next, and is refused.
"""

from __future__ import annotations

import os
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from machine import OtherLoad
from peers import FOREACH, FUSED, Candidate, trainable
from shapes import SHAPES
from torch import nn
from torch._C._profiler import _EventType
from torch.profiler import ProfilerActivity, profile

from hf_lowmem_optim import CapturedStep, measure_state

SEED = 0
MIN_ROUNDS = 5
#: Steps before the rounds at least: allocators settle in two, and a window is full only after its length.
_WARM_STEPS = 2
# every profile would otherwise announce its start and end on stderr
os.environ.setdefault("KINETO_LOG_LEVEL", "99")


class Workload:
    """Hold a model's trainable parameters with fixed random gradients.

    Args:
        name: Of the shapes.
        model: The model.
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
        """Return whether a gradient is not what it was."""
        return self._gradient_sums() != self._fingerprint


def workload(shapes: str, dtype: str = "float32", device: str = "cpu") -> Workload:
    """Build a set of shapes with the benchmarks' seed."""
    torch.manual_seed(SEED)
    return Workload(shapes, SHAPES[shapes]().to(device=device, dtype=getattr(torch, dtype)))


@dataclass
class Contender:
    """Hold an optimizer on a workload, and the times of its steps."""

    candidate: Candidate
    workload: Workload
    optimizer: torch.optim.Optimizer
    step: Callable[[], object]
    first_step_ms: float
    times_ms: list[float] = field(default_factory=list)
    #: Until ``step()`` returned, where the device goes on after that.
    host_times_ms: list[float] = field(default_factory=list)


def timed_step_ms(step: Callable[[], object], device: torch.device) -> tuple[float, float]:
    """Take a step and return its milliseconds until the device has finished it, and until ``step()`` returned."""
    if device.type == "cuda":
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(device)
        begin.record()
    start = time.perf_counter()
    step()
    host_ms = 1e3 * (time.perf_counter() - start)
    if device.type != "cuda":
        return host_ms, host_ms
    end.record()
    torch.cuda.synchronize(device)
    return float(begin.elapsed_time(end)), host_ms


def enter(candidate: Candidate, work: Workload) -> Contender | str:
    """Build an optimizer and take its first steps; return the contender, or why a peer cannot take part."""
    if candidate.problem is not None:
        return candidate.problem
    if candidate.ours:
        # kernels are compiled, and libraries set themselves up, before the first step is timed
        model = nn.ModuleList([nn.Linear(192, 160), nn.Linear(160, 192)])
        small = Workload("warm-up", model.to(work.device, work.parameters[0].dtype))
        optimizer = candidate.build(small.model)
        step = step_of(optimizer, candidate)
        for _ in range(2):
            step()
    try:
        optimizer = candidate.build(work.model)
        step = step_of(optimizer, candidate)
        contender = Contender(candidate, work, optimizer, step, timed_step_ms(step, work.device)[0])
    except Exception as error:
        if candidate.ours:
            raise
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    if work.gradients_changed():
        raise RuntimeError(f"{candidate.name} changes the gradients, which it shares with the others")
    window = max((group.get("window") or 0 for group in optimizer.param_groups), default=0)
    # a full window is recorded in the second step from then on
    for _ in range(max(_WARM_STEPS, int(window)) + (3 if candidate.captured else 0)):
        step()
    return contender


def step_of(optimizer: Any, candidate: Candidate) -> Callable[[], object]:
    """Return what takes a step."""
    step: Callable[[], object] = optimizer.step  # of any class: peers have no type in common
    return CapturedStep(optimizer) if candidate.captured else step


def compare(contenders: Sequence[Contender], rounds: int, seconds: float) -> float:
    """Fill the times of the contenders by rounds, each one step of everyone in an order of its own.

    Args:
        contenders: Who takes part.
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
            milliseconds, on_host = timed_step_ms(contender.step, contender.workload.device)
            contender.times_ms.append(milliseconds)
            contender.host_times_ms.append(on_host)
    for work in {id(c.workload): c.workload for c in contenders}.values():
        if not all(bool(parameter.isfinite().all()) for parameter in work.parameters):
            raise RuntimeError(f"a parameter of {work.name} is not finite any more: times of nonsense")
    return others.cores()


def ratio(numerator: Contender, denominator: Contender) -> tuple[float, float, float]:
    """Return the 10th percentile, median and 90th percentile of the ratios round by round."""
    ratios = [a / b for a, b in zip(numerator.times_ms, denominator.times_ms, strict=True)]
    deciles = statistics.quantiles(ratios, n=10)
    return round(deciles[0], 4), round(statistics.median(ratios), 4), round(deciles[8], 4)


def summarize(contender: Contender, others: Sequence[Contender]) -> dict[str, Any]:
    """Return one line of the table; its spread is the 90th minus the 10th percentile."""
    times, num_parameters = contender.times_ms, contender.workload.num_parameters
    median, deciles = statistics.median(times), statistics.quantiles(times, n=10)
    row: dict[str, Any] = {
        "median_ms": round(median, 4),
        "spread_ms": round(deciles[8] - deciles[0], 4),
        "ns_per_parameter": round(1e6 * median / num_parameters, 4),
    }
    if contender.workload.device.type == "cuda":
        row["host_ms"] = round(statistics.median(contender.host_times_ms), 4)
    for key, name in (("foreach", FOREACH), ("fused", FUSED)):
        for baseline in others:
            if baseline.candidate.name == name:
                low, middle, high = ratio(contender, baseline)
                row |= {f"ratio_to_{key}": middle, f"ratio_to_{key}_p10": low, f"ratio_to_{key}_p90": high}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # several threads may allocate scratch each
    peak = peak_bytes(contender.step, contender.workload.device)
    torch.set_num_threads(threads)
    return {
        **row,
        "first_step_ms": round(contender.first_step_ms, 4),
        "state_bytes_per_parameter": measure_state(contender.optimizer).total_bytes / num_parameters,
        "peak_temporary_bytes": peak,
        "rounds": len(times),
    }


def peak_bytes(action: Callable[[], object], device: torch.device | str = "cpu") -> int:
    """Return the most bytes that were allocated on top of what was there before, at any moment of an action.

    On the CPU torch's profiler tells of every tensor (not of what libraries allocate); a GPU's peak is reset.
    """
    device = torch.device(device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        action()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        action()
    # what was there before may be freed meanwhile: that is no part of the action, and its addresses are unknown here
    allocated: dict[int, int] = {}
    live = peak = 0
    for _, address, size in sorted(_allocations(profiler)):
        if size > 0:
            allocated[address] = size
            live += size
        else:
            live -= allocated.pop(address, 0)
        peak = max(peak, live)
    return peak


def _allocations(profiler: profile) -> Iterator[tuple[int, int, int]]:
    """Yield time, address and size of every allocation; of every release, with a negative size."""
    pending = list(profiler.profiler.kineto_results.experimental_event_tree())  # type: ignore[union-attr]
    while pending:
        event = pending.pop()
        pending.extend(event.children)
        if event.tag == _EventType.Allocation:
            yield event.start_time_ns, event.extra_fields.ptr, event.extra_fields.alloc_size
