"""Does it learn as well? The same model on the same batches, each optimizer at the best of its own learning rates.

    python benchmarks/convergence.py pretrain --entry adamw@5e-4 ldadam@4e-3 galore:rank=16@1e-2 --results a.json
    python benchmarks/convergence.py finetune --entry adamw microadam --lr 3e-5 1e-4 --seeds 0 1 2
    python benchmarks/convergence.py pretrain --results a.json --table --plot a.png

The tasks are described in ``convergence_tasks.py``, the optimizers in ``convergence_peers.py``. An entry is a name,
with settings after a colon and the rate where its grid starts after an @. The grid doubles and halves until the best
rate is not at an edge; it is chosen on the validation set with ``--tune-seed``, and ``--seeds`` (other starts and data
orders, the same for all) at that rate are reported on the test set. ``--lr`` reports those rates instead, without
choosing.

Cosine schedule with 5% warm-up, gradients clipped at norm 1, weight decay 0; a run whose loss is not finite stops
there. Each run goes to ``--results`` (JSON, and CSV beside it) as soon as it is done, and is not run again when it is
there. Seconds are wall time, on whatever else the machine had to do. ``--table`` and ``--plot`` only read the results.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from convergence_peers import build_optimizer, state_bytes
from convergence_plots import plot_convergence
from convergence_results import ConvergenceRow, RunStore, read_rows
from convergence_tables import convergence_table, rates_table
from convergence_tasks import TASKS, Batch, Task
from results import load_run
from torch import nn
from transformers import logging as transformers_logging

FINAL_STEPS = 50
CURVE_STEPS = 10
MAX_DOUBLINGS = 8


def bracket(loss_at: Callable[[float], float], start: float) -> dict[float, float]:
    """Try rates by factors of two from ``start``, until both neighbours of the best one have been tried.

    Args:
        loss_at: Loss at a rate; what is not finite counts as worst.
        start: Rate to start with.

    Returns:
        Loss by rate, as tried.

    Raises:
        RuntimeError: The best rate is :data:`MAX_DOUBLINGS` factors from the start, and not bracketed.
    """
    tried: dict[int, float] = {}

    def attempt(exponent: int) -> None:
        loss = loss_at(start * 2.0**exponent)
        tried[exponent] = loss if math.isfinite(loss) else math.inf

    attempt(0)
    while True:
        best = min(tried, key=lambda k: tried[k])
        neighbours = [best + 1, best - 1]
        if math.isinf(tried[best]):  # all diverged: only down
            best = min(tried)
            neighbours = [best - 1]
        untried = [k for k in neighbours if k not in tried]
        if not untried:
            return {start * 2.0**k: loss for k, loss in tried.items()}
        if abs(untried[0]) > MAX_DOUBLINGS:
            raise RuntimeError(f"best rate {start * 2.0**best:g} is an edge, {MAX_DOUBLINGS} doublings from {start:g}")
        attempt(untried[0])


def train(task: Task, entry: str, lr: float, seed: int, steps: int, held_out: str, precision: str) -> ConvergenceRow:
    """One run, from the same start on the same batches for every optimizer.

    Args:
        task: What is trained.
        entry: As in the module's docstring, without the rate.
        lr: Peak of the schedule.
        seed: Of initialization and data order.
        steps: Number of steps.
        held_out: ``"validation"`` or ``"test"``: where the model is evaluated in the end.
        precision: ``"fp32"``, or ``"bf16"`` for autocast as the Trainer's ``bf16=True`` has it.

    Returns:
        The results.
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
    if not math.isfinite(losses[-1]):
        held_out_loss = math.inf  # the weights may still give a number: not one to be chosen for
    return ConvergenceRow(
        task=task.name,
        entry=entry,
        lr=lr,
        seed=seed,
        steps=steps,
        precision=precision,
        held_out=held_out,
        train_loss=statistics.mean(losses[-FINAL_STEPS:]),
        held_out_loss=held_out_loss,
        accuracy=accuracy,
        state_bytes=state_bytes(optimizer),
        parameters=sum(p.numel() for p in model.parameters()),
        seconds=round(seconds, 1),
        curve=[round(statistics.mean(losses[i : i + CURVE_STEPS]), 4) for i in range(0, len(losses), CURVE_STEPS)],
    )


@torch.no_grad()
def evaluate(model: nn.Module, batches: Sequence[Batch]) -> tuple[float, float]:
    """Loss and accuracy (of the class, or of the next byte)."""
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
    """``name:settings@rate`` → entry and rate where the grid starts, 1e-3 if none is given."""
    entry, _, rate = text.partition("@")
    return entry, float(rate or 1e-3)


def tune_and_report(
    run: Callable[[str, float, int, str], ConvergenceRow],
    entries: Mapping[str, float],
    tune_seed: int,
    seeds: Sequence[int],
) -> dict[str, float]:
    """All grids first, then the seeds in turn, so that an interrupted run has the same seeds for every entry.

    Args:
        run: Trains an entry at a rate from a seed and evaluates it on the set of that name.
        entries: Where the grid of each entry starts.
        tune_seed: The seed whose validation loss chooses the rate.
        seeds: The seeds that are reported on the test set.

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
            return run(entry, lr, tune_seed, "validation").held_out_loss

        losses = bracket(loss_at, start)
        chosen[entry] = min(losses, key=lambda lr: losses[lr])
        print(f"{entry}: best rate {chosen[entry]:g} of {', '.join(f'{lr:g}' for lr in sorted(losses))}", flush=True)
    for seed in seeds:
        for entry, lr in chosen.items():
            run(entry, lr, seed, "test")
    return chosen


def resumable(
    store: RunStore, train_one: Callable[[str, float, int, str], ConvergenceRow]
) -> Callable[[str, float, int, str], ConvergenceRow]:
    """Look a run up in the store before it is run, and keep it there afterwards.

    Args:
        store: The runs that are done.
        train_one: Trains an entry at a rate from a seed and evaluates it on the set of that name.

    Returns:
        The same function, which trains only what has not been trained.
    """

    def run(entry: str, lr: float, seed: int, held_out: str) -> ConvergenceRow:
        row = store.find(entry, lr, seed, held_out)
        if row is None:
            row = train_one(entry, lr, seed, held_out)
            store.add(row)
            print(
                f"{entry} lr {lr:g} seed {seed}: training {row.train_loss:.3f}, {held_out} {row.held_out_loss:.3f}, "
                f"{row.seconds:.0f} s",
                flush=True,
            )
        return row

    return run


def parse_arguments() -> argparse.Namespace:
    """The command line."""
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
    parser.add_argument("--table", action="store_true", help="print the tables of --results")
    parser.add_argument("--plot", type=Path, help="draw --results to this file")
    args = parser.parse_args()
    if (args.table or args.plot) and not (args.results and args.results.exists()):
        parser.error(f"--table and --plot need results, and --results is {args.results}")
    return args


def train_all(args: argparse.Namespace) -> list[ConvergenceRow]:
    """Run what the command line asks for, and return all runs there are."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    transformers_logging.set_verbosity_error()
    task = TASKS[args.task]()
    store = RunStore(args.results, task.name, args.steps, args.precision, args.note)
    run = resumable(
        store,
        lambda entry, lr, seed, held_out: train(task, entry, lr, seed, args.steps, held_out, args.precision),
    )
    entries = dict(parse_entry(text) for text in args.entry)
    if args.lr:
        for entry in entries:
            for lr in args.lr:
                for seed in args.seeds:
                    run(entry, lr, seed, "test")
    else:
        tune_and_report(run, entries, args.tune_seed, args.seeds)
    store.finish()
    return store.rows


def main() -> None:
    """Train and print, or only print and draw."""
    args = parse_arguments()
    reading = args.table or args.plot
    rows = read_rows(load_run(args.results)) if reading else train_all(args)
    if args.plot:
        plot_convergence(load_run(args.results), args.plot)
    if args.table or not reading:
        print(convergence_table(rows))
        if any(row.held_out == "validation" for row in rows):
            print(f"\nValidation loss by learning rate:\n\n{rates_table(rows)}")


if __name__ == "__main__":
    main()
