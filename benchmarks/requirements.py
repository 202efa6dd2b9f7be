"""What must hold of the speed, measured: a line per requirement with its figure, its limit, and whether it is met.

    python benchmarks/requirements.py --save      # about five minutes; exit status 1 if something is not met

On the CPU, with numba (extra ``cpu``), MiniLM shapes unless a line says otherwise; every figure is a median over rounds
in which all optimizers take a step each. A peer that is missing leaves its line without a figure, and not met.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace

import torch
from interleave import SEED, Contender, Workload, compare, enter, ratio, timed_step_ms
from peers import FOREACH, Candidate, ours, peer
from results import describe_run, resume_run, save_run
from scaling import general
from shapes import BODY_SIZES, body
from step_time import add_timing_options, wait_unless_told, workload
from tables import requirement_rows

from hf_lowmem_optim.kernels.backend import choose_backend

_FIRST_STEPS = 5


@dataclass(frozen=True)
class Finding:
    """One line.

    Attributes:
        requirement: What is compared.
        figure: The median that was measured, None if it could not be.
        limit: What it may be at most; None for a figure that is there to compare with.
        spread: 10th to 90th percentile, or what the figure was made from.
    """

    requirement: str
    figure: float | None
    limit: float | None
    spread: str = ""

    @property
    def met(self) -> bool | None:
        """Whether the figure is within the limit; a figure that is missing is not."""
        return None if self.limit is None else self.figure is not None and self.figure <= self.limit


def enter_all(candidates: Sequence[Candidate], work: Workload) -> dict[str, Contender | str]:
    """Every candidate on one workload."""
    return {candidate.name: enter(candidate, work) for candidate in candidates}


def run_rounds(entered: dict[str, Contender | str], arguments: argparse.Namespace) -> None:
    """Fill the times of those that could enter."""
    contenders = [contender for contender in entered.values() if isinstance(contender, Contender)]
    cores = compare(contenders, arguments.rounds, arguments.seconds)
    print(f"others used {cores:.2f} cores meanwhile")


def compared(entered: dict[str, Contender | str], name: str, base: str, limit: float, where: str = "") -> Finding:
    """The ratio of two optimizers' steps."""
    requirement = f"{name} / {base}{where}"
    first, second = entered[name], entered[base]
    if isinstance(first, str) or isinstance(second, str):
        return Finding(requirement, None, limit, first if isinstance(first, str) else str(second))
    low, middle, high = ratio(first, second)
    return Finding(requirement, middle, limit, f"{low:.2f}–{high:.2f}")


def on_minilm(arguments: argparse.Namespace) -> Iterator[Finding]:
    """Ratios to the peers, and LDAdam's first step."""
    mfac = ours("sparse_mfac", window=32, density=0.01)
    candidates = [peer(FOREACH), peer("bitsandbytes AdamW8bit"), ours("microadam"), mfac]
    for rank in (16, 128):
        candidates += [peer("galore-torch", rank), ours("ldadam", rank=rank)]
    work = workload("minilm", "float32", "cpu")
    entered = enter_all(candidates, work)
    run_rounds(entered, arguments)
    yield compared(entered, "ldadam rank=16", "galore-torch rank=16", 0.8)
    yield compared(entered, "ldadam rank=16", FOREACH, 1.0)
    yield compared(entered, "ldadam rank=128", "galore-torch rank=128", 1.6)
    yield compared(entered, "microadam", FOREACH, 1.0)
    yield compared(entered, "microadam", "bitsandbytes AdamW8bit", 0.2)
    yield compared(entered, mfac.name, FOREACH, 1.8)
    yield first_step(work)


def first_step(work: Workload) -> Finding:
    """LDAdam's first step, which decomposes every gradient, against its third, over several new optimizers."""
    candidate = ours("ldadam", rank=16)
    times = []
    for _ in range(_FIRST_STEPS):
        optimizer = candidate.build(work.model)
        times.append([timed_step_ms(optimizer, work.device) for _ in range(3)])
    first, later = statistics.median(t[0] for t in times), statistics.median(t[2] for t in times)
    return Finding("ldadam rank=16, first step / later step", first / later, 10.0, f"{first:.0f} / {later:.0f} ms")


def on_small_tensors(arguments: argparse.Namespace) -> Iterator[Finding]:
    """1000 small tensors."""
    entered = enter_all(general(), workload("small", "float32", "cpu"))
    run_rounds(entered, arguments)
    for name in ("ldadam rank=16", "microadam", "sparse_mfac"):
        yield compared(entered, name, FOREACH, 3.0, ", 1000 small tensors")


def on_growing_models(arguments: argparse.Namespace) -> Iterator[Finding]:
    """Time per parameter from 10 M to 200 M parameters, all sizes interleaved."""
    entered: dict[str, list[Contender]] = {}
    for size in BODY_SIZES:
        torch.manual_seed(SEED)
        work = Workload(f"body {size}", body(*size))
        for candidate in general():
            contender = enter(candidate, work)
            if isinstance(contender, str):
                raise RuntimeError(f"{candidate.name}: {contender}")
            entered.setdefault(candidate.name, []).append(contender)
    cores = compare([c for contenders in entered.values() for c in contenders], arguments.rounds, arguments.seconds)
    print(f"others used {cores:.2f} cores meanwhile")
    for name, contenders in entered.items():
        costs = [1e6 * statistics.median(c.times_ms) / c.workload.num_parameters for c in contenders]
        text = " ".join(f"{cost:.2f}" for cost in costs) + " ns"
        limit = None if name.startswith("torch") else 1.2
        yield Finding(f"{name}, largest / smallest time per parameter, 10–200 M", max(costs) / min(costs), limit, text)


PARTS = {"minilm": on_minilm, "small": on_small_tensors, "growing": on_growing_models}


def main() -> int:
    """Measure and print; the exit status is 1 if a requirement is not met."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", nargs="+", default=list(PARTS), choices=list(PARTS))
    add_timing_options(parser, "requirements")
    arguments = parser.parse_args()
    if arguments.device != "cpu" or arguments.plot:
        parser.error("the requirements are for the CPU, and there is no picture of them: use step_time.py")
    if choose_backend("step", torch.device("cpu")) != "cpu":
        parser.error("the requirements are for numba's kernels: pip install 'hf-lowmem-optim[cpu]'")
    settings = {"device": "cpu", "dtype": "float32", "threads": torch.get_num_threads(), "seed": SEED}
    run = describe_run("requirements", {**settings, "rounds": arguments.rounds, "seconds": arguments.seconds})
    print(run.label())
    if arguments.resume:
        run = resume_run(run, arguments.save)
    for part in arguments.part:
        if any(row["part"] == part for row in run.rows):
            continue
        wait_unless_told(arguments, parser)
        rows = [{"part": part, **asdict(found), "met": found.met} for found in PARTS[part](arguments)]
        run = replace(run, rows=[*run.rows, *rows])
        if arguments.save:
            save_run(run, arguments.save)
    print(requirement_rows(run.rows))
    return 1 if any(row["met"] is False for row in run.rows) else 0


if __name__ == "__main__":
    sys.exit(main())
