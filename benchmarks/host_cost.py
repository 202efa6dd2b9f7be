"""What a step of many small tensors costs the host of a GPU: Python and torch's bookkeeping, without the kernels.

    python benchmarks/host_cost.py [--rounds 40] [--save benchmarks/results/host_cost.json]

A GPU is done with a thousand small tensors long before the host has told it what to do, so that such a step takes as
long as the host. The tensors lie on the CPU, and all that would be launched is left out: Triton's kernels, and of
torch's fused AdamW its kernel and the one that counts steps, which on a CPU is a call for each tensor; of LDAdam, whose
launches torch's products stand between, the whole update. Gradients lie in two places in turn, where an allocator that
reuses memory puts them after ``zero_grad``; each step has its learning rate. All tensors have gradients in every step:
where other ones have some each time, a step finds out anew what is remembered here. Captured steps are replays, whose
gradients stay where they are. The methods take turns; figures are medians.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from results import Row, describe_run, save_run
from torch import nn
from triton.runtime.jit import JITFunction

from hf_lowmem_optim import CapturedStep
from hf_lowmem_optim.engine import capture
from hf_lowmem_optim.ops import dispatch
from hf_lowmem_optim.optimizers import LDAdam, MicroAdam, SparseGGT, SparseMFAC

TENSORS = 1000
#: Steps that are not counted: until a window is full, nothing is the same twice.
FIRST = 14
#: Entries of each tensor: a matrix, which all compress, and a vector, which MicroAdam and LDAdam leave to AdamW.
SHAPES = {"64 × 64": (64, 64), "64": (64,)}
FUSED, CAPTURED = "AdamW (torch, fused)", ", captured"


def _nothing(*args: Any, **kwargs: Any) -> None:
    """Take the place of a launch."""


def leave_out_launches() -> None:
    """Have every operation of this process prepare its launch, and not launch."""
    os.environ[dispatch.ENVIRONMENT_VARIABLE] = "triton"
    dispatch._triton_interprets = lambda: True
    JITFunction.__getitem__ = lambda self, grid: _nothing
    capture._graph_of = lambda run, device: [run(), _nothing][1]
    # in place of torch's functions of other signatures, in this process alone
    torch._fused_adamw_ = torch._foreach_add_ = _nothing  # type: ignore[assignment]


def ldadam_without_update(params: Any, lr: float) -> torch.optim.Optimizer:
    """Return LDAdam, whose update does nothing."""

    class WithoutUpdate(LDAdam):
        method = replace(LDAdam.method, update_=_nothing)

    return WithoutUpdate(params, lr=lr)


OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    FUSED: lambda params, lr: torch.optim.AdamW(params, lr=lr, fused=True),
    "MicroAdam": MicroAdam,
    "SparseMFAC": SparseMFAC,
    "SparseGGT": SparseGGT,
    "LDAdam, but for its update": ldadam_without_update,
    f"MicroAdam{CAPTURED}": MicroAdam,
    f"SparseMFAC{CAPTURED}": SparseMFAC,
    f"LDAdam{CAPTURED}": ldadam_without_update,
}


class Subject:
    """An optimizer of many equal tensors, and gradients for it in two places; in one for a captured step."""

    def __init__(
        self, make: Callable[..., torch.optim.Optimizer], shape: tuple[int, ...], *, captured: bool = False
    ) -> None:
        self.weights = [nn.Parameter(torch.randn(shape).bfloat16()) for _ in range(TENSORS)]
        self.gradients = [[torch.randn(shape).bfloat16() for _ in range(TENSORS)] for _ in range(1 if captured else 2)]
        self.optimizer, self.steps = make(self.weights, lr=1e-4), 0
        self.take = CapturedStep(self.optimizer) if captured else self.optimizer.step
        self.seconds: list[float] = []

    def step(self) -> None:
        """Take a step, and note how long it took."""
        self.steps += 1
        for group in self.optimizer.param_groups:
            group["lr"] *= 0.999
        for weight, gradient in zip(self.weights, self.gradients[self.steps % len(self.gradients)], strict=True):
            weight.grad = gradient
        start = time.perf_counter()
        self.take()
        self.seconds.append(time.perf_counter() - start)


def measure(rounds: int) -> list[Row]:
    """Return a row for each optimizer."""
    rows: dict[str, dict[str, Any]] = {name: {"optimizer": name} for name in OPTIMIZERS}
    for title, shape in SHAPES.items():
        subjects = {name: Subject(make, shape, captured=CAPTURED in name) for name, make in OPTIMIZERS.items()}
        for _ in range(rounds + FIRST):
            for subject in subjects.values():
                subject.step()
        each = {name: 1e6 * statistics.median(one.seconds[FIRST:]) / TENSORS for name, one in subjects.items()}
        for name, microseconds in each.items():
            rows[name] |= {f"{title}, us": microseconds, f"{title}, ratio": microseconds / each[FUSED]}
    return list(rows.values())


def main() -> None:
    """Measure, print, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=40, help="of timing")
    parser.add_argument("--save", type=Path, metavar="PATH.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    leave_out_launches()
    run = describe_run("host_cost", {"threads": 1, "rounds": arguments.rounds, "dtype": "bfloat16"})
    rows = measure(arguments.rounds)
    for row in rows:
        print(row)
    if arguments.save:
        save_run(replace(run, rows=rows), arguments.save)


if __name__ == "__main__":
    main()
