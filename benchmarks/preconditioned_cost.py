"""Cost of a step of the sparse preconditioned optimizers over window and density: linear in window · density.

    python benchmarks/preconditioned_cost.py --entries 4000000 --csv preconditioned_cost.csv

Prints, per window and density, the CPU milliseconds of a step (median), and a least-squares line through them: what a
step costs whatever the window (the gradient is read, the error read and written), and what each unit of window ·
density adds. Processor time, not wall time, so that other work on the machine matters less: set OMP_NUM_THREADS=1 and
NUMBA_NUM_THREADS=1.
"""

from __future__ import annotations

import argparse
import csv
import platform
import statistics
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn

from hf_lowmem_optim.optimizers import SparseGGT, SparseMFAC

OPTIMIZERS = {"sparse_mfac": SparseMFAC, "sparse_ggt": SparseGGT}


def step_ms(name: str, entries: int, window: int, density: float, rounds: int) -> float:
    """Median CPU milliseconds of a step with a full window."""
    generator = torch.Generator().manual_seed(0)
    weight = nn.Parameter(torch.zeros(entries))
    optimizer = OPTIMIZERS[name]([weight], lr=1e-6, window=window, density=density)
    times = []
    for step in range(window + rounds):
        weight.grad = torch.randn(entries, generator=generator)
        began = time.process_time()
        optimizer.step()
        if step >= window:
            times.append(1e3 * (time.process_time() - began))
    return statistics.median(times)


def main() -> None:
    """Parse the command line, measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--optimizer", default="sparse_mfac", choices=list(OPTIMIZERS))
    parser.add_argument("--entries", type=int, default=4_000_000)
    parser.add_argument("--windows", type=int, nargs="+", default=[8, 16, 32, 64])
    parser.add_argument("--densities", type=float, nargs="+", default=[0.005, 0.01, 0.02])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--csv", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{arguments.optimizer}, {arguments.entries:,} entries, torch {torch.__version__}, {platform.machine()}")
    # the kernels are compiled at their first call
    step_ms(arguments.optimizer, 10_000, 2, 0.01, 1)
    rows = []
    for window in arguments.windows:
        for density in arguments.densities:
            ms = step_ms(arguments.optimizer, arguments.entries, window, density, arguments.rounds)
            rows.append((window, density, ms))
            print(f"window {window:4d}  density {density:.3f}  window·density {window * density:6.3f}  {ms:8.2f} ms")
    product = np.array([window * density for window, density, _ in rows])
    measured = np.array([ms for *_, ms in rows])
    slope, fixed = np.polyfit(product, measured, 1)
    off = np.abs(fixed + slope * product - measured) / measured
    print(f"step ≈ {fixed:.2f} ms + {slope:.2f} ms · window·density")
    print(f"the line is off by {off.mean():.0%} on average, {off.max():.0%} at most")
    if arguments.csv:
        with arguments.csv.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["optimizer", "entries", "window", "density", "step_cpu_ms"])
            writer.writerows((arguments.optimizer, arguments.entries, *row) for row in rows)


if __name__ == "__main__":
    main()
