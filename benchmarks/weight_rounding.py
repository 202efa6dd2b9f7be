"""How should bfloat16 weights be rounded? The demo's task in pure bfloat16, the same run with each way.

    python benchmarks/weight_rounding.py --entry ldadam adamw --lr 4e-4 5e-5 --seeds 0 1 --steps 100

``nearest`` and ``stochastic`` are ``weight_rounding``. ``master`` keeps float32 weights beside the model, which the
optimizer updates and the model gets rounded: two bytes per parameter more even if only the bits that bfloat16 lacks are
stored. ``fp32`` trains a float32 model. ``adamw`` is the dense rule for everything. AdamW's moments are float32
(``dense_state="fp32"``) in all of them, so that only the rounding differs. One learning rate per entry. Cosine schedule
with 5% warm-up, gradients clipped at norm 1.

Printed: mean training loss of the last 25 steps and held-out loss, nats per byte.
"""

from __future__ import annotations

import argparse
import copy
import math
import statistics

import torch
from torch import Tensor, nn
from transformers.utils import logging as transformers_logging

from hf_lowmem_optim import OptimizerFactory
from hf_lowmem_optim.trainer.demo import demo_model, documentation

WAYS = ("nearest", "stochastic", "master", "fp32")
BATCH_SIZE, FINAL_STEPS = 8, 25
SETTINGS = {"ldadam": {}, "adamw": {"rank": None, "betas": (0.9, 0.999)}}


def train(entry: str, lr: float, seed: int, way: str, num_steps: int) -> tuple[float, float]:
    """One run; returns training and held-out loss."""
    torch.manual_seed(seed)
    model = demo_model().train()
    training, held_out = (dataset.tensors[0] for dataset in documentation())
    # the weights that the optimizer sees
    updated = copy.deepcopy(model) if way == "master" else model
    if way != "fp32":
        model.bfloat16()
    rounding = "stochastic" if way == "stochastic" else "nearest"
    settings = {"lr": lr, "dense_state": "fp32", "weight_rounding": rounding, **SETTINGS[entry]}
    optimizer = OptimizerFactory("ldadam", **settings)(updated)
    warm_up = max(1, num_steps // 20)

    def factor(step: int) -> float:
        if step < warm_up:
            return (step + 1) / warm_up
        return 0.5 * (1 + math.cos(math.pi * (step - warm_up) / (num_steps - warm_up)))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    order = torch.randperm(len(training), generator=torch.Generator().manual_seed(seed))
    order = order.repeat(math.ceil(num_steps * BATCH_SIZE / len(order)))[: num_steps * BATCH_SIZE]
    losses = []
    for batch in order.view(num_steps, BATCH_SIZE):
        loss = model(input_ids=training[batch], labels=training[batch]).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        if updated is not model:
            for weight, master in zip(model.parameters(), updated.parameters(), strict=True):
                master.grad = weight.grad.float()
        optimizer.step()
        schedule.step()
        if updated is not model:
            with torch.no_grad():
                for weight, master in zip(model.parameters(), updated.parameters(), strict=True):
                    weight.copy_(master)
        model.zero_grad()
        losses.append(loss.item())
    return statistics.mean(losses[-FINAL_STEPS:]), evaluate(model, held_out)


@torch.no_grad()
def evaluate(model: nn.Module, held_out: Tensor) -> float:
    """Held-out loss."""
    model.eval()
    parts = held_out.split(32)
    return sum(model(input_ids=part, labels=part).loss.item() * len(part) for part in parts) / len(held_out)


def main() -> None:
    """Parse the command line, run, print a line per run and the means over the seeds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--entry", nargs="+", choices=tuple(SETTINGS), default=list(SETTINGS))
    parser.add_argument("--lr", nargs="+", type=float, default=[4e-4, 5e-5], help="one for each entry")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--steps", type=int, default=100)
    args = parser.parse_args()
    if len(args.lr) != len(args.entry):
        parser.error(f"--lr needs one learning rate for each of {', '.join(args.entry)}")
    transformers_logging.set_verbosity_error()
    results: dict[tuple[str, float, str], list[tuple[float, float]]] = {}
    for seed in args.seeds:
        for entry, lr in zip(args.entry, args.lr, strict=True):
            for way in args.ways:
                losses = train(entry, lr, seed, way, args.steps)
                results.setdefault((entry, lr, way), []).append(losses)
                print(f"{entry} lr={lr:g} seed={seed} {way}: {losses[0]:.4f} {losses[1]:.4f}", flush=True)
    print(f"\n{args.steps} steps, seeds {args.seeds}, torch {torch.__version__}")
    print("| optimizer | lr | weights | training loss | held-out loss |\n|---|---|---|---|---|")
    for (entry, lr, way), runs in results.items():
        training, held_out = (statistics.mean(column) for column in zip(*runs, strict=True))
        print(f"| {entry} | {lr:g} | {way} | {training:.3f} | {held_out:.3f} |")


if __name__ == "__main__":
    main()
