"""Front ends: their configurations are right, our plugins do what the documented hooks of theirs ask.

What CI installs is run; axolotl and Lightning are stood in for by their hooks (``docs/front-ends/`` says what was run).
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from torch import nn

from hf_lowmem_optim import OptimizerFactory, get_entry, measure_state
from hf_lowmem_optim.__main__ import main
from hf_lowmem_optim.memory.report import load_report
from hf_lowmem_optim.trainer.optim_args import hyperparameters_from_text

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples" / "front_ends"
CONFIGURATIONS = ("axolotl.yaml", "llama_factory.yaml", "ms_swift.yaml", "trl_sft.yaml")
SCRIPTS = ("accelerate_loop.py", "lightning_module.py", "tiny_model.py", "train_embeddings.py")


def test_every_example_is_here_and_on_a_page() -> None:
    assert {path.name for path in EXAMPLES.iterdir() if path.is_file()} == {*CONFIGURATIONS, *SCRIPTS}
    pages = "".join(page.read_text() for page in (ROOT / "docs" / "front-ends").glob("*.md"))
    assert all(f"examples/front_ends/{name}" in pages for name in (*CONFIGURATIONS, *SCRIPTS))


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_configurations_name_an_optimizer_and_options_of_it(name: str) -> None:
    settings = yaml.safe_load((EXAMPLES / name).read_text())
    entry = get_entry(settings["optimizer" if name == "axolotl.yaml" else "optim"])
    assert hyperparameters_from_text(settings["optim_args"], entry.optimizer_class)["rank"] == 16
    assert type(float(settings["learning_rate"])) is float


def loaded(file: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(file.stem, file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_loop_with_accelerate_resumes_bit_for_bit_and_reports(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.syspath_prepend(EXAMPLES)
    loop, histories = loaded(EXAMPLES / "accelerate_loop.py"), {}
    for folder, steps, more in (("whole", 4, []), ("parts", 2, []), ("parts", 4, ["--resume"])):
        options = ["--folder", str(tmp_path / folder), "--max_steps", str(steps), "--save_steps", "2", *more]
        monkeypatch.setattr(sys, "argv", ["accelerate_loop.py", *options])
        loop.main()
        histories[folder] = load_report(tmp_path / folder)["log_history"]
    assert [entry["step"] for entry in histories["parts"]] == [3, 4]
    assert histories["parts"] == histories["whole"][2:]
    assert main(["report", str(tmp_path / "whole"), "--html", str(tmp_path / "page.html")]) == 0
    assert "Seconds per training step" in (tmp_path / "page.html").read_text()


def test_axolotl_loads_the_plugin_and_accepts_the_string(monkeypatch: Any) -> None:
    """As axolotl 0.19 does: the module by name, the class without arguments, ``register`` before it reads the rest."""
    from transformers import TrainingArguments

    from hf_lowmem_optim import OptimizerStateMemoryCallback

    base = ModuleType("axolotl.integrations.base")
    base.BasePlugin = type("BasePlugin", (), {"__init__": lambda self: None})
    for name, module in (("axolotl", None), ("axolotl.integrations", None), ("axolotl.integrations.base", base)):
        monkeypatch.setitem(sys.modules, name, module or ModuleType(name))
    module_name, _, class_name = yaml.safe_load((EXAMPLES / "axolotl.yaml").read_text())["plugins"][0].rpartition(".")
    plugin = getattr(importlib.import_module(module_name), class_name)()
    monkeypatch.delitem(sys.modules, module_name)
    assert isinstance(plugin, base.BasePlugin)
    plugin.register({})
    assert TrainingArguments(optim="ldadam").optim.value == "ldadam"
    (callback,) = plugin.add_callbacks_post_trainer({}, None)
    assert isinstance(callback, OptimizerStateMemoryCallback)


def test_lightning_calls_the_callback_and_gets_a_report(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    stand_in = ModuleType("lightning.pytorch")
    stand_in.Callback = object
    monkeypatch.setitem(sys.modules, "lightning", ModuleType("lightning"))
    monkeypatch.setitem(sys.modules, "lightning.pytorch", stand_in)
    module_name = "hf_lowmem_optim.integrations.lightning"
    callback = importlib.import_module(module_name).OptimizerStateReport()
    monkeypatch.delitem(sys.modules, module_name)

    model, logged = nn.Linear(64, 64), {}
    optimizer = OptimizerFactory("ldadam", lr=0.5, rank=4)(model)
    trainer = SimpleNamespace(global_step=0, log_every_n_steps=2, optimizers=[optimizer], callback_metrics={})
    trainer.default_root_dir, trainer.is_global_zero, trainer.sanity_checking = tmp_path, True, True
    module = SimpleNamespace(log=lambda name, value, **_: logged.__setitem__(name, value))
    callback.on_validation_end(trainer, module)  # before there is any state
    callback.on_train_start(trainer, module)
    for batch in range(10):
        model(torch.ones(1, 64)).sum().backward()
        if batch % 2:  # gradients of two batches
            optimizer.step()
            optimizer.zero_grad()
            trainer.global_step += 1
        trainer.callback_metrics["loss"] = torch.tensor(float(batch))
        callback.on_train_batch_end(trainer, module, None, None, batch)
    assert not list(tmp_path.iterdir())
    trainer.sanity_checking = False
    callback.on_validation_end(trainer, module)
    report = load_report(tmp_path)
    assert report["log_history"] == [{"step": step, "learning_rate": 0.5, "loss": 2.0 * step - 1} for step in (2, 4)]
    assert [entry["step"] for entry in report["step_seconds"]] == [2, 4]
    total = measure_state(optimizer).total_bytes
    assert report["measured"]["total_bytes"] == logged["optimizer_state/total_bytes"] == total
    callback.on_train_end(trainer, module)
    assert "Optimizer state of LDAdam" in capsys.readouterr().out
    assert json.loads((tmp_path / "optimizer_state_report.json").read_text()) == report
