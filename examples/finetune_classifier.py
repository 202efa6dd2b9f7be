"""Train a text classifier with a low-memory optimizer, made by an OptimizerFactory.

Without a model and data of your own it trains a small byte-level BERT to tell from which chapter of Python's own
documentation a paragraph is:

    python examples/finetune_classifier.py --learning_rate 1e-3 --max_steps 200

With your own (a directory and a CSV file with the columns text and label on this machine):

    python examples/finetune_classifier.py --model path/to/encoder --table my.csv --rank 8 --learning_rate 2e-4
"""

from __future__ import annotations

import csv
import random
from dataclasses import dataclass, field
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import numpy as np
import torch
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    EvalPrediction,
    HfArgumentParser,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
    set_seed,
)

from hf_lowmem_optim import OptimizerFactory, OptimizerStateMemoryCallback

CHAPTERS = ("compound", "formatstrings", "specialnames", "typesseq")


@dataclass
class DataArguments:
    """What is trained on what, and how."""

    model: Path | None = field(default=None, metadata={"help": "directory of a saved encoder"})
    table: Path | None = field(default=None, metadata={"help": "CSV file with the columns text and label"})
    sequence_length: int = field(default=128, metadata={"help": "tokens per text, longer ones are cut"})
    optimizer: str = field(default="ldadam", metadata={"help": "an optimizer of hf-lowmem-optim list"})
    rank: int = field(default=16, metadata={"help": "rank of the compression"})


def load_texts(table: Path | None) -> list[tuple[str, str]]:
    """Return pairs of text and label."""
    if table is None:
        paragraphs = ((p, chapter) for chapter in CHAPTERS for p in topics[chapter].split("\n\n"))
        return [(text, label) for text, label in paragraphs if len(text) > 40]
    with table.open(newline="") as file:
        return [(row["text"], row["label"]) for row in csv.DictReader(file)]


def load_model(path: Path | None, num_labels: int, length: int) -> tuple[PreTrainedModel, Any]:
    """Return the model and a function from a text to its inputs."""
    if path is None:
        config = BertConfig(
            vocab_size=257,
            hidden_size=128,
            intermediate_size=512,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=length,
            pad_token_id=256,
            num_labels=num_labels,
        )

        def encode(text: str) -> dict[str, torch.Tensor]:
            codes = list(text.encode()[:length])
            padding = length - len(codes)
            return {
                "input_ids": torch.tensor(codes + [256] * padding),
                "attention_mask": torch.tensor([1] * len(codes) + [0] * padding),
            }

        return BertForSequenceClassification(config), encode
    tokenizer = AutoTokenizer.from_pretrained(path)

    def tokenize(text: str) -> dict[str, torch.Tensor]:
        encoded = tokenizer(text, truncation=True, padding="max_length", max_length=length, return_tensors="pt")
        return {key: value[0] for key, value in encoded.items()}

    return AutoModelForSequenceClassification.from_pretrained(path, num_labels=num_labels), tokenize


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    """Share of the held-out texts that were classified rightly."""
    return {"accuracy": float(np.mean(prediction.predictions.argmax(-1) == prediction.label_ids))}


def main() -> None:
    """Train, then report the held-out accuracy."""
    parser = HfArgumentParser((DataArguments, TrainingArguments))
    parser.set_defaults(per_device_train_batch_size=16)
    data, args = parser.parse_args_into_dataclasses()
    set_seed(args.seed)
    pairs = load_texts(data.table)
    random.Random(0).shuffle(pairs)
    labels = sorted({label for _, label in pairs})
    model, encode = load_model(data.model, len(labels), data.sequence_length)
    examples = [{**encode(text), "labels": torch.tensor(labels.index(label))} for text, label in pairs]
    num_training = int(0.8 * len(examples))

    factory = OptimizerFactory(data.optimizer, lr=args.learning_rate, weight_decay=args.weight_decay, rank=data.rank)
    trainer = Trainer(
        model,
        args,
        train_dataset=examples[:num_training],
        eval_dataset=examples[num_training:],
        compute_metrics=accuracy,
        optimizer_cls_and_kwargs=(factory, {}),
        callbacks=[OptimizerStateMemoryCallback()],
    )
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    print(trainer.evaluate())


if __name__ == "__main__":
    main()
