"""Compare how well optimizers learn: the same model on the same batches, each at the best of its own learning rates.

    python benchmarks/convergence.py pretrain --entry adamw@5e-4 ldadam@4e-3 galore:rank=16@1e-2 --results a.json
    python benchmarks/convergence.py finetune --entry adamw microadam --lr 3e-5 1e-4 --seeds 0 1 2
    python benchmarks/render.py a.json --plot a.png

The tasks are described in ``convergence_tasks.py``, the optimizers in ``peers.build_optimizer``. An entry is a name,
with settings after a colon and the rate where its grid starts after an @. The grid doubles and halves until the best
rate is not at an edge; it is chosen on the validation set with ``--tune-seed``, and ``--seeds`` (other starts and data
orders, the same for all) at that rate are reported on the test set. ``--lr`` reports those rates instead, without
choosing.

Cosine schedule with 5% warm-up, gradients clipped at norm 1, weight decay 0; a run whose loss is not finite stops
there. GaLore multiplies the update of its matrices by 0.25, so that all else has four times their rate; the setting
``dense_lr_ratio=4`` gives any entry what GaLore has. Each run goes to ``--results`` as soon as it is done, and is not
run again when it is there. Seconds are wall time, on whatever else the machine had to do.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from convergence_tasks import TASKS, Batch, Task
from peers import build_optimizer
from pictures import plot_convergence
from results import Row, describe_run, load_run, save_run
from tables import report
from torch import nn
from transformers import logging as transformers_logging

from hf_lowmem_optim import measure_state

FINAL_STEPS = 50
CURVE_STEPS = 10
MAX_DOUBLINGS = 8

#: Trains an entry at a rate from a seed, and evaluates it on the set of that name.
TrainOne = Callable[[str, float, int, str], Row]


def bracket(loss_at: Callable[[float], float], start: float) -> dict[float, float]:
    """Try rates by factors of two from ``start``, until both neighbours of the best one have been tried.

    Returns:
        Loss by rate, as tried; what is not finite counts as worst.

    Raises:
        RuntimeError: The best rate is :data:`MAX_DOUBLINGS` factors from the start, and not bracketed.
    """
    tried: dict[int, float] = {}
    best, untried = 0, [0]
    while untried:
        if abs(untried[0]) > MAX_DOUBLINGS:
            raise RuntimeError(f"best rate {start * 2.0**best:g} is an edge, {MAX_DOUBLINGS} doublings from {start:g}")
        loss = loss_at(start * 2.0 ** untried[0])
        tried[untried[0]] = loss if math.isfinite(loss) else math.inf
        best = min(tried, key=lambda k: tried[k])
        # where all diverged there is only a way down
        neighbours = [min(tried) - 1] if math.isinf(tried[best]) else [best + 1, best - 1]
        untried = [k for k in neighbours if k not in tried]
    return {start * 2.0**k: loss for k, loss in tried.items()}


def train(task: Task, entry: str, lr: float, seed: int, steps: int, held_out: str, precision: str) -> Row:
    """Train once, from the same start on the same batches for every optimizer.

    Args:
        task: What is trained.
        entry: As in the module's docstring, without the rate.
        lr: Peak of the schedule.
        seed: Of initialization and data order.
        steps: Number of steps.
        held_out: ``"validation"`` or ``"test"``: where the model is evaluated in the end.
        precision: ``"fp32"``, or ``"bf16"`` for autocast as the Trainer's ``bf16=True`` has it.

    Returns:
        The arguments; ``train_loss`` (mean of the last 50 steps), ``held_out_loss`` and ``accuracy`` on that set,
        ``state_bytes``, ``parameters``, ``seconds``, and ``curve``, training losses as means of ten steps.
    """
    torch.manual_seed(seed)
    model = task.build().train()
    optimizer = build_optimizer(entry, model, lr)
    warm_up = max(1, steps // 20)

    def factor(step: int) -> float:
        if step < warm_up:
            return (step + 1) / warm_up
        return 0.5 * (1 + math.cos(math.pi * (step - warm_up) / (steps - warm_up)))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16")
    losses: list[float] = []
    start = time.perf_counter()
    for batch in task.batches(seed, steps):
        with autocast:
            loss = model(**batch).loss
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            break
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        model.zero_grad()
    seconds = time.perf_counter() - start
    with autocast:
        held_out_loss, accuracy = evaluate(model, task.held_out[held_out])
    return {
        "task": task.name,
        "entry": entry,
        "lr": lr,
        "seed": seed,
        "steps": steps,
        "precision": precision,
        "held_out": held_out,
        "train_loss": statistics.mean(losses[-FINAL_STEPS:]),
        # weights that diverged may still give a number: not one to be chosen for
        "held_out_loss": held_out_loss if math.isfinite(losses[-1]) else math.inf,
        "accuracy": accuracy,
        "state_bytes": measure_state(optimizer).total_bytes,
        "parameters": sum(p.numel() for p in model.parameters()),
        "seconds": round(seconds, 1),
        "curve": [round(statistics.mean(losses[i : i + CURVE_STEPS]), 4) for i in range(0, len(losses), CURVE_STEPS)],
    }


@torch.no_grad()
def evaluate(model: nn.Module, batches: Sequence[Batch]) -> tuple[float, float]:
    """Return loss and accuracy (of the class, or of the next byte)."""
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


def parse_entry(text: str) -> tuple[str, float]:
    """Return entry and starting rate of ``name:settings@rate``, 1e-3 if none is given."""
    entry, _, rate = text.partition("@")
    return entry, float(rate or 1e-3)


def tune_and_report(
    run: TrainOne, entries: Mapping[str, float], tune_seed: int, seeds: Sequence[int]
) -> dict[str, float]:
    """Run all grids first, then the seeds in turn: an interrupted run has the same seeds for every entry.

    Args:
        run: Trains and evaluates.
        entries: Where the grid of each entry starts.
        tune_seed: Its validation loss chooses the rate.
        seeds: These are reported on the test set.

    Returns:
        The rate that was chosen for each entry.

    Raises:
        ValueError: ``tune_seed`` is among ``seeds``.
    """
    if tune_seed in seeds:
        raise ValueError(f"--tune-seed {tune_seed} chooses the rates and cannot be one of --seeds {seeds} as well")
    chosen = {}
    for entry, start in entries.items():

        def loss_at(lr: float, entry: str = entry) -> float:
            return float(run(entry, lr, tune_seed, "validation")["held_out_loss"])

        losses = bracket(loss_at, start)
        chosen[entry] = min(losses, key=lambda lr: losses[lr])
        print(f"{entry}: best rate {chosen[entry]:g} of {', '.join(f'{lr:g}' for lr in sorted(losses))}", flush=True)
    for seed in seeds:
        for entry, lr in chosen.items():
            run(entry, lr, seed, "test")
    return chosen


class RunStore:
    """Keep the runs of one task in memory, and in a file if there is one.

    Args:
        path: The file (``….json``); continued if it exists, and written after every run.
        settings: Task, steps and precision (``dtype``) of all runs.
        note: What a reader must know about the runs; by default what the file says.
        benchmark: Whose runs they are.

    Raises:
        ValueError: The file has figures of another task, machine or versions, or with other settings: they cannot
            stand in one table.
    """

    def __init__(self, path: Path | None, settings: Row, note: str = "", benchmark: str = "convergence") -> None:
        self.path = path
        self.run = describe_run(benchmark, {**settings, "threads": torch.get_num_threads(), "device": "cpu"}, note)
        if path is None or not path.exists():
            return
        old, new = load_run(path), self.run
        for what, before, now in (
            ("benchmark", old.benchmark, new.benchmark),
            ("machine", old.machine, new.machine),
            ("versions", old.software["versions"], new.software["versions"]),
            ("settings", old.settings, new.settings),
        ):
            if before != now:
                raise ValueError(f"{path} has another {what}, {before}, than this process, {now}: choose another file")
        commands = dict.fromkeys((*old.command.split("\n"), new.command))
        self.run = replace(new, command="\n".join(commands), note=note or old.note, rows=old.rows)

    def resumable(self, train_one: TrainOne) -> TrainOne:
        """Return the same function, which trains only what has not been trained."""

        def run(entry: str, lr: float, seed: int, held_out: str) -> Row:
            wanted = {"entry": entry, "lr": lr, "seed": seed, "held_out": held_out}
            for row in self.run.rows:
                if wanted.items() <= {key: row[key] for key in wanted}.items():
                    return row
            row = train_one(entry, lr, seed, held_out)
            self.run = replace(self.run, rows=[*self.run.rows, row])
            if self.path is not None:
                save_run(self.run, self.path)
            losses = f"training {row['train_loss']:.3f}, {held_out} {row['held_out_loss']:.3f}"
            print(f"{entry} lr {lr:g} seed {seed}: {losses}, {row['seconds']:.0f} s", flush=True)
            return row

        return run


def main() -> None:
    """Train what the command line asks for, print and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=list(TASKS))
    parser.add_argument("--entry", nargs="+", default=["adamw@5e-4", "ldadam@4e-3"], metavar="NAME[:SETTINGS][@RATE]")
    parser.add_argument("--lr", nargs="+", type=float, help="report these rates, without choosing")
    parser.add_argument("--tune-seed", type=int, default=0)
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="bf16: autocast")
    parser.add_argument("--results", type=Path, help="write runs to this ….json, and skip those that are there")
    parser.add_argument("--note", default="", help="what a reader must know about these runs")
    parser.add_argument("--plot", type=Path, help="draw the runs to this file")
    args = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    transformers_logging.set_verbosity_error()
    task = TASKS[args.task]()
    store = RunStore(args.results, {"task": task.name, "steps": args.steps, "dtype": args.precision}, args.note)
    run = store.resumable(
        lambda entry, lr, seed, held_out: train(task, entry, lr, seed, args.steps, held_out, args.precision)
    )
    entries = dict(parse_entry(text) for text in args.entry)
    if args.lr:
        for entry in entries:
            for lr in args.lr:
                for seed in args.seeds:
                    run(entry, lr, seed, "test")
    else:
        tune_and_report(run, entries, args.tune_seed, args.seeds)
    print(report(store.run))
    if args.plot:
        plot_convergence(store.run, args.plot)


if __name__ == "__main__":
    main()
