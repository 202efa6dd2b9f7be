r"""Pre-train or fine-tune a causal language model with a low-memory optimizer.

Without a model and data of your own it trains a small byte-level Llama on the documentation that comes with Python:

    python examples/train_language_model.py --optim ldadam --learning_rate 3e-3 --max_steps 300

With your own (directories and files on this machine; every field of TrainingArguments is an option as well):

    python examples/train_language_model.py --model path/to/model --text my.txt --optim ldadam \
        --optim_args rank=32 --learning_rate 5e-5 --num_train_epochs 1 --bf16
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from pydoc_data.topics import topics

import torch
from torch.utils.data import TensorDataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    HfArgumentParser,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
    set_seed,
)

# This import is all that makes --optim ldadam valid; the callback logs the bytes of optimizer state.
from hf_lowmem_optim import OptimizerStateMemoryCallback


@dataclass
class DataArguments:
    """What is trained on what."""

    model: Path | None = field(default=None, metadata={"help": "directory of a saved causal language model"})
    text: Path | None = field(default=None, metadata={"help": "a text file"})
    sequence_length: int = field(default=128, metadata={"help": "tokens per training sequence"})


def load(data: DataArguments) -> tuple[PreTrainedModel, torch.Tensor]:
    """Return the model and the text as one long row of tokens."""
    text = data.text.read_text() if data.text else "\n\n".join(topics[name] for name in sorted(topics))
    if data.model:
        tokenizer = AutoTokenizer.from_pretrained(data.model)
        return AutoModelForCausalLM.from_pretrained(data.model), torch.tensor(tokenizer(text)["input_ids"])
    config = LlamaConfig(
        vocab_size=256, hidden_size=256, intermediate_size=688, num_hidden_layers=4, num_attention_heads=4
    )
    return LlamaForCausalLM(config), torch.tensor(list(text.encode()))


def collate(rows: list[tuple[torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Stack sequences; the model shifts the labels by itself."""
    batch = torch.stack([row[0] for row in rows])
    return {"input_ids": batch, "labels": batch}


def main() -> None:
    """Train, then report the held-out loss."""
    parser = HfArgumentParser((DataArguments, TrainingArguments))
    parser.set_defaults(optim="ldadam", lr_scheduler_type="cosine", warmup_steps=15)
    data, args = parser.parse_args_into_dataclasses()
    set_seed(args.seed)
    model, tokens = load(data)
    sequences = tokens[: len(tokens) // data.sequence_length * data.sequence_length].view(-1, data.sequence_length)
    num_training = int(0.9 * len(sequences))
    trainer = Trainer(
        model,
        args,
        train_dataset=TensorDataset(sequences[:num_training]),
        eval_dataset=TensorDataset(sequences[num_training:]),
        data_collator=collate,
        callbacks=[OptimizerStateMemoryCallback()],
    )
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    print(trainer.evaluate())


if __name__ == "__main__":
    main()
