"""Training arguments that change how a step runs, not what it computes: for every registered optimizer.

With `auto_find_batch_size`, after running out of memory, the Trainer begins anew, with the optimizer it has.
"""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from torch.utils.data import SequentialSampler
from transformers import Trainer, TrainerCallback

from hf_lowmem_optim import OPTIMIZERS, OptimizerStateMemoryCallback, measure_state, plan_optimizer
from hf_lowmem_optim.engine.optimizer import LowMemoryOptimizer
from hf_lowmem_optim.memory.measure import unwrap_optimizer
from tests.optimizers.cases import assert_same_state
from tests.trainer import runs
from tests.trainer.tiny_models import tiny_llama, token_rows

every_optimizer = pytest.mark.parametrize("name", runs.TRAINED)
OVERFLOWS_AT = 3


class InOrder(Trainer):
    """Takes the rows in their order; a batch with the token 0 overflows, as a loss that is too large does."""

    def create_accelerator_and_postprocess(self) -> None:
        """Give accelerate a scaler where it makes none: on the CPU ``fp16=True`` would compute in float32."""
        super().create_accelerator_and_postprocess()
        if self.args.fp16 and self.args.use_cpu:
            self.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
            self.accelerator.native_amp = True

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)

    def compute_loss(self, model: Any, inputs: dict[str, Tensor], *args: Any, **kwargs: Any) -> Any:
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        return loss * torch.inf if (inputs["input_ids"] == 0).any() else loss


SCHEDULE = {"max_steps": 4, "lr_scheduler_type": "constant_with_warmup", "warmup_steps": 2, "weight_decay": 0.1}


def trainer_for(folder: Path, name: str, *, rows: Any = 16, callbacks: Any = (), **settings: Any) -> Trainer:
    settings = runs.settings_of(name, **{**SCHEDULE, **settings})
    return runs.make_trainer(folder, rows=rows, trainer_class=InOrder, given={"callbacks": list(callbacks)}, **settings)


def assert_same_end(left: Trainer, right: Trainer) -> None:
    """Parameters and optimizer state equal to the bit, and not where they began."""
    runs.assert_same_parameters(left, right)
    assert runs.moved(left.model, runs.values(tiny_llama().to(left.model.device)))
    assert_same_state(*(unwrap_optimizer(each.optimizer) for each in (left, right)))
    for each in (left, right):
        measured = measure_state(each.optimizer)
        assert measured == plan_optimizer(each.optimizer)
        assert set(measured.component_bytes) - {"dense"}


class HalveTheScale(TrainerCallback):
    """Gives a run without an overflow the scale that an overflow leaves, so that fp16 rounds alike from there on."""

    scaler: torch.amp.GradScaler

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == OVERFLOWS_AT:
            self.scaler.update(new_scale=self.scaler.get_scale() / 2)


@pytest.mark.parametrize("device", runs.DEVICES)
@pytest.mark.parametrize("name", runs.NORMAL)
def test_a_batch_that_overflows_in_fp16_is_as_if_it_had_not_been_there(name: str, device: str, tmp_path: Path) -> None:
    """With accumulation: its step is skipped as a whole, with the other micro-batch, which was finite."""
    good = token_rows(24)
    bad = [{key: value - value.min() for key, value in row.items()} for row in token_rows(4, seed=9)]
    mixed = [*good[: 4 * OVERFLOWS_AT], *bad[:2], *good[:2], *good[4 * OVERFLOWS_AT :]]
    settings = {"fp16": True, "use_cpu": device == "cpu", "gradient_accumulation_steps": 2}
    overflown = trainer_for(tmp_path, name, rows=mixed, max_steps=7, **settings)
    clean = trainer_for(tmp_path, name, rows=good, max_steps=6, callbacks=[halve := HalveTheScale()], **settings)
    halve.scaler = clean.accelerator.scaler
    overflown.train()
    clean.train()
    assert overflown.accelerator.scaler.get_scale() == clean.accelerator.scaler.get_scale()
    losses = runs.logged(overflown, "loss")
    assert len(losses) == 7 and losses[-3:] == runs.logged(clean, "loss")[-3:]
    assert {state["step"] for state in overflown.optimizer.state.values()} == {6}
    assert_same_end(overflown, clean)


@pytest.mark.parametrize("device", runs.DEVICES[1:])
@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
@every_optimizer
def test_resume_on_a_gpu_is_exact(name: str, bf16: bool, device: str, tmp_path: Path) -> None:
    settings = runs.settings_of(name, **{**SCHEDULE, "max_steps": 12})
    straight = runs.assert_resumes_to_the_bit(tmp_path, tiny_llama, use_cpu=False, bf16=bf16, **settings)
    assert {parameter.device.type for parameter in straight.model.parameters()} == {device}
    assert_same_end(straight, straight)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ldadam", "ldadam_layerwise"])
def test_a_compiled_model_trains_alike_and_resumes_in_either_way(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """With the part of torch.compile that could matter: graphs forward and backward. Inductor would take minutes."""
    chosen = [f"model.layers.{part}.weight" for part in ("0.self_attn.q_proj", "1.mlp.down_proj", "1.self_attn.q_proj")]
    settings = {"optim_target_modules": [r".*q_proj", r".*layers\.1\.mlp\.down_proj"], "save_strategy": "steps"}
    ways: dict[bool, dict[str, Any]] = {False: settings, True: {**settings, "torch_compile_backend": "aot_eager"}}
    trained: dict[bool, Trainer] = {}
    for compiled, way in ways.items():
        torch._dynamo.reset()
        counters.clear()
        trained[compiled] = trainer_for(tmp_path / str(compiled), name, save_steps=2, **way)
        trained[compiled].train()
        assert ("saves no memory for gradients" in caplog.text) == (compiled and name in runs.LAYERWISE)
        # one graph, and none again in a later step for a hook's sake
        assert counters["stats"].get("unique_graphs", 0) == compiled
        method = OPTIMIZERS[name].optimizer_class.method
        dense = {n: method.is_dense(g) for g in trained[compiled].optimizer.param_groups for n in g["param_names"]}
        assert dense == {n: n not in chosen for n, _ in tiny_llama().named_parameters()}
    assert_close_ends(trained[True], trained[False])
    for compiled, way in ways.items():
        resumed = trainer_for(tmp_path / "resumed", name, **way)
        resumed.train(resume_from_checkpoint=str(tmp_path / str(not compiled) / "checkpoint-2"))
        assert resumed.state.global_step == 4
        assert_close_ends(resumed, trained[False])


def assert_close_ends(left: Trainer, right: Trainer) -> None:
    """As near as two orders of summation are, compared to how far training went."""
    parameters = (each.parameters() for each in (left.model, right.model, tiny_llama()))
    for mine, theirs, start in zip(*parameters, strict=True):
        assert (mine - theirs).norm() <= 1e-3 * (theirs - start).norm()
    assert runs.logged(left, "loss") == pytest.approx(runs.logged(right, "loss"), rel=1e-5)
    assert runs.logged(left, "grad_norm") == pytest.approx(runs.logged(right, "grad_norm"), rel=1e-4)
    for each in (left, right):
        assert measure_state(each.optimizer).component_bytes == plan_optimizer(each.optimizer).component_bytes


@every_optimizer
def test_gradient_checkpointing_changes_nothing(name: str, tmp_path: Path) -> None:
    checkpointing = [
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
        for reentrant in (False, True)
    ]
    ends = [trainer_for(tmp_path, name, gradient_accumulation_steps=2, **each) for each in ({}, *checkpointing)]
    for end in ends:
        end.train()
        assert end.model.is_gradient_checkpointing == (end is not ends[0])
        assert_same_end(end, ends[0])
        assert runs.logged(end, "grad_norm") == pytest.approx(runs.logged(ends[0], "grad_norm"), rel=1e-5)


@every_optimizer
def test_after_training_nothing_of_ours_keeps_the_model(name: str, tmp_path: Path) -> None:
    """What accelerate remembers is cleared as a user would; the collector may run, for the Trainer has cycles."""
    trainer = trainer_for(tmp_path, name, callbacks=[callback := OptimizerStateMemoryCallback()], save_strategy="steps")
    trainer.train()
    optimizer = unwrap_optimizer(trainer.optimizer)
    held = [weakref.ref(each) for each in (trainer, trainer.model, optimizer, *trainer.model.parameters())]
    held += [
        weakref.ref(value) for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value)
    ]
    assert all(each() is not None for each in held)
    trainer.accelerator.free_memory()
    del trainer, optimizer
    gc.collect()
    assert not [each() for each in held if each() is not None]
    # the user's own callback is still there
    assert callback is not None


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


def run_failing(name: str, where: str, folder: Path, **settings: Any) -> tuple[Any, list[int]]:
    defaults = {
        "max_steps": STEPS,
        "per_device_train_batch_size": 8,
        "auto_find_batch_size": True,
        "max_grad_norm": 0.0,
    }
    settings = runs.settings_of(name, **{**defaults, **settings})
    trainer: Any = runs.make_trainer(folder, rows=64, trainer_class=Failing, auto_find_batch_size=True, **settings)
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
    trainer, batches = run_failing(name, where, tmp_path)
    assert batches[: BEFORE + 1] == [8] * (BEFORE + 1)
    assert len(batches) == BEFORE + 1 + STEPS
    assert len({*batches[BEFORE + 1 :]}) == 1 and batches[-1] < 8
    assert trainer.state.global_step == STEPS
    losses = runs.logged(trainer, "loss")
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
    one, other = (run_failing(name, "forward", tmp_path)[0] for name in (normal, f"{normal}_layerwise"))
    assert updates(one) == updates(other)
    runs.assert_same_parameters(one, other)


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
    trainer, batches = run_failing(name, "backward", tmp_path, **settings)
    accumulated = settings.get("gradient_accumulation_steps", 1)
    assert trainer.state.global_step == STEPS
    assert len(batches) == accumulated * (BEFORE + STEPS) + 1
    assert set(updates(trainer).values()) == {BEFORE + STEPS}
    assert said in caplog.text
    losses = runs.logged(trainer, "loss")
    assert losses[-1] < losses[0]
