"""Time of ``optimizer.step()``, every optimizer interleaved with torch's AdamW in one process.

    python benchmarks/step_time.py --model minilm --rank 16 128 --csv step_time.csv
    HF_LOWMEM_OPTIM_BACKEND=reference python benchmarks/step_time.py    # without numba

Prints, per optimizer, the median milliseconds of a step, the spread, the ratio to AdamW foreach (median of the
ratios round by round), the first step (which computes the SVD) and the bytes of optimizer state per parameter.
Rounds in which the machine was visibly busy with something else widen the spread: quote the medians.
"""

from __future__ import annotations

import argparse
import csv
import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import transformers
from shapes import MODELS
from torch import nn

from hf_lowmem_optim import OPTIMIZERS, OptimizerFactory
from hf_lowmem_optim.kernels.backend import choose_backend
from hf_lowmem_optim.memory.measure import measure_state


@dataclass
class Row:
    """One line of the table."""

    model: str
    optimizer: str
    dtype: str
    median_ms: float
    spread_ms: float
    ratio_to_foreach: float
    first_step_ms: float
    bytes_per_parameter: float


class Contender:
    """A model of its own, with fixed random gradients, and its optimizer."""

    def __init__(self, name: str, model: nn.Module, build: Callable[[nn.Module], torch.optim.Optimizer]) -> None:
        self.name = name
        generator = torch.Generator(model.device).manual_seed(0)
        for param in model.parameters():
            param.grad = torch.randn(param.shape, generator=generator, device=param.device).to(param.dtype) * 1e-3
        self.num_parameters = sum(p.numel() for p in model.parameters())
        self.optimizer = build(model)
        self.device = model.device
        self.times_ms: list[float] = []

    def step(self) -> None:
        """Time one step."""
        self._synchronize()
        start = time.perf_counter()
        self.optimizer.step()
        self._synchronize()
        self.times_ms.append(1e3 * (time.perf_counter() - start))

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def contenders(model: str, ranks: list[int], error_feedback: str, dtype: torch.dtype, device: str) -> list[Contender]:
    """AdamW foreach first, then fused, then ours."""

    def new_model() -> nn.Module:
        torch.manual_seed(0)
        return MODELS[model]().to(device=device, dtype=dtype)

    def ours(name: str, **hyper: object) -> Contender:
        factory = OptimizerFactory(name, lr=1e-4, **hyper)
        return Contender(" ".join([name, *(f"{k}={v}" for k, v in hyper.items())]), new_model(), factory)

    adamw = torch.optim.AdamW
    return [
        Contender("torch AdamW foreach", new_model(), lambda m: adamw(m.parameters(), lr=1e-4, foreach=True)),
        Contender("torch AdamW fused", new_model(), lambda m: adamw(m.parameters(), lr=1e-4, fused=True)),
        *(ours("ldadam", rank=rank, error_feedback=error_feedback) for rank in ranks),
        *(ours(name) for name in OPTIMIZERS if name != "ldadam"),
    ]


def measure(model: str, entries: list[Contender], rounds: int, dtype: str) -> list[Row]:
    """Run the rounds, each of one step of everyone, and summarize."""
    for _ in range(rounds + 2):
        for entry in entries:
            entry.step()
    base = entries[0].times_ms[2:]
    rows = []
    for entry in entries:
        times = entry.times_ms[2:]
        deciles = statistics.quantiles(times, n=10)
        rows.append(
            Row(
                model,
                entry.name,
                dtype,
                statistics.median(times),
                deciles[8] - deciles[0],
                statistics.median(t / b for t, b in zip(times, base, strict=True)),
                entry.times_ms[0],
                measure_state(entry.optimizer).total_bytes / entry.num_parameters,
            )
        )
    return rows


def main() -> None:
    """Parse the command line, measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--rank", nargs="+", type=int, default=[16, 128])
    parser.add_argument("--error-feedback", default="4bit", help="of ldadam")
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--csv", type=Path, default=None)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    malloc = {k: v for k, v in os.environ.items() if k.startswith("MALLOC_")} or "default"
    print(
        f"{platform.machine()}, {torch.get_num_threads()} threads, device {args.device}, "
        f"kernels {choose_backend('step', torch.device(args.device))}, "
        f"load {os.getloadavg()[0]:.1f}, "
        f"torch {torch.__version__}, transformers {transformers.__version__}, malloc {malloc}, seed 0"
    )
    rows: list[Row] = []
    for model in args.model:
        entries = contenders(model, args.rank, args.error_feedback, getattr(torch, args.dtype), args.device)
        rows += measure(model, entries, args.rounds, args.dtype)
    print("| model | optimizer | dtype | median ms | 10–90% ms | × foreach | first step ms | B/param |")
    print("|---|---|---|---|---|---|---|---|")
    for row in rows:
        cells = [f"{v:.2f}" if isinstance(v, float) else v for v in asdict(row).values()]
        print(f"| {' | '.join(cells)} |")
    if args.csv:
        with args.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(asdict(rows[0])))
            writer.writeheader()
            writer.writerows(asdict(row) for row in rows)


if __name__ == "__main__":
    main()
