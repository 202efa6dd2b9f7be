"""Stopping and going on in a new process gives, bit for bit, what an uninterrupted run gives."""

from __future__ import annotations

import multiprocessing
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.trainer.resume_worker import CASES, STEPS, run_phase
from tests.trainer.runs import STOP, assert_equal_to_the_bit, make_trainer, run_python

WORKER = "tests.trainer.resume_worker"
#: Seconds for one process, which takes a few: also on a machine that is much slower or busy.
LIMIT = 600
LAUNCHED = ("ldadam", "sparse_mfac", "ldadam_layerwise")


@pytest.fixture(scope="module")
def fresh_processes() -> BaseContext:
    """Processes forked from one that has only imported what they need, which takes longer than to train."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([WORKER])
    return context


def run_phases(processes: BaseContext, root: Path, name: str, case: str) -> Path:
    """Train with a stop and without in one process, go on from the stop in another; return where it is written."""
    for phase in ("begin", "resume"):
        process = processes.Process(target=run_phase, args=(phase, str(root), name, case))  # type: ignore[attr-defined]
        process.start()
        process.join(LIMIT)
        if process.exitcode is None:
            process.kill()
        assert process.exitcode == 0, f"{phase} of {name}, {case}: exit code {process.exitcode}"
    return root / f"{name}-{case}"


def load(folder: Path, name: str) -> Any:
    return torch.load(folder / f"{name}.pt", weights_only=True)


def check_resume(folder: Path) -> None:
    straight, stopped, resumed = (load(folder, name) for name in ("straight", "stopped", "resumed"))
    assert (straight["steps"], stopped["steps"], resumed["steps"]) == (STEPS, STOP, STEPS)
    assert_equal_to_the_bit(resumed["parameters"], straight["parameters"])
    assert_equal_to_the_bit(resumed["optimizer"], straight["optimizer"])
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
@pytest.mark.parametrize(("name", "case"), [(name, key) for key, case in CASES.items() for name in case.names])
def test_resume_in_a_new_process_is_exact(name: str, case: str, fresh_processes: BaseContext, tmp_path: Path) -> None:
    folder = run_phases(fresh_processes, tmp_path, name, case)
    check_resume(folder)
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
        chosen = {(group["initial_lr"], group["rank"]) for group in groups}
        assert chosen == {(1e-2, 4), (4e-2, 4), (1e-2, 5), (4e-2, 5), (1e-3, None)}


@pytest.mark.slow
def test_resume_under_accelerate_launch_is_exact_and_the_same(fresh_processes: BaseContext, tmp_path: Path) -> None:
    launch = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1", "--num_machines", "1"]
    launch += ["--mixed_precision", "no", "--dynamo_backend", "no", "-m", WORKER]
    for phase in ("begin", "resume"):
        arguments = [phase, str(tmp_path / "launched"), "fp32", *LAUNCHED]
        done = run_python(*launch, *arguments, timeout=3 * LIMIT)
        assert done.returncode == 0, done.stderr[-4000:]
    for name in LAUNCHED:
        check_resume(tmp_path / "launched" / f"{name}-fp32")
        result = load(tmp_path / "launched" / f"{name}-fp32", "straight")
        assert result["launched"]
        plain = load(run_phases(fresh_processes, tmp_path, name, "fp32"), "straight")
        assert_equal_to_the_bit(result["parameters"], plain["parameters"])


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        (("ldadam", "rank=8"), ("ldadam", "rank=4"), "rank=8.*rank=4"),
        (("ldadam", None), ("ldadam", "error_feedback=none"), "error_feedback='4bit'.*error_feedback='none'"),
        (("adamw_torch", None), ("ldadam", None), "another optimizer"),
        (("ldadam", "rank=8"), ("ldadam", "rank=none"), "groups of"),
    ],
    ids=["another rank", "another error feedback", "another optimizer", "other groups"],
)
def test_resume_with_what_cannot_fit_is_refused(
    first: tuple[str, str | None], second: tuple[str, str | None], message: str, tmp_path: Path
) -> None:
    optim, optim_args = first
    make_trainer(tmp_path, optim=optim, optim_args=optim_args, save_strategy="steps", save_steps=2).train()
    optim, optim_args = second
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, optim=optim, optim_args=optim_args, max_steps=4).train(resume_from_checkpoint=True)
