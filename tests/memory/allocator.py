"""What an action allocates for a moment, counted from the allocator's own events."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import torch
from torch._C._profiler import _EventType
from torch.profiler import ProfilerActivity, profile

__all__ = ["peak_bytes"]

# Every profile would otherwise announce its start and end on stderr.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")


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
    # What was there before may be freed meanwhile; that is no part of the action, and its addresses are unknown here.
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
    """Time, address and size of every allocation; of every release, with a negative size."""
    pending = list(profiler.profiler.kineto_results.experimental_event_tree())  # type: ignore[union-attr]
    while pending:
        event = pending.pop()
        pending.extend(event.children)
        if event.tag == _EventType.Allocation:
            fields = event.extra_fields
            yield event.start_time_ns, fields.ptr, fields.alloc_size
