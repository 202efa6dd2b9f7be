"""What a run leaves behind for people and for the next run: model card, report, hooks, checkpoints without state."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer, TrainerCallback

from hf_lowmem_optim import OptimizerFactory, OptimizerStateMemoryCallback
from hf_lowmem_optim.memory.report import REPORT_NAME, load_report
from tests.trainer.runs import ARGUMENTS, assert_same_parameters, logged, make_trainer
from tests.trainer.tiny_models import tiny_llama


def card_of(trainer: Trainer) -> str:
    trainer.create_model_card()
    lines = (Path(trainer.args.output_dir) / "README.md").read_text().splitlines()
    (line,) = [line for line in lines if line.startswith("- optimizer:")]
    return line


def test_the_model_card_states_the_options_that_were_used(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, optim="ldadam", optim_args="rank=4,beta1=0.95", adam_epsilon=1e-6)
    trainer.train()
    line = card_of(trainer)
    assert "LDAdam of hf_lowmem_optim with lr=5e-05, betas=(0.95, 0.99), eps=1e-06, weight_decay=0.0" in line
    assert "rank=4 or None" in line
    assert "OptimizerNames" not in line
    factory = OptimizerFactory("microadam", lr=2e-3)
    trainer = make_trainer(tmp_path, given={"optimizer_cls_and_kwargs": (factory, {})})
    trainer.train()
    assert "MicroAdam of hf_lowmem_optim with lr=0.002, betas=(0.9, 0.999)" in card_of(trainer)
    trainer = make_trainer(tmp_path, optim="adamw_torch", adam_beta1=0.8)
    trainer.train()
    assert "betas=(0.8,0.999)" in card_of(trainer)


class InterruptAt(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            raise KeyboardInterrupt


def test_a_run_that_is_killed_has_the_report_of_its_last_checkpoint(tmp_path: Path) -> None:
    given = {"callbacks": [OptimizerStateMemoryCallback(), InterruptAt(3)]}
    trainer = make_trainer(tmp_path, optim="ldadam", max_steps=6, save_strategy="steps", save_steps=2, given=given)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    report = load_report(tmp_path)
    assert [entry["step"] for entry in report["log_history"]] == [1, 2]
    assert report["measured"]["total_bytes"] == report["predicted"]["total_bytes"] > 0


def test_a_report_that_cannot_be_written_costs_neither_the_run_nor_the_earlier_one(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / REPORT_NAME).write_text("an earlier run's")
    (tmp_path / REPORT_NAME).with_suffix(".tmp").mkdir()  # in the way of any writing
    given = {"callbacks": [OptimizerStateMemoryCallback()]}
    trainer = make_trainer(tmp_path, optim="ldadam", save_strategy="steps", save_steps=1, given=given)
    trainer.train()
    trainer.save_model()
    assert (tmp_path / "model.safetensors").is_file()
    assert (tmp_path / REPORT_NAME).read_text() == "an earlier run's"
    assert "report of the optimizer's state could not be written" in caplog.text
    assert "Optimizer state of LDAdam" in capsys.readouterr().out


@pytest.mark.parametrize("missing", ["optimizer.pt", "scheduler.pt"])
def test_a_resume_without_the_state_is_noted_once(
    missing: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    common = {"optim": "ldadam", "optim_args": "rank=4", "save_strategy": "steps", "save_steps": 2}
    make_trainer(tmp_path, max_steps=2, **common).train()
    said = "training resumes after step 2, but LDAdam has no state"
    make_trainer(tmp_path, max_steps=4, **common).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert said not in caplog.text
    (tmp_path / "checkpoint-2" / missing).unlink()
    make_trainer(tmp_path, max_steps=4, **common).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert caplog.text.count(said) == 1


@pytest.mark.parametrize("second", ["adamw_torch", "ldadam", "ldadam_layerwise"])
def test_a_second_trainer_takes_the_model_over(second: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    first = make_trainer(tmp_path, optim="ldadam_layerwise", optim_args="rank=4", learning_rate=1e-2)
    first.train()
    before = [p.detach().clone() for p in first.model.parameters()]
    common = {"optim": second, "optim_args": ARGUMENTS.get(second), "max_grad_norm": 0.0}
    still = make_trainer(tmp_path, first.model, learning_rate=0.0, **common)
    still.train()
    assert all(torch.equal(p, old) for p, old in zip(first.model.parameters(), before, strict=True))
    taken = "another optimizer that is still there (LDAdamLayerwise); from now on only this {} acts on their gradients"
    assert taken.format(type(still.optimizer.optimizer).__name__) in caplog.text
    # and back: the first one acts in the backward pass again, as it would in a run without the second
    alone = make_trainer(tmp_path, optim="ldadam_layerwise", optim_args="rank=4", learning_rate=1e-2)
    alone.train()
    caplog.clear()
    for trainer in (first, alone):
        trainer.train()
    # neither the message nor the first one minds that the other is newer
    assert (taken.format("LDAdamLayerwise") in caplog.text) == (second == "ldadam_layerwise")
    assert_same_parameters(first, alone)
    assert logged(first, "grad_norm") == logged(alone, "grad_norm")
    largest = max(p.numel() * 4 for p in first.model.parameters())
    assert first.optimizer.optimizer.peak_gradient_bytes == largest


def test_a_loop_of_ones_own_is_told_of_the_older_optimizer() -> None:
    model = tiny_llama()
    older = OptimizerFactory("ldadam_layerwise", rank=4)(model)
    newer = torch.optim.AdamW(model.parameters())
    tokens = torch.arange(1, 9)[None]
    model(input_ids=tokens, labels=tokens).loss.backward()
    newer.step()
    with pytest.raises(RuntimeError, match=r"first call remove_hooks\(\) of this LDAdamLayerwise"):
        model(input_ids=tokens, labels=tokens).loss.backward()
    older.remove_hooks()
    older.restore_hooks()  # what was removed on purpose stays off
    model(input_ids=tokens, labels=tokens).loss.backward()
    assert all(p.grad is not None for p in model.parameters())
