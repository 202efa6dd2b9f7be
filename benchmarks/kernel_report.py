"""Report what the Triton kernels cost, as far as that can be known without a GPU.

    python benchmarks/kernel_report.py [--targets sm90 gfx942] [--main]

*Resources*: every launch of ``launches.py`` compiled ahead of time; registers, spills, shared memory, and the share of
a multiprocessor's warps that these allow to be resident (an upper bound). *Instructions*: of the machine code for
NVIDIA's, per entry of the parameter and by pipe (``machine_code.py`` says how they are counted), and the least time
that issuing them takes, in ms per 10⁹ entries, beside the least time of moving the bytes. *Traffic*: the same launches
run in Triton's interpreter, with every load and store counted, in bytes per entry:

- needed: distinct bytes of the tensors that the algorithm reads, plus those that it writes;
- in sectors: the same in whole 32-byte sectors, the least that a GPU's memory moves;
- issued: bytes of all lanes of all loads and stores of the kernel, caches and scratch memory included.

Nothing here is a measured time. ``--record`` writes the figures of the main launches, which a test compares.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RECORD = ROOT / "tests" / "ops" / "kernels.json"
SLACK = 1.05
ADAMW_BYTES = 28  # fp32: reads parameter, gradient and two moments, writes parameter and two moments
MICROADAM_STEP = ("block_topk 4-bit error", "window_update defaults")

Row = dict[str, Any]


def run_json(arguments: list[str], *, interpret: bool) -> Any:
    """Run a module of the repository in a process of its own and parse what it prints."""
    environment = dict(os.environ, PYTHONPATH=str(ROOT))
    environment["TRITON_INTERPRET"] = "1" if interpret else "0"
    run = subprocess.run([sys.executable, "-m", *arguments], cwd=ROOT, env=environment, capture_output=True, text=True)
    if run.returncode != 0:
        raise SystemExit(run.stderr)
    return json.loads(run.stdout)


def count_launches(names: Sequence[str] | None = None) -> Iterator[Row]:
    """Run launches in the interpreter and count; needs TRITON_INTERPRET=1 from the start of the process."""
    import torch

    from tests.ops import interpreter

    interpreter.enable()
    from benchmarks.launches import LAUNCHES, force_triton
    from benchmarks.machine_code import counted_lines
    from tests.ops.interpreter.traffic import SECTOR_BYTES, counted_launches

    force_triton()
    for launch in LAUNCHES:
        if names is not None and launch.name not in names:
            continue
        torch.manual_seed(0)  # how often loops turn depends on the data
        call, tensors = launch.prepare()
        with counted_launches() as launched, counted_lines() as (lines, products):
            call()
        yield {
            "launch": launch.name,
            "numel": launch.numel,
            "launches": len(launched),
            "needed": sum(each.needed(tensors) for each in launched) / launch.numel,
            "sectors": sum(each.needed(tensors, SECTOR_BYTES) for each in launched) / launch.numel,
            "issued": sum(each.issued() for each in launched) / launch.numel,
            "lines": [[*line, count] for line, count in lines.items()],
            "products": products,
        }


def add_instructions(compiled: list[Row], counted: list[Row]) -> None:
    """Give each compiled kernel its ``instructions``: of all its warps, by pipe, per entry of the launch's tensor."""
    from benchmarks.machine_code import Executions

    of = {row["launch"]: row for row in counted}
    for kernel in compiled:
        kernel["instructions"] = None
        if kernel.get("code") is None or kernel["launch"] not in of:
            continue
        launch = of[kernel["launch"]]
        ran = Executions({(file, line): count for file, line, count in launch["lines"]})
        warps = kernel["programs"] * kernel["num_warps"]
        pipes = ran.instructions(kernel["code"])
        kernel["instructions"] = {pipe: warps * count / launch["numel"] for pipe, count in pipes.items()}


def per_entry(instructions: dict[str, float] | None) -> float | None:
    """Return the instructions of all threads per entry."""
    if instructions is None:
        return None
    return round(32 * sum(count for pipe, count in instructions.items() if pipe != "turns"), 2)


def to_record(compiled: list[Row], counted: list[Row]) -> dict[str, Any]:
    """Return what is recorded of the main launches, on sm90 where it depends on a target."""
    import triton

    from benchmarks.launches import MAIN

    return {
        "triton": triton.__version__,
        "kernels": [
            {key: row[key] for key in ("launch", "kernel", "registers", "spill_bytes", "shared_bytes")}
            | {"instructions": per_entry(row["instructions"])}
            for row in compiled
            if row["launch"] in MAIN and row["target"] == "sm90"
        ],
        "launches": [
            {"launch": row["launch"], "launches": row["launches"], "bytes": round(row["sectors"], 3)}
            for row in counted
            if row["launch"] in MAIN
        ],
    }


def what_is_worse(found: list[Row], recorded: list[Row]) -> list[str]:
    """Return the figures that exceed the recorded ones by more than SLACK, and rows that only one of both has."""

    def keyed(rows: list[Row]) -> dict[tuple[str, str], Row]:
        return {(row["launch"], row.get("kernel", "")): row for row in rows}

    new, old = keyed(found), keyed(recorded)
    problems = [" ".join(key) + ": recorded or found, not both" for key in new.keys() ^ old.keys()]
    for key in new.keys() & old.keys():
        for name, value in old[key].items():
            if name not in ("launch", "kernel") and new[key][name] > SLACK * value:
                problems.append(f"{' '.join(key)}: {name} {new[key][name]}, recorded {value}")
    return sorted(problems)


def _resources(compiled: list[Row]) -> Iterator[str]:
    yield "| launch | target | warps | registers | spills, bytes | shared memory, bytes | occupancy, at most |"
    yield "| --- | --- | --: | --: | --: | --: | --: |"
    for row in compiled:
        if row["error"]:
            yield f"| {row['launch']} | {row['target']} | does not compile: {row['error']} |"
            continue
        cells = [row[key] for key in ("launch", "target", "num_warps", "registers", "spill_bytes", "shared_bytes")]
        yield "| " + " | ".join(map(str, cells)) + f" | {row['occupancy']:.0%} |"


def _bounds(compiled: list[Row], counted: list[Row]) -> Iterator[str]:
    """Yield a row for each launch and card."""
    from benchmarks.machine_code import CARDS, issue_time

    pipes = "ALU | FMA | of these int | XU | LSU | FP64 | other"
    yield f"| launch | card | instructions | {pipes} | issue, ms | by | bytes, ms |"
    yield "| --- | --- |" + " --: |" * 9 + " --- | --: |"
    for launch in counted:
        for name, card in CARDS.items():
            kernels = [row for row in compiled if (row["launch"], row["target"]) == (launch["launch"], card.target)]
            if not kernels or any(row["instructions"] is None for row in kernels):
                continue
            total: dict[str, float] = {}
            for row in kernels:
                for pipe, count in row["instructions"].items():
                    total[pipe] = total.get(pipe, 0.0) + count
            products = {kind: count / launch["numel"] for kind, count in launch["products"].items()}
            seconds, pipe = issue_time(total, products, card)
            of = {each: 32 * total.get(each, 0.0) for each in ("alu", "imad", "xu", "lsu", "fp64", "other")}
            fma = 32 * total.get("fma", 0.0) + of["imad"]
            cells = [of["alu"], fma, of["imad"], of["xu"], of["lsu"], of["fp64"], of["other"]]
            counts = " | ".join(f"{cell:.1f}" for cell in (per_entry(total) or 0.0, *cells))
            moved = launch["sectors"] / card.bandwidth
            yield f"| {launch['launch']} | {name} | {counts} | {seconds * 1e12:.2f} | {pipe} | {moved * 1e12:.2f} |"


def _traffic(counted: list[Row]) -> Iterator[str]:
    yield "| launch | kernels | needed | in sectors | issued |"
    yield "| --- | --: | --: | --: | --: |"
    of_step = [row for row in counted if row["launch"] in MICROADAM_STEP]
    step = {name: sum(row[name] for row in of_step) for name in ("launches", "needed", "sectors", "issued")}
    for row in [*counted, *([{"launch": " + ".join(MICROADAM_STEP), **step}] if len(of_step) == 2 else [])]:
        bytes_moved = " | ".join(f"{row[name]:.2f}" for name in ("needed", "sectors", "issued"))
        yield f"| {row['launch']} | {row['launches']} | {bytes_moved} |"


def markdown(compiled: list[Row], counted: list[Row]) -> str:
    """Render the tables."""
    nvidia = [row for row in compiled if row["target"].startswith("sm") and not row["error"]]
    bounds = list(_bounds(compiled, counted))
    if nvidia and all(row["code"] is None for row in nvidia):
        bounds = ["Not shown: neither triton nor CUDA has nvdisasm here."]
    parts = [
        "# Triton kernels",
        "Compiled and counted, not measured on a GPU.",
        "## Resources",
        "\n".join(_resources(compiled)),
        "## Instructions per parameter, and the least time per 10⁹ parameters: not measured",
        "\n".join(bounds),
        f"## Memory traffic, bytes per parameter\n\nAdamW in fp32: {ADAMW_BYTES}.",
        "\n".join(_traffic(counted)),
    ]
    return "\n\n".join(parts)


def write_record(record: dict[str, Any], path: Path) -> None:
    """Write a record, a line for each row."""
    parts = [f'"triton": {json.dumps(record["triton"])}']
    for key in ("kernels", "launches"):
        rows = ",\n".join(f"  {json.dumps(row, ensure_ascii=False)}" for row in record[key])
        parts.append(f'"{key}": [\n{rows}\n ]')
    path.write_text("{\n " + ",\n ".join(parts) + "\n}\n")


def main() -> None:
    """Compile, count, print."""
    sys.path.insert(0, str(ROOT))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", nargs="*", default=[], help="sm80, sm90, sm100, gfx942 (all of them by default)")
    parser.add_argument("--main", action="store_true", help="only the main launches")
    parser.add_argument("--record", action="store_true", help="record the main launches for the test, on sm90")
    parser.add_argument("--count", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    from benchmarks.launches import MAIN

    only_main = arguments.main or arguments.record
    if arguments.count:
        print(json.dumps(list(count_launches(MAIN if only_main else None))))
        return
    targets, few = ["sm90"] if arguments.record else arguments.targets, ["--main"] if only_main else []
    counted = run_json(["benchmarks.kernel_report", "--count", *few], interpret=True)
    compiled = run_json(["benchmarks.ahead_of_time", *few, *targets], interpret=False)
    add_instructions(compiled, counted)
    if arguments.record:
        write_record(to_record(compiled, counted), RECORD)
    print(markdown(compiled, counted))


if __name__ == "__main__":
    main()
