"""Measure what must hold of the speed: a line per requirement with its figure, its limit, and whether it is met.

    python benchmarks/requirements.py --save      # about five minutes
    python benchmarks/requirements.py --quick     # fewer rounds, under two minutes

The limits are for two CPU cores and numba (extra ``cpu``); on a larger machine: ``OMP_NUM_THREADS=2 taskset -c 0,1``.
A figure is a median over rounds in which all optimizers of a part take a step each, in a process of its own; of Dash,
whose roots are spread over ten steps, the mean and the worst round, with the default storage and with the paper's. A
first step is that of a fresh process whose model and gradients exist, the import of numba included, with numba's
compiled code on disk. The exit status is 1 if a requirement is not met, 2 if one was skipped because a peer is missing.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from interleave import SEED, Contender, compare, enter, ratio, workload
from machine import backend
from peers import FOREACH, GALORE, Candidate, ours, peer
from results import describe_run, save_run
from step_time import add_timing_options, wait_unless_told
from tables import requirement_rows

from hf_lowmem_optim.optimizers import trion

NAMES = ("ldadam", "microadam", "sparse_mfac")
_FIRST_STEP_LIMIT = 1.0  # seconds


@dataclass(frozen=True)
class Limit:
    """Describe the most that an optimizer's time may be in units of another's."""

    ours: Candidate
    base: Candidate
    most: float
    statistic: Literal["median", "mean", "worst"] = "median"  # mean and worst round: in units of the base's median
    beyond_products: bool = False  # whether the first one is Trion, and its Newton–Schulz products are left out
    gap: int = 0  # steps between two decompositions of the base: its first step has one, no step of a round does


@dataclass(frozen=True)
class Part:
    """Describe optimizers that are timed together in one process."""

    shapes: str
    limits: tuple[Limit, ...]
    words: str = ""  # what a line says besides the names
    environment: dict[str, str] = field(default_factory=dict)


class Meter:
    """Note how long Trion's Newton–Schulz products take in each of its steps: on a CPU calls return when done."""

    def __init__(self) -> None:
        self.steps_ms: list[float] = []
        self._since_ms = 0.0
        self._products: Callable[..., torch.Tensor] = trion.newton_schulz
        trion.newton_schulz = self._timed

    def _timed(self, *arguments: Any) -> torch.Tensor:
        start = time.perf_counter()
        products = self._products(*arguments)
        self._since_ms += 1e3 * (time.perf_counter() - start)
        return products

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        """Begin with the next step of an optimizer, the only one of its kind."""
        self._since_ms = 0.0
        optimizer.register_step_post_hook(self._end_step)

    def _end_step(self, *_: Any) -> None:
        self.steps_ms.append(self._since_ms)
        self._since_ms = 0.0


_BASE = peer(FOREACH)
_DASH = ours("dash", block_size=256, precondition_frequency=10)
_FLOAT32 = {"statistics_dtype": "fp32", "root_dtype": "fp32", "moment_dtype": "fp32", "grafting": "adam"}
_PAPERS_DASH = ours("dash", block_size=256, precondition_frequency=10, **_FLOAT32)
PARTS: dict[str, Part] = {
    "minilm": Part(
        "minilm",
        (
            Limit(ours("ldadam", rank=16), _BASE, 0.8),
            Limit(ours("ldadam", rank=128), peer("galore-torch", 128), 1.9, gap=GALORE["update_proj_gap"]),
            Limit(ours("microadam"), _BASE, 0.55),
            Limit(ours("sparse_mfac"), _BASE, 0.7),
        ),
    ),
    "transforms": Part(
        "minilm",
        (
            Limit(ours("dct_adamw", rank=128), peer("galore-torch", 128), 1.5, gap=GALORE["update_proj_gap"]),
            Limit(ours("trion", rank=128), _BASE, 1.5, beyond_products=True),
        ),
    ),
    "dash": Part(
        "minilm",
        tuple(
            Limit(dash, _BASE, most, statistic)
            for dash in (_DASH, _PAPERS_DASH)
            for statistic, most in (("mean", 6.0), ("worst", 12.0))
        ),
    ),
    "small": Part("small", tuple(Limit(ours(name), _BASE, 3.0) for name in NAMES), ", 1000 small tensors"),
    "reference": Part(
        "minilm",
        (Limit(ours("microadam"), _BASE, 4.0), Limit(ours("ldadam", rank=16), _BASE, 2.5)),
        ", without numba",
        {"HF_LOWMEM_OPTIM_BACKEND": "reference"},
    ),
}


def finding(requirement: str, limit: float, figure: float | None, spread: str) -> dict[str, Any]:
    """Return a row; a figure of None was skipped for the reason in ``spread``."""
    met = None if figure is None else figure <= limit
    return {"requirement": requirement, "figure": figure, "limit": limit, "spread": spread, "met": met}


def measure_part(part: Part, rounds: int, seconds: float) -> list[dict[str, Any]]:
    """Return the rows of a part, measured in this process."""
    work = workload(part.shapes)
    wanted = {c.name: c for limit in part.limits for c in (limit.ours, limit.base)}
    meter = Meter()
    entered = {name: enter(candidate, work) for name, candidate in wanted.items()}
    for limit in part.limits:
        if limit.beyond_products and isinstance(timed := entered[limit.ours.name], Contender):
            meter.attach(timed.optimizer)
    cores = compare([found for found in entered.values() if isinstance(found, Contender)], rounds, seconds)
    print(f"others used {cores:.2f} cores meanwhile", file=sys.stderr)
    return [measure_limit(limit, entered, part.words, meter.steps_ms) for limit in part.limits]


def measure_limit(
    limit: Limit, entered: dict[str, Contender | str], words: str, products_ms: list[float]
) -> dict[str, Any]:
    """Return the row of a limit, from the times of all contenders and of the products in Trion's steps."""
    requirement = f"{limit.ours.name} / {limit.base.name}{words}"
    if limit.beyond_products:
        requirement += ", beyond its Newton–Schulz products"
    if limit.statistic != "median":
        requirement += f", {limit.statistic} of the rounds"
    first, second = entered[limit.ours.name], entered[limit.base.name]
    if isinstance(first, str) or isinstance(second, str):
        return finding(requirement, limit.most, None, f"skipped: {first if isinstance(first, str) else second}")
    if limit.beyond_products:
        first = replace(first, times_ms=[a - b for a, b in zip(first.times_ms, products_ms, strict=True)])
    low, middle, high = ratio(first, second)
    if limit.statistic != "median":
        reduce = statistics.mean if limit.statistic == "mean" else max
        middle = round(reduce(first.times_ms) / statistics.median(second.times_ms), 4)
    spread = f"{low:.2f}–{high:.2f}"
    if limit.gap:
        usual = statistics.median(second.times_ms)
        mean = usual + (second.first_step_ms - usual) / limit.gap
        spread += f"; {middle * usual / mean:.2f} with a decomposition every {limit.gap} steps"
    return finding(requirement, limit.most, middle, spread)


def time_first_step(name: str) -> float:
    """Return the seconds in which this process builds an optimizer and takes its first step on MiniLM's shapes."""
    work = workload("minilm")
    if "numba" in sys.modules:
        raise RuntimeError("numba is already imported: its import would not be in the figure")
    start = time.perf_counter()
    ours(name).build(work.model).step()
    seconds = time.perf_counter() - start
    if "numba" not in sys.modules:
        raise RuntimeError(f"{name}'s step did not use numba")
    return seconds


def first_steps(name: str, count: int) -> dict[str, Any]:
    """Return the row of one optimizer's first step, from fresh processes after one that fills numba's cache."""
    times = sorted([run_child({}, "--first-step", name) for _ in range(count + 1)][1:])
    requirement = f"{name}, first step of a fresh process, in seconds"
    return finding(requirement, _FIRST_STEP_LIMIT, statistics.median(times), f"{times[0]:.2f}–{times[-1]:.2f}")


def run_child(environment: dict[str, str], *arguments: str) -> Any:
    """Run this file in a process of its own and return what it prints as JSON."""
    command = [sys.executable, __file__, *arguments]
    done = subprocess.run(command, env={**os.environ, **environment}, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", nargs="+", default=[*PARTS, "first step"], choices=[*PARTS, "first step"])
    parser.add_argument("--quick", action="store_true", help="seven rounds and one first step of each")
    parser.add_argument("--child", choices=list(PARTS), help=argparse.SUPPRESS)
    parser.add_argument("--first-step", choices=NAMES, help=argparse.SUPPRESS)
    add_timing_options(parser, "requirements")
    arguments = parser.parse_args()
    if arguments.child or arguments.first_step:
        part = PARTS.get(arguments.child)
        result = (
            measure_part(part, arguments.rounds, arguments.seconds) if part else time_first_step(arguments.first_step)
        )
        print(json.dumps(result))
        return 0
    if backend("cpu") != "cpu":
        parser.error("the requirements are for numba's kernels: pip install 'hf-lowmem-optim[cpu]'")
    if arguments.quick:
        arguments.rounds, arguments.seconds = 7, 8.0
    timing = {"rounds": arguments.rounds, "seconds": arguments.seconds}
    settings = {"device": "cpu", "dtype": "float32", "threads": torch.get_num_threads(), "seed": SEED, **timing}
    run = describe_run("requirements", settings)
    print(run.label(), flush=True)
    for part_name in arguments.part:
        wait_unless_told(arguments, parser)
        if part_name in PARTS:
            rows = run_child(
                PARTS[part_name].environment,
                "--child",
                part_name,
                *(f"--{key}={value}" for key, value in timing.items()),
            )
        else:
            rows = [first_steps(name, 1 if arguments.quick else 5) for name in NAMES]
        run = replace(run, rows=[*run.rows, *({"part": part_name, **row} for row in rows)])
        if arguments.save:
            save_run(run, arguments.save)
    print(requirement_rows(run.rows))
    verdicts = [row["met"] for row in run.rows]
    return 1 if False in verdicts else 2 if None in verdicts else 0


if __name__ == "__main__":
    sys.exit(main())
