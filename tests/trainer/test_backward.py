"""Optimizers that act during the backward pass, in the Trainer: what it logs, accumulates, resumes and refuses."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import Trainer

from hf_lowmem_optim import OptimizerFactory, OptimizerStateMemoryCallback, measure_state, plan_optimizer
from hf_lowmem_optim.memory.report import load_report, report_text
from hf_lowmem_optim.registry import get_entry
from hf_lowmem_optim.trainer.backward import BackwardCallback, check_backward_arguments
from hf_lowmem_optim.trainer.optim_args import hyperparameters_from_text
from tests.optimizers.cases import assert_same_state
from tests.trainer.runs import Reporter, assert_same_parameters, logged, make_trainer, moved, values
from tests.trainer.tiny_models import tiny_llama

RATES = {"ldadam": 1e-2, "microadam": 1e-3}
SMALL = {"ldadam": "rank=4", "microadam": "min_compress_size=64,density=0.1"}
IN_GRADIENT, IN_STATE = "rank=4,error_feedback=grad", "rank=4,error_feedback=param"


def trainer_for(folder: Path, optim: str = "ldadam", *, model: Any = None, **settings: Any) -> Trainer:
    normal = optim.removesuffix("_layerwise")
    defaults = {"optim_args": SMALL[normal], "learning_rate": RATES[normal], "max_steps": 6, "warmup_steps": 2}
    return make_trainer(folder, model, rows=24, weight_decay=0.1, optim=optim, **{**defaults, **settings})


#: Two ways to the same run: the optimizer and what differs.
ALIKE: dict[str, list[tuple[str, dict[str, Any]]]] = {
    # a limit that scales nothing: without one older Trainers log no norm
    **{normal: [(normal, {"max_grad_norm": 1e9}), (f"{normal}_layerwise", {})] for normal in RATES},
    "error in gradients": [("ldadam", {"optim_args": text}) for text in (IN_GRADIENT, IN_STATE)],
}


@pytest.mark.parametrize("settings", [{}, {"bf16": True}, {"gradient_checkpointing": True}], ids=str)
@pytest.mark.parametrize("case", ALIKE)
def test_what_acts_in_the_backward_pass_is_the_normal_mode_to_the_bit(
    case: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    runs = [trainer_for(tmp_path, optim, **differs, **settings) for optim, differs in ALIKE[case]]
    for trainer in runs:
        trainer.train()
    assert_same_parameters(*runs)
    assert_same_state(*(trainer.optimizer.optimizer for trainer in runs))
    assert logged(runs[0], "loss") == logged(runs[1], "loss")
    if case != "error in gradients":  # which are part of the norm there
        assert isinstance(runs[1].optimizer.optimizer.peak_gradient_bytes, int)
        norms = logged(runs[1], "grad_norm")
        assert len(norms) == 6
        assert min(norms) > 0
        assert norms == pytest.approx(logged(runs[0], "grad_norm"), rel=1e-4)


def test_layerwise_accumulation_goes_through_the_error(tmp_path: Path) -> None:
    """With an exact error it is the normal mode's; the norm logged is that of the pieces."""
    exact: dict[str, Any] = {"optim_args": "rank=4,error_feedback=fp32", "gradient_accumulation_steps": 3}
    normal, layerwise = (trainer_for(tmp_path, optim, **exact) for optim in ("ldadam", "ldadam_layerwise"))
    start = values(normal.model)
    for trainer in (normal, layerwise):
        trainer.train()
    theirs = values(normal.model)
    for name, mine in values(layerwise.model).items():
        assert (mine - theirs[name]).norm() <= 1e-4 * (theirs[name] - start[name]).norm()
    assert min(logged(layerwise, "grad_norm")) > 0
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
    trainer = trainer_for(tmp_path, optim, model=model, given=given, **settings)
    before = values(model)
    with pytest.raises(ValueError, match=message):
        trainer.train()
    assert not moved(model, before) and all(p.grad is None for p in model.parameters())


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
    run = make_trainer(tmp_path, model, given=given, gradient_accumulation_steps=2)
    run.train()
    assert run.state.global_step == 2 and min(logged(run, "grad_norm")) > 0


def test_other_optimizers_do_not_notice(tmp_path: Path) -> None:
    runs = [trainer_for(tmp_path, max_grad_norm=1e-3) for _ in range(2)]
    runs[1].remove_callback(BackwardCallback)
    for trainer in runs:
        trainer.train()
        assert min(logged(trainer, "grad_norm")) > 1e-3  # as torch measured it, before clipping
    assert logged(runs[0], "grad_norm") == logged(runs[1], "grad_norm")
    assert len(logged(runs[0], "grad_norm")) == 6


def test_reporters_see_the_norm_and_the_report_the_gradients(tmp_path: Path) -> None:
    given = {"callbacks": [reporter := Reporter(), OptimizerStateMemoryCallback()]}
    trainer = trainer_for(tmp_path, "ldadam_layerwise", given=given)
    trainer.train()
    norms = [logs["grad_norm"] for logs in reporter.seen if "grad_norm" in logs]
    assert norms == logged(trainer, "grad_norm") and len(norms) == 6
    sizes = [p.nbytes for p in trainer.model.parameters()]
    report = load_report(tmp_path)
    assert report["gradients"] == {"peak_bytes": max(sizes), "all_bytes": sum(sizes)}
    assert "at once, of" in report_text(report)


def test_the_accounts_name_the_gradients_that_keep_errors(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    given = {"callbacks": [OptimizerStateMemoryCallback()]}
    trainer = trainer_for(tmp_path, optim_args=IN_GRADIENT, given=given, max_grad_norm=1.0, max_steps=2)
    trainer.train()
    optimizer = trainer.optimizer.optimizer
    shaped = [(p, g) for g in optimizer.param_groups for p in g["params"]]
    kept = sum(p.nbytes for p, g in shaped if optimizer.method.compresses(p.shape, g))
    assert kept > 0
    assert measure_state(optimizer) == plan_optimizer(optimizer)
    assert logged(trainer, "optimizer_state/in_gradient_bytes")[:2] == [kept, kept]
    assert all("optimizer_state/error_bytes" not in entry for entry in trainer.state.log_history)
    report = load_report(tmp_path)
    assert report["measured"] == report["predicted"]
    assert report["measured"]["in_gradient_bytes"] == kept
    assert "of the gradients, which stayed in memory" in report_text(report)
    assert "not the predicted" not in caplog.text
    assert caplog.text.count("grad_norm is the norm of gradient plus error, and max_grad_norm=1.0 clips by it") == 1
