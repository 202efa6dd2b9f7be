"""Compile the kernels that the other GPU benchmarks launch, in several processes at once; Triton keeps them on disk.

    python benchmarks/gpu_compile.py --seconds 100

Where none is on disk yet, that is two minutes of one process. Each process here takes all steps without launching a
kernel of ours, so that what torch computes is nonsense, and compiles its share of what would have been launched.
"""

from __future__ import annotations

import argparse
import itertools
import math
import os
import subprocess
import sys
import time
import zlib
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import gpu_stages
import gpu_training
import torch
from interleave import Workload, enter, workload
from peers import Candidate, build_optimizer, candidates

#: As gpu_session.py has them.
OURS = ("ldadam", "microadam", "sparse_mfac", "lowrank_mfac", "sparse_ggt")
SHAPES = ("large", "llama", "small", "minilm")
_BYTES_OF_A_PROCESS = 6 << 30
_MOST_PROCESSES = 16


def variant(names: Sequence[str], constants: Sequence[bool], values: dict[str, Any]) -> str:
    """Return what a launch is compiled for, as far as that matters to share out the work."""
    parts = []
    for name, value in values.items():
        constant = name not in names or constants[names.index(name)]
        if isinstance(value, torch.Tensor):
            parts.append(f"{name}: {value.dtype} {value.data_ptr() % 16 == 0}")
        elif constant or value is None or isinstance(value, bool) or not isinstance(value, int):
            parts.append(f"{name}: {value if constant else type(value)}")
        else:
            parts.append(f"{name}: {value == 1} {value % 16 == 0} {abs(value) >> 31 > 0}")
    return "; ".join(parts)


def compile_only(share: int, of: int) -> dict[str, bool]:
    """Have Triton launch nothing from now on, and compile what falls to this share.

    Returns:
        What is met from now on: each variant, and whether it fell to this share.
    """
    from triton.runtime.jit import JITFunction

    run, met = JITFunction.run, dict[str, bool]()

    def instead(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        values = dict(zip(self.arg_names, args, strict=False)) | kwargs
        key = f"{self.fn.__name__}: {variant(self.arg_names, [p.is_constexpr for p in self.params], values)}"
        if key not in met:
            met[key] = zlib.crc32(key.encode()) % of == share
            if met[key]:
                run(self, *args, grid=grid, warmup=True, **kwargs)

    JITFunction.run = instead
    return met


def steps(work: Workload) -> Iterator[tuple[str, Callable[[], object]]]:
    """Yield the first steps of every optimizer of ours on a set of shapes."""
    for candidate in candidates([16, 128], compiled=False, compensated=work.name == "large"):
        if candidate.ours and candidate.name.split()[0] in OURS:
            yield f"{work.name}, {candidate.name}", partial(enter, candidate, work)


def trained() -> Iterator[tuple[str, Callable[[], object]]]:
    """Yield the first steps of the training runs."""
    work = Workload("training", gpu_training.build(Namespace(**gpu_training.SIZES, device="cuda")))
    for entry in gpu_training.ENTRIES:
        text, _, rate = entry.rpartition("@")
        if text.partition(":")[0] in OURS:
            build = partial(build_optimizer, text, lr=float(rate))
            yield f"training, {text}", partial(enter, Candidate(text, build), work)


def jobs() -> Iterator[tuple[str, Callable[[], object]]]:
    """Yield what the other parts do, in their order."""
    for shapes in SHAPES:
        yield from steps(workload(shapes, "bfloat16", "cuda"))
    for (shape, count), rank in itertools.product(gpu_stages.SHAPES, gpu_stages.RANKS):
        yield f"stages of {shape}, rank {rank}", partial(list, gpu_stages.rows_of(shape, count, rank))
    yield from trained()


def work_through(share: int, of: int) -> None:
    """Go through all jobs as one of the processes."""
    began, met = time.monotonic(), compile_only(share, of)
    for name, job in jobs():
        try:
            job()
        except Exception as error:  # the part itself will say so; here the other kernels are to be compiled
            print(f"{share}: {name}: {type(error).__name__}: {str(error)[:200]}", flush=True)
        torch.cuda.empty_cache()  # the device is shared
    mine = sum(met.values())
    print(f"{share}: {mine} of {len(met)} kernels after {time.monotonic() - began:.0f} s", flush=True)


def main() -> None:
    """Start the processes, and end those that are not done in time."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=math.inf)
    parser.add_argument("--share", type=int, nargs=2, metavar=("NUMBER", "OF"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.share:
        work_through(*arguments.share)
        return
    deadline = time.monotonic() + arguments.seconds
    free = torch.cuda.mem_get_info()[0] // _BYTES_OF_A_PROCESS
    count = max(1, min(_MOST_PROCESSES, os.cpu_count() or 1, free))
    command = [sys.executable, __file__, "--share"]
    processes = [subprocess.Popen([*command, str(number), str(count)]) for number in range(count)]
    for process in processes:
        try:
            process.wait(None if math.isinf(deadline) else max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


if __name__ == "__main__":
    main()
