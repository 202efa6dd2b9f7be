r"""Training over a slow network: each process takes K steps on its own data, then all average.

Without a model of your own it trains a small byte-level Llama on the documentation that comes with Python, here in two
processes on the CPU:

    torchrun --nproc-per-node 2 examples/local_updates.py --sync_every 8 --max_steps 80 --use_cpu

With your own, on two machines with eight GPUs each (MAIN is the address of the first), with DiLoCo's outer step:

    torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint MAIN:29500 examples/local_updates.py \
        --model path/to/model --text my.txt --sync_every 64 --outer --save_steps 640 --max_steps 10000 --bf16

Every field of TrainingArguments is an option as well; save_steps and eval_steps must be multiples of sync_every.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch.utils.data import Dataset, TensorDataset
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser, Trainer, TrainingArguments, set_seed

from hf_lowmem_optim import LocalUpdatesCallback, OuterNesterov
from hf_lowmem_optim.trainer.demo import demo_model, documentation


@dataclass
class Arguments:
    """What is trained on what, and how often the processes average."""

    model: Path | None = field(default=None, metadata={"help": "directory of a saved causal language model"})
    text: Path | None = field(default=None, metadata={"help": "a text file; needed with --model"})
    sequence_length: int = field(default=512, metadata={"help": "tokens per training sequence of your own text"})
    sync_every: int = field(default=16, metadata={"help": "steps from one average to the next"})
    outer: bool = field(default=False, metadata={"help": "apply the mean displacement with Nesterov momentum"})


def load(own: Arguments) -> tuple[torch.nn.Module, Dataset]:
    """Return a model and rows of tokens; the Trainer gives every process rows of its own."""
    if not own.model or not own.text:
        return demo_model(), documentation()[0]
    tokens = torch.tensor(AutoTokenizer.from_pretrained(own.model)(own.text.read_text())["input_ids"])
    rows = tokens[: len(tokens) // own.sequence_length * own.sequence_length].view(-1, own.sequence_length)
    return AutoModelForCausalLM.from_pretrained(own.model), TensorDataset(rows)


def collate(rows: list[tuple[torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Stack sequences; the model shifts the labels by itself."""
    batch = torch.stack([row[0] for row in rows])
    return {"input_ids": batch, "labels": batch}


def main() -> None:
    """Train, and say what was sent beside what DDP would have sent."""
    parser = HfArgumentParser((Arguments, TrainingArguments))
    parser.set_defaults(output_dir="local_updates_out", logging_steps=8, save_steps=0.5, report_to="none")
    own, args = parser.parse_args_into_dataclasses()
    set_seed(args.seed)
    model, dataset = load(own)
    trainer = Trainer(model, args, train_dataset=dataset, data_collator=collate)
    # whatever --optim names steps on each process alone; adamw_torch is averaged with its moments
    callback = LocalUpdatesCallback(trainer, own.sync_every, outer=OuterNesterov() if own.outer else None)
    trainer.add_callback(callback)
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    if trainer.is_world_process_zero():
        sent = trainer.optimizer.optimizer.communicated_bytes / trainer.state.global_step
        gradients = sum(param.nbytes for param in model.parameters() if param.requires_grad)
        print(f"a process sent {sent / 1e6:.2f} MB a step; gradients every step are {gradients / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
