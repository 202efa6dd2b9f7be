r"""Full fine-tuning with one gradient at a time: a parameter is updated in the backward pass, then its gradient freed.

Without a model of your own it trains a small byte-level Llama on the documentation that comes with Python:

    python examples/layerwise_full_finetuning.py --learning_rate 3e-3 --max_steps 100

With your own, in bfloat16 (every field of TrainingArguments is an option as well):

    python examples/layerwise_full_finetuning.py --model path/to/model --text my.txt --optim microadam_layerwise \
        --learning_rate 1e-5 --num_train_epochs 1 --optim_args clip_tensor_norm=1.0
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch.utils.data import Dataset, TensorDataset
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser, Trainer, TrainingArguments, set_seed

from hf_lowmem_optim import OptimizerStateMemoryCallback
from hf_lowmem_optim.trainer.demo import demo_model, documentation


@dataclass
class DataArguments:
    """What is trained on what."""

    model: Path | None = field(default=None, metadata={"help": "directory of a saved causal language model"})
    text: Path | None = field(default=None, metadata={"help": "a text file; needed with --model"})
    sequence_length: int = field(default=512, metadata={"help": "tokens per training sequence of your own text"})


def load(data: DataArguments) -> tuple[torch.nn.Module, Dataset]:
    """Return a model in bfloat16 and rows of tokens."""
    if not data.model or not data.text:
        return demo_model().to(torch.bfloat16), documentation()[0]
    tokens = torch.tensor(AutoTokenizer.from_pretrained(data.model)(data.text.read_text())["input_ids"])
    rows = tokens[: len(tokens) // data.sequence_length * data.sequence_length].view(-1, data.sequence_length)
    return AutoModelForCausalLM.from_pretrained(data.model, dtype=torch.bfloat16), TensorDataset(rows)


def collate(rows: list[tuple[torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Stack sequences; the model shifts the labels by itself."""
    batch = torch.stack([row[0] for row in rows])
    return {"input_ids": batch, "labels": batch}


def main() -> None:
    """Train; the report at the end says how much the gradients took at once."""
    parser = HfArgumentParser((DataArguments, TrainingArguments))
    # The norm of all gradients together is never known before they are used, so it cannot be clipped.
    parser.set_defaults(optim="ldadam_layerwise", max_grad_norm=0, warmup_steps=15)
    data, args = parser.parse_args_into_dataclasses()
    set_seed(args.seed)
    model, dataset = load(data)
    trainer = Trainer(
        model, args, train_dataset=dataset, data_collator=collate, callbacks=[OptimizerStateMemoryCallback()]
    )
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)


if __name__ == "__main__":
    main()
