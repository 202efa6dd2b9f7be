"""Stopping and going on in a new process gives, bit for bit, what an uninterrupted run gives.

A process trains for 12 steps without a stop, and again for 6 with a checkpoint at the end, each optimizer of a case;
another one goes on from the checkpoints to step 12. Both write parameters and optimizer state to FOLDER/NAME/*.pt.
Under accelerate launch: test_launcher.py.
"""

from __future__ import annotations

import gc
import multiprocessing
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from hf_lowmem_optim import OptimizerFactory, OptimizerStateMemoryCallback, measure_state, plan_optimizer
from hf_lowmem_optim.memory.report import load_report
from tests.trainer import runs
from tests.trainer.tiny_models import tiny_llama, with_lora

STEPS = 12
CLIP_TENSOR_NORM = 0.02


@dataclass(frozen=True)
class Case:
    """One way to train: what differs from float32 with :data:`ARGUMENTS`."""

    dtype: torch.dtype = torch.float32
    adapters: dict[str, Any] | None = None
    """How the adapters differ from plain LoRA; None for no adapters."""
    settings: dict[str, Any] = field(default_factory=dict)
    optim_args: str | None = ""
    """What is added to :data:`ARGUMENTS`; None for neither."""
    factory: dict[str, Any] | None = None
    """What the factory gets that stands in place of the string."""
    names: Sequence[str] = tuple(runs.KINDS)


#: A dtype, an adapter or a setting is saved alike for all methods; tests/optimizers has all of them in each dtype.
CASES = {
    "fp32": Case(names=["ldadam"]),
    "fp32 of others": Case(names=[name for name in runs.TRAINED if name != "ldadam"]),
    "bf16": Case(torch.bfloat16),
    "autocast": Case(settings={"bf16": True}, names=["ldadam", "ldadam_layerwise"]),
    # Without accumulation, with which the layer-wise optimizers do not clip.
    "defaults": Case(settings={"gradient_accumulation_steps": 1}, optim_args=None),
    "error in gradients": Case(optim_args=",error_feedback=grad", names=["ldadam"]),
    "error in gradients bf16": Case(torch.bfloat16, optim_args=",error_feedback=grad", names=["ldadam"]),
    # The gradients of fresh adapters are small; they too shall be clipped.
    "lora": Case(adapters={}, settings={"max_grad_norm": 0.01}),
    "lora bf16": Case(torch.bfloat16, {}, {"max_grad_norm": 0.01}, names=["microadam", "sparse_mfac"]),
    # DoRA's magnitudes, and a head that peft trains and saves whole
    "lora autocast": Case(
        adapters={"use_dora": True, "use_rslora": True, "modules_to_save": ["lm_head"]},
        settings={"max_grad_norm": 0.01, "bf16": True},
        names=["ldadam", "ldadam_layerwise"],
    ),
    "lora with own settings": Case(
        adapters={"modules_to_save": ["lm_head"]},
        settings={"max_grad_norm": 0.01},
        factory={"lr_ratio": 4, "overrides": {"down_proj": {"rank": 5}, "lm_head": {"lr": 1e-3}}},
        names=["ldadam"],
    ),
}


def build_model(case: Case) -> nn.Module:
    model = tiny_llama().to(case.dtype)
    return model if case.adapters is None else with_lora(model, lora_dropout=0.1, **case.adapters)


def train(name: str, case: Case, folder: Path, *, stop: bool = False, resume: bool = False) -> None:
    """Train one case from the start or from its checkpoint, and write where it ended."""
    schedule = {"max_steps": STEPS, "lr_scheduler_type": "cosine", "warmup_steps": 3, "weight_decay": 0.1}
    settings = {"gradient_accumulation_steps": 2, "max_grad_norm": 0.5, **schedule, **case.settings}
    settings = {"learning_rate": runs.LEARNING_RATES.get(name, 1e-2), **settings}
    optim_args = None if case.optim_args is None else runs.ARGUMENTS[name] + case.optim_args
    clipped_at = settings["max_grad_norm"]
    if name in runs.LAYERWISE:
        settings["max_grad_norm"] = clipped_at = 0.0
        if settings["gradient_accumulation_steps"] == 1:
            optim_args = f"clip_tensor_norm={CLIP_TENSOR_NORM}"
            # A norm of all tensors beyond this is that of at least one which is clipped.
            clipped_at = CLIP_TENSOR_NORM * len(list(build_model(case).parameters())) ** 0.5
    model = build_model(case)
    given: dict[str, Any] = {"callbacks": [OptimizerStateMemoryCallback(), *([runs.StopAt()] if stop else [])]}
    if case.factory is not None:
        factory = OptimizerFactory(name, lr=settings["learning_rate"], weight_decay=0.1, rank=4, **case.factory)
        given["optimizer_cls_and_kwargs"] = (factory, {})
    trainer = runs.make_trainer(folder, model, rows=24, given=given, optim=name, optim_args=optim_args, **settings)
    trainer.train(resume_from_checkpoint=str(folder / f"checkpoint-{runs.STOP}") if resume else None)
    torch.save(
        {
            "initial": runs.values(build_model(case)),
            "parameters": dict(model.named_parameters()),
            "trainable": [n for n, p in model.named_parameters() if p.requires_grad],
            "optimizer": trainer.optimizer.state_dict(),
            "steps": trainer.state.global_step,
            "losses": runs.logged(trainer, "loss"),
            "grad_norms": runs.logged(trainer, "grad_norm"),
            "clipped_at": clipped_at,
            "planned": plan_optimizer(trainer.optimizer).component_bytes,
            "measured": measure_state(trainer.optimizer).component_bytes,
        },
        folder / ("stopped.pt" if stop else "resumed.pt" if resume else "straight.pt"),
    )


def run_phase(phase: str, root: str, key: str, names: Sequence[str]) -> None:
    """Train optimizers in one way: from the start, or from the checkpoint."""
    gc.freeze()  # as in conftest.py
    for name in names:
        folder = Path(root) / name
        folder.mkdir(parents=True, exist_ok=True)
        if phase == "begin":
            train(name, CASES[key], folder)
            train(name, CASES[key], folder, stop=True)
        else:
            train(name, CASES[key], folder, resume=True)


#: Seconds for one process, which takes a few: also on a machine that is much slower or busy.
LIMIT = 600


def in_new_process(phase: str, root: Path, case: str, names: Sequence[str]) -> None:
    """Run a phase in a fork of a process that has only imported what it needs, which takes longer than to train."""
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload([__name__])
    process = processes.Process(target=run_phase, args=(phase, str(root), case, names))
    process.start()
    process.join(LIMIT)
    if process.exitcode is None:
        process.kill()
    assert process.exitcode == 0, f"{phase} of {case}: exit code {process.exitcode}"


def load(folder: Path, name: str) -> Any:
    return torch.load(folder / f"{name}.pt", weights_only=True)


def check_resume(folder: Path) -> None:
    straight, stopped, resumed = (load(folder, name) for name in ("straight", "stopped", "resumed"))
    assert (straight["steps"], stopped["steps"], resumed["steps"]) == (STEPS, runs.STOP, STEPS)
    runs.assert_equal_to_the_bit(resumed["parameters"], straight["parameters"])
    runs.assert_equal_to_the_bit(resumed["optimizer"], straight["optimizer"])
    # The history is in the checkpoint, so the resumed one is whole; it was a real run: it clipped, and it learned.
    assert resumed["losses"] == straight["losses"]
    assert len(straight["losses"]) == STEPS
    assert max(straight["grad_norms"]) > straight["clipped_at"]
    assert straight["losses"][-1] < straight["losses"][0]
    # A fresh adapter's A has no gradient while B is zero: with the warm-up's first rate, 0, that is not an update.
    assert {state["step"] for state in straight["optimizer"]["state"].values()} <= {STEPS, STEPS - 1}
    assert straight["measured"] == resumed["measured"] == straight["planned"]
    # Exactly what is trainable moved, also between the checkpoint and the end.
    for before in (straight["initial"], stopped["parameters"]):
        moved = {n for n, p in straight["parameters"].items() if not torch.equal(p, before[n])}
        assert moved == set(straight["trainable"])


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_resume_in_a_new_process_is_exact(case: str, tmp_path: Path) -> None:
    for phase in ("begin", "resume"):
        in_new_process(phase, tmp_path, case, CASES[case].names)
    for name in CASES[case].names:
        check_resume(tmp_path / name)
        check_case(case, tmp_path / name)


def check_case(case: str, folder: Path) -> None:
    result = load(folder, "straight")
    if case != "defaults":
        assert set(result["measured"]) - {"dense"}
    assert result["trainable"]
    groups = result["optimizer"]["param_groups"]
    assert {n for group in groups for n in group["param_names"]} == set(result["trainable"])
    adapters = CASES[case].adapters
    if adapters is not None:
        saved = {parameter for parameter in result["trainable"] if "modules_to_save" in parameter}
        assert len(saved) == len(adapters.get("modules_to_save", []))
        assert all("lora_" in parameter for parameter in set(result["trainable"]) - saved)
    if case == "bf16":
        assert {p.dtype for p in result["parameters"].values()} == {torch.bfloat16}
    if case == "lora with own settings":
        assert {group["initial_lr"] for group in groups} == {1e-2, 4e-2, 1e-3}
        assert [group["description"] for group in load_report(folder)["groups"]] == [
            "compressed, weight_decay 0.1",  # A of q_proj
            "compressed, weight_decay 0.1, lr=0.04",
            "compressed, weight_decay 0.1, rank=5",
            "compressed, weight_decay 0.1, lr=0.04, rank=5",
            "dense, weight_decay 0.1, lr=0.001",
        ]


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        ("ldadam rank=8", "ldadam rank=4", "rank=8.*rank=4"),
        ("ldadam ", "ldadam error_feedback=none", "error_feedback='4bit'.*error_feedback='none'"),
        ("adamw_torch ", "ldadam ", "another optimizer"),
        ("ldadam rank=8", "ldadam rank=none", "groups of"),
    ],
)
def test_resume_with_what_cannot_fit_is_refused(first: str, second: str, message: str, tmp_path: Path) -> None:
    settings = [dict(zip(("optim", "optim_args"), text.split(" "), strict=True)) for text in (first, second)]
    runs.make_trainer(tmp_path, save_strategy="steps", save_steps=2, **settings[0]).train()
    with pytest.raises(ValueError, match=message):
        runs.make_trainer(tmp_path, max_steps=4, **settings[1]).train(resume_from_checkpoint=True)
