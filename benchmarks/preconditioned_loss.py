"""Training loss of the preconditioned optimizers beside AdamW: density, storage of the error, damping, momentum.

    python benchmarks/preconditioned_loss.py

A small network (0.12 M parameters) predicts the next character of CPython's own documentation (which every
installation carries) from the eight before it: 300 steps of 64, two seeds, the rate falling to zero, the best of a few
rates picked on the very loss that is reported. It says how the settings compare with each other, no more than that.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from pydoc_data.topics import topics
from typing import Any

import torch
from torch import Tensor, nn

from hf_lowmem_optim.optimizers import LowRankMFAC, SparseGGT, SparseMFAC

Build = Callable[[Iterable[nn.Parameter], float], torch.optim.Optimizer]
CONTEXT, BATCH, SEEDS = 8, 64, (0, 1)


class Text:
    """Documentation as numbered characters, cut into a part to train on and a part held out."""

    def __init__(self) -> None:
        text = "".join(topics[key] for key in sorted(topics))[:200_000].lower()
        characters = sorted(set(text))
        self.codes = torch.tensor([characters.index(c) for c in text])
        self.num_characters = len(characters)
        order = torch.randperm(len(text) - CONTEXT - 1, generator=torch.Generator().manual_seed(0))
        self.training, self.held_out = order[:-4000], order[-4000:]

    def batch(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Contexts [n, 8] and what follows them [n]."""
        context = torch.stack([self.codes[positions + j] for j in range(CONTEXT)], dim=1)
        return context, self.codes[positions + CONTEXT]


def train(text: Text, build: Build, lr: float, seed: int, steps: int) -> tuple[float, float]:
    """Loss after training, on 8000 positions trained on and on those held out."""
    torch.manual_seed(seed)
    network = nn.Sequential(
        nn.Embedding(text.num_characters, 16),
        nn.Flatten(),
        nn.Linear(16 * CONTEXT, 256),
        nn.ReLU(),
        nn.Linear(256, 256),
        nn.ReLU(),
        nn.Linear(256, text.num_characters),
    )
    optimizer = build(network.parameters(), lr)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    generator = torch.Generator().manual_seed(seed)
    cross_entropy = nn.functional.cross_entropy
    for _ in range(steps):
        drawn = torch.randint(len(text.training), (BATCH,), generator=generator)
        context, target = text.batch(text.training[drawn])
        network.zero_grad()
        cross_entropy(network(context), target).backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        losses = []
        for positions in (text.training[:8000], text.held_out):
            context, target = text.batch(positions)
            losses.append(cross_entropy(network(context), target).item())
    return losses[0], losses[1]


def settings() -> dict[str, tuple[Build, tuple[float, ...]]]:
    """What is compared, each with its rates."""

    def ours(cls: Any, **hyper: Any) -> Build:
        return lambda params, lr: cls(params, lr=lr, **hyper)

    mfac = (0.03, 0.1, 0.2)
    dense = {"density": 1.0, "value_dtype": "fp32", "error_feedback": "fp32"}
    return {
        "torch AdamW": (lambda p, lr: torch.optim.AdamW(p, lr=lr, weight_decay=0.0), (3e-3, 1e-2, 3e-2)),
        "torch SGD, momentum 0.9": (lambda p, lr: torch.optim.SGD(p, lr=lr, momentum=0.9), (0.1, 0.3, 1.0)),
        "M-FAC, density 1": (ours(SparseMFAC, **dense), mfac),
        **{
            f"sparse_mfac, error in {e}": (ours(SparseMFAC, error_feedback=e), mfac)
            for e in ("fp32", "bf16", "8bit", "4bit")
        },
        "M-FAC, density 1, damping 1e-2": (ours(SparseMFAC, damping=1e-2, **dense), mfac),
        **{f"sparse_mfac, damping {d:g}": (ours(SparseMFAC, damping=d), mfac) for d in (1e-7, 1e-3, 1e-2, 1e-1)},
        "sparse_mfac, momentum 0.9": (ours(SparseMFAC, momentum=0.9), (1e-3, 3e-3, 1e-2)),
        "sparse_mfac, scope tensor": (ours(SparseMFAC, scope="tensor"), (3e-3, 1e-2, 3e-2)),
        "lowrank_mfac": (ours(LowRankMFAC), mfac),
        "lowrank_mfac, damping 1e-2": (ours(LowRankMFAC, damping=1e-2), mfac),
        "sparse_ggt": (ours(SparseGGT), (1.0, 3.0, 6.0)),
    }


def main() -> None:
    """Parse the command line, train, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--only", default="", help="part of the names to run")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    text = Text()
    print(f"{'':34s}{'best lr':>9s}{'loss':>8s}{'held out':>10s}   loss at each rate")
    for name, (build, rates) in settings().items():
        if arguments.only not in name:
            continue
        results = []
        for lr in rates:
            runs = [train(text, build, lr, seed, arguments.steps) for seed in SEEDS]
            results.append((lr, *(sum(losses) / len(SEEDS) for losses in zip(*runs, strict=True))))
        lr, loss, held_out = min(results, key=lambda result: result[1])
        others = "  ".join(f"{rate:g}: {value:.3f}" for rate, value, _ in results)
        print(f"{name:34s}{lr:9g}{loss:8.3f}{held_out:10.3f}   {others}", flush=True)


if __name__ == "__main__":
    main()
