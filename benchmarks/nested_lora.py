"""Compare how to train nested LoRA ranks: loss at every rank, each way at the best of its own learning rates.

    python benchmarks/nested_lora.py --results benchmarks/results/nested_lora.json
    python benchmarks/render.py benchmarks/results/nested_lora.json

A byte-level Llama of 0.13 M parameters is trained on the documentation that comes with Python, frozen, and adapted by
LoRA (rank 16, all linear layers, ``use_rslora``, ``lora_alpha=1``: the authors' scale) to the source of Python's
standard library. An entry is a mode of MatryoshkaLora, with the rule of inference after a colon. Rates double and halve
until the best is not at an edge, chosen with seed 0 by the AURAC (log2) of validation losses; ``--seeds`` are reported
on test files. AdamW without weight decay, cosine schedule with 5% warm-up. All ways take the same steps on the same
batches; ``losses`` takes five passes for each. A run that is in ``--results`` is not run again.
"""

from __future__ import annotations

import argparse
import copy
import math
import statistics
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from convergence import RunStore, tune_and_report
from peft import LoraConfig, get_peft_model
from results import Row
from tables import report
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from hf_lowmem_optim import MatryoshkaLora, aurac

RANKS = (1, 2, 4, 8, 16)
LENGTH, BATCH = 64, 8
ENTRIES = ("lora", "dylora", "matryoshka:paper", "matryoshka:nested", "losses")
#: Modules of the standard library: to adapt to, to choose rates by, to report.
TEXTS = {
    "training": ("argparse", "ast", "calendar", "configparser", "difflib", "doctest", "inspect", "typing"),
    "validation": ("mailbox", "smtplib"),
    "test": ("optparse", "pickle", "tarfile", "textwrap"),
}


def sequences(text: str) -> Tensor:
    """Return rows of bytes."""
    tokens = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8).long()
    return tokens[: len(tokens) // LENGTH * LENGTH].view(-1, LENGTH)


def source(split: str) -> Tensor:
    """Return the modules of a split; of those to evaluate on 128 rows, evenly spread."""
    folder = Path(sysconfig.get_path("stdlib"))
    rows = sequences("".join((folder / f"{name}.py").read_text(encoding="utf-8") for name in TEXTS[split]))
    return rows if split == "training" else rows[:: len(rows) // 128][:128]


def batches(rows: Tensor, num_steps: int, seed: int) -> Iterator[Tensor]:
    """Draw mini-batches."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(num_steps):
        yield rows[torch.randint(len(rows), (BATCH,), generator=generator)]


def optimizer_for(model: nn.Module, lr: float, num_steps: int) -> tuple[Any, Any]:
    """Return AdamW and its schedule."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr, weight_decay=0)
    warm_up = max(1, num_steps // 20)

    def factor(step: int) -> float:
        return min((step + 1) / warm_up, 0.5 * (1 + math.cos(math.pi * step / num_steps)))

    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def pretrain(num_steps: int) -> nn.Module:
    """Return the model that is adapted, frozen."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 2, "vocab_size": 256}
    model = LlamaForCausalLM(LlamaConfig(num_attention_heads=4, max_position_embeddings=LENGTH, **sizes))
    optimizer, schedule = optimizer_for(model, 5e-3, num_steps)
    for rows in batches(sequences("\n\n".join(topics[name] for name in sorted(topics))), num_steps, 0):
        model(rows, labels=rows).loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return model.requires_grad_(False)


@torch.no_grad()
def held_out_loss(model: nn.Module, rows: Tensor) -> float:
    """Return nats per byte."""
    return float(model.eval()(rows, labels=rows).loss)


def adapt(base: nn.Module, entry: str, lr: float, seed: int, num_steps: int, held_out: str) -> Row:
    """Train an adapter by a mode, and evaluate every rank by a rule."""
    mode, _, rule = entry.partition(":")
    torch.manual_seed(seed)
    config = LoraConfig(r=RANKS[-1], lora_alpha=1, use_rslora=True, target_modules="all-linear", task_type="CAUSAL_LM")
    model: Any = get_peft_model(copy.deepcopy(base), config)
    nested = MatryoshkaLora(model, RANKS, mode="lora" if mode == "base" else mode, seed=seed)
    optimizer, schedule = optimizer_for(model, lr, num_steps)
    losses, start = [], time.perf_counter()
    for rows in batches(source("training"), num_steps if lr else 1, seed):
        model.train()
        total = 0.0
        for rank in RANKS if mode == "losses" else (None,):
            with nested.at(rank):
                loss = model(rows, labels=rows).loss / (len(RANKS) if mode == "losses" else 1)
                loss.backward()
            total += loss.item()
        losses.append(total)
        if not math.isfinite(total):
            break
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    found = {}
    for rank in RANKS:
        nested.set_rank(rank, "nested" if rule == "nested" else "paper")
        found[rank] = held_out_loss(model, source(held_out))
    row = {"entry": entry, "lr": lr, "seed": seed, "held_out": held_out}
    row |= {"held_out_loss": aurac(list(found.values()), RANKS), **{f"rank_{r}": loss for r, loss in found.items()}}
    return {**row, "train_loss": statistics.mean(losses[-20:]), "seconds": round(time.perf_counter() - start, 1)}


def main() -> None:
    """Train what the command line asks for, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--entry", nargs="+", default=ENTRIES, metavar="MODE[:RULE]")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--steps", nargs=2, type=int, default=[800, 200], help="of training the model, and adapters")
    parser.add_argument("--results", type=Path, help="write runs to this ….json, and skip those that are there")
    args = parser.parse_args()
    torch.set_num_threads(1)
    store = RunStore(args.results, {"steps": args.steps, "dtype": "fp32"}, benchmark="nested_lora")
    base = pretrain(args.steps[0])
    run = store.resumable(lambda entry, lr, seed, held: adapt(base, entry, lr, seed, args.steps[1], held))
    for seed in args.seeds:
        run("base", 0.0, seed, "test")  # one step, at a rate of zero
    tune_and_report(run, dict.fromkeys(args.entry, 1.6e-2), 0, args.seeds)
    print(report(store.run))


if __name__ == "__main__":
    main()
