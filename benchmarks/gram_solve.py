"""Why M-FAC solves its system as it does: numba's loops and LAPACK, with warm caches and as in a step.

    python benchmarks/gram_solve.py

Needs numba (extra ``cpu``). Per size of the window and implementation: median microseconds of interleaved calls, right
after the last one and after an AdamW step of 50 M parameters, which leaves nothing of it in the caches, as a training
step does; and the largest relative difference between the two.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from hf_lowmem_optim.kernels.backend import implementation
from hf_lowmem_optim.kernels.gram_solve import CPU_MAX_SIZE
from hf_lowmem_optim.kernels.workers import one_thread

_SIZES = (8, 16, 32, 64, 96, 128, 192, 256)
_DAMPING = 1e-3


def microseconds(solve: Callable[[Tensor, int, float], object], gram: Tensor) -> float:
    """Time of a call."""
    start = time.perf_counter()
    solve(gram, 0, _DAMPING)
    return 1e6 * (time.perf_counter() - start)


def main() -> None:
    """Time both in turn and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    arguments = parser.parse_args()
    solvers = {
        name: implementation("gram_solve", backend).inverse_column
        for name, backend in (("numba", "cpu"), ("LAPACK", "reference"))
    }
    weight = nn.Parameter(torch.zeros(50_000_000))
    weight.grad = torch.ones_like(weight)
    other = torch.optim.AdamW([weight])
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}; numba's loops up to {CPU_MAX_SIZE} rows")
    print("| rows | method | warm, µs | as in a step, µs | relative difference |")
    print("|---|---|---|---|---|")
    generator = torch.Generator().manual_seed(0)
    for size in _SIZES:
        rows = torch.randn(size, 4 * size, dtype=torch.float64, generator=generator)
        gram = rows @ rows.T
        found = {name: solve(gram, 0, _DAMPING)[0] for name, solve in solvers.items()}
        difference = float((found["numba"] - found["LAPACK"]).abs().max() / found["LAPACK"].abs().max())
        warm: dict[str, list[float]] = {name: [] for name in solvers}
        cold: dict[str, list[float]] = {name: [] for name in solvers}
        for _ in range(arguments.rounds):
            for name, solve in solvers.items():
                other.step()
                with one_thread():
                    cold[name].append(microseconds(solve, gram))
                    warm[name].append(microseconds(solve, gram))
        for name in solvers:
            times = f"{statistics.median(warm[name]):.0f} | {statistics.median(cold[name]):.0f}"
            print(f"| {size} | {name} | {times} | {difference:.0e} |")


if __name__ == "__main__":
    main()
