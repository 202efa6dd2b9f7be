"""How a step's cost grows: with the rank, the window, the density, the size of the model, the number of tensors.

    python benchmarks/scaling.py --save --plot scaling.png
    python benchmarks/scaling.py --sweep parameters --only ldadam fused

Every sweep is one interleaved measurement over all its points, in nanoseconds per parameter and step. ``parameters``
goes over the matrices of Llamas of 10 to 200 million parameters, which grow wider and deeper: the cost per parameter
should stay flat; torch's AdamW beside it shows what the machine's caches do. ``rank``, ``window`` and ``density`` step
over 25 M parameters of such matrices, ``tensors`` over small matrices and biases.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from interleave import SEED, Contender, Workload, compare, enter, summarize
from peers import FOREACH, FUSED, Candidate, ours, peer
from plots import plot_scaling
from results import describe_run, resume_run, save_run
from shapes import BODY_SIZES, body, small_tensors
from step_time import add_timing_options, wait_unless_told
from tables import sweep_rows
from torch import nn

RANKS = (4, 8, 16, 32, 64, 128)
WINDOWS = (4, 8, 16, 32)
DENSITIES = (0.005, 0.01, 0.02, 0.05)
TENSORS = (250, 500, 1000, 2000)
_BODY = (512, 8)


@dataclass(frozen=True)
class Point:
    """One optimizer at one place of a sweep; points with an equal ``shape`` step over the same parameters."""

    series: str
    value: float
    candidate: Candidate
    shape: tuple[int, ...] = _BODY


@dataclass(frozen=True)
class Sweep:
    """A question, and the points that answer it."""

    title: str
    unit: str
    points: Callable[[], Iterator[Point]]
    build: Callable[..., nn.Module] = body


def _ranks() -> Iterator[Point]:
    for rank in RANKS:
        yield Point("ldadam", rank, ours("ldadam", rank=rank))
        yield Point("galore-torch", rank, peer("galore-torch", rank))


def _windows() -> Iterator[Point]:
    for window in WINDOWS:
        for name in ("microadam", "sparse_mfac", "sparse_ggt", "lowrank_mfac"):
            yield Point(name, window, ours(name, window=window))


def _densities() -> Iterator[Point]:
    for density in DENSITIES:
        for name in ("microadam", "sparse_mfac", "sparse_ggt"):
            yield Point(name, density, ours(name, density=density))


def general(rank: int = 16) -> tuple[Candidate, ...]:
    """The two AdamW and the optimizers for which a sweep over models asks."""
    return (peer(FOREACH), peer(FUSED), ours("ldadam", rank=rank), ours("microadam"), ours("sparse_mfac"))


def _parameters() -> Iterator[Point]:
    for size in BODY_SIZES:
        with torch.device("meta"):
            millions = sum(parameter.numel() for parameter in body(*size).parameters()) / 1e6
        yield from (Point(candidate.name, round(millions, 1), candidate, size) for candidate in general())


def _tensors() -> Iterator[Point]:
    for count in TENSORS:
        yield from (Point(candidate.name, count, candidate, (count,)) for candidate in general())


SWEEPS: dict[str, Sweep] = {
    "rank": Sweep("rank (25 M parameters)", "rank", _ranks),
    "window": Sweep("window (25 M parameters)", "gradients in the window", _windows),
    "density": Sweep("density (25 M parameters)", "fraction of entries kept", _densities),
    "parameters": Sweep("size of the model", "million parameters", _parameters),
    "tensors": Sweep("number of small tensors", "tensors of 96 × 168 and 96", _tensors, small_tensors),
}


def measure(name: str, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows of one sweep."""
    sweep = SWEEPS[name]
    workloads: dict[tuple[int, ...], Workload] = {}
    entered: list[tuple[Point, Contender]] = []
    for point in sweep.points():
        if arguments.only and not any(part in point.series for part in arguments.only):
            continue
        if point.shape not in workloads:
            torch.manual_seed(SEED)
            dtype = getattr(torch, arguments.dtype)
            model = sweep.build(*point.shape).to(device=arguments.device, dtype=dtype)
            workloads[point.shape] = Workload(f"{name} {point.shape}", model)
        contender = enter(point.candidate, workloads[point.shape])
        if isinstance(contender, str):
            print(f"{name}: {point.candidate.name}: {contender}")
        else:
            entered.append((point, contender))
    contenders = [contender for _, contender in entered]
    cores = compare(contenders, arguments.rounds, arguments.seconds)
    head = {"sweep": name, "title": sweep.title, "unit": sweep.unit}
    return [
        {**head, "optimizer": point.series, "value": point.value, **summarize(contender, contenders)}
        | {"others_cores": round(cores, 3)}
        for point, contender in entered
    ]


def main() -> None:
    """Parse the command line, measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sweep", nargs="+", default=list(SWEEPS), choices=list(SWEEPS))
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--only", nargs="+", metavar="PART", help="optimizers whose names contain one of these")
    add_timing_options(parser, "scaling")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    keys = ("device", "dtype", "threads", "rounds", "seconds", "only")
    run = describe_run("scaling", {"seed": SEED, **{key: getattr(arguments, key) for key in keys}})
    if arguments.resume:
        run = resume_run(run, arguments.save)
    print(run.label())
    for name in arguments.sweep:
        if any(row["sweep"] == name for row in run.rows):
            continue
        wait_unless_told(arguments, parser)
        rows = measure(name, arguments)
        if not rows:
            print(f"{name}: no optimizer of this sweep is called {' or '.join(arguments.only)}")
            continue
        print(f"\n{sweep_rows(rows)}")
        run = replace(run, rows=[*run.rows, *rows])
        if arguments.save:
            save_run(run, arguments.save)
    if arguments.plot:
        plot_scaling(run, arguments.plot)


if __name__ == "__main__":
    main()
