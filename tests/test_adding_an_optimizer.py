"""The example of docs/adding-an-optimizer.md, as it stands there, has what a method of the package has."""

from __future__ import annotations

import dataclasses
import importlib
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import Trainer, trainer_optimizer
from transformers.training_args import OptimizerNames

from hf_lowmem_optim import (
    OPTIMIZERS,
    LDAdam,
    LowMemoryOptimizer,
    OptimizerFactory,
    OptimizerStateMemoryCallback,
    measure_state,
    option,
    plan_memory,
    plan_optimizer,
    register_optimizer,
)
from hf_lowmem_optim.engine.options import NOT_NEGATIVE
from hf_lowmem_optim.memory.measure import unwrap_optimizer
from hf_lowmem_optim.memory.report import REPORT_NAME
from tests.trainer.runs import STOP, StopAt, assert_equal_to_the_bit, assert_same_parameters, logged, make_trainer
from tests.trainer.tiny_models import tiny_llama

DOCUMENT = Path(__file__).parent.parent / "docs" / "adding-an-optimizer.md"
EXAMPLE = re.findall(r"^```python\n(.*?)^```$", DOCUMENT.read_text(), re.M | re.S)[0]
NAMES = ["sgdm8bit", "sgdm8bit_layerwise"]


@pytest.fixture(autouse=True)
def registered_for_a_test_only() -> Iterator[None]:
    """Take registered names out again: other tests run over every optimizer."""
    before = set(OPTIMIZERS)
    yield
    for name in OPTIMIZERS.keys() - before:
        del OPTIMIZERS[name]
        member = OptimizerNames._value2member_map_.pop(name)
        del trainer_optimizer._OPTIMIZER_HANDLERS[member]
        OptimizerNames._member_names_.remove(name.upper())
        del OptimizerNames._member_map_[name.upper()]
        type.__delattr__(OptimizerNames, name.upper())
        if hasattr(OptimizerNames, "_hashable_values_"):  # Python 3.13
            OptimizerNames._hashable_values_.remove(name)


@pytest.fixture
def example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The module that a user who saved the example imports, in a process that has transformers already."""
    (tmp_path / "sgdm8bit.py").write_text(EXAMPLE)
    monkeypatch.syspath_prepend(tmp_path)
    yield importlib.import_module("sgdm8bit")
    del sys.modules["sgdm8bit"]


def train(folder: Path, name: str, model: nn.Module | None = None, **settings: Any) -> Trainer:
    defaults = {"learning_rate": 0.1, "max_steps": 2 * STOP, "lr_scheduler_type": "cosine", "weight_decay": 0.1}
    resume = settings.pop("resume", None)
    trainer = make_trainer(folder, model, optim=name, rows=24, **defaults | settings)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def inner(trainer: Trainer) -> LowMemoryOptimizer:
    """The optimizer under accelerate's wrapper."""
    optimizer = unwrap_optimizer(trainer.optimizer)
    assert isinstance(optimizer, LowMemoryOptimizer)
    return optimizer


@pytest.mark.parametrize("name", NAMES)
def test_it_is_short_trains_is_planned_and_resumes_to_the_bit(example: ModuleType, name: str, tmp_path: Path) -> None:
    assert len([line for line in EXAMPLE.splitlines() if line.strip()]) <= 80
    settings: dict[str, Any] = {"optim_args": "momentum=0.8"}
    planned = plan_memory(tiny_llama(), name, **settings)[name].state
    straight = train(tmp_path / "straight", name, given={"callbacks": [OptimizerStateMemoryCallback()]}, **settings)
    optimizer = inner(straight)
    assert type(optimizer) is OPTIMIZERS[name].optimizer_class and isinstance(optimizer, example.SGDM8bit)
    assert {group["momentum"] for group in optimizer.param_groups} == {0.8}
    losses = logged(straight, "loss")
    assert sum(losses[-3:]) < 0.9 * sum(losses[:3])

    measured = measure_state(optimizer)
    assert measured == plan_optimizer(optimizer) == planned
    matrices = [p for n, p in straight.model.named_parameters() if n.endswith("_proj.weight")]
    blocks = sum(-(-p.numel() // 256) for p in matrices)
    assert measured.component_bytes["momentum codes"] == sum(p.numel() for p in matrices)
    assert measured.component_bytes["momentum statistics"] == 2 * 2 * blocks
    assert logged(straight, "optimizer_state/total_bytes")[-1] == measured.total_bytes
    assert (tmp_path / "straight" / REPORT_NAME).exists()

    stopped = tmp_path / "stopped"
    train(stopped, name, given={"callbacks": [StopAt()]}, save_strategy="steps", save_steps=100, **settings)
    resumed = train(stopped, name, resume=str(stopped / f"checkpoint-{STOP}"), **settings)
    assert resumed.state.global_step == 2 * STOP and len(logged(resumed, "loss")) == 2 * STOP
    assert_same_parameters(straight, resumed)
    assert_equal_to_the_bit(optimizer.state_dict(), inner(resumed).state_dict())
    with pytest.raises(ValueError, match=r"block_size=256.*block_size=128"):
        train(stopped, name, resume=str(stopped / f"checkpoint-{STOP}"), optim_args="momentum=0.8,block_size=128")


def test_layerwise_is_the_normal_mode_to_the_bit(example: ModuleType, tmp_path: Path) -> None:
    normal, layerwise = (train(tmp_path / name, name) for name in NAMES)
    assert_same_parameters(normal, layerwise)


def test_lora_trains(example: ModuleType, tmp_path: Path) -> None:
    torch.manual_seed(7)
    model = get_peft_model(tiny_llama(), LoraConfig(r=4, target_modules=["q_proj", "down_proj"]))
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    trainer = train(tmp_path, NAMES[1], model, learning_rate=1.0)
    losses = logged(trainer, "loss")
    assert sum(losses[-3:]) < sum(losses[:3])
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert moved == {n for n in before if "lora_" in n} and len(moved) == 8
    assert all("momentum_codes" in state for state in inner(trainer).state.values())
    assert measure_state(inner(trainer)) == plan_optimizer(inner(trainer))


def test_the_update_is_sgd_with_momentum_but_for_the_quantization(example: ModuleType) -> None:
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(24, 32))
    exact, buffer = weight.detach().double(), torch.zeros(24, 32, dtype=torch.float64)
    optimizer = example.SGDM8bit([weight], lr=0.1, weight_decay=0.5, momentum=0.7)
    for _ in range(10):
        weight.grad = torch.randn(24, 32)
        buffer = 0.7 * buffer + weight.grad
        exact = (1 - 0.1 * 0.5) * exact - 0.1 * buffer
        optimizer.step()
    # each step a code is off by half a level of 255, of a range below 12
    torch.testing.assert_close(weight.double(), exact, rtol=0, atol=0.1 * 10 * 12 / 255)
    assert (weight.double() - exact).abs().max() > 0


def test_the_factory_takes_the_name_and_the_class(example: ModuleType) -> None:
    for optimizer in ("sgdm8bit", example.SGDM8bit):
        factory = OptimizerFactory(optimizer, lr=0.1, momentum=0.5)
        assert repr(factory) == "OptimizerFactory('sgdm8bit', lr=0.1, momentum=0.5)"
        assert type(factory(tiny_llama())) is example.SGDM8bit
    layerwise = OPTIMIZERS["sgdm8bit_layerwise"].optimizer_class
    assert type(OptimizerFactory(layerwise)(tiny_llama())) is layerwise


def test_a_method_is_varied_and_a_default_redeclared(example: ModuleType) -> None:
    @dataclasses.dataclass(frozen=True)
    class FastOptions(example.SGDM8bitOptions):  # type: ignore[misc, name-defined]
        lr: float = option(0.5, "Learning rate.", within=NOT_NEGATIVE)

    def reversed_(W: Any, g: Any, state: Any, t: int, o: Any) -> None:
        example.sgdm8bit_update_(W, [-grad for grad in g], state, t, o)

    class Fast(example.SGDM8bit):  # type: ignore[misc, name-defined]
        method = dataclasses.replace(example.SGDM8bit.method, name="fast", options=FastOptions, update_=reversed_)

    register_optimizer("fast", Fast)
    weight = nn.Parameter(torch.zeros(16, 16, dtype=torch.bfloat16))
    optimizer = Fast([weight], weight_rounding="stochastic")
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    assert torch.equal(weight, torch.full_like(weight, 0.5))


def test_the_factory_and_the_registry_refuse_what_cannot_work() -> None:
    MyLD, Bare = type("MyLD", (LDAdam,), {}), type("Bare", (LowMemoryOptimizer,), {})
    Taken = type("Taken", (LDAdam,), {"method": dataclasses.replace(LDAdam.method)})
    Varied = type("Varied", (LDAdam,), {"method": dataclasses.replace(LDAdam.method, name="varied")})
    before = set(OPTIMIZERS)
    for optimizer, error, message in (
        (MyLD, ValueError, r"^MyLD is not registered: call register_optimizer\('myld', MyLD\) first$"),
        (Varied, ValueError, r"^Varied is not registered: call register_optimizer\('varied', Varied\)"),
        (torch.optim.SGD, TypeError, r"torch\.optim\.sgd\.SGD'> is no optimizer of this package.*straight to the T"),
    ):
        with pytest.raises(error, match=message):
            OptimizerFactory(optimizer)
    for name, optimizer, error, message in (
        ("myld", MyLD, ValueError, r"not the name of MyLD's method, 'ldadam'.*replace\(Base.method, name='myld'"),
        ("ldadam", Taken, ValueError, r"name='ldadam' is taken by LDAdam"),
        ("My LD", MyLD, ValueError, r"name='My LD' must be a lower-case identifier"),
        ("bare", Bare, TypeError, r"Bare has no class attribute `method"),
        ("sgd", torch.optim.SGD, TypeError, r"no subclass of LowMemoryOptimizer"),
    ):
        with pytest.raises(error, match=message):
            register_optimizer(name, optimizer)
    assert set(OPTIMIZERS) == before
    register_optimizer("varied", Varied)
    assert isinstance(OptimizerFactory(Varied)(tiny_llama()), Varied)


def test_a_class_that_is_defined_anew_takes_the_place_of_its_earlier_self(example: ModuleType, tmp_path: Path) -> None:
    first = example.SGDM8bit
    again = importlib.reload(example)
    assert again.SGDM8bit is not first
    assert type(inner(train(tmp_path, "sgdm8bit", max_steps=1))) is again.SGDM8bit


def test_it_may_be_imported_before_transformers(tmp_path: Path) -> None:
    (tmp_path / "sgdm8bit.py").write_text(EXAMPLE)
    code = "import sgdm8bit, transformers.trainer; from transformers import TrainingArguments\n"
    code += "for name in ('sgdm8bit', 'sgdm8bit_layerwise'): print(TrainingArguments('out', optim=name).optim.name)"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.split() == ["SGDM8BIT", "SGDM8BIT_LAYERWISE"], done.stderr
