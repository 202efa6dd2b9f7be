"""Run the tests marked ``gpu``, some at a time, and keep how many passed and which did not.

    python benchmarks/gpu_tests.py --save benchmarks/results/gpu_tests.json

What had run when the time was up is kept too, as incomplete. Kernels are compiled for the device: the suite interprets
them unless it is told otherwise.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import os
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from results import describe_run, save_run

ROOT = Path(__file__).resolve().parents[1]
#: Each process of pytest takes half a gigabyte of the device for itself.
_MOST_PROCESSES = 12
_SECONDS_TO_END = 5.0


def run_pytest(arguments: Sequence[str], seconds: float) -> tuple[list[str], int | None]:
    """Return the lines that pytest printed, and its exit status; None where it was stopped after ``seconds``."""
    command = [sys.executable, "-m", "pytest", "-v", "-rfE", "--tb=short", "-p", "no:cacheprovider", *arguments]
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        status: int | None = None
        try:
            status = process.wait(None if math.isinf(seconds) else seconds)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)  # pytest still says what it has found
            try:
                process.wait(_SECONDS_TO_END)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        output.seek(0)
        return output.read().splitlines(), status


def row_of(lines: Sequence[str], status: int | None) -> dict[str, Any]:
    """Return what is kept of a run: a count of each outcome, and the names of what failed."""
    counts, failed = Counter[str](), dict[str, None]()
    for line in lines:
        # [gw3] [ 12%] PASSED tests/x.py::test_y; in one process the outcome stands behind the name
        words = [word for word in line.split() if word in ("PASSED", "FAILED", "ERROR", "SKIPPED", "XFAIL", "XPASS")]
        if words and "::" in line and "%]" in line:
            counts[words[0].lower()] += 1
        if line.startswith(("FAILED ", "ERROR ")):
            failed[line.partition(" - ")[0]] = None
    return {**counts, "exit_status": status, "failed": list(failed), "summary": lines[-1].strip("= ") if lines else ""}


def main() -> None:
    """Run them, print the end of what pytest said, and save the row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=math.inf, help="stop after that")
    parser.add_argument("--save", type=Path, metavar="PATH.json")
    arguments = parser.parse_args()
    processes = min(_MOST_PROCESSES, os.cpu_count() or 1)
    several = ["-n", str(processes), "--dist", "worksteal"] if importlib.util.find_spec("xdist") else []
    lines, status = run_pytest(["-m", "gpu", *several], arguments.seconds)
    row = row_of(lines, status)
    print("\n".join(lines[-120:]), *(f"{key}: {value}" for key, value in row.items()), sep="\n", flush=True)
    if arguments.save:
        settings = {"device": "cuda", "processes": processes if several else 1, "complete": status is not None}
        save_run(replace(describe_run("gpu_tests", settings), rows=[row]), arguments.save)


if __name__ == "__main__":
    main()
