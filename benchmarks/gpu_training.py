"""Train a Llama of 70 M parameters from scratch on real text, once per optimizer, on a GPU.

    python benchmarks/gpu_training.py --save benchmarks/results/gpu_training.json --seconds 240
    python benchmarks/gpu_training.py --entry adamw@1e-3 ldadam:rank=128@2e-3 --steps 1000

The text is the Python sources of the standard library and of the installed packages, without duplicates, cut by a byte
pair encoding that is trained on a part of it; whole files are held out. bfloat16 autocast over float32 weights, cosine
schedule with 5 % warm-up, gradients clipped at norm 1, weight decay 0; every entry sees the same batches. An entry is a
name with settings after a colon and the rate after an @, as in ``convergence.py``. A run is saved as soon as it is
done, and not run again for the same commit and settings; one for which no time is left is named at the end.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import math
import random
import site
import statistics
import sysconfig
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from machine import commit
from peers import build_optimizer
from results import describe_run, load_run, save_run
from tokenizers import ByteLevelBPETokenizer
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from hf_lowmem_optim import measure_state

VOCABULARY, SEED = 16384, 0
#: Bytes of text that the encoding learns from, and that the training reads at most.
_LEARNED_BYTES, _TEXT_BYTES = 10 << 20, 64 << 20
_HELD_OUT_SHARE = 50  # one file of so many
_HELD_OUT_BATCHES, _CURVE_STEPS = 16, 25
ENTRIES = (
    "adamw@1e-3",
    "ldadam:rank=128@2e-3",
    "microadam@1e-3",
    "ldadam:rank=16@2e-3",
    "adamw_8bit@1e-3",
    "galore:rank=128@4e-3",
)


#: The defaults: of the training, and of the model.
SIZES = {"steps": 1000, "batch": 32, "length": 512, "hidden": 640, "layers": 10, "text": _TEXT_BYTES}


def sources(limit: int) -> Iterator[str]:
    """Yield the texts of Python files, in an order that their contents decide, each once."""
    folders = {Path(sysconfig.get_path("stdlib")), Path(sysconfig.get_path("purelib"))}
    folders |= {Path(folder) for folder in site.getsitepackages()}
    texts: dict[str, Path] = {}
    for path in (path for folder in sorted(folders) for path in folder.rglob("*.py")):
        content = path.read_bytes() if path.is_file() else b""
        if 200 <= len(content) <= 200_000:
            texts.setdefault(hashlib.sha256(content).hexdigest(), path)
    read = 0
    for _, path in sorted(texts.items()):
        text = path.read_text(errors="replace")
        read += len(text)
        if read > limit:
            return
        yield text


@functools.cache
def tokens(limit: int) -> tuple[Tensor, Tensor]:
    """Return the text to train on and the held-out one, as int32 tokens in one piece each."""
    texts = list(sources(limit))
    encoding = ByteLevelBPETokenizer()
    learned, size = [], 0
    for text in texts:
        learned.append(text)
        size += len(text)
        if size > _LEARNED_BYTES:
            break
    encoding.train_from_iterator(learned, vocab_size=VOCABULARY, show_progress=False)
    held_out, training = texts[::_HELD_OUT_SHARE], [t for i, t in enumerate(texts) if i % _HELD_OUT_SHARE]
    random.Random(SEED).shuffle(training)
    pieces = []
    for chosen in (training, held_out):
        codes = [torch.tensor(each.ids, dtype=torch.int32) for each in encoding.encode_batch(chosen)]
        pieces.append(torch.cat(codes))
    return pieces[0], pieces[1]


def build(arguments: argparse.Namespace) -> LlamaForCausalLM:
    """Return the model, the same at every call."""
    torch.manual_seed(SEED)
    sizes: dict[str, Any] = {
        "hidden_size": arguments.hidden,
        "intermediate_size": arguments.hidden * 43 // 16,
        "num_hidden_layers": arguments.layers,
        "num_attention_heads": arguments.hidden // 64,
        "max_position_embeddings": arguments.length,
    }
    config = LlamaConfig(vocab_size=VOCABULARY, tie_word_embeddings=False, **sizes)
    return LlamaForCausalLM(config).to(arguments.device).train()  # type: ignore[arg-type,no-any-return]  # transformers wraps to()


def loss_of(model: nn.Module, batch: Tensor) -> Tensor:
    """Return the mean loss of a batch of tokens."""
    ids = batch.long()
    with torch.autocast(batch.device.type, torch.bfloat16):
        return model(input_ids=ids, labels=ids).loss  # type: ignore[no-any-return]  # a module returns anything


@torch.no_grad()
def held_out_loss(model: nn.Module, text: Tensor, arguments: argparse.Namespace) -> float:
    """Return the mean loss on the first batches of the held-out text."""
    count = min(_HELD_OUT_BATCHES * arguments.batch, len(text) // arguments.length)
    rows = text[: count * arguments.length].view(count, arguments.length).to(arguments.device)
    model.eval()
    losses = [loss_of(model, part).item() for part in rows.split(arguments.batch)]
    model.train()
    return statistics.mean(losses)


def train(entry: str, lr: float, arguments: argparse.Namespace) -> dict[str, Any]:
    """Train once and return the row of it; the first three steps, in which kernels are compiled, are in no time."""
    training, held_out = tokens(arguments.text)
    model = build(arguments)
    optimizer = build_optimizer(entry, model, lr)
    warm_up = max(1, arguments.steps // 20)

    def factor(step: int) -> float:
        if step < warm_up:
            return (step + 1) / warm_up
        return 0.5 * (1 + math.cos(math.pi * (step - warm_up) / (arguments.steps - warm_up)))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    rows = len(training) // arguments.length
    text = training[: rows * arguments.length].view(rows, arguments.length)
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(SEED))
    losses: list[Tensor] = []
    first = time.perf_counter()
    began = first
    for step in range(arguments.steps):
        if step == 3:
            _finish(arguments.device)
            began = time.perf_counter()
        chosen = order[(step * arguments.batch + torch.arange(arguments.batch)) % rows]
        loss = loss_of(model, text[chosen].to(arguments.device))
        losses.append(loss.detach())
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        model.zero_grad()
    _finish(arguments.device)
    ended = time.perf_counter()
    found = torch.stack(losses).tolist()
    return {
        "entry": entry,
        "lr": lr,
        "tokens": arguments.steps * arguments.batch * arguments.length,
        "held_out_loss": held_out_loss(model, held_out, arguments),
        "train_loss": statistics.mean(found[-50:]),
        "ms_per_step": round(1e3 * (ended - began) / max(1, arguments.steps - 3), 2),
        "seconds": round(ended - first, 1),
        "state_bytes": measure_state(optimizer).total_bytes,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "curve": [round(statistics.mean(found[i : i + _CURVE_STEPS]), 4) for i in range(0, len(found), _CURVE_STEPS)],
    }


def _finish(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def main() -> None:
    """Train what is not there yet for as long as there is time."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--entry", nargs="+", default=list(ENTRIES), metavar="NAME[:SETTINGS]@RATE")
    parser.add_argument("--device", default="cuda")
    for name, default in SIZES.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--seconds", type=float, default=math.inf, help="begin no run that would not end by then")
    parser.add_argument("--save", type=Path, metavar="PATH.json")
    arguments = parser.parse_args()
    began = time.monotonic()
    settings = {name: getattr(arguments, name) for name in ("device", *SIZES)} | {"dtype": "bfloat16", "seed": SEED}
    run = describe_run("gpu_training", settings | {"complete": False})
    if arguments.save and arguments.save.exists():
        before = load_run(arguments.save)
        same = all(before.settings.get(key) == value for key, value in settings.items())
        if same and before.software["commit"] == commit() and before.machine["gpu"] == run.machine["gpu"]:
            run = before
    there = {(row["entry"], row["lr"]) for row in run.rows}
    longest, missing = 0.0, []
    tokens(arguments.text)  # takes a while, once: no run is to be thought as long as that
    for text in arguments.entry:
        entry, _, rate = text.rpartition("@")
        if (entry, float(rate)) in there:
            continue
        start = time.monotonic()
        if start - began + longest > arguments.seconds:
            missing.append(text)
            continue
        try:
            row = train(entry, float(rate), arguments)
        except ImportError as error:  # a peer that is not installed
            print(f"{entry}: {error}", flush=True)
            continue
        longest = max(longest, time.monotonic() - start)
        print(f"{entry}@{rate}: held-out {row['held_out_loss']:.4f}, {row['ms_per_step']} ms a step", flush=True)
        run = replace(run, rows=[*run.rows, row], settings={**run.settings, "complete": False})
        if arguments.save:
            save_run(run, arguments.save)
    if arguments.save and run.rows and not missing:
        save_run(replace(run, settings={**run.settings, "complete": True}), arguments.save)
    for text in missing:
        print(f"missing: {text} (no time left)")


if __name__ == "__main__":
    main()
