"""Training arguments that change how a step runs, not what it computes: for each kind of optimizer.

With `auto_find_batch_size`, after running out of memory, the Trainer begins anew, with the optimizer it has. What
optimizers that act during the backward pass log, accumulate and refuse is here too.
"""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from torch.utils.data import SequentialSampler
from transformers import Trainer, TrainerCallback

from hf_lowmem_optim import OPTIMIZERS, OptimizerFactory, OptimizerStateMemoryCallback, measure_state, plan_optimizer
from hf_lowmem_optim.engine.optimizer import LowMemoryOptimizer
from hf_lowmem_optim.memory.measure import unwrap_optimizer
from hf_lowmem_optim.memory.report import load_report, report_text
from hf_lowmem_optim.registry import get_entry
from hf_lowmem_optim.trainer.backward import BackwardCallback, check_backward_arguments
from hf_lowmem_optim.trainer.optim_args import hyperparameters_from_text
from tests.optimizers.cases import assert_same_state
from tests.trainer import runs
from tests.trainer.tiny_models import tiny_llama, token_rows

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


def trainer_for(folder: Path, name: str, **settings: Any) -> Trainer:
    settings = runs.settings_of(name, **{**SCHEDULE, **settings})
    return runs.make_trainer(folder, **{"rows": 16, "trainer_class": InOrder, **settings})


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
@pytest.mark.parametrize("name", ["ldadam", "sparse_mfac"])
def test_a_batch_that_overflows_in_fp16_is_as_if_it_had_not_been_there(name: str, device: str, tmp_path: Path) -> None:
    """With accumulation: its step is skipped as a whole, with the other micro-batch, which was finite.

    A scaler and every optimizer: tests/optimizers/test_long_runs.py.
    """
    good = token_rows(24)
    bad = [{key: value - value.min() for key, value in row.items()} for row in token_rows(4, seed=9)]
    mixed = [*good[: 4 * OVERFLOWS_AT], *bad[:2], *good[:2], *good[4 * OVERFLOWS_AT :]]
    settings = {"fp16": True, "use_cpu": device == "cpu", "gradient_accumulation_steps": 2}
    overflown = trainer_for(tmp_path, name, rows=mixed, max_steps=7, **settings)
    given = {"callbacks": [halve := HalveTheScale()]}
    clean = trainer_for(tmp_path, name, rows=good, max_steps=6, given=given, **settings)
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
@pytest.mark.parametrize("name", runs.TRAINED)
def test_resume_on_a_gpu_is_exact(name: str, bf16: bool, device: str, tmp_path: Path) -> None:
    settings = runs.settings_of(name, **{**SCHEDULE, "max_steps": 12})
    straight = runs.assert_resumes_to_the_bit(tmp_path, tiny_llama, use_cpu=False, bf16=bf16, **settings)
    assert {parameter.device.type for parameter in straight.model.parameters()} == {device}
    assert_same_end(straight, straight)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ldadam", "ldadam_layerwise"])
def test_a_compiled_model_trains_alike_and_resumes_in_either_way(name: str, tmp_path: Path, caplog: Any) -> None:
    """With the part of torch.compile that could matter: graphs forward and backward. Inductor would take minutes."""
    chosen = [f"model.layers.0.{part}.weight" for part in ("self_attn.q_proj", "mlp.down_proj")]
    settings = {"optim_target_modules": [r".*q_proj", r".*layers\.0\.mlp\.down_proj"], "save_strategy": "steps"}
    ways: dict[bool, dict[str, Any]] = {False: settings, True: {**settings, "torch_compile_backend": "aot_eager"}}
    trained: dict[bool, Trainer] = {}
    for compiled, way in ways.items():
        torch._dynamo.reset()
        counters.clear()
        trained[compiled] = trainer_for(tmp_path / str(compiled), name, model=one_layer(), save_steps=2, **way)
        trained[compiled].train()
        assert ("saves no memory for gradients" in caplog.text) == (compiled and name in runs.LAYERWISE)
        # one graph, and none again in a later step for a hook's sake
        assert counters["stats"].get("unique_graphs", 0) == compiled
        method = OPTIMIZERS[name].optimizer_class.method
        dense = {n: method.is_dense(g) for g in trained[compiled].optimizer.param_groups for n in g["param_names"]}
        assert dense == {n: n not in chosen for n, _ in one_layer().named_parameters()}
    assert_close_ends(trained[True], trained[False])
    for compiled, way in ways.items():
        resumed = trainer_for(tmp_path / "resumed", name, model=one_layer(), **way)
        resumed.train(resume_from_checkpoint=str(tmp_path / str(not compiled) / "checkpoint-2"))
        assert resumed.state.global_step == 4
        assert_close_ends(resumed, trained[False])


def one_layer() -> Any:
    """As compiling takes its time for each layer."""
    return tiny_llama(num_hidden_layers=1)


def assert_close_ends(left: Trainer, right: Trainer) -> None:
    """As near as two orders of summation are, compared to how far training went."""
    parameters = (each.parameters() for each in (left.model, right.model, one_layer()))
    for mine, theirs, start in zip(*parameters, strict=True):
        assert (mine - theirs).norm() <= 1e-3 * (theirs - start).norm()
    assert runs.logged(left, "loss") == pytest.approx(runs.logged(right, "loss"), rel=1e-5)
    assert runs.logged(left, "grad_norm") == pytest.approx(runs.logged(right, "grad_norm"), rel=1e-4)
    for each in (left, right):
        assert measure_state(each.optimizer).component_bytes == plan_optimizer(each.optimizer).component_bytes


@pytest.mark.parametrize("name", ["ldadam", "ldadam_layerwise", "microadam_layerwise"])
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


@pytest.mark.parametrize("name", runs.KINDS)
def test_after_training_nothing_of_ours_keeps_the_model(name: str, tmp_path: Path) -> None:
    """What accelerate remembers is cleared as a user would; the collector may run, for the Trainer has cycles."""
    given = {"callbacks": [callback := OptimizerStateMemoryCallback()]}
    trainer = trainer_for(tmp_path, name, given=given, save_strategy="steps")
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
    defaults = {"max_steps": STEPS, "per_device_train_batch_size": 8, "max_grad_norm": 0.0}
    settings = runs.settings_of(name, **{**defaults, **settings})
    trainer: Any = runs.make_trainer(folder, rows=64, trainer_class=Failing, auto_find_batch_size=True, **settings)
    trainer.where = where
    trainer.train()
    return trainer, trainer.batches


def updates(trainer: Trainer) -> dict[str, int]:
    optimizer = trainer.optimizer.optimizer
    return {name: optimizer.state[p]["step"] for name, p in trainer.model.named_parameters()}


@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize("name", runs.KINDS)
def test_training_begins_anew_with_a_smaller_batch(name: str, where: str, tmp_path: Path, caplog: Any) -> None:
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
def test_what_reached_an_error_stays_there(name: str, settings: Any, said: str, tmp_path: Path, caplog: Any) -> None:
    trainer, batches = run_failing(name, "backward", tmp_path, **settings)
    accumulated = settings.get("gradient_accumulation_steps", 1)
    assert trainer.state.global_step == STEPS
    assert len(batches) == accumulated * (BEFORE + STEPS) + 1
    assert set(updates(trainer).values()) == {BEFORE + STEPS}
    assert said in caplog.text
    losses = runs.logged(trainer, "loss")
    assert losses[-1] < losses[0]


IN_GRADIENT, IN_STATE = "rank=4,error_feedback=grad", "rank=4,error_feedback=param"


def small_run(folder: Path, optim: str = "ldadam", **settings: Any) -> Trainer:
    return trainer_for(folder, optim, **{"rows": 24, "max_steps": 6, "max_grad_norm": 0.0, **settings})


#: Two ways to the same run: the optimizer and what differs.
ALIKE: dict[str, list[tuple[str, dict[str, Any]]]] = {
    # a limit that scales nothing: without one older Trainers log no norm
    **{normal: [(normal, {"max_grad_norm": 1e9}), (f"{normal}_layerwise", {})] for normal in ("ldadam", "microadam")},
    "error in gradients": [("ldadam", {"optim_args": text}) for text in (IN_GRADIENT, IN_STATE)],
}


@pytest.mark.parametrize("settings", [{}, {"bf16": True}, {"gradient_checkpointing": True}], ids=str)
@pytest.mark.parametrize("case", ALIKE)
def test_acting_in_the_backward_pass_changes_no_bit(case: str, settings: dict[str, Any], tmp_path: Path) -> None:
    both = [small_run(tmp_path, optim, **differs, **settings) for optim, differs in ALIKE[case]]
    for trainer in both:
        trainer.train()
    runs.assert_same_parameters(*both)
    assert_same_state(*(trainer.optimizer.optimizer for trainer in both))
    assert runs.logged(both[0], "loss") == runs.logged(both[1], "loss")
    if case != "error in gradients":  # which are part of the norm there
        assert isinstance(both[1].optimizer.optimizer.peak_gradient_bytes, int)
        norms = runs.logged(both[1], "grad_norm")
        assert len(norms) == 6
        assert min(norms) > 0
        assert norms == pytest.approx(runs.logged(both[0], "grad_norm"), rel=1e-4)


def test_layerwise_accumulation_goes_through_the_error(tmp_path: Path) -> None:
    """With an exact error it is the normal mode's; the norm logged is that of the pieces."""
    exact: dict[str, Any] = {"optim_args": "rank=4,error_feedback=fp32", "gradient_accumulation_steps": 3}
    normal, layerwise = (small_run(tmp_path, optim, **exact) for optim in ("ldadam", "ldadam_layerwise"))
    start = runs.values(normal.model)
    for trainer in (normal, layerwise):
        trainer.train()
    theirs = runs.values(normal.model)
    for name, mine in runs.values(layerwise.model).items():
        assert (mine - theirs[name]).norm() <= 1e-4 * (theirs[name] - start[name]).norm()
    assert min(runs.logged(layerwise, "grad_norm")) > 0
    steps = [state["step"] for state in layerwise.optimizer.state.values()]
    assert steps == [6] * len(steps)


#: Settings, the optimizer, and what is said about them.
REFUSED: dict[str, tuple[dict[str, Any], str, str]] = {
    "global clipping": (
        {"max_grad_norm": 1.0},
        "ldadam_layerwise",
        r"max_grad_norm=1.0 .*Set max_grad_norm=0.*clip_tensor_norm=1.0.*optim='ldadam'",
    ),
    "fp16": ({"fp16": True}, "ldadam_layerwise", r"fp16=True .*bf16=True"),
    "accumulation without error": (
        {"gradient_accumulation_steps": 2, "optim_args": "rank=4,error_feedback=none"},
        "ldadam_layerwise",
        "error_feedback='none' cannot",
    ),
    "accumulation with clipping": (
        {"gradient_accumulation_steps": 2, "optim_args": "rank=4,clip_tensor_norm=1.0"},
        "ldadam_layerwise",
        "clip_tensor_norm=1.0 cannot",
    ),
    "fp16 with the error in gradients": (
        {"fp16": True, "optim_args": IN_GRADIENT},
        "ldadam",
        r"fp16=True .*error_feedback='grad'.*bf16=True.*error_feedback='4bit'",
    ),
}


@pytest.mark.parametrize("way", ["string", "factory", "object"])
@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_work_is_refused_before_the_first_gradient(case: str, way: str, tmp_path: Path) -> None:
    settings, optim, message = REFUSED[case]
    model = tiny_llama()
    given: dict[str, Any] = {}
    if way != "string":
        optimizer_class = get_entry(optim).optimizer_class
        hyper = hyperparameters_from_text(settings.get("optim_args", "rank=4"), optimizer_class)
        if way == "factory":
            given = {"optimizer_cls_and_kwargs": (OptimizerFactory(optim, **hyper), {})}
        else:
            given = {"optimizers": (optimizer_class(model.parameters(), **hyper), None)}
        settings = {**settings, "optim_args": None}
    trainer = small_run(tmp_path, optim, model=model, given=given, **settings)
    before = runs.values(model)
    with pytest.raises(ValueError, match=message):
        trainer.train()
    assert not runs.moved(model, before) and all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(("name", "in_gradients"), [("ldadam_layerwise", False), ("ldadam", True)])
def test_several_processes_are_refused(name: str, in_gradients: bool) -> None:
    args: Any = SimpleNamespace(fp16=False, world_size=2, max_grad_norm=0)
    with pytest.raises(ValueError, match="before the 2 processes have averaged it"):
        check_backward_arguments(args, get_entry(name).optimizer_class, error_in_gradients=in_gradients)
    check_backward_arguments(args, get_entry("ldadam").optimizer_class, error_in_gradients=False)


@pytest.mark.parametrize("way", ["factory", "object"])
def test_other_ways_into_the_trainer_are_served_too(way: str, tmp_path: Path) -> None:
    """A dense group may clip and accumulate: its gradients accumulate whole, those of compressed tensors do not."""
    model = tiny_llama()
    if way == "factory":
        factory = OptimizerFactory("ldadam_layerwise", rank=4, overrides={"lm_head": {"clip_tensor_norm": 1e-3}})
        given: dict[str, Any] = {"optimizer_cls_and_kwargs": (factory, {})}
    else:
        layerwise = get_entry("ldadam_layerwise").optimizer_class
        given = {"optimizers": (layerwise(model.parameters(), rank=4), None)}
    run = runs.make_trainer(tmp_path, model, given=given, gradient_accumulation_steps=2)
    run.train()
    assert run.state.global_step == 2 and min(runs.logged(run, "grad_norm")) > 0


def test_other_optimizers_do_not_notice(tmp_path: Path) -> None:
    both = [small_run(tmp_path, max_grad_norm=1e-3) for _ in range(2)]
    both[1].remove_callback(BackwardCallback)
    for trainer in both:
        trainer.train()
        assert min(runs.logged(trainer, "grad_norm")) > 1e-3  # as torch measured it, before clipping
    assert runs.logged(both[0], "grad_norm") == runs.logged(both[1], "grad_norm")
    assert len(runs.logged(both[0], "grad_norm")) == 6


def test_reporters_see_the_norm_and_the_report_the_gradients(tmp_path: Path) -> None:
    given = {"callbacks": [reporter := runs.Reporter(), OptimizerStateMemoryCallback()]}
    trainer = small_run(tmp_path, "ldadam_layerwise", given=given)
    trainer.train()
    norms = [logs["grad_norm"] for logs in reporter.seen if "grad_norm" in logs]
    assert norms == runs.logged(trainer, "grad_norm") and len(norms) == 6
    sizes = [p.nbytes for p in trainer.model.parameters()]
    report = load_report(tmp_path)
    assert report["gradients"] == {"peak_bytes": max(sizes), "all_bytes": sum(sizes)}
    assert "at once, of" in report_text(report)


def test_the_accounts_name_the_gradients_that_keep_errors(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    given = {"callbacks": [OptimizerStateMemoryCallback()]}
    trainer = small_run(tmp_path, optim_args=IN_GRADIENT, given=given, max_grad_norm=1.0, max_steps=2)
    trainer.train()
    optimizer = trainer.optimizer.optimizer
    shaped = [(p, g) for g in optimizer.param_groups for p in g["params"]]
    kept = sum(p.nbytes for p, g in shaped if optimizer.method.compresses(p.shape, g))
    assert kept > 0
    assert measure_state(optimizer) == plan_optimizer(optimizer)
    assert runs.logged(trainer, "optimizer_state/in_gradient_bytes")[0] == kept
    assert all("optimizer_state/error_bytes" not in entry for entry in trainer.state.log_history)
    report = load_report(tmp_path)
    assert report["measured"] == report["predicted"]
    assert report["measured"]["in_gradient_bytes"] == kept
    assert "of the gradients, which stayed in memory" in report_text(report)
    assert "not the predicted" not in caplog.text
    assert caplog.text.count("grad_norm is the norm of gradient plus error, and max_grad_norm=1.0 clips by it") == 1
