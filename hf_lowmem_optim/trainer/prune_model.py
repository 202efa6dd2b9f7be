"""``hf-lowmem-optim prune``: load a model from a directory, prune it layer by layer, measure it before and after."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import default_collate
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
)

from hf_lowmem_optim.engine.options import COUNT, check_number, shown
from hf_lowmem_optim.pruning.layers import iobs_layers_, prunable_layers
from hf_lowmem_optim.pruning.support import check_pattern

__all__ = ["PruneOptions", "PruneResult", "parse_pattern", "prune_directory"]

#: Samples of a batch.
_BATCH = 8


@dataclass(frozen=True)
class PruneOptions:
    """How a model is pruned.

    Attributes:
        sparsity: As for :func:`~hf_lowmem_optim.iobs_layers_`, like pattern, iterations and layers.
        pattern: (N, M), or None.
        iterations: How often each layer is pruned.
        layers: Names of layers, or None for all but embeddings and the output head.
        samples: Sequences or texts to calibrate with, at most.
        length: Tokens of a sequence, or of a text at most: longer texts are cut.

    Raises:
        TypeError: A value has the wrong type.
        ValueError: A value is out of range.
    """

    sparsity: float | None = None
    pattern: tuple[int, int] | None = None
    iterations: int = 3
    layers: Sequence[str] | None = None
    samples: int = 128
    length: int = 512

    def __post_init__(self) -> None:
        """Check everything, before a model is loaded."""
        check_pattern(self.pattern, self.sparsity)
        for name in ("iterations", "samples", "length"):
            check_number(name, getattr(self, name), COUNT)


@dataclass(frozen=True)
class PruneResult:
    """What came of it, on data that was not calibrated with.

    Attributes:
        measure: ``"perplexity"`` or ``"accuracy"``.
        before: Of the model as it was.
        after: Of the pruned one.
        num_zeros: Zeros in the pruned layers.
        num_weights: Weights of the pruned layers.
        num_cut: Texts that were longer than the options' length, of all that were read.
    """

    measure: str
    before: float
    after: float
    num_zeros: int
    num_weights: int
    num_cut: int = 0


def parse_pattern(text: str) -> tuple[int, int]:
    """Read ``"2:4"``.

    Raises:
        ValueError: It is no such text.
    """
    kept, _, of = text.partition(":")
    if not (kept.isdecimal() and of.isdecimal() and len(text) < 12):
        raise ValueError(f"pattern={shown(text)} is not N:M, such as 2:4")
    return int(kept), int(of)


def prune_directory(source: Path, data: Path, out: Path, options: PruneOptions) -> PruneResult:
    """Prune a saved model, and save it with its tokenizer.

    A causal language model is calibrated and measured (perplexity) on a text file, a classifier of texts (accuracy) on
    a CSV file with the columns text and label. The last tenth of the file, one sequence or text at least, is kept for
    the measurement.

    Args:
        source: Directory of a model and its tokenizer, saved by ``save_pretrained``.
        data: The file.
        out: Directory to write; it must not be there yet.
        options: How it is pruned.

    Raises:
        OSError: Something is not there, or ``out`` is.
        ValueError: The model is none of the two kinds, the file has too little in it, or a layer cannot be pruned.
    """
    if not (source / "config.json").is_file():
        raise FileNotFoundError(
            f"{source} has no config.json: give the directory of a model saved by save_pretrained()"
        )
    if not data.is_file():
        raise FileNotFoundError(f"--data {data} is no file")
    if out.exists():
        raise FileExistsError(f"--out {out} is there already")
    config = AutoConfig.from_pretrained(source, local_files_only=True, trust_remote_code=False)
    kind = (config.architectures or ["a model without architecture"])[0]
    if not any((source / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")):
        raise FileNotFoundError(f"{source} has no tokenizer: save that there, too, by tokenizer.save_pretrained()")
    tokenizer = AutoTokenizer.from_pretrained(source, local_files_only=True, trust_remote_code=False)
    positions = getattr(config, "max_position_embeddings", None) or options.length
    length = min(options.length, positions, tokenizer.model_max_length)  # of RoBERTa's positions two have no token
    loader: Any
    measure: Callable[[nn.Module, Sequence[dict[str, Any]]], float]
    collate: Callable[[Any], dict[str, Any]] = default_collate
    num_cut = 0
    if kind.endswith(("ForCausalLM", "LMHeadModel")):
        loader, name, measure = AutoModelForCausalLM, "perplexity", _perplexity
        samples = _sequences(data, tokenizer, length)
    elif kind.endswith("ForSequenceClassification"):
        loader, name, measure = AutoModelForSequenceClassification, "accuracy", _accuracy
        samples, num_cut = _labelled_texts(data, tokenizer, length, dict(config.label2id))
        collate = DataCollatorWithPadding(tokenizer)
    else:
        raise ValueError(f"{source} has {kind}: causal language models and sequence classifiers can be measured")
    held_out = max(1, len(samples) // 10)
    if len(samples) <= held_out:
        raise ValueError(f"{data} gives {len(samples)} sequences of {length} tokens: two are the least")
    calibration, held_out_samples = samples[:-held_out][: options.samples], samples[-held_out:]
    model = loader.from_pretrained(source, local_files_only=True, trust_remote_code=False, dtype="auto").eval()
    if torch.cuda.is_available():
        model.cuda()

    held_out_batches = _batches(model, collate, held_out_samples)
    before = measure(model, held_out_batches)
    layers = prunable_layers(model, options.layers, options.pattern)
    batches = _batches(model, collate, calibration)
    inputs = [{key: x for key, x in batch.items() if key != "labels"} for batch in batches]
    iobs_layers_(model, inputs, options.sparsity, options.iterations, options.pattern, layers=options.layers)
    after = measure(model, held_out_batches)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    weights = [layer.weight for layer in layers.values()]
    zeros = sum(int((weight == 0).sum()) for weight in weights)
    return PruneResult(name, before, after, zeros, sum(weight.numel() for weight in weights), num_cut)


def _sequences(data: Path, tokenizer: Any, length: int) -> list[dict[str, Any]]:
    """Return a text as sequences of tokens, with themselves as labels; the rest that fills none is left out."""
    ids = torch.tensor(
        tokenizer(data.read_text(encoding="utf-8"), add_special_tokens=False, verbose=False)["input_ids"]
    )
    whole = ids[: len(ids) // length * length].view(-1, length)
    return [{"input_ids": row, "labels": row} for row in whole]


def _labelled_texts(
    data: Path, tokenizer: Any, length: int, label_ids: dict[str, int]
) -> tuple[list[dict[str, Any]], int]:
    """Return texts and their labels, names of the configuration or numbers; and how many texts were cut."""
    with data.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    if rows and not {"text", "label"} <= rows[0].keys():
        raise ValueError(f"{data} has the columns {', '.join(map(str, rows[0]))}: it must have text and label")
    samples, num_cut = [], 0
    for number, row in enumerate(rows, start=2):
        label = str(row["label"])
        index = label_ids.get(label, int(label) if label.isdecimal() and len(label) < 10 else -1)
        if not 0 <= index < len(label_ids):
            raise ValueError(f"{data}, row {number}: label {shown(label)} is none of {', '.join(label_ids)}")
        num_cut += len(tokenizer(row["text"], verbose=False)["input_ids"]) > length
        samples.append({**tokenizer(row["text"], truncation=True, max_length=length), "labels": index})
    return samples, num_cut


def _batches(
    model: Any, collate: Callable[[Any], dict[str, Any]], samples: Sequence[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Return batches of samples of about the same length, so that little is padded."""
    ordered = sorted(samples, key=lambda sample: len(sample["input_ids"]))
    parts = [collate(ordered[start : start + _BATCH]) for start in range(0, len(ordered), _BATCH)]
    return [{key: value.to(model.device) for key, value in part.items()} for part in parts]


@torch.no_grad()
def _perplexity(model: Any, batches: Sequence[dict[str, Any]]) -> float:
    losses = [float(model(**batch).loss) * len(batch["input_ids"]) for batch in batches]
    mean = sum(losses) / sum(len(batch["input_ids"]) for batch in batches)
    return math.exp(mean) if mean < 700 else math.inf


@torch.no_grad()
def _accuracy(model: Any, batches: Sequence[dict[str, Any]]) -> float:
    right = [model(**batch).logits.argmax(-1) == batch["labels"] for batch in batches]
    return float(torch.cat(right).float().mean())
