"""Measure everything that needs a GPU, in one command that fits into ten minutes and goes on where it stopped.

    python benchmarks/gpu_session.py                                   # all parts, into benchmarks/results
    python benchmarks/gpu_session.py --parts gpu_tests step_time_gpu_large --minutes 4
    python benchmarks/gpu_session.py --out /tmp/results --commit 1a2b3c4    # in a copy without git

Parts, the most valuable first, each a process with a time limit of its own:

- ``gpu_compile``: ``gpu_compile.py``, so that no other part waits for kernels to be compiled; it has no result;
- ``gpu_tests``: ``gpu_tests.py``, the tests marked ``gpu``;
- ``step_time_gpu_…``: ``step_time.py`` on the shapes large, llama, small (1000 tensors) and minilm, bfloat16; of large
  also with compensated weights, of llama and small also with steps that are CUDA graphs;
- ``gpu_kernels``: ``gpu_kernels.py``, which kernels a step launches and how long each takes;
- ``gpu_stages``: ``gpu_stages.py``, the stages of LDAdam's fused step, with other tiles beside their own;
- ``gpu_layerwise``: ``gpu_layerwise.py``, training steps in the normal and in the layer-wise mode;
- ``memory_gpu``: ``memory.py``, the peak memory of training steps;
- ``gpu_training``: ``gpu_training.py``, a Llama from scratch on real text. Each variant is kept as soon as it is done.

A part whose result file is complete and of this commit is skipped; what a part has saved when its time is up is kept,
and the part is run again the next time. The last lines are the times of ``step()`` and what is missing; the exit status
is 1 if anything is, 3 without a GPU. Peers take part where they are installed (``pip install -e '.[bench]'``).
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import torch
from machine import COMMIT_VARIABLE, commit
from results import RESULTS, Run, load_run
from tables import gpu_ratio_rows

ROOT = Path(__file__).resolve().parents[1]
#: A part that is told its limit ends by itself so long before.
_SECONDS_TO_END = 8
_LEAST_SECONDS = 20


@dataclass(frozen=True)
class Part:
    """Describe a part.

    Attributes:
        name: Its result's name.
        command: Its command after ``python``.
        seconds: How long it may take.
        timed: Whether it takes ``--seconds`` and ends by itself then, with what it has.
        kept: Whether it takes ``--save`` and has a result.
    """

    name: str
    command: tuple[str, ...]
    seconds: int
    timed: bool = False
    kept: bool = True


def _step_time(shapes: str, seconds: int, *extra: str) -> Part:
    options = ("--device", "cuda", "--dtype", "bfloat16", "--rounds", "30", "--seconds", "8", "--ignore-load")
    command = ("benchmarks/step_time.py", *options, "--shapes", shapes, "--only", *_OURS, *extra)
    return Part(f"step_time_gpu_{shapes}", command, seconds)


_OURS = ("ldadam", "microadam", "mfac", "ggt", "AdamW8bit", "flashoptim")
_MEMORY_ONLY = ("adamw_torch_fused", "adamw_bnb_8bit", "galore_adamw", "ldadam", "ldadam_layerwise")
_MEMORY_ONLY += ("microadam", "microadam_layerwise", "sparse_mfac", "lowrank_mfac")
_MEMORY = ("benchmarks/memory.py", "--device", "cuda", "--dtype", "bfloat16", "--only", *_MEMORY_ONLY)
PARTS = (
    Part("gpu_compile", ("benchmarks/gpu_compile.py",), 100, timed=True, kept=False),
    Part("gpu_tests", ("benchmarks/gpu_tests.py",), 200, timed=True),
    # no GaLore here: on such matrices its first step decomposes for half a minute
    _step_time("large", 110, "--compensated"),
    _step_time("llama", 75, "galore-torch", "apollo-torch", "--captured"),
    _step_time("small", 75, "--captured"),
    Part("gpu_kernels", ("benchmarks/gpu_kernels.py",), 60),
    _step_time("minilm", 60, "galore-torch", "apollo-torch"),
    Part("gpu_stages", ("benchmarks/gpu_stages.py",), 80, timed=True),
    Part("gpu_layerwise", ("benchmarks/gpu_layerwise.py",), 60),
    Part("memory_gpu", _MEMORY, 90),
    Part("gpu_training", ("benchmarks/gpu_training.py",), 240, timed=True),
)


def result_of(part: Part, out: Path, label: str | None) -> Run | None:
    """Return what a part has saved for this commit, complete or not; without a commit nothing counts."""
    path = out / f"{part.name}.json"
    run = load_run(path) if path.exists() else None
    return run if run is not None and label is not None and run.software["commit"] == label else None


def is_done(part: Part, out: Path, label: str | None) -> bool:
    """Return whether nothing is left to do of a part."""
    run = result_of(part, out, label)
    return run is not None and bool(run.settings.get("complete", True))


def run_for(command: Sequence[str], seconds: float) -> int | None:
    """Return the exit status of a process; None if it was ended, with all that it had started, when its time was up."""
    process = subprocess.Popen(command, cwd=ROOT, start_new_session=True)
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        return None
    finally:
        with contextlib.suppress(ProcessLookupError):  # where all of them have ended
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def run_parts(parts: Sequence[Part], out: Path, minutes: float, label: str | None) -> dict[str, str]:
    """Run what is not done for as long as there is time; return the names of what is missing, each with a reason."""
    deadline, missing = time.monotonic() + 60 * minutes, dict[str, str]()
    for part in parts:
        later = parts[parts.index(part) + 1 :]
        if is_done(part, out, label) if part.kept else all(is_done(each, out, label) for each in later):
            print(f"== {part.name}: is there for {label}", flush=True)
            continue
        seconds = min(part.seconds, deadline - time.monotonic())
        if seconds < min(_LEAST_SECONDS, part.seconds):
            missing[part.name] = "no time left"
            continue
        print(f"== {part.name}, at most {seconds:.0f} s", flush=True)
        began, command = time.monotonic(), [sys.executable, *part.command]
        if part.kept:
            command += ["--save", str(out / f"{part.name}.json")]
        if part.timed:
            command += ["--seconds", str(max(1, int(seconds) - _SECONDS_TO_END))]
        status = run_for(command, seconds)
        print(f"== {part.name}: status {status} after {time.monotonic() - began:.0f} s", flush=True)
        if status != 0:
            missing[part.name] = "ran out of time" if status is None else f"exit status {status}"
        elif part.kept and label is not None and not is_done(part, out, label):
            missing[part.name] = "incomplete"
    return missing


def step_times(parts: Iterable[Part], out: Path, label: str | None) -> str:
    """Return the table of the times of ``step()`` that were measured at this commit; nothing if none was."""
    runs = [run for part in parts if part.kept and (run := result_of(part, out, label)) is not None]
    rows: list[Any] = [row for run in runs if run.benchmark == "step_time" for row in run.rows]
    return gpu_ratio_rows(rows) if rows else ""


def _stop(number: int, _: FrameType | None) -> NoReturn:
    """End as an exception does, so that the part that is running is ended too."""
    raise SystemExit(128 + number)


def main(argv: Sequence[str] | None = None) -> int:
    """Run what has no result yet, print what was found, and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [part.name for part in PARTS]
    parser.add_argument("--parts", nargs="+", default=names, choices=names)
    parser.add_argument("--minutes", type=float, default=10.0, help="for all parts together")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--commit", default=commit(), help="what is measured, where there is no git")
    arguments = parser.parse_args(argv)
    if not torch.cuda.is_available():
        parser.exit(3, f"{parser.prog}: torch sees no GPU, and nothing else is measured here\n")
    signal.signal(signal.SIGTERM, _stop)
    if arguments.commit is None:
        print("this is no git checkout and --commit says nothing: all parts are run, and their results name no commit")
    os.environ[COMMIT_VARIABLE] = arguments.commit or ""
    out, parts = arguments.out.resolve(), [part for part in PARTS if part.name in arguments.parts]
    missing = run_parts(parts, out, arguments.minutes, arguments.commit)
    print(step_times(PARTS, out, arguments.commit))
    tests = result_of(Part("gpu_tests", (), 0), out, arguments.commit)
    for row in tests.rows if tests else ():
        print("gpu_tests:", row["summary"], *row["failed"], sep="\n  ")
    for name, reason in missing.items():
        print(f"missing: {name} ({reason})")
    return 1 if missing else 0


if __name__ == "__main__":
    sys.exit(main())
