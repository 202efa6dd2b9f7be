"""`auto_find_batch_size`: after running out of memory the Trainer begins anew, with the optimizer it has."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor
from transformers import Trainer

from hf_lowmem_optim import OPTIMIZERS, measure_state, plan_optimizer
from hf_lowmem_optim.engine.optimizer import LowMemoryOptimizer
from tests.trainer.runs import ARGUMENTS, LEARNING_RATES, assert_same_parameters, logged, make_trainer

BEFORE, STEPS = 2, 6


class Failing(Trainer):
    """Fails once, as CUDA does, in the step after `BEFORE` steps: before it, or in its backward pass at layer 1."""

    where = "forward"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.batches: list[int] = []

    def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
        self.batches.append(len(inputs["input_ids"]))
        if len(self.batches) != BEFORE * self.args.gradient_accumulation_steps + 1:
            return super().training_step(model, inputs, *args, **kwargs)
        if self.where == "forward":
            self.fail()
        handle = model.model.layers[1].register_full_backward_hook(self.fail)
        try:
            return super().training_step(model, inputs, *args, **kwargs)
        finally:
            handle.remove()

    def fail(self, *_: Any) -> None:
        raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")


def run(name: str, where: str, folder: Path, **settings: Any) -> tuple[Trainer, list[int]]:
    defaults: dict[str, Any] = {
        "optim": name,
        "optim_args": ARGUMENTS[name],
        "learning_rate": LEARNING_RATES.get(name, 3e-3),
        "lr_scheduler_type": "linear",
        "max_steps": STEPS,
        "per_device_train_batch_size": 8,
        "auto_find_batch_size": True,
    }
    trainer = make_trainer(folder, rows=64, trainer_class=Failing, **{**defaults, **settings})
    assert isinstance(trainer, Failing)
    trainer.where = where
    trainer.train()
    return trainer, trainer.batches


def updates(trainer: Trainer) -> dict[str, int]:
    optimizer = trainer.optimizer.optimizer
    return {name: optimizer.state[p]["step"] for name, p in trainer.model.named_parameters()}


@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_begins_anew_with_a_smaller_batch(
    name: str, where: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer, batches = run(name, where, tmp_path)
    assert batches[: BEFORE + 1] == [8] * (BEFORE + 1)
    assert len(batches) == BEFORE + 1 + STEPS
    assert len({*batches[BEFORE + 1 :]}) == 1 and batches[-1] < 8
    assert trainer.state.global_step == STEPS
    losses = logged(trainer, "loss")
    assert losses[-1] < losses[0]
    # The schedule begins anew as well, from the rate of the arguments.
    assert {group["initial_lr"] for group in trainer.optimizer.param_groups} == {trainer.args.learning_rate}

    again = name.endswith("_layerwise") and where == "backward"
    late = {n for n, count in updates(trainer).items() if count == max(updates(trainer).values()) and again}
    counts = set(updates(trainer).values())
    # What came before layer 1 in the failing backward pass had been updated: head, final norm and nothing of layer 0.
    assert len(counts) == 1 + again and max(counts) - min(counts) == again
    assert not any("layers.0" in n or "embed" in n for n in late)
    assert {"lm_head.weight", "model.norm.weight"} <= late or not again
    assert ("cannot take back" in caplog.text) == again
    assert measure_state(trainer.optimizer) == plan_optimizer(trainer.optimizer)
    gc.collect()
    mine = {id(p) for p in trainer.model.parameters()}
    owners: list[Any] = [o for o in gc.get_objects() if issubclass(type(o), LowMemoryOptimizer)]
    assert sum(any(id(p) in mine for group in o.param_groups for p in group["params"]) for o in owners) == 1


@pytest.mark.parametrize("normal", ["ldadam", "microadam"])
def test_layerwise_ends_where_the_normal_mode_does(normal: str, tmp_path: Path) -> None:
    """Nothing steps twice, and nothing is lost."""
    one, other = (run(name, "forward", tmp_path)[0] for name in (normal, f"{normal}_layerwise"))
    assert updates(one) == updates(other)
    assert_same_parameters(one, other)


@pytest.mark.parametrize(
    ("name", "settings", "said"),
    [
        # The first micro-batch failed, of which the error feedback has a part: no update.
        ("ldadam_layerwise", {"gradient_accumulation_steps": 2}, "cannot take back"),
        ("ldadam", {"optim_args": "rank=4,error_feedback=grad"}, "stay in their errors, for later steps to use"),
    ],
    ids=["accumulation", "error in gradients"],
)
def test_what_has_reached_an_error_stays_there_and_counts_as_no_step(
    name: str, settings: dict[str, Any], said: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer, batches = run(name, "backward", tmp_path, **settings)
    accumulated = settings.get("gradient_accumulation_steps", 1)
    assert trainer.state.global_step == STEPS
    assert len(batches) == accumulated * (BEFORE + STEPS) + 1
    assert set(updates(trainer).values()) == {BEFORE + STEPS}
    assert said in caplog.text
    losses = logged(trainer, "loss")
    assert losses[-1] < losses[0]
