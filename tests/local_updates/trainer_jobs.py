"""What the processes of ``test_trainer.py`` do: the Trainer under DDP, on CPUs."""

from __future__ import annotations

import importlib.util
import io
import os
import sys
import time
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import AdamW
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_lowmem_optim import LocalUpdates, LocalUpdatesCallback, OptimizerStateMemoryCallback, OuterNesterov
from tests.local_updates.jobs import warnings_of_the_package
from tests.sharding.processes import die
from tests.trainer.tiny_models import tiny_llama, token_rows

EXAMPLE = Path(__file__).parent.parent.parent / "examples" / "local_updates.py"
#: Settings of the callback, and training arguments; every run takes ten steps and syncs every four.
RUNS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "local adam": ({"sync_every": 4}, {}),
    "outer": (
        {"sync_every": {"params": 2, "moments": 4}, "outer": OuterNesterov()},
        {"gradient_accumulation_steps": 2},
    ),
    "epochs": ({"sync_every": 4}, {"save_strategy": "epoch", "max_steps": -1, "num_train_epochs": 2}),
    "own state": (
        {"sync_every": 4, "outer": OuterNesterov(), "average": ("params",)},
        {"optim": "ldadam", "optim_args": "rank=4,error_feedback=none", "save_only_model": True},
    ),
    # which syncs by itself
    "lordo": ({}, {"optim": "lordo", "optim_args": "rank=4,sync_every=4"}),
}


class Recorder(TrainerCallback):
    """Keeps the weights after every step, and ends the process before one."""

    def __init__(self, die_before: int | None = None, folder: Path | None = None) -> None:
        self.weights: dict[int, Tensor] = {}
        self.die_before, self.folder = die_before, folder

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.die_before == state.global_step + 1:
            assert self.folder is not None
            die(self.folder)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        self.weights[state.global_step] = torch.cat([param.detach().flatten() for param in model.parameters()])


def say_where_the_group_is() -> None:
    """Set what torchrun does, and accelerate asks for even where there is a group."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="1")


def make_trainer(folder: Path, rows: int = 40, **settings: Any) -> Trainer:
    say_where_the_group_is()
    own = {
        "max_steps": 10,
        "save_steps": 4,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    args = TrainingArguments(str(folder), **{**own, **settings})
    model = tiny_llama(num_hidden_layers=1)
    return Trainer(model, args, train_dataset=token_rows(rows), eval_dataset=token_rows(4))


def train_run(folder: Path, name: str, recorder: Recorder, resume: str | None = None, **more: Any) -> Trainer:
    """Train, or go on from a checkpoint; an epoch has five steps of two processes, rows permitting."""
    settings, arguments = RUNS[name]
    trainer = make_trainer(folder / name, **{"rows": 20, **arguments, **more})
    # the callback is told of a step after the recorder, but for the last
    trainer.add_callback(LocalUpdatesCallback(trainer, **settings))
    trainer.add_callback(recorder)
    trainer.add_callback(OptimizerStateMemoryCallback())
    trainer.train(resume_from_checkpoint=resume and str(folder / name / resume))
    return trainer


def inner(trainer: Trainer) -> Any:
    """Return what accelerate wraps."""
    accelerated: Any = trainer.optimizer
    return accelerated.optimizer


def train(rank: int, world: int, folder: Path) -> dict[str, Any]:
    """Train by every way, without a break."""
    found = {}
    for name in RUNS:
        recorder = Recorder()
        with warnings_of_the_package() as told:
            trainer = train_run(folder, name, recorder)
        assert not [each for each in told if "predicted" in each or "same gradients" in each]
        logs = [log for log in trainer.state.log_history if "loss" in log]
        optimizer = inner(trainer)
        assert isinstance(optimizer, LocalUpdates) == (name != "lordo") and optimizer.steps_since_sync == 0
        found[name] = {
            "weights": recorder.weights,
            "sent": optimizer.communicated_bytes,
            "logged": [log.get("local_updates/communicated_bytes") for log in logs],
            "outer": logs[0].get("optimizer_state/outer_bytes"),
            "saved": sorted(path.name for path in (folder / name).glob("checkpoint-*")),
        }
    return found


def resume(rank: int, world: int, folder: Path) -> dict[str, Tensor]:
    """Go on from the checkpoint in the middle; return the end."""
    ends = {}
    checkpoints = {
        "local adam": "checkpoint-4",
        "outer": "checkpoint-8",
        "epochs": "checkpoint-5",
        "lordo": "checkpoint-4",
    }
    for name, checkpoint in checkpoints.items():
        recorder = Recorder()
        batch = {} if world == 2 else {"per_device_train_batch_size": 4}
        trainer = train_run(folder, name, recorder, checkpoint, save_strategy="no", **batch)
        assert trainer.state.global_step == 10 and 4 not in recorder.weights
        assert name == "lordo" or inner(trainer).num_steps == 10
        ends[name] = recorder.weights[10]
    return ends


def killed(rank: int, world: int, folder: Path) -> float:
    """Lose a worker after its sixth step: the other ends with an error; return the seconds that it took."""
    start = time.monotonic()
    with pytest.raises(RuntimeError, match=r"(?i)connection|peer|timed out"):
        train_run(folder / "killed", "local adam", Recorder(7 if rank == 1 else None, folder), logging_strategy="no")
    return time.monotonic() - start


def resume_the_killed(rank: int, world: int, folder: Path) -> Tensor:
    """Go on from what the run left."""
    recorder = Recorder()
    train_run(folder / "killed", "local adam", recorder, "checkpoint-4", save_strategy="no", logging_strategy="no")
    return recorder.weights[10]


def again(rank: int, world: int, folder: Path) -> dict[int, Tensor]:
    """Train twice, where the optimizer's count is no longer the Trainer's; return the weights that were saved."""
    trainer = make_trainer(folder / "again", max_steps=5, learning_rate=1e-2)
    trainer.add_callback(LocalUpdatesCallback(trainer, 4))
    recorder = Recorder()
    trainer.add_callback(recorder)
    trainer.train()
    trainer.train()
    saved = torch.load(folder / "again" / "checkpoint-4" / "optimizer.pt", weights_only=True)["local_updates"]
    assert saved["num_steps"] == 9 and set(saved["synced"].values()) == {9}
    return {step: recorder.weights[step] for step in (2, 4)}


def refusals(rank: int, world: int, folder: Path) -> None:
    """Ask for what communicates at every step, or would save between two syncs."""

    def refused(message: str, kind: type[Exception] = ValueError, before: Any = None, **settings: Any) -> None:
        trainer = make_trainer(folder / "refused", **{"save_strategy": "no", **settings})
        callback = LocalUpdatesCallback(trainer, 4)
        trainer.add_callback(callback)
        if before is not None:
            before(trainer)
        with pytest.raises(kind, match=message):
            trainer.train()
        assert trainer.state.global_step == 0

    def later(key: str, value: Any) -> Any:
        return lambda trainer: setattr(trainer.args, key, value)

    refused("ddp_broadcast_buffers=True communicates at every step", ddp_broadcast_buffers=True)
    refused("ddp_find_unused_parameters=True communicates", ddp_find_unused_parameters=True)
    refused("average_tokens_across_devices=True communicates", before=later("average_tokens_across_devices", True))
    refused("fp16=True skips a worker's step", before=later("fp16", True))
    refused("save_steps=6 is no multiple of sync_every=4.*Set save_steps=8", save_strategy="steps", save_steps=6)
    every_three = {"save_strategy": "steps", "save_steps": 3, "eval_steps": 3, "eval_strategy": "steps"}
    refused("eval_steps=3 is no multiple of sync_every=4", **{**every_three, "save_strategy": "no"})
    refused("save_steps=3 .*load_best_model_at_end=True", **every_three, load_best_model_at_end=True)
    compressed = {"optim": "ldadam", "optim_args": "rank=4", "save_strategy": "steps"}
    refused("basis.* is each worker's own: no worker's is that of all. Use save_only_model=True", **compressed)
    trainer = make_trainer(folder / "refused", optim="lordo", optim_args="rank=4,sync_every=4,error_feedback=4bit")
    trainer.add_callback(LocalUpdatesCallback(trainer))
    with pytest.raises(ValueError, match="the error that error_feedback='4bit' keeps is each worker's own: no worker"):
        trainer.train()
    # of which the state is known after a step
    trainer = make_trainer(folder / "refused", optim="adafactor", save_steps=8)
    trainer.add_callback(LocalUpdatesCallback(trainer, 4))
    with pytest.raises(ValueError, match=r"exp_avg_sq_row, exp_avg_sq_col of .* is each worker's own: no worker"):
        trainer.train()
    assert trainer.state.global_step == 1
    trainer = make_trainer(folder / "refused", optim="adamw_torch", save_steps=8)
    trainer.add_callback(LocalUpdatesCallback(trainer, 4, average=("params",)))
    with pytest.raises(ValueError, match=r"exp_avg, exp_avg_sq of .* with average=\('params', 'moments'\)"):
        trainer.train()
    for engine, name in (("is_fsdp_enabled", "FSDP"), ("is_deepspeed_enabled", "DeepSpeed")):
        trainer = make_trainer(folder / "refused")
        setattr(trainer, engine, True)
        with pytest.raises(NotImplementedError, match=f"{name} communicates at every step"):
            LocalUpdatesCallback(trainer, 4)
    trainer = make_trainer(folder / "refused", save_strategy="no")
    trainer.add_callback(LocalUpdatesCallback(trainer))
    with pytest.raises(ValueError, match="found AdamW, which averages nothing: give it the Trainer"):
        trainer.train()
    trainer.model_init = tiny_llama
    with pytest.raises(ValueError, match="model_init makes a new model"):
        LocalUpdatesCallback(trainer, 4)
    layerwise = make_trainer(folder / "refused")
    layerwise.optimizer = LocalUpdates(AdamW(layerwise.model.parameters()))
    with pytest.raises(ValueError, match="AdamW syncs by itself"):
        LocalUpdatesCallback(layerwise, 4)


def run_example(rank: int, world: int, folder: Path) -> str:
    """Run the example on less; return what it prints."""
    say_where_the_group_is()
    spec = importlib.util.spec_from_file_location("example", EXAMPLE)
    assert spec is not None and spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    sys.modules["example"] = example  # dataclasses look there
    spec.loader.exec_module(example)
    short = ["--max_steps", "4", "--sync_every", "2", "--per_device_train_batch_size", "1", "--use_cpu"]
    sys.argv = ["example", *short, "--outer", "--output_dir", str(folder / "example"), "--disable_tqdm", "true"]
    with redirect_stdout(io.StringIO()) as printed:
        example.main()
    return printed.getvalue()
