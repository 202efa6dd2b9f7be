"""Stopping and going on in a new process gives, bit for bit, what an uninterrupted run gives."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils import _pytree as pytree
from transformers import Trainer, TrainingArguments

from hf_lowmem_optim import OPTIMIZERS
from tests.trainer.resume_worker import CASES, STEPS, STOP
from tests.trainer.tiny_models import tiny_llama, token_rows

REPOSITORY = Path(__file__).parents[2]
WORKER = "tests.trainer.resume_worker"


def run(command: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, *command], cwd=REPOSITORY, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All cases of all optimizers in two processes: starting transformers costs more than training."""
    root = tmp_path_factory.mktemp("plain")
    for phase in ("begin", "resume"):
        run(["-m", WORKER, phase, str(root), *CASES])
    return root


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One case of all optimizers under `accelerate launch` on one process."""
    root = tmp_path_factory.mktemp("launched")
    launch = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1", "--num_machines", "1"]
    for phase in ("begin", "resume"):
        run([*launch, "--mixed_precision", "no", "--dynamo_backend", "no", "-m", WORKER, phase, str(root), "fp32"])
    return root


def load(folder: Path, name: str) -> Any:
    return torch.load(folder / f"{name}.pt", weights_only=True)


def assert_equal_to_the_bit(left: Any, right: Any) -> None:
    """Same structure, same dtypes, same values."""
    (leaves, structure), (others, other_structure) = pytree.tree_flatten(left), pytree.tree_flatten(right)
    assert structure == other_structure
    for leaf, other in zip(leaves, others, strict=True):
        assert type(leaf) is type(other)
        if isinstance(leaf, torch.Tensor):
            assert leaf.dtype == other.dtype
            assert torch.equal(leaf, other)
        else:
            assert leaf == other


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
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_resume_in_a_new_process_is_exact(plain: Path, name: str, case: str) -> None:
    folder = plain / f"{name}-{case}"
    check_resume(folder)
    result = load(folder, "straight")
    if case != "defaults":
        assert set(result["measured"]) - {"dense"}
    if case.startswith("lora"):
        assert result["trainable"]
        saved = {parameter for parameter in result["trainable"] if "modules_to_save" in parameter}
        assert len(saved) == len((CASES[case].adapters or {}).get("modules_to_save", []))
        assert all("lora_" in parameter for parameter in set(result["trainable"]) - saved)
        groups = result["optimizer"]["param_groups"]
        assert {n for group in groups for n in group["param_names"]} == set(result["trainable"])
    if case == "bf16":
        assert {p.dtype for p in result["parameters"].values()} == {torch.bfloat16}


@pytest.mark.slow
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_resume_under_accelerate_launch_is_exact_and_the_same(launched: Path, plain: Path, name: str) -> None:
    check_resume(launched / f"{name}-fp32")
    result = load(launched / f"{name}-fp32", "straight")
    assert result["launched"]
    assert_equal_to_the_bit(result["parameters"], load(plain / f"{name}-fp32", "straight")["parameters"])


def trainer(folder: Path, optim: str, optim_args: str | None = None, **settings: Any) -> Trainer:
    args = TrainingArguments(
        str(folder),
        optim=optim,
        optim_args=optim_args,
        per_device_train_batch_size=2,
        save_steps=2,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        **settings,
    )
    return Trainer(tiny_llama(), args, train_dataset=token_rows(8))


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        (("ldadam", "rank=8"), ("ldadam", "rank=4"), "rank=8.*rank=4"),
        (("ldadam", None), ("ldadam", "error_feedback=none"), "error_feedback='4bit'.*error_feedback='none'"),
        (("adamw_torch", None), ("ldadam", None), "another optimizer"),
    ],
    ids=["another rank", "another error feedback", "another optimizer"],
)
def test_resume_with_what_cannot_fit_is_refused(
    first: tuple[str, str | None], second: tuple[str, str | None], message: str, tmp_path: Path
) -> None:
    trainer(tmp_path, *first, max_steps=2).train()
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, *second, max_steps=4).train(resume_from_checkpoint=True)
