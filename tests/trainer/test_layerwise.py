"""The layer-wise strings in the Trainer: what it logs, accumulates and refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer import DEFAULT_CALLBACKS

from hf_lowmem_optim import OptimizerFactory, OptimizerStateMemoryCallback
from hf_lowmem_optim.memory.report import load_report, report_text
from hf_lowmem_optim.optimizers.layerwise import LDAdamLayerwise
from hf_lowmem_optim.trainer.layerwise import LayerwiseCallback
from tests.trainer.tiny_models import tiny_llama, token_rows

RATES = {"ldadam": 1e-2, "microadam": 1e-3}
TWO = {"gradient_accumulation_steps": 2}
SMALL = {"ldadam": "rank=4", "microadam": "min_compress_size=64,density=0.1"}


def make_trainer(folder: Path, optim: str, *, callbacks: Any = (), **settings: Any) -> Trainer:
    normal = optim.removesuffix("_layerwise")
    arguments: dict[str, Any] = {
        "optim_args": SMALL[normal],
        "learning_rate": RATES[normal],
        "max_steps": 6,
        "logging_steps": 1,
        "warmup_steps": 2,
        "weight_decay": 0.1,
        "per_device_train_batch_size": 2,
        "max_grad_norm": 0,
        "use_cpu": True,
        "report_to": [],
        "disable_tqdm": True,
        "save_strategy": "no",
    }
    args = TrainingArguments(str(folder), optim=optim, **{**arguments, **settings})
    return Trainer(tiny_llama(), args, train_dataset=token_rows(16), callbacks=list(callbacks))


def logged(trainer: Trainer, key: str) -> list[float]:
    return [float(entry[key]) for entry in trainer.state.log_history if key in entry]


@pytest.mark.parametrize("settings", [{}, {"bf16": True}, {"gradient_checkpointing": True}], ids=str)
@pytest.mark.parametrize("normal", RATES)
def test_a_run_is_that_of_the_normal_mode_to_the_bit(normal: str, settings: dict[str, Any], tmp_path: Path) -> None:
    # a limit that scales nothing: without one older Trainers log no norm
    limits = {normal: 1e9, f"{normal}_layerwise": 0.0}
    trainers = [make_trainer(tmp_path, optim, max_grad_norm=limit, **settings) for optim, limit in limits.items()]
    for trainer in trainers:
        trainer.train()
    normal_run, layerwise_run = trainers
    assert isinstance(layerwise_run.optimizer.optimizer.peak_gradient_bytes, int)
    for mine, theirs in zip(layerwise_run.model.parameters(), normal_run.model.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    assert logged(layerwise_run, "loss") == logged(normal_run, "loss")
    norms = logged(layerwise_run, "grad_norm")
    assert len(norms) == 6
    assert min(norms) > 0
    assert norms == pytest.approx(logged(normal_run, "grad_norm"), rel=1e-4)


def test_accumulation_goes_through_the_error(tmp_path: Path) -> None:
    """With an exact error it is the normal mode's; the norm logged is that of the pieces."""
    exact: dict[str, Any] = {"optim_args": "rank=4,error_feedback=fp32", "gradient_accumulation_steps": 3}
    normal, layerwise = (make_trainer(tmp_path, optim, **exact) for optim in ("ldadam", "ldadam_layerwise"))
    start = [p.detach().clone() for p in normal.model.parameters()]
    for trainer in (normal, layerwise):
        trainer.train()
    for mine, theirs, before in zip(layerwise.model.parameters(), normal.model.parameters(), start, strict=True):
        assert (mine - theirs).norm() <= 1e-4 * (theirs - before).norm()
    assert min(logged(layerwise, "grad_norm")) > 0
    steps = [state["step"] for state in layerwise.optimizer.state.values()]
    assert steps == [6] * len(steps)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_grad_norm": 1.0}, r"max_grad_norm=1.0 .*Set max_grad_norm=0.*clip_tensor_norm=1.0.*optim='ldadam'"),
        ({"fp16": True}, r"fp16=True .*bf16=True"),
        (
            {**TWO, "optim_args": "rank=4,error_feedback=none"},
            "error_feedback='none' cannot",
        ),
        (
            {**TWO, "optim_args": "rank=4,clip_tensor_norm=1.0"},
            "clip_tensor_norm=1.0 cannot",
        ),
    ],
    ids=str,
)
def test_what_needs_all_gradients_is_refused_before_the_first(
    settings: dict[str, Any], message: str, tmp_path: Path
) -> None:
    trainer = make_trainer(tmp_path, "ldadam_layerwise", **settings)
    before = [p.detach().clone() for p in trainer.model.parameters()]
    with pytest.raises(ValueError, match=message):
        trainer.train()
    assert all(torch.equal(p, b) for p, b in zip(trainer.model.parameters(), before, strict=True))


@pytest.mark.parametrize("way", ["factory", "object"])
def test_other_ways_into_the_trainer_are_checked_and_served_too(way: str, tmp_path: Path) -> None:
    model = tiny_llama()

    def trainer(**settings: Any) -> Trainer:
        args = TrainingArguments(
            str(tmp_path), max_steps=2, logging_steps=1, use_cpu=True, report_to=[], disable_tqdm=True, **settings
        )
        if way == "factory":
            chosen = {"optimizer_cls_and_kwargs": (OptimizerFactory("ldadam_layerwise", rank=4), {})}
        else:
            chosen = {"optimizers": (LDAdamLayerwise(model.parameters(), rank=4), None)}
        return Trainer(model, args, train_dataset=token_rows(8), **chosen)

    with pytest.raises(ValueError, match=r"max_grad_norm=1\.0"):
        trainer().train()
    run = trainer(max_grad_norm=0)
    run.train()
    assert min(logged(run, "grad_norm")) > 0


def test_other_optimizers_do_not_notice(tmp_path: Path) -> None:
    assert DEFAULT_CALLBACKS.count(LayerwiseCallback) == 1
    for callbacks in ([], [LayerwiseCallback]):
        trainer = make_trainer(tmp_path, "ldadam", max_grad_norm=1e-3)
        for callback in callbacks:
            trainer.remove_callback(callback)
        trainer.train()
        norms = logged(trainer, "grad_norm")
        assert len(norms) == 6
        assert min(norms) > 1e-3  # as torch measured it, before clipping


def test_reporters_see_the_norm_and_the_report_the_gradients(tmp_path: Path) -> None:
    class Reporter(TrainerCallback):
        def __init__(self) -> None:
            self.norms: list[float] = []

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            if "grad_norm" in logs:
                self.norms.append(logs["grad_norm"])

    reporter = Reporter()
    trainer = make_trainer(tmp_path, "ldadam_layerwise", callbacks=[reporter, OptimizerStateMemoryCallback()])
    trainer.train()
    assert reporter.norms == logged(trainer, "grad_norm")
    largest = max(p.nbytes for p in trainer.model.parameters())
    everything = sum(p.nbytes for p in trainer.model.parameters())
    report = load_report(tmp_path)
    assert report["gradients"] == {"peak_bytes": largest, "all_bytes": everything}
    assert "at once, of" in report_text(report)


def test_a_dense_group_may_clip_and_accumulate(tmp_path: Path) -> None:
    """Its gradients accumulate whole; only compressed tensors lose theirs to the error."""
    model = tiny_llama()
    factory = OptimizerFactory("ldadam_layerwise", rank=4, overrides={"lm_head": {"clip_tensor_norm": 1e-3}})
    args = TrainingArguments(
        str(tmp_path),
        max_steps=2,
        gradient_accumulation_steps=2,
        max_grad_norm=0,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        save_strategy="no",
    )
    trainer = Trainer(model, args, train_dataset=token_rows(8), optimizer_cls_and_kwargs=(factory, {}))
    trainer.train()
    assert trainer.state.global_step == 2
