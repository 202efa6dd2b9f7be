"""Peak memory of whole training steps (forward, backward, update), measured, beside what the planner predicts.

    python benchmarks/memory.py --save --plot memory.png
    python benchmarks/memory.py --device cuda --dtype bfloat16
    python benchmarks/memory.py --only ldadam ldadam_layerwise --hidden 512 --layers 8

A process of its own per optimizer trains a Llama on one short sequence for three steps, so that weights, gradients and
state are nearly all there is. On the CPU the figure is resident memory: the kernel's own high-water mark (VmHWM), which
is reset before each step (``/proc/self/clear_refs``, Linux), above what the process took with its libraries loaded and
a tiny model trained. glibc is told to map tensors one by one (MALLOC_MMAP_THRESHOLD_=65536), else what is freed stays
in its heap and counts. On a GPU the figure is ``torch.cuda.max_memory_allocated``.

The prediction is weights + gradients + state + what ``step()`` allocates (layer-wise: one gradient at a time). It has
no activations: a run without an optimizer shows what forward and backward take beside it.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from memory_entries import ENTRIES, NO_OPTIMIZER, Entry, plan
from plots import plot_memory
from results import RESULTS, describe_run, resume_run, save_run
from tables import memory_rows
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers import logging as transformers_logging

from hf_lowmem_optim.memory.measure import measure_state
from hf_lowmem_optim.memory.units import format_bytes

SEED = 0
#: So that freed memory returns to the system at once, and one heap serves all threads.
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_ARENA_MAX": "1"}


def build_model(arguments: argparse.Namespace, *, tiny: bool = False) -> nn.Module:
    """The Llama, or one of a few thousand parameters that uses the same code."""
    hidden, layers, vocabulary = (64, 1, 128) if tiny else (arguments.hidden, arguments.layers, arguments.vocabulary)
    config = LlamaConfig(
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 32,
        intermediate_size=hidden * 8 // 3,
        vocab_size=vocabulary,
        tie_word_embeddings=False,
    )
    torch.manual_seed(SEED)
    default = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, arguments.dtype))
    try:
        with torch.device(arguments.device):
            return LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(default)


class PeakMeter:
    """The most memory that was taken since the last reset, in bytes above a baseline."""

    def __init__(self, device: str) -> None:
        self.cuda = torch.device(device).type == "cuda"
        self.baseline = 0
        if not self.cuda and not os.access("/proc/self/clear_refs", os.W_OK):
            raise SystemExit("the kernel's high-water mark cannot be reset: no /proc/self/clear_refs; needs Linux")

    @property
    def method(self) -> str:
        """What is read."""
        return "torch.cuda.max_memory_allocated" if self.cuda else "VmHWM, reset before each step"

    def reset(self) -> None:
        """Start anew from what is taken now."""
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
        else:
            Path("/proc/self/clear_refs").write_text("5")

    def peak(self) -> int:
        """The most since the reset."""
        taken = torch.cuda.max_memory_allocated() if self.cuda else _status_bytes("VmHWM")
        return taken - self.baseline

    def now(self) -> int:
        """What is taken now, without what waits to be freed."""
        gc.collect()
        if self.cuda:
            return torch.cuda.memory_allocated() - self.baseline
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        return _status_bytes("VmRSS") - self.baseline

    def set_baseline(self) -> None:
        """Count from here."""
        self.baseline = 0
        self.baseline = self.now()


def _status_bytes(key: str) -> int:
    """A line of /proc/self/status, which has KiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:"))


def train(model: nn.Module, entry: Entry, arguments: argparse.Namespace, meter: PeakMeter) -> dict[str, Any]:
    """Train for some steps and note the peaks of each; the batch is the same in all."""
    optimizer = entry.build(model)
    generator = torch.Generator().manual_seed(SEED)
    size = (1, arguments.sequence)
    tokens = torch.randint(model.config.vocab_size, size, generator=generator).to(arguments.device)
    forward_peaks, peaks, losses = [], [], []
    for _ in range(arguments.steps):
        meter.reset()
        loss = model(input_ids=tokens, labels=tokens).loss
        forward_peaks.append(meter.peak())
        loss.backward()
        if optimizer is not None:
            optimizer.step()
        peaks.append(meter.peak())
        losses.append(loss.item())
        del loss
        model.zero_grad(set_to_none=True)
    state = 0 if optimizer is None else measure_state(optimizer).total_bytes
    return {
        "forward_peak_bytes": max(forward_peaks),
        "first_step_peak_bytes": peaks[0],
        "later_step_peak_bytes": max(peaks[1:]),
        "peak_bytes": max(peaks),
        "held_bytes": meter.now(),
        "state_bytes": state,
        "first_loss": losses[0],
        "last_loss": losses[-1],
    }


def work(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """What a process does for one optimizer: warm up, note the baseline, build, train."""
    transformers_logging.set_verbosity_error()
    entry, meter = ENTRIES[name], PeakMeter(arguments.device)
    warm = argparse.Namespace(**{**vars(arguments), "steps": 2})
    train(build_model(arguments, tiny=True), entry, warm, meter)
    meter.set_baseline()
    model = build_model(arguments)
    weights = meter.now()
    row = {"optimizer": name, "method": meter.method, "weights_bytes": weights, **train(model, entry, arguments, meter)}
    row["num_parameters"] = sum(parameter.numel() for parameter in model.parameters())
    return {**row, **plan(model, entry)}


def run_process(name: str, argv: list[str]) -> dict[str, Any]:
    """Measure one optimizer in a process of its own.

    Returns:
        Its row; for an optimizer that is not ours and fails, the reason under ``"problem"``.

    Raises:
        RuntimeError: One of ours failed.
    """
    entry = ENTRIES[name]
    if entry.problem is not None:
        return {"optimizer": name, "problem": entry.problem}
    command = [sys.executable, __file__, *argv, "--worker", name]
    done = subprocess.run(command, env={**os.environ, **MALLOC}, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return dict(json.loads(done.stdout.splitlines()[-1]))
    reason = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
    if entry.ours:
        raise RuntimeError(f"{name}: {done.stderr}")
    return {"optimizer": name, "problem": reason}


def main() -> None:
    """Parse the command line, start the processes, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=list(ENTRIES), choices=list(ENTRIES))
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--vocabulary", type=int, default=16000)
    parser.add_argument("--sequence", type=int, default=32)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--save", type=Path, nargs="?", const=RESULTS / "memory.json", metavar="PATH.json")
    parser.add_argument("--resume", action="store_true", help="with --save: keep what the file has already")
    parser.add_argument("--plot", type=Path, metavar="PATH.png", help="draw the rows (extra plot)")
    parser.add_argument("--worker", choices=list(ENTRIES), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.steps < 2:
        parser.error(f"--steps {arguments.steps}: the first step and a later one are told apart, so at least 2")
    if arguments.worker:
        print(json.dumps(work(arguments.worker, arguments)))
        return
    keys = ("device", "dtype", "hidden", "layers", "vocabulary", "sequence", "steps")
    settings = {key: getattr(arguments, key) for key in keys}
    with torch.device("meta"):
        meta = argparse.Namespace(**{**vars(arguments), "device": "meta"})
        size = sum(parameter.numel() for parameter in build_model(meta).parameters())
    settings |= {"seed": SEED, "threads": torch.get_num_threads(), "model": f"Llama of {size / 1e6:.0f} M parameters"}
    os.environ.update(MALLOC)
    run = describe_run("memory", settings)
    if arguments.resume:
        run = resume_run(run, arguments.save)
    print(f"{settings['model']}, {run.label()}")
    names = [NO_OPTIMIZER, *(name for name in arguments.only if name != NO_OPTIMIZER)]
    done = {row["optimizer"] for row in run.rows}
    for name in names:
        if name in done:
            continue
        row = run_process(name, sys.argv[1:])
        print(f"{name}: {row['problem'] if 'problem' in row else format_bytes(row['peak_bytes'])}", flush=True)
        run = replace(run, rows=[*run.rows, row])
        if arguments.save:
            save_run(run, arguments.save)
    print(memory_rows(run.rows))
    if arguments.plot:
        plot_memory(run, arguments.plot)


if __name__ == "__main__":
    main()
