"""What the device says about memory while ``optimizer.step()`` runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import psutil
import torch
from torch.optim import Optimizer

__all__ = ["StepMemory", "StepMemoryMeter"]


@dataclass(frozen=True)
class StepMemory:
    """Observations around one ``step()``, or the largest of several."""

    device: str
    # The most that tensors took on the device during a step. None where the device does not tell (the CPU), and as long
    # as no step went beyond what the process had taken before.
    peak_bytes: int | None = None
    process_rss_bytes: int | None = None  # on the CPU, resident memory of the process after the step

    def largest(self, other: StepMemory | None) -> StepMemory:
        """Return the larger of each figure."""
        both = (self,) if other is None else (self, other)
        peaks = [memory.peak_bytes for memory in both if memory.peak_bytes is not None]
        resident = [memory.process_rss_bytes for memory in both if memory.process_rss_bytes is not None]
        return StepMemory(self.device, max(peaks, default=None), max(resident, default=None))


class StepMemoryMeter:
    """Observes one step after the other.

    The devices count the peak since the process started, or since somebody reset it. So a step's own peak is known only
    if it is the highest so far, or with ``reset_peak``, which misleads whoever else reads the counter.
    """

    def __init__(self, *, reset_peak: bool = False) -> None:
        self.reset_peak = reset_peak
        self._peak_before: int | None = None

    def start(self, optimizer: Optimizer) -> None:
        """Note what is known before a step."""
        device = _device(optimizer)
        if (counters := _counters(device)) is None:
            return
        if self.reset_peak:
            counters.reset_peak_memory_stats(device)
        self._peak_before = counters.max_memory_allocated(device)

    def stop(self, optimizer: Optimizer) -> StepMemory:
        """Return what is known after it."""
        device = _device(optimizer)
        counters, before, self._peak_before = _counters(device), self._peak_before, None
        if device.type == "cpu":
            return StepMemory("cpu", process_rss_bytes=psutil.Process().memory_info().rss)
        if counters is None or before is None:
            return StepMemory(str(device))
        peak = int(counters.max_memory_allocated(device))
        return StepMemory(str(device), peak if peak > before or self.reset_peak else None)


def _device(optimizer: Optimizer) -> torch.device:
    """Return the device of the first parameter."""
    return next((p.device for group in optimizer.param_groups for p in group["params"]), torch.device("cpu"))


def _counters(device: torch.device) -> Any | None:
    """Return the module of the device (``torch.cuda``, ...) if it counts peaks."""
    if device.type in ("cpu", "meta"):
        return None
    module = torch.get_device_module(device)
    return module if hasattr(module, "max_memory_allocated") and hasattr(module, "reset_peak_memory_stats") else None
