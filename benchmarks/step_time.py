"""Time ``optimizer.step()``: ours and every peer that is installed, interleaved in one process.

    python benchmarks/step_time.py --save                        # MiniLM and Llama shapes, into benchmarks/results
    python benchmarks/step_time.py --shapes lora matrix small --rank 16 --only ldadam galore foreach
    python benchmarks/step_time.py --device cuda --dtype bfloat16
    HF_LOWMEM_OPTIM_BACKEND=reference python benchmarks/step_time.py    # without numba

Install the peers with ``pip install -e '.[bench]'``, and with ``--no-deps`` galore-torch and apollo-torch, which ask
for much that they do not use. What is missing is a line that says so. torchao compiles for 20 to 40 seconds: it takes
part with ``--compiled``.

Printed per optimizer: median milliseconds of a step, on a GPU also until ``step()`` returns ("host"), spread (90th
minus 10th percentile), ratio to torch's AdamW foreach and fused (medians of the ratios round by round), the first step
(which computes the SVD, or compiles), bytes of state per parameter, and the most that a step allocated. A window is
full before the rounds begin. GaLore's and APOLLO's new projections, every 200 steps, are in no round.

Page faults of temporaries can change a ratio by 1.4: the malloc setting is printed; try MALLOC_MMAP_MAX_=0
MALLOC_TRIM_THRESHOLD_=17179869184. It waits until the machine is quiet. Rows are saved after each set of shapes.
"""

from __future__ import annotations

import argparse
import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from interleave import MIN_ROUNDS, SEED, Contender, compare, enter, summarize, workload
from machine import BusyMachineError, backend, wait_until_quiet
from peers import FOREACH, FUSED, candidates
from pictures import plot_step_time
from results import RESULTS, describe_run, save_run
from shapes import SHAPES
from tables import step_time_rows
from transformers import logging as transformers_logging

#: Above this others disturb the rounds noticeably.
_DISTURBING_CORES = 0.2


def _rounds(text: str) -> int:
    """Parse a number of rounds of which a median means something."""
    if not text.isdigit() or int(text) < MIN_ROUNDS:
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number of at least {MIN_ROUNDS}")
    return int(text)


def add_timing_options(parser: argparse.ArgumentParser, name: str) -> None:
    """Add the options of everything that measures time."""
    transformers_logging.set_verbosity_error()  # what the factory logs about each model is of no interest here
    parser.add_argument("--rounds", type=_rounds, default=25, help="at most")
    parser.add_argument("--seconds", type=float, default=120.0, help="for the rounds of one set, five rounds at least")
    parser.add_argument("--wait", type=float, default=300.0, help="seconds to wait for a quiet machine")
    parser.add_argument("--ignore-load", action="store_true", help="measure although others are computing")
    parser.add_argument("--save", type=Path, nargs="?", const=RESULTS / f"{name}.json", metavar="PATH.json")


def wait_unless_told(arguments: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Wait for a quiet machine, or exit with the reason."""
    if not arguments.ignore_load:
        try:
            wait_until_quiet(patience_s=arguments.wait)
        except BusyMachineError as error:
            parser.exit(3, f"{parser.prog}: {error}\n")


def measure(arguments: argparse.Namespace, shapes: str, dtype: str, threads: int) -> list[dict[str, Any]]:
    """Return the rows of every optimizer on one set of shapes."""
    torch.set_num_threads(threads)
    work = workload(shapes, dtype, arguments.device)
    entered: dict[str, Contender | str] = {}
    others = {name: getattr(arguments, name) for name in ("compiled", "captured", "compensated")}
    for candidate in candidates(arguments.rank, **others):
        wanted = not arguments.only or any(part in candidate.name for part in arguments.only)
        if wanted or candidate.name in (FOREACH, FUSED):
            entered[candidate.name] = enter(candidate, work)
    contenders = [c for c in entered.values() if isinstance(c, Contender)]
    cores = compare(contenders, arguments.rounds, arguments.seconds)
    if cores > _DISTURBING_CORES:
        print(f"warning: others used {cores:.2f} cores meanwhile; these times are not to be believed")
    rows = []
    for name, contender in entered.items():
        row: dict[str, Any] = {"shapes": shapes, "dtype": dtype, "threads": threads, "optimizer": name}
        if isinstance(contender, str):
            rows.append({**row, "problem": contender})
            print(f"{name}: {contender}")
        else:
            rows.append({**row, **summarize(contender, contenders), "others_cores": round(cores, 3)})
    print(f"\n{shapes}, {dtype}, {threads} threads\n\n{step_time_rows(rows)}")
    return rows


def main() -> None:
    """Measure, print and write what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["minilm", "llama"], choices=list(SHAPES))
    parser.add_argument("--rank", nargs="+", type=int, default=[16, 128], help="of the low-rank methods")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", nargs="+", default=["float32"], choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--threads", nargs="+", type=int, default=[torch.get_num_threads()])
    parser.add_argument("--only", nargs="+", metavar="PART", help="optimizers whose names contain one of these")
    parser.add_argument("--compiled", action="store_true", help="torchao too")
    parser.add_argument("--captured", action="store_true", help="steps of ours as CUDA graphs, too (on a GPU)")
    parser.add_argument("--compensated", action="store_true", help="ours with weight_rounding=compensated, too")
    parser.add_argument("--plot", type=Path, metavar="PATH.png", help="draw the rows (extra plot)")
    add_timing_options(parser, "step_time")
    arguments = parser.parse_args()
    settings = {
        "device": arguments.device,
        "backend": backend(torch.device(arguments.device).type),
        "dtype": " ".join(arguments.dtype),
        "threads": " ".join(map(str, arguments.threads)),
        "seed": SEED,
        **{key: getattr(arguments, key) for key in ("rounds", "seconds", "only")},
    }
    run = describe_run("step_time", settings)
    print(f"{run.label()}, kernels {settings['backend']}")
    for shapes, dtype, threads in itertools.product(arguments.shapes, arguments.dtype, arguments.threads):
        wait_unless_told(arguments, parser)
        run = replace(run, rows=[*run.rows, *measure(arguments, shapes, dtype, threads)])
        if arguments.save:
            save_run(run, arguments.save)
    if arguments.plot:
        plot_step_time(run, arguments.plot)


if __name__ == "__main__":
    main()
