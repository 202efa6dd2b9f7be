r"""Nested LoRA ranks: one adapter of rank R whose first components are adapters of smaller ranks.

Without a model of your own it adapts a small byte-level Llama with random weights to the documentation of Python, by
each of the modes from the same start, and draws the held-out loss at every rank:

    python examples/nested_lora.py --modes lora matryoshka dylora losses --learning_rate 1e-2 --max_steps 100

With your own (every field of TrainingArguments is an option as well):

    python examples/nested_lora.py --modes losses --model path/to/model --text my.txt --lora_rank 32 \
        --learning_rate 2e-4 --num_train_epochs 1 --bf16

A step of ``losses`` takes as long as one at every rank. The best rates of the modes differ: compare at each one's own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from matplotlib.figure import Figure
from peft import LoraConfig, get_peft_model
from torch.utils.data import Dataset, TensorDataset
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser, Trainer, TrainingArguments, set_seed

from hf_lowmem_optim import MatryoshkaLora, RankEvaluationCallback, attach_nested_lora
from hf_lowmem_optim.trainer.demo import demo_model, documentation


@dataclass
class DataArguments:
    """What is trained on what, and how."""

    modes: list[str] = field(default_factory=lambda: ["losses"], metadata={"help": "lora, matryoshka, dylora, losses"})
    rule: str = field(default="paper", metadata={"help": "of inference: paper, or nested"})
    lora_rank: int = field(default=16, metadata={"help": "R; the ranks are 1, 2, 4, … and this"})
    model: Path | None = field(default=None, metadata={"help": "directory of a saved causal language model"})
    text: Path | None = field(default=None, metadata={"help": "a text file; needed with --model"})
    sequence_length: int = field(default=512, metadata={"help": "tokens per training sequence of your own text"})


def load(data: DataArguments) -> tuple[torch.nn.Module, Dataset, Dataset]:
    """Return a model, and rows of tokens to train on and to hold out."""
    if not data.model or not data.text:
        return demo_model(), *documentation()
    tokens = torch.tensor(AutoTokenizer.from_pretrained(data.model)(data.text.read_text())["input_ids"])
    rows = tokens[: len(tokens) // data.sequence_length * data.sequence_length].view(-1, data.sequence_length)
    held_out = max(1, len(rows) // 10)
    model = AutoModelForCausalLM.from_pretrained(data.model)
    return model, TensorDataset(rows[:-held_out]), TensorDataset(rows[-held_out:])


def collate(rows: list[tuple[torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Stack sequences; the model shifts the labels by itself."""
    batch = torch.stack([row[0] for row in rows])
    return {"input_ids": batch, "labels": batch}


def train(mode: Any, data: DataArguments, args: TrainingArguments) -> tuple[dict[int, float], float]:
    """Train an adapter by a mode, save it with one of its ranks, and return losses by rank and their AURAC."""
    set_seed(args.seed)
    model, training_set, held_out = load(data)
    model = get_peft_model(model, LoraConfig(r=data.lora_rank, target_modules="all-linear", task_type="CAUSAL_LM"))
    nested = MatryoshkaLora(model, mode=mode, seed=args.seed)
    evaluation = RankEvaluationCallback(nested, metric="eval_loss", rule=cast(Any, data.rule))
    trainer = Trainer(
        model, args, train_dataset=training_set, eval_dataset=held_out, data_collator=collate, callbacks=[evaluation]
    )
    attach_nested_lora(trainer, nested)
    trainer.train()
    folder = Path(cast(str, args.output_dir)) / mode
    nested.save_pretrained(folder)  # to train on
    smallest = nested.ranks[0]
    nested.save_pretrained(folder / f"rank-{smallest}", rank=smallest, rule=cast(Any, data.rule))  # for any peft
    metrics = trainer.evaluate()
    return {r: metrics[f"eval_rank/{r}/eval_loss"] for r in nested.ranks}, metrics["eval_aurac/eval_loss"]


def draw(found: Mapping[str, tuple[dict[int, float], float]], path: Path) -> None:
    """Draw losses over ranks."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for mode, (losses, area) in found.items():
        axes.plot(list(losses), list(losses.values()), marker="o", label=f"{mode}: AURAC {area:.3f}")
    axes.set_xscale("log", base=2)
    axes.set_xlabel("rank")
    axes.set_ylabel("held-out loss")
    axes.legend()
    figure.savefig(path)


def main() -> None:
    """Train by each mode, print the losses and draw them."""
    parser = HfArgumentParser((DataArguments, TrainingArguments))
    parser.set_defaults(optim="adamw_torch", warmup_steps=10)
    data, args = parser.parse_args_into_dataclasses()
    found = {}
    for mode in data.modes:
        found[mode] = train(mode, data, args)
        losses = ", ".join(f"{loss:.3f} at rank {rank}" for rank, loss in found[mode][0].items())
        print(f"{mode}: {losses}; AURAC {found[mode][1]:.3f}")
    picture = Path(cast(str, args.output_dir)) / "aurac.png"
    draw(found, picture)
    print("adapters saved in", args.output_dir, "losses by rank in", picture)


if __name__ == "__main__":
    main()
