r"""LoRA with a low-memory optimizer: the state of large adapters in low rank, and LoRA+'s own rate for B.

Without a model of your own it adapts a small byte-level Llama with random weights to the documentation of Python:

    python examples/lora_finetuning.py --learning_rate 1e-3 --max_steps 100

With your own (every field of TrainingArguments is an option as well):

    python examples/lora_finetuning.py --model path/to/model --text my.txt --lora_rank 256 --optim_args rank=32 \
        --learning_rate 2e-4 --num_train_epochs 1 --bf16

Adapters no larger than the optimizer's rank stay dense; the summary in the log says which did.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from torch.utils.data import Dataset, TensorDataset
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser, Trainer, TrainingArguments, set_seed

from hf_lowmem_optim import OptimizerStateMemoryCallback
from hf_lowmem_optim.trainer.demo import demo_model, documentation


@dataclass
class DataArguments:
    """What is trained on what, and with which adapter."""

    model: Path | None = field(default=None, metadata={"help": "directory of a saved causal language model"})
    text: Path | None = field(default=None, metadata={"help": "a text file; needed with --model"})
    sequence_length: int = field(default=512, metadata={"help": "tokens per training sequence of your own text"})
    lora_rank: int = field(default=64, metadata={"help": "rank of the adapters"})
    use_dora: bool = field(default=False, metadata={"help": "train the norm of each row as well"})


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


def main() -> None:
    """Train the adapter, save it, and report the held-out loss of the merged model."""
    parser = HfArgumentParser((DataArguments, TrainingArguments))
    # B learns 4 times as fast as A (LoRA+); the rate is that of A and of all that is no B
    parser.set_defaults(optim="ldadam", optim_args="rank=16,lr_ratio=4", warmup_steps=10)
    data, args = parser.parse_args_into_dataclasses()
    set_seed(args.seed)
    model, training_set, held_out = load(data)
    config = LoraConfig(r=data.lora_rank, target_modules="all-linear", use_dora=data.use_dora, task_type="CAUSAL_LM")
    model = get_peft_model(model, config)
    callbacks = [OptimizerStateMemoryCallback()]
    trainer = Trainer(
        model, args, train_dataset=training_set, eval_dataset=held_out, data_collator=collate, callbacks=callbacks
    )
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    trainer.save_model()  # the adapter alone
    merged = Trainer(model.merge_and_unload(), args, eval_dataset=held_out, data_collator=collate)
    print("adapter saved in", args.output_dir, "merged model:", merged.evaluate())


if __name__ == "__main__":
    main()
