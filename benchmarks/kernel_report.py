"""Report what the Triton kernels cost, as far as that can be known without a GPU.

    python benchmarks/kernel_report.py [--targets sm90 gfx942]

Two tables. *Resources*: every launch of ``launches.py`` compiled ahead of time; registers, spills, shared
memory, and the share of a multiprocessor's warps that these allow to be resident (an upper bound). *Traffic*: the same
launches run in Triton's interpreter, with every load and store counted, in bytes per entry of the parameter:

- needed: distinct bytes of the tensors that the algorithm reads, plus those that it writes;
- in sectors: the same in whole 32-byte sectors, the least that a GPU's memory moves;
- issued: bytes of all lanes of all loads and stores of the kernel, caches and scratch memory included.

Nothing here is a time, and nothing was measured on a GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
ADAMW_BYTES = 28  # fp32: reads parameter, gradient and two moments, writes parameter and two moments
MICROADAM_STEP = ("block_topk 4-bit error", "window_update defaults")


def run_json(arguments: list[str], *, interpret: bool) -> Any:
    """Run a module of the repository in a process of its own and parse what it prints."""
    environment = dict(os.environ, PYTHONPATH=str(ROOT))
    environment["TRITON_INTERPRET"] = "1" if interpret else "0"
    run = subprocess.run([sys.executable, "-m", *arguments], cwd=ROOT, env=environment, capture_output=True, text=True)
    if run.returncode != 0:
        raise SystemExit(run.stderr)
    return json.loads(run.stdout)


def count_traffic() -> list[dict[str, Any]]:
    """Run every launch in the interpreter and count; needs TRITON_INTERPRET=1 from the start of the process."""
    from tests.ops import interpreter

    interpreter.enable()
    from benchmarks.launches import LAUNCHES, force_triton
    from tests.ops.interpreter.traffic import SECTOR_BYTES, counted_launches

    force_triton()
    rows = []
    for launch in LAUNCHES:
        call, tensors = launch.prepare()
        with counted_launches() as launched:
            call()
        per_entry = {
            "needed": sum(each.needed(tensors) for each in launched),
            "sectors": sum(each.needed(tensors, SECTOR_BYTES) for each in launched),
            "issued": sum(each.issued() for each in launched),
        }
        rows.append({"launch": launch.name} | {name: count / launch.numel for name, count in per_entry.items()})
    return rows


def markdown(resources: list[dict[str, Any]], traffic: list[dict[str, Any]]) -> str:
    """Render both tables."""
    lines = ["# Triton kernels\n\nCompiled and counted, not measured on a GPU.\n\n## Resources\n"]
    lines.append("| launch | target | warps | registers | spills, bytes | shared memory, bytes | occupancy, at most |")
    lines.append("| --- | --- | --: | --: | --: | --: | --: |")
    for row in resources:
        if row["error"]:
            lines.append(f"| {row['launch']} | {row['target']} | does not compile: {row['error']} |")
            continue
        cells = [row[key] for key in ("launch", "target", "num_warps", "registers", "spill_bytes", "shared_bytes")]
        lines.append("| " + " | ".join(map(str, cells)) + f" | {row['occupancy']:.0%} |")
    lines.append(f"\n## Memory traffic, bytes per parameter\n\nAdamW in fp32: {ADAMW_BYTES}.\n")
    lines.append("| launch | needed | in sectors | issued |\n| --- | --: | --: | --: |")
    of_step = [row for row in traffic if row["launch"] in MICROADAM_STEP]
    step = {name: sum(row[name] for row in of_step) for name in ("needed", "sectors", "issued")}
    for row in [*traffic, {"launch": " + ".join(MICROADAM_STEP), **step}]:
        lines.append(f"| {row['launch']} | {row['needed']:.2f} | {row['sectors']:.2f} | {row['issued']:.2f} |")
    return "\n".join(lines)


def main() -> None:
    """Compile, count, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", nargs="*", default=[], help="sm80, sm90, sm100, gfx942 (all of them by default)")
    parser.add_argument("--count-traffic", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.count_traffic:
        print(json.dumps(count_traffic()))
        return
    traffic = run_json(["benchmarks.kernel_report", "--count-traffic"], interpret=True)
    print(markdown(run_json(["benchmarks.ahead_of_time", *arguments.targets], interpret=False), traffic))


if __name__ == "__main__":
    main()
