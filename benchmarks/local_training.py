"""Compare ways to train on several workers, by loss against tokens and bytes sent: a small byte-level language model.

    python benchmarks/local_training.py --results benchmarks/results/local_training.json
    python benchmarks/local_training.py --only lordo:16:0.9 local:16 --steps 64

An entry is ``ddp:OPTIMIZER`` (gradients averaged at every step), ``local:K`` (AdamW on each worker, weights and moments
averaged every K steps) or ``lordo:K:OMEGA``. Four gloo processes, each with its own part of every batch, train all
entries one after the other, each at rates by factors of two until the best is bracketed: chosen on a validation set,
reported on a test set. Cosine schedule with 6 % warm-up, a worker's own gradients clipped at norm 1 (``ddp``: their
mean is), rank 16, embeddings and head with AdamW. Bytes are what a worker puts into collectives: entries times bytes of
each. Each run is in the file as soon as it is done, and is not run again when it is there.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from convergence import bracket
from convergence_tasks import split_held_out
from results import Row, describe_run, load_run, save_run
from torch import Tensor, nn

from hf_lowmem_optim import LDAdam, LocalUpdates, LoRDO, measure_state
from hf_lowmem_optim.engine.averaging import average_
from hf_lowmem_optim.trainer.demo import documentation

WORKERS, PER_WORKER, RANK, CURVE_STEPS, WIDTH, LENGTH = 4, 2, 16, 16, 128, 64
PERIODS, OMEGAS = (16, 64, 4), (0.0, 0.5, 0.9, 1.0)
#: Where the search for a rate begins.
RATES = {"ddp:adamw": 4e-3, "ddp:ldadam": 8e-3, "local": 4e-3, "0": 2e-3, "0.5": 4e-3, "0.9": 8e-3, "1": 8e-3}
ENTRIES = [
    f"{kind}:{k}" + (f":{omega:g}" if omega is not None else "")
    for k in PERIODS
    for kind, omega in [("local", None), *(("lordo", omega) for omega in OMEGAS)]
]
ENTRIES = ["ddp:adamw", *ENTRIES[:5], "ddp:ldadam", *ENTRIES[5:]]


def first_rate(entry: str) -> float:
    """Return the rate that is tried first."""
    kind, _, rest = entry.partition(":")
    return RATES[entry if kind == "ddp" else kind if kind == "local" else rest.split(":")[1]]


class Block(nn.Module):
    """A pre-norm block: causal attention of four heads, and two layers with a GELU between."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.RMSNorm(WIDTH) for _ in range(2))
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH, bias=False), nn.Linear(2 * WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return activations of the same shape, (batch, bytes, width)."""
        q, k, v = self.qkv(self.norms[0](x)).view(*x.shape[:2], 3, 4, -1).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(x.shape))
        return x + self.down(nn.functional.gelu(self.up(self.norms[1](x))))


class LanguageModel(nn.Module):
    """A byte-level model of 0.3 million parameters: two blocks between embeddings and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embeddings = nn.ModuleList([nn.Embedding(256, WIDTH), nn.Embedding(LENGTH, WIDTH)])
        self.layers = nn.Sequential(Block(), Block(), nn.RMSNorm(WIDTH))
        self.head = nn.Linear(WIDTH, 256, bias=False)

    def forward(self, text: Tensor) -> Tensor:
        """Return the mean loss of predicting every byte but the first, in nats."""
        x = self.embeddings[0](text) + self.embeddings[1].weight
        return nn.functional.cross_entropy(self.head(self.layers(x))[:, :-1].flatten(0, 1), text[:, 1:].flatten())


def build_optimizer(entry: str, model: nn.Module, lr: float) -> Any:
    """Return the optimizer of an entry."""
    kind, *rest = entry.split(":")
    if entry == "ddp:adamw" or kind == "local":
        adamw = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)
        return LocalUpdates(adamw, int(rest[0])) if kind == "local" else adamw
    inner = [p for name, p in model.named_parameters() if "layers" in name]
    outer = [p for name, p in model.named_parameters() if "layers" not in name]
    groups = [{"params": inner, "rank": RANK}, {"params": outer, "rank": None}]
    if kind == "lordo":
        return LoRDO(groups, lr=lr, sync_every=int(rest[0]), omega=float(rest[1]))
    return LDAdam(groups, lr=lr)


def train(entry: str, lr: float, *, steps: int, seed: int, data: tuple[Tensor, dict[str, list[Tensor]]]) -> Row:
    """Train once; all workers alike, from the same start on their parts of the same batches.

    Returns:
        The arguments, ``validation_loss``, ``test_loss``, ``tokens`` of all workers, ``sent_bytes`` and
        ``state_bytes`` of a worker, ``seconds``, and ``curve``: the training loss as means over workers and 16 steps.
    """
    torch.manual_seed(seed)
    worker, model = torch.distributed.get_rank(), LanguageModel()
    optimizer, params = build_optimizer(entry, model, lr), list(model.parameters())
    warm_up, sent, losses, ended = max(1, steps // 16), 0, list[Tensor](), True
    schedule = torch.optim.lr_scheduler.LambdaLR(
        getattr(optimizer, "optimizer", optimizer),
        lambda t: min((t + 1) / warm_up, 0.5 + 0.5 * math.cos(math.pi * max(0, t - warm_up) / (steps - warm_up))),
    )
    order = torch.randperm(len(data[0]), generator=torch.Generator().manual_seed(seed))
    order = order.repeat(-(-steps * WORKERS * PER_WORKER // len(order)))
    begin = time.perf_counter()
    for t in range(steps):
        part = order[(t * WORKERS + worker) * PER_WORKER :][:PER_WORKER]
        loss = model(data[0][part])
        losses.append(loss.detach())
        loss.backward()
        if entry.startswith("ddp"):
            sent += average_([param.grad for param in params if param.grad is not None])
        nn.utils.clip_grad_norm_(params, 1.0)
        try:
            optimizer.step()
        except RuntimeError as error:
            if "NaN or infinity" not in str(error):  # which all workers are told at once
                raise
            ended = False
            break
        schedule.step()
        optimizer.zero_grad()
    seconds, curve = time.perf_counter() - begin, torch.stack(losses)
    average_([curve])
    means = [round(float(each.mean()), 4) for each in curve.split(CURVE_STEPS)]
    found = {f"{name}_loss": evaluate(model, sets) if ended else math.inf for name, sets in data[1].items()}
    found = {name: loss if math.isfinite(loss) else math.inf for name, loss in found.items()}
    sent = sent if entry.startswith("ddp") else optimizer.communicated_bytes
    state = measure_state(optimizer).total_bytes
    row = {"entry": entry, "lr": lr, **found, "tokens": order[: steps * WORKERS * PER_WORKER].numel() * LENGTH}
    return {**row, "sent_bytes": sent, "state_bytes": state, "seconds": round(seconds, 1), "curve": means}


@torch.no_grad()
def evaluate(model: nn.Module, batches: Sequence[Tensor]) -> float:
    """Return the mean loss over batches, of which each worker takes its share; the same on all."""
    own = batches[torch.distributed.get_rank() :: WORKERS]
    total = torch.tensor([sum(model(batch).item() * len(batch) for batch in own)], dtype=torch.float64)
    torch.distributed.all_reduce(total)
    return total.item() / sum(len(batch) for batch in batches)


def work(rank: int, folder: str, arguments: argparse.Namespace) -> None:
    """Train everything as one of the workers; the first one writes the file."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{folder}/group", world_size=WORKERS, rank=rank)
    settings = {"dtype": "fp32", "threads": 1, "seed": arguments.seed, "steps": arguments.steps, "workers": WORKERS}
    run, path = describe_run("local_training", settings, arguments.note), arguments.results
    if path is not None and path.exists():
        old = load_run(path)
        if old.settings != run.settings:
            raise ValueError(f"{path} has other settings, {old.settings}: choose another file")
        run = replace(old, command=run.command)
    training, held_out = (dataset.tensors[0][:, :LENGTH] for dataset in documentation())
    parts = split_held_out(range(len(held_out)))
    sets = {name: list(held_out[torch.tensor(chosen)].split(16)) for name, chosen in parts.items()}
    rows = {(row["entry"], row["lr"]): row for row in run.rows}

    def loss_at(entry: str, lr: float) -> float:
        nonlocal run
        if (entry, lr) not in rows:
            rows[entry, lr] = train(entry, lr, steps=arguments.steps, seed=arguments.seed, data=(training, sets))
            if rank == 0:
                row = rows[entry, lr]
                print({key: value for key, value in row.items() if key != "curve"}, flush=True)
                run = replace(run, rows=list(rows.values()))
                if path is not None:
                    save_run(run, path)
        return float(rows[entry, lr]["validation_loss"])

    for entry in arguments.only:
        bracket(partial(loss_at, entry), first_rate(entry))


def main() -> None:
    """Fork the workers, before anything has been computed, and wait for them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=ENTRIES, choices=ENTRIES, metavar="ENTRY")
    parser.add_argument("--steps", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--results", type=Path, help="write runs to this ….json, and skip those that are there")
    parser.add_argument("--note", default="", help="what a reader must know about these runs")
    arguments = parser.parse_args()
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    with tempfile.TemporaryDirectory() as folder:
        context = multiprocessing.get_context("fork")
        workers = [context.Process(target=work, args=(rank, folder, arguments)) for rank in range(WORKERS)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    sys.exit(max(abs(worker.exitcode or 0) for worker in workers))


if __name__ == "__main__":
    main()
