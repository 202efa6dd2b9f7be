"""Measure the peak memory of whole training steps (forward, backward, update), beside what the planner predicts.

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
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peers import FOREACH, FUSED, GALORE, LEARNING_RATE, PEERS, adamw_8bit, low_rank_groups, ours, trainable
from pictures import plot_memory
from results import RESULTS, describe_run, save_run
from tables import memory_rows
from torch import nn
from torch.optim import Optimizer
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers import logging as transformers_logging

from hf_lowmem_optim import OPTIMIZERS, measure_state, plan_memory

SEED = 0
NO_OPTIMIZER = "no optimizer"
#: So that freed memory returns to the system at once, and one heap serves all threads.
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_ARENA_MAX": "1"}


class LayerwiseGaLore(Optimizer):
    """GaLore's layer-wise mode as transformers has it: an optimizer per parameter, called by a hook in the backward.

    It is an ``Optimizer`` only so that its state can be measured; ``step()`` does nothing.
    """

    def __init__(self, model: nn.Module) -> None:
        from galore_torch import GaLoreAdamW

        super().__init__(trainable(model), {})
        self.inner: dict[torch.Tensor, Optimizer] = {}
        for group in low_rank_groups(model, GALORE):
            for parameter in group["params"]:
                alone = [{**group, "params": [parameter]}]
                self.inner[parameter] = GaLoreAdamW(alone, lr=LEARNING_RATE, no_deprecation_warning=True)
                parameter.register_post_accumulate_grad_hook(self._update)

    def _update(self, parameter: torch.Tensor) -> None:
        optimizer = self.inner[parameter]
        optimizer.step()
        optimizer.zero_grad()
        self.state[parameter] = optimizer.state[parameter]

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Do nothing: everything is updated."""


@dataclass(frozen=True)
class Entry:
    """Describe an optimizer to measure."""

    build: Callable[[nn.Module], Optimizer | None]
    planned: str | None  # its name in the planner, if that knows it
    ours: bool = False
    problem: str | None = None  # why it cannot be measured here


def _peer(name: str, planned: str | None, build: Callable[[nn.Module], Optimizer] | None = None) -> Entry:
    found = PEERS[name]
    return Entry(build or (lambda model: found.build(model, GALORE["rank"])), planned, problem=found.problem)


ENTRIES: Mapping[str, Entry] = {
    NO_OPTIMIZER: Entry(lambda model: None, "adamw_torch"),
    "adamw_torch (foreach)": _peer(FOREACH, "adamw_torch"),
    "adamw_torch_fused": _peer(FUSED, "adamw_torch_fused"),
    "adamw_bnb_8bit": _peer("bitsandbytes AdamW8bit", "adamw_8bit", adamw_8bit),
    "galore_adamw": _peer("galore-torch", "galore_adamw"),
    "galore_adamw_layerwise": _peer("galore-torch", None, LayerwiseGaLore),
    **{name: Entry(ours(name).build, name, ours=True) for name in OPTIMIZERS},
}


def plan(model: nn.Module, name: str) -> dict[str, int]:
    """Return the predicted bytes of weights, gradients, state and step, and their sum ``planned_bytes``.

    Args:
        model: The model, of which only names, shapes and dtypes are read.
        name: Of the optimizer; nothing is returned for one that the planner does not know.
    """
    entry = ENTRIES[name]
    if entry.planned is None:
        return {}
    planned = plan_memory(model, entry.planned)
    row = planned.optimizers[0]
    assert row.state is not None, row.problem
    parts = {
        "weights": sum(planned.weights.weight_bytes.values()),
        "gradients": sum(planned.gradient_bytes(row).values()),
        "state": 0 if name == NO_OPTIMIZER else row.state.total_bytes,
        "step": 0 if name == NO_OPTIMIZER else row.temporary_bytes or 0,
    }
    return {**{f"planned_{part}_bytes": count for part, count in parts.items()}, "planned_bytes": sum(parts.values())}


def build_model(arguments: argparse.Namespace, device: str, *, tiny: bool = False) -> nn.Module:
    """Return the Llama, or one of a few thousand parameters that uses the same code."""
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
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=getattr(torch, arguments.dtype))  # type: ignore[no-any-return]


class PeakMeter:
    """Read the most memory that was taken since the last reset, in bytes above a baseline."""

    def __init__(self, device: str) -> None:
        self.cuda = torch.device(device).type == "cuda"
        self.method = "torch.cuda.max_memory_allocated" if self.cuda else "VmHWM, reset before each step"
        self.baseline = 0
        if not self.cuda and not os.access("/proc/self/clear_refs", os.W_OK):
            raise SystemExit("the kernel's high-water mark cannot be reset: no /proc/self/clear_refs; needs Linux")

    def reset(self) -> None:
        """Start anew from what is taken now."""
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
        else:
            Path("/proc/self/clear_refs").write_text("5")

    def peak(self) -> int:
        """Return the most since the reset."""
        return (torch.cuda.max_memory_allocated() if self.cuda else _status_bytes("VmHWM")) - self.baseline

    def now(self) -> int:
        """Return what is taken now, without what waits to be freed."""
        gc.collect()
        if self.cuda:
            return torch.cuda.memory_allocated() - self.baseline
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        return _status_bytes("VmRSS") - self.baseline


def _status_bytes(key: str) -> int:
    """Return a line of /proc/self/status, which has KiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:"))


def train(model: nn.Module, entry: Entry, arguments: argparse.Namespace, meter: PeakMeter) -> dict[str, Any]:
    """Train for some steps on one batch and return the peaks of the first and of later ones."""
    optimizer = entry.build(model)
    generator = torch.Generator().manual_seed(SEED)
    tokens = torch.randint(model.config.vocab_size, (1, arguments.sequence), generator=generator)  # type: ignore[union-attr,arg-type]
    tokens = tokens.to(arguments.device)
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
    return {
        "forward_peak_bytes": max(forward_peaks),
        "first_step_peak_bytes": peaks[0],
        "later_step_peak_bytes": max(peaks[1:]),
        "peak_bytes": max(peaks),
        "held_bytes": meter.now(),
        "state_bytes": 0 if optimizer is None else measure_state(optimizer).total_bytes,
        "first_loss": losses[0],
        "last_loss": losses[-1],
    }


def work(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Do what a process does for one optimizer: warm up, note the baseline, build, train."""
    transformers_logging.set_verbosity_error()
    entry, meter = ENTRIES[name], PeakMeter(arguments.device)
    train(build_model(arguments, arguments.device, tiny=True), entry, arguments, meter)
    meter.baseline = meter.now()
    model = build_model(arguments, arguments.device)
    row = {"optimizer": name, "method": meter.method, "weights_bytes": meter.now()}
    row |= train(model, entry, arguments, meter)
    return {**row, "num_parameters": sum(parameter.numel() for parameter in model.parameters()), **plan(model, name)}


def run_process(name: str, argv: list[str]) -> dict[str, Any]:
    """Measure one optimizer in a process of its own.

    Returns:
        Its row; for an optimizer that is not ours and fails, the reason under ``"problem"``.

    Raises:
        RuntimeError: One of ours failed.
    """
    if ENTRIES[name].problem is not None:
        return {"optimizer": name, "problem": ENTRIES[name].problem}
    command = [sys.executable, __file__, *argv, "--worker", name]
    done = subprocess.run(command, env={**os.environ, **MALLOC}, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return dict(json.loads(done.stdout.splitlines()[-1]))
    if ENTRIES[name].ours:
        raise RuntimeError(f"{name}: {done.stderr}")
    return {"optimizer": name, "problem": (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1]}


def main() -> None:
    """Start the processes, print, write and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=list(ENTRIES), choices=list(ENTRIES))
    for name, default in {"hidden": 768, "layers": 12, "vocabulary": 16000, "sequence": 32, "steps": 3}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--save", type=Path, nargs="?", const=RESULTS / "memory.json", metavar="PATH.json")
    parser.add_argument("--plot", type=Path, metavar="PATH.png", help="draw the rows (extra plot)")
    parser.add_argument("--worker", choices=list(ENTRIES), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.steps < 2:
        parser.error(f"--steps {arguments.steps}: a first and a later step are told apart, so at least 2")
    if arguments.worker:
        print(json.dumps(work(arguments.worker, arguments)))
        return
    keys = ("device", "dtype", "hidden", "layers", "vocabulary", "sequence", "steps")
    size = sum(parameter.numel() for parameter in build_model(arguments, "meta").parameters())
    settings = {key: getattr(arguments, key) for key in keys}
    settings |= {"seed": SEED, "threads": torch.get_num_threads(), "model": f"Llama of {size / 1e6:.0f} M parameters"}
    os.environ.update(MALLOC)
    run = describe_run("memory", settings)
    print(f"{settings['model']}, {run.label()}", flush=True)
    names = list(dict.fromkeys([NO_OPTIMIZER, *arguments.only]))
    # a GPU's allocator counts for each process alone, whatever the others do meanwhile
    with ThreadPoolExecutor(len(names) if torch.device(arguments.device).type == "cuda" else 1) as pool:
        for name, row in zip(names, pool.map(lambda each: run_process(each, sys.argv[1:]), names), strict=True):
            print(f"{name}: {row.get('problem', 'measured')}", flush=True)
            complete = len(run.rows) + 1 == len(names)
            run = replace(run, rows=[*run.rows, row], settings={**run.settings, "complete": complete})
            if arguments.save:
                save_run(run, arguments.save)
    print(memory_rows(run.rows))
    if arguments.plot:
        plot_memory(run, arguments.plot)


if __name__ == "__main__":
    main()
