from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import DefaultFlowCallback

from hf_lowmem_optim import OPTIMIZERS, OptimizerStateMemoryCallback, measure_state, plan_optimizer
from tests.trainer.tiny_models import tiny_llama, token_rows

PREFIX = "optimizer_state/"


class Reporter(TrainerCallback):
    """Stands for TensorBoard or W&B: keeps what it is given."""

    def __init__(self) -> None:
        self.seen: list[dict[str, Any]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.seen.append(dict(logs))


def make_trainer(folder: Path, callbacks: list[Any], **settings: Any) -> Trainer:
    arguments: dict[str, Any] = {
        "max_steps": 4,
        "logging_steps": 2,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "use_cpu": True,
        "report_to": [],
        "disable_tqdm": True,
        "save_strategy": "no",
        "per_device_train_batch_size": 2,
    }
    args = TrainingArguments(str(folder), **{**arguments, **settings})
    rows = token_rows(8)
    return Trainer(tiny_llama(), args, train_dataset=rows, eval_dataset=rows[:2], callbacks=callbacks)


def added(logs: dict[str, Any]) -> dict[str, int]:
    found = {key: value for key, value in logs.items() if key.startswith(PREFIX)}
    # differs from step to step
    assert not found or found.pop(f"{PREFIX}process_rss_bytes") > 2**20
    return found


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("late", [False, True], ids=["in the list", "added later"])
@pytest.mark.parametrize(
    "callback", [OptimizerStateMemoryCallback, OptimizerStateMemoryCallback()], ids=["class", "object"]
)
def test_bytes_reach_history_and_the_reporters_before_it(name: str, late: bool, callback: Any, tmp_path: Path) -> None:
    reporter = Reporter()
    trainer = make_trainer(tmp_path, [reporter] if late else [reporter, callback], optim=name)
    if late:
        trainer.add_callback(callback)
    kinds = [type(c) for c in trainer.callback_handler.callbacks]
    trainer.train()

    measured = measure_state(trainer.optimizer)
    assert measured == plan_optimizer(trainer.optimizer)
    expected = {
        f"{PREFIX}total_bytes": measured.total_bytes,
        f"{PREFIX}adamw_fp32_bytes": 8 * measured.num_parameters,
        f"{PREFIX}predicted_bytes": measured.total_bytes,
        **{
            f"{PREFIX}{component.replace(' ', '_')}_bytes": count
            for component, count in measured.component_bytes.items()
        },
        **{f"{PREFIX}group_{i}_bytes": count for i, count in enumerate(measured.group_bytes)},
    }
    assert len(measured.group_bytes) == len(trainer.optimizer.param_groups)
    for stream in (reporter.seen, trainer.state.log_history):
        training = [logs for logs in stream if "loss" in logs or "train_loss" in logs]
        assert len(training) == 3
        assert [added(logs) for logs in training] == [expected] * 3
        evaluation = [logs for logs in stream if "eval_loss" in logs]
        assert len(evaluation) == 2
        assert [added(logs) for logs in evaluation] == [{}] * 2
    # First now, with every other callback still there once and in its order.
    after = [type(c) for c in trainer.callback_handler.callbacks]
    assert after[0] is OptimizerStateMemoryCallback
    assert sorted(after, key=str) == sorted(kinds, key=str)
    assert [k for k in after if k is not after[0]] == [k for k in kinds if k is not after[0]]
    assert DefaultFlowCallback in after


def test_a_torch_optimizer_is_reported_too(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, [OptimizerStateMemoryCallback()], optim="adamw_torch")
    trainer.train()
    logged = added(trainer.state.log_history[-1])
    entries = sum(p.numel() for p in trainer.model.parameters())
    assert logged[f"{PREFIX}exp_avg_bytes"] == logged[f"{PREFIX}exp_avg_sq_bytes"] == 4 * entries
    assert logged[f"{PREFIX}adamw_fp32_bytes"] == 8 * entries


def test_values_reach_the_printed_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_trainer(tmp_path, [OptimizerStateMemoryCallback()], optim="ldadam").train()
    printed = [line for line in capsys.readouterr().out.splitlines() if "'loss'" in line]
    assert printed
    assert all(f"{PREFIX}total_bytes" in line for line in printed)


def test_tensorboard_receives_the_scalars(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trainer = make_trainer(tmp_path, [OptimizerStateMemoryCallback()], optim="ldadam", report_to=["tensorboard"])
    trainer.train()
    files = list(tmp_path.rglob("events.out.tfevents.*"))
    found = EventAccumulator(str(files[0].parent)).Reload()
    assert any(tag.endswith("optimizer_state/total_bytes") for tag in found.Tags()["scalars"])


def test_other_processes_log_nothing(tmp_path: Path) -> None:
    callback = OptimizerStateMemoryCallback()
    trainer = make_trainer(tmp_path, [callback], optim="ldadam")
    trainer.train()
    logs: dict[str, Any] = {"loss": 1.0}
    trainer.state.is_world_process_zero = False
    callback.on_log(trainer.args, trainer.state, trainer.control, logs=logs, optimizer=trainer.optimizer)
    assert logs == {"loss": 1.0}


def test_outside_a_trainer_the_limit_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer = make_trainer(tmp_path, [], optim="ldadam")
    OptimizerStateMemoryCallback().on_train_begin(trainer.args, trainer.state, trainer.control)
    assert "cannot move before the reporters" in caplog.text
