"""Time whole training steps in the normal and in the layer-wise mode: forward, backward, update.

    python benchmarks/gpu_layerwise.py --save benchmarks/results/gpu_layerwise.json

The model is that of gpu_training.py, on batches so small that the update is a part of the time. Every round is a step
of each optimizer, in an order of its own; each trains a model of its own.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from gpu_training import SIZES, VOCABULARY, build, loss_of
from peers import build_optimizer
from results import describe_run, save_run
from torch import Tensor, nn
from torch.optim import Optimizer

SEED = 0
_WARM_STEPS = 12  # a window of MicroAdam's is full
ENTRIES = ("adamw", "ldadam", "ldadam_layerwise", "microadam", "microadam_layerwise")


def training_step_ms(model: nn.Module, optimizer: Optimizer, batch: Tensor) -> float:
    """Train for a step and return its milliseconds, until the device has finished it."""
    if batch.is_cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    # torch does not annotate backward()
    loss_of(model, batch).backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    model.zero_grad()
    if batch.is_cuda:
        torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - start)


def rows_of(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Return the row of each optimizer: its time, and that over the time of AdamW in the same round."""
    generator = torch.Generator().manual_seed(SEED)
    batch = torch.randint(VOCABULARY, (arguments.batch, arguments.length), generator=generator).to(arguments.device)
    models = {entry: build(arguments) for entry in ENTRIES}
    optimizers = {entry: build_optimizer(entry, model, 1e-4) for entry, model in models.items()}
    times: dict[str, list[float]] = {entry: [] for entry in ENTRIES}
    order, shuffle = list(ENTRIES), random.Random(SEED)
    for number in range(_WARM_STEPS + arguments.rounds):
        shuffle.shuffle(order)
        for entry in order:
            milliseconds = training_step_ms(models[entry], optimizers[entry], batch)
            if number >= _WARM_STEPS:
                times[entry].append(milliseconds)
    rows = []
    for entry, found in times.items():
        ratio = statistics.median(mine / base for mine, base in zip(found, times[ENTRIES[0]], strict=True))
        deciles = statistics.quantiles(found, n=10)
        row = {"entry": entry, "median_ms": round(statistics.median(found), 3), "ratio_to_adamw": round(ratio, 3)}
        rows.append({**row, "spread_ms": round(deciles[8] - deciles[0], 3), "rounds": len(found)})
    return rows


def main() -> None:
    """Measure, print and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    defaults = {"rounds": 30, "batch": 4, **{key: SIZES[key] for key in ("length", "hidden", "layers")}}
    for name, default in defaults.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--save", type=Path, metavar="PATH.json")
    arguments = parser.parse_args()
    settings = {name: getattr(arguments, name) for name in ("device", *defaults)} | {"dtype": "bfloat16", "seed": SEED}
    run = describe_run("gpu_layerwise", settings)
    run = replace(run, rows=rows_of(arguments))
    for row in run.rows:
        print(*row.values(), sep="  ")
    if arguments.save:
        save_run(run, arguments.save)


if __name__ == "__main__":
    main()
