"""Measure everything that needs a GPU, in one command that fits into ten minutes and goes on where it stopped.

    python benchmarks/gpu_session.py                                   # all parts, into benchmarks/results
    python benchmarks/gpu_session.py --parts tests step_time_gpu_large --minutes 4
    python benchmarks/gpu_session.py --out /tmp/results --commit 1a2b3c4    # in a copy without git

Parts, in this order, each a process with a time limit of its own:

- ``gpu_tests``: the tests marked ``gpu``;
- ``step_time_gpu_…``: ``step_time.py`` on the shapes large, llama, minilm and small, bfloat16;
- ``gpu_kernels``: which kernels a step launches and how long each takes, beside the device's copy bandwidth;
- ``gpu_stages``: ``gpu_stages.py``, the stages of LDAdam's fused step, with other tiles beside their own;
- ``memory_gpu``: ``memory.py``, the peak memory of training steps;
- ``gpu_training``: ``gpu_training.py``, a Llama from scratch on real text. Each variant is kept as soon as it is done.

A part whose result file has this commit is skipped. The last lines say what is missing. Peers take part where they are
installed (``pip install -e '.[bench]'``).
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from interleave import SEED, workload
from machine import COMMIT_VARIABLE, commit
from peers import FUSED, ours, peer
from results import RESULTS, describe_run, load_run, save_run
from torch.profiler import ProfilerActivity, profile

ROOT = Path(__file__).resolve().parents[1]
#: Steps that the profile of the kernels averages over.
_PROFILED_STEPS = 5
_COPIED_BYTES = 1 << 32


@dataclass(frozen=True)
class Part:
    """Describe a part: its result's name, its command after ``python``, and the seconds it may take."""

    name: str
    command: tuple[str, ...]
    seconds: int


def _step_time(shapes: str, *extra: str, seconds: int = 60) -> Part:
    options = ("--device", "cuda", "--dtype", "bfloat16", "--rounds", "15", "--seconds", "8", "--ignore-load")
    command = ("benchmarks/step_time.py", *options, "--shapes", shapes, *extra)
    return Part(f"step_time_gpu_{shapes}", command, seconds)


_STEP_ONLY = ("--only", "ldadam", "microadam", "mfac", "ggt", "AdamW8bit", "galore", "flashoptim")
_MEMORY_ONLY = ("adamw_torch_fused", "ldadam", "ldadam_layerwise", "microadam", "microadam_layerwise", "lowrank_mfac")
_MEMORY = ("benchmarks/memory.py", "--device", "cuda", "--dtype", "bfloat16", "--only", *_MEMORY_ONLY)
PARTS = {
    part.name: part
    for part in (
        Part("gpu_tests", ("benchmarks/gpu_session.py", "--worker", "tests"), 150),
        _step_time("large", *_STEP_ONLY, seconds=80),
        _step_time("llama", *_STEP_ONLY),
        _step_time("minilm", *_STEP_ONLY),
        _step_time("small", *_STEP_ONLY, "--rank", "16"),
        Part("gpu_kernels", ("benchmarks/gpu_session.py", "--worker", "kernels"), 90),
        Part("gpu_stages", ("benchmarks/gpu_stages.py", "--seconds", "70"), 90),
        Part("memory_gpu", _MEMORY, 130),
        Part("gpu_training", ("benchmarks/gpu_training.py",), 240),
    )
}


def is_done(path: Path, label: str | None) -> bool:
    """Return whether a result file of this commit says that it is complete."""
    if not path.exists():
        return False
    run = load_run(path)
    return run.software["commit"] == label and run.settings.get("complete", True)


def run_tests(path: Path) -> None:
    """Run the tests marked ``gpu``, a process each for a few of them, and keep how many passed and which did not."""
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-n", "12", "--dist", "worksteal", "-p", "no:cacheprovider"]
    done = subprocess.run([*command, "-rfE", "--tb=short"], cwd=ROOT, capture_output=True, text=True, check=False)
    print(done.stdout[-6000:], done.stderr[-2000:])
    lines = done.stdout.splitlines()
    failed = [line.partition(" - ")[0] for line in lines if line.startswith(("FAILED ", "ERROR "))]
    rows = [{"summary": lines[-1].strip("= ") if lines else "", "exit_status": done.returncode, "failed": failed}]
    save_run(replace(describe_run("gpu_tests", {"device": "cuda"}), rows=rows), path)


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


def profile_kernels(path: Path) -> None:
    """Profile some steps of every optimizer of ours and of fused AdamW: launches and microseconds by kernel."""
    bandwidth = copy_bandwidth()
    run = describe_run("gpu_kernels", {"device": "cuda", "dtype": "bfloat16", "seed": SEED})
    run = replace(run, settings={**run.settings, "copy_gb_per_s": round(bandwidth / 1e9)})
    entries = [peer(FUSED), ours("ldadam", rank=16), ours("ldadam", rank=128)]
    entries += [ours(name) for name in ("microadam", "sparse_mfac", "lowrank_mfac")]
    for shapes in ("large", "llama"):
        work = workload(shapes, "bfloat16", "cuda")
        for entry in entries:
            optimizer = entry.build(work.model)
            for _ in range(3):
                optimizer.step()
            torch.cuda.synchronize()
            with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as profiler:
                for _ in range(_PROFILED_STEPS):
                    optimizer.step()
                torch.cuda.synchronize()
            rows = [{"shapes": shapes, "optimizer": entry.name, **row} for row in kernel_rows(profiler)]
            run = replace(run, rows=[*run.rows, *rows])
            total, launches = (sum(row[key] for row in rows[:-1]) for key in ("microseconds", "launches"))
            print(f"\n{shapes} {entry.name}: {total:.0f} of {rows[-1]['microseconds']:.0f} µs, {launches:.0f} launches")
            for row in rows[:12]:
                print(f"  {row['microseconds']:9.1f} µs  {row['launches']:6.1f} ×  {row['kernel'][:90]}", flush=True)
            del optimizer
            save_run(run, path)


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
    return [{k: round(v / _PROFILED_STEPS, 2) if k in per_step else v for k, v in row.items()} for row in rows]


def main() -> None:
    """Run what has no result yet for as long as there is time, and say what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=list(PARTS))
    parser.add_argument("--minutes", type=float, default=10.0, help="for all parts together")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--commit", default=commit(), help="what is measured, where there is no git")
    parser.add_argument("--worker", choices=("tests", "kernels"), help=argparse.SUPPRESS)
    parser.add_argument("--save", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        {"tests": run_tests, "kernels": profile_kernels}[arguments.worker](arguments.save)
        return
    if not torch.cuda.is_available():
        parser.exit(3, f"{parser.prog}: torch sees no GPU, and nothing else is measured here\n")
    os.environ[COMMIT_VARIABLE] = arguments.commit or ""
    deadline = time.monotonic() + 60 * arguments.minutes
    missing = {}
    for part in (PARTS[name] for name in arguments.parts):
        path = (arguments.out / f"{part.name}.json").resolve()
        if is_done(path, arguments.commit):
            print(f"== {part.name}: is there for {arguments.commit}", flush=True)
            continue
        seconds = min(part.seconds, deadline - time.monotonic())
        if seconds < 10:
            missing[part.name] = "no time left"
            continue
        print(f"== {part.name}, at most {seconds:.0f} s", flush=True)
        began = time.monotonic()
        command = [sys.executable, *part.command, "--save", str(path)]
        if part.name == "gpu_training":
            command += ["--seconds", str(int(seconds) - 5)]
        try:
            status = subprocess.run(command, cwd=ROOT, timeout=seconds, check=False).returncode
        except subprocess.TimeoutExpired:
            status = -1
        print(f"== {part.name}: status {status} after {time.monotonic() - began:.0f} s", flush=True)
        if status:
            missing[part.name] = "ran out of time" if status == -1 else f"exit status {status}"
    for name, reason in missing.items():
        print(f"missing: {name} ({reason})")


if __name__ == "__main__":
    main()
