from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import Trainer, TrainerCallback
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from hf_lowmem_optim import OPTIMIZERS, OptimizerStateMemoryCallback, measure_state, plan_optimizer
from hf_lowmem_optim.memory import step_memory
from hf_lowmem_optim.memory.report import load_report, report_text
from hf_lowmem_optim.trainer.callbacks import EarlyLogCallback
from tests.memory.layout import layout
from tests.trainer.runs import KINDS, Reporter, make_trainer
from tests.trainer.tiny_models import token_rows

PREFIX = "optimizer_state/"
EXACT = "rank=4,error_feedback=param"


def trainer_for(folder: Path, callbacks: list[Any], **settings: Any) -> Trainer:
    rows = token_rows(8)
    given = {"callbacks": callbacks, "eval_dataset": rows[:2]}
    evaluated = {"max_steps": 4, "logging_steps": 2, "eval_strategy": "steps", "eval_steps": 2}
    return make_trainer(folder, rows=rows, given=given, **{"optim": "ldadam", **evaluated, **settings})


def added(logs: dict[str, Any]) -> dict[str, int]:
    found = {key: value for key, value in logs.items() if key.startswith(PREFIX)}
    # differs from step to step, but for steps that touch no more memory
    assert not found or found.pop(f"{PREFIX}process_rss_bytes", 2**21) > 2**20
    return found


@pytest.mark.parametrize("optim", [*KINDS, "adamw_torch", "adafactor", "adamw_bnb_8bit"])
def test_bytes_reach_history_reporters_and_the_report(optim: str, tmp_path: Path, capsys: Any) -> None:
    if "bnb" in optim:
        pytest.importorskip("bitsandbytes")
    trainer = trainer_for(tmp_path, [reporter := Reporter(), OptimizerStateMemoryCallback()], optim=optim)
    trainer.train()

    measured = measure_state(trainer.optimizer)
    entries = sum(p.numel() for p in trainer.model.parameters())
    expected = {"total": measured.total_bytes, "adamw_fp32": 8 * entries}
    expected |= {component.replace(" ", "_"): count for component, count in measured.component_bytes.items()}
    if optim in OPTIMIZERS:
        assert measured == plan_optimizer(trainer.optimizer)
        assert len(measured.group_bytes) == len(trainer.optimizer.param_groups)
        expected["predicted"] = measured.total_bytes
        if OPTIMIZERS[optim].optimizer_class.method.layerwise:
            expected["gradient_peak"] = max(p.nbytes for p in trainer.model.parameters())
    if optim == "adamw_torch":
        assert expected["exp_avg"] == expected["exp_avg_sq"] == 4 * entries
    expected |= {f"group_{i}": count for i, count in enumerate(measured.group_bytes)}
    expected = {f"{PREFIX}{key}_bytes": count for key, count in expected.items()}
    for stream in (reporter.seen, trainer.state.log_history):
        training = [added(logs) for logs in stream if "loss" in logs or "train_loss" in logs]
        total = f"{PREFIX}total_bytes"
        assert training == [expected] + [{total: expected[total]}] * 2  # what does not change is said once
        evaluation = [added(logs) for logs in stream if "eval_loss" in logs]
        assert evaluation == [{}] * 2

    report = load_report(tmp_path)
    assert report == load_report(tmp_path / "optimizer_state_report.json")
    assert report["measured"]["total_bytes"] == report["this_process_bytes"] == measured.total_bytes
    for key in ("component_bytes", "dtype_bytes"):
        assert report["measured"][key] == getattr(measured, key)
        assert sum(report["measured"][key].values()) == measured.total_bytes
    assert report["measured"]["group_bytes"] == list(measured.group_bytes)
    assert report["predicted"] == (report["measured"] if optim in OPTIMIZERS else None)
    assert report["log_history"] == json.loads(json.dumps(trainer.state.log_history))
    assert report["step_memory"]["process_rss_bytes"] > 2**20
    table = report_text(report)
    printed = capsys.readouterr().out
    assert table in printed
    assert all(f"{PREFIX}total_bytes" in line for line in printed.splitlines() if "'loss'" in line)
    assert all(component in table for component in measured.component_bytes)


@pytest.mark.parametrize(
    "callback", [OptimizerStateMemoryCallback, OptimizerStateMemoryCallback()], ids=["class", "object"]
)
@pytest.mark.parametrize("late", [False, True], ids=["in the list", "added later"])
def test_reporters_get_them_whichever_way_it_is_added(
    late: bool, callback: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    """Such as TensorBoard's: the Trainer makes them from ``report_to``, and puts them before the user's callbacks."""
    monkeypatch.setitem(INTEGRATION_TO_CALLBACK, "fake", Reporter)
    trainer = trainer_for(tmp_path, [] if late else [callback], report_to=["fake"])
    kinds = [type(each) for each in trainer.callback_handler.callbacks]
    assert kinds.index(EarlyLogCallback) < kinds.index(Reporter)
    if late:
        trainer.add_callback(callback)
    reporter = next(each for each in trainer.callback_handler.callbacks if type(each) is Reporter)
    for _ in range(2):  # also in a second run of the same Trainer
        reporter.seen.clear()
        trainer.train()
        assert [f"{PREFIX}total_bytes" in logs for logs in reporter.seen if "loss" in logs] == [True, True]


def test_a_callback_taken_off_or_added_during_training_loses_only_what_is_documented(tmp_path: Path) -> None:
    class AddIt(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 1:
                trainer.add_callback(OptimizerStateMemoryCallback)

    trainer = trainer_for(tmp_path, [before := Reporter(), AddIt()])
    trainer.train()
    keys = [f"{PREFIX}total_bytes" in logs for logs in before.seen if "loss" in logs]
    assert keys == [False, False]
    assert [f"{PREFIX}total_bytes" in logs for logs in trainer.state.log_history if "loss" in logs] == [True, True]
    trainer.remove_callback(AddIt)
    trainer.remove_callback(OptimizerStateMemoryCallback)
    trainer.train()
    assert not any(map(added, trainer.state.log_history))


def test_the_layout_of_the_report(tmp_path: Path) -> None:
    trainer_for(tmp_path, [OptimizerStateMemoryCallback()], optim_args=EXACT, max_grad_norm=1.0).train()
    golden = json.loads((Path(__file__).parent.parent / "memory" / "report_layout.json").read_text())
    assert layout(load_report(tmp_path)) == golden


def test_a_state_that_is_not_as_predicted_is_warned_of_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer_for(tmp_path, [OptimizerStateMemoryCallback()], optim_args=EXACT).train()
    assert "not the predicted" not in caplog.text
    trainer = trainer_for(tmp_path, [], optim_args=EXACT, max_steps=1)
    trainer.train()
    state = trainer.optimizer.state[trainer.optimizer.param_groups[0]["params"][0]]
    state["error"] = state["error"].double()
    callback = OptimizerStateMemoryCallback()
    for _ in range(2):
        callback.on_optimizer_step(trainer.args, trainer.state, trainer.control, optimizer=trainer.optimizer)
    assert "error +4,096 B" in caplog.text and caplog.text.count("not the predicted") == 1


def test_a_parameter_without_gradient_is_the_reason_given(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer = trainer_for(tmp_path, [OptimizerStateMemoryCallback()], optim_args=EXACT)
    trainer.model.unused = torch.nn.Linear(8, 8)
    trainer.train()
    assert "2 of 23 parameters have had no gradient yet" in caplog.text


@pytest.mark.parametrize("reset_peak", [False, True])
def test_the_peak_of_a_step_is_told_only_where_it_is_known(reset_peak: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    peak = {"bytes": 100, "resets": 0}
    device = SimpleNamespace(
        max_memory_allocated=lambda _: peak["bytes"],
        reset_peak_memory_stats=lambda _: peak.update(bytes=10, resets=peak["resets"] + 1),
    )
    monkeypatch.setattr(torch, "get_device_module", lambda _: device)
    optimizer: Any = SimpleNamespace(param_groups=[{"params": [SimpleNamespace(device=torch.device("cuda", 0))]}])
    meter = step_memory.StepMemoryMeter(reset_peak=reset_peak)
    meter.start(optimizer)
    quiet = meter.stop(optimizer)
    assert quiet.peak_bytes == (10 if reset_peak else None)
    meter.start(optimizer)
    peak["bytes"] = 170
    loud = meter.stop(optimizer)
    assert loud.peak_bytes == 170 == quiet.largest(loud).peak_bytes == loud.largest(quiet).peak_bytes
    assert peak["resets"] == (2 if reset_peak else 0)
