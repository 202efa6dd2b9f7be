"""What an action allocates for a moment, counted from the allocator's own events."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile

__all__ = ["peak_bytes"]


def peak_bytes(action: Callable[[], object], device: torch.device | str = "cpu") -> int:
    """Return the most bytes that were allocated on top of what was there before, at any moment of the action.

    On the CPU torch's profiler tells of every allocation of a tensor (not of what libraries allocate for themselves);
    on a GPU the device counts the peak, which is reset.

    Args:
        action: What to run.
        device: Where it allocates.

    Returns:
        Bytes.
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
    events = profiler.profiler.kineto_results.events()  # type: ignore[union-attr]
    deltas = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    live = peak = 0
    for _, delta in deltas:
        live += delta
        peak = max(peak, live)
    return peak
