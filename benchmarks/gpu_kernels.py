"""Profile some steps of every optimizer of ours and of fused AdamW: launches and microseconds by kernel.

    python benchmarks/gpu_kernels.py --save benchmarks/results/gpu_kernels.json

Beside them stands how many bytes a second a large copy on the device reads and writes. Rows are saved after each
optimizer.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from interleave import SEED, workload
from peers import FUSED, ours, peer
from results import describe_run, save_run
from torch.profiler import ProfilerActivity, profile

#: Steps that the profile averages over.
_STEPS = 5
_COPIED_BYTES = 1 << 32
SHAPES = ("large", "llama")


def copy_bandwidth() -> float:
    """Return the bytes per second that a large copy on the device reads and writes."""
    source = torch.empty(_COPIED_BYTES, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    times = []
    for _ in range(5):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        target.copy_(source)
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return 2 * _COPIED_BYTES / min(times)


def profile_step(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """Return the rows of a later step."""
    for _ in range(3):
        optimizer.step()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as profiler:
        for _ in range(_STEPS):
            optimizer.step()
        torch.cuda.synchronize()
    return kernel_rows(profiler)


def kernel_rows(profiler: Any) -> list[dict[str, Any]]:
    """Return what ran on the device: kernel, launches and microseconds of one step, the slowest first.

    What takes less than a hundredth of all is one row. The row of the step itself is the time from its first launch to
    the end of its last: where it is much longer than the others' sum, the device waits for the host.
    """
    events = [event for event in profiler.key_averages() if event.device_type == torch.autograd.DeviceType.CUDA]
    rows: list[dict[str, Any]] = []
    rest = {"kernel": "all others", "launches": 0.0, "microseconds": 0.0}
    step = {"kernel": "first launch to end", "launches": 0.0, "microseconds": 0.0}
    spans = [event for event in events if event.key.startswith("Optimizer.step#")]
    events = [event for event in events if event not in spans]
    least = sum(event.self_device_time_total for event in events) / 100
    for event in events:
        found = {"kernel": event.key[:120], "launches": event.count, "microseconds": event.self_device_time_total}
        if event.self_device_time_total >= least:
            rows.append(found)
        else:
            rest = {key: rest[key] + found[key] if key != "kernel" else rest[key] for key in rest}
    step["microseconds"] = sum(event.self_device_time_total for event in spans)
    rows = [*sorted(rows, key=lambda row: -row["microseconds"]), rest, step]
    per_step = ("launches", "microseconds")
    return [{k: round(v / _STEPS, 2) if k in per_step else v for k, v in row.items()} for row in rows]


def main() -> None:
    """Profile, print and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--save", type=Path, metavar="PATH.json")
    arguments = parser.parse_args()
    settings = {"device": "cuda", "dtype": "bfloat16", "seed": SEED, "copy_gb_per_s": round(copy_bandwidth() / 1e9)}
    run = describe_run("gpu_kernels", {**settings, "complete": False})
    entries = [peer(FUSED), ours("ldadam", rank=16), ours("ldadam", rank=128)]
    entries += [ours(name) for name in ("microadam", "sparse_mfac", "lowrank_mfac")]
    for shapes in SHAPES:
        work = workload(shapes, "bfloat16", "cuda")
        for entry in entries:
            rows = [{"shapes": shapes, "optimizer": entry.name, **row} for row in profile_step(entry.build(work.model))]
            run = replace(run, rows=[*run.rows, *rows])
            total, launches = (sum(row[key] for row in rows[:-1]) for key in ("microseconds", "launches"))
            print(f"\n{shapes} {entry.name}: {total:.0f} of {rows[-1]['microseconds']:.0f} µs, {launches:.0f} launches")
            for row in rows[:12]:
                print(f"  {row['microseconds']:9.1f} µs  {row['launches']:6.1f} ×  {row['kernel'][:90]}", flush=True)
            if arguments.save:
                save_run(run, arguments.save)
    if arguments.save:
        save_run(replace(run, settings={**run.settings, "complete": True}), arguments.save)


if __name__ == "__main__":
    main()
