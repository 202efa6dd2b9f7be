"""``error_feedback="grad"`` in the Trainer: the run of ``"param"``, resumed to the bit, and what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer, TrainingArguments

from hf_lowmem_optim import LDAdam, OptimizerFactory, OptimizerStateMemoryCallback, measure_state, plan_optimizer
from hf_lowmem_optim.memory.report import load_report, report_text
from hf_lowmem_optim.trainer.gradient_error import check_gradient_error_arguments
from tests.optimizers.cases import assert_same_state
from tests.trainer.resume_worker import STOP, StopAt
from tests.trainer.tiny_models import tiny_llama, token_rows


def make_trainer(
    folder: Path, error_feedback: str = "grad", *, callbacks: Any = (), dtype: torch.dtype = torch.float32, **other: Any
) -> Trainer:
    settings: dict[str, Any] = {
        "optim": "ldadam",
        "optim_args": f"rank=4,error_feedback={error_feedback}",
        "learning_rate": 1e-2,
        "max_steps": 14,
        "warmup_steps": 2,
        "weight_decay": 0.1,
        "logging_steps": 1,
        "per_device_train_batch_size": 2,
        "save_strategy": "no",
        "use_cpu": True,
        "report_to": [],
        "disable_tqdm": True,
        **other,
    }
    args = TrainingArguments(str(folder), **settings)
    return Trainer(tiny_llama().to(dtype), args, train_dataset=token_rows(24), callbacks=list(callbacks))


@pytest.mark.parametrize("settings", [{}, {"bf16": True}, {"gradient_checkpointing": True}], ids=str)
def test_without_clipping_and_accumulation_it_is_error_feedback_param_to_the_bit(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    trainers = [make_trainer(tmp_path, how, max_grad_norm=0, max_steps=5, **settings) for how in ("grad", "param")]
    for trainer in trainers:
        trainer.train()
    for mine, theirs in zip(*(trainer.model.parameters() for trainer in trainers), strict=True):
        assert torch.equal(mine, theirs)
    assert_same_state(*(trainer.optimizer.optimizer for trainer in trainers))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_resume_is_exact_with_clipping_and_accumulation(dtype: torch.dtype, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"gradient_accumulation_steps": 2, "max_grad_norm": 0.5, "dtype": dtype}
    straight = make_trainer(tmp_path, **settings)
    straight.train()
    make_trainer(tmp_path, callbacks=[StopAt()], **settings).train()
    resumed = make_trainer(tmp_path, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{STOP}"))
    for mine, theirs in zip(straight.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    assert_same_state(straight.optimizer.optimizer, resumed.optimizer.optimizer)
    history = [entry for entry in straight.state.log_history if "grad_norm" in entry]
    assert len(history) == 14
    assert max(entry["grad_norm"] for entry in history) > 0.5
    assert history[-1]["loss"] < history[0]["loss"]


def test_the_accounts_name_the_gradients(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer = make_trainer(tmp_path, callbacks=[OptimizerStateMemoryCallback()], max_steps=2)
    trainer.train()
    optimizer = trainer.optimizer.optimizer
    kept = sum(p.nbytes for g in optimizer.param_groups for p in g["params"] if optimizer.keeps_error_in_gradient(p, g))
    assert kept > 0
    assert measure_state(optimizer) == plan_optimizer(optimizer)
    logged = [e["optimizer_state/in_gradient_bytes"] for e in trainer.state.log_history if "loss" in e]
    assert logged == [kept, kept]
    assert all("optimizer_state/error_bytes" not in entry for entry in trainer.state.log_history)
    report = load_report(tmp_path)
    assert report["measured"] == report["predicted"]
    assert report["measured"]["in_gradient_bytes"] == kept
    assert "of the gradients, which stayed in memory" in report_text(report)
    assert "not the predicted" not in caplog.text
    assert caplog.text.count("grad_norm is the norm of gradient plus error, and max_grad_norm=1.0 clips by it") == 1


@pytest.mark.parametrize("way", ["string", "factory", "object"])
def test_fp16_is_refused_before_the_first_gradient(way: str, tmp_path: Path) -> None:
    model = tiny_llama()
    args = TrainingArguments(
        str(tmp_path), max_steps=2, fp16=True, use_cpu=True, report_to=[], disable_tqdm=True, save_strategy="no"
    )
    chosen: dict[str, Any] = {}
    if way == "string":
        args.set_optimizer("ldadam", args="rank=4,error_feedback=grad")
    elif way == "factory":
        chosen["optimizer_cls_and_kwargs"] = (OptimizerFactory("ldadam", rank=4, error_feedback="grad"), {})
    else:
        chosen["optimizers"] = (LDAdam(model.parameters(), rank=4, error_feedback="grad"), None)
    trainer = Trainer(model, args, train_dataset=token_rows(8), **chosen)
    with pytest.raises(ValueError, match=r"fp16=True .*error_feedback='grad'.*bf16=True.*error_feedback='4bit'"):
        trainer.train()
    assert all(p.grad is None for p in model.parameters())


def test_several_processes_are_refused(tmp_path: Path) -> None:
    class Args:
        fp16, world_size = False, 2

    with pytest.raises(ValueError, match="before the 2 processes have averaged it"):
        check_gradient_error_arguments(Args())  # type: ignore[arg-type]
