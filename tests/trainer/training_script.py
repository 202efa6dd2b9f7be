"""A training script in the style of transformers' examples: it imports nothing of ours and has options of its own."""

from __future__ import annotations

import importlib
from dataclasses import dataclass, field
from pathlib import Path

import torch
import transformers
from transformers import HfArgumentParser, Trainer, TrainerCallback, TrainingArguments


@dataclass
class DataArguments:
    """What is trained on, and where each process writes what it ended with."""

    dump: str = field(default="", metadata={"help": "folder for parameters and optimizer state of each process"})
    callback: str = field(default="", metadata={"help": "a callback as module:class"})
    num_rows: int = field(default=32)


class NamedOnRankZero(TrainerCallback):
    """Says once who trained."""

    def on_train_end(self, args, state, control, optimizer=None, **kwargs):  # type: ignore[no-untyped-def]
        if state.is_world_process_zero:
            print("trained with", type(optimizer.optimizer).__name__, "to step", state.global_step)


def main() -> None:
    data, args = HfArgumentParser((DataArguments, TrainingArguments)).parse_args_into_dataclasses()
    transformers.set_seed(args.seed)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=64, **sizes))
    rows = [{"input_ids": (row := torch.arange(i, i + 16) % 64), "labels": row} for i in range(data.num_rows)]
    callbacks: list[TrainerCallback] = [NamedOnRankZero()]
    if data.callback:
        module, name = data.callback.split(":")
        callbacks.append(getattr(importlib.import_module(module), name)())
    trainer = Trainer(model, args, train_dataset=rows, callbacks=callbacks)
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    if data.dump:
        folder = Path(data.dump)
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(
            {
                "world_size": args.world_size,
                "wrapped": type(trainer.model_wrapped).__name__,
                "parameters": dict(trainer.accelerator.unwrap_model(trainer.model).named_parameters()),
                "optimizer": trainer.optimizer.state_dict(),
                "logs": trainer.state.log_history,
            },
            folder / f"rank{args.process_index}.pt",
        )


if __name__ == "__main__":
    main()
