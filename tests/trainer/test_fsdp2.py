"""The Trainer with accelerate's FSDP2, and ``examples/fsdp2_full_finetuning.py``: train, save, resume."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.sharding.processes import GROUP_TIMEOUT, launch
from tests.trainer.fsdp2_jobs import IS_OLD_TORCH, RUNS

#: What is done, and by how many processes.
JOBS = [
    ("train", 2),
    ("resume", 2),
    ("resume", 1),
    ("killed", 2),
    ("resume_the_killed", 2),
    ("clip_each", 2),
    ("example", 2),
    ("resume_example", 1),
    ("count_bytes", 2),
    ("zero_redundancy", 2),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return where the jobs work."""
    return tmp_path_factory.mktemp("fsdp2")


@pytest.fixture(scope="module")
def results(folder: Path) -> dict[tuple[str, int], list[Any]]:
    """Return what each process of each job returned."""
    jobs = [(f"tests.trainer.fsdp2_jobs:{name}", world) for name, world in JOBS]
    return dict(zip(JOBS, launch(jobs, folder, timeout=600), strict=True))


def test_the_trainer_shards_and_resumes_on_any_number(results: Any) -> None:
    for found in results["train", 2]:
        assert found == {name: {4} for name in RUNS}
    for found in results["resume", 2]:
        assert found == dict.fromkeys(RUNS, (True, True, 0.0))
    (alone,) = results["resume", 1]
    for name, (begins, _, off) in alone.items():
        assert begins, name
        # gradients differ in rounding: in bfloat16, by up to 1/256
        assert off < (2e-2 if RUNS[name].dtype == torch.bfloat16 else 1e-3), name


def test_when_a_process_is_killed_the_others_end_and_the_checkpoint_resumes(results: Any) -> None:
    seconds, nothing = results["killed", 2]
    assert nothing is None and seconds < GROUP_TIMEOUT.total_seconds() + 10
    assert results["resume_the_killed", 2] == [True, True]


def test_a_tensor_is_clipped_by_the_norm_of_all_its_parts(results: Any) -> None:
    here, there = results["clip_each", 2]
    assert here == there


@pytest.mark.skipif(IS_OLD_TORCH, reason="FSDP2 over gloo adds the gradients of two processes up: pytorch 162338")
def test_the_example_runs_in_two_processes_and_one_process_goes_on(folder: Path, results: Any) -> None:
    """Losses and norms agree to rounding; each process tells what it holds, as planned."""
    (straight, other), (resumed,) = results["example", 2], results["resume_example", 1]
    assert other == ""
    assert "step 1 " not in resumed
    for text in (straight, resumed):
        sizes = re.findall(r"rank \d: weights (.*), optimizer state (.*) \(planned (.*)\)", text)
        assert len(sizes) == (2 if text is straight else 1)
        assert all(state == planned for _, state, planned in sizes)
    found = [re.findall(r"step 2  loss (.*)  gradient norm (.*)", text)[0] for text in (straight, resumed)]
    losses = [[float(number) for number in numbers] for numbers in found]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    assert (folder / "again" / "checkpoint-2" / ".metadata").is_file()


def test_a_step_sends_what_the_formulas_say(results: Any) -> None:
    """FSDP2's own bytes, and those of LDAdam in stages."""
    for fsdp, fsdp_formula, _, _ in results["count_bytes", 2]:
        assert fsdp == fsdp_formula > 0
    (_, _, here, total), (_, _, there, _) = results["count_bytes", 2]
    assert here + there == total > 0


def test_zero_redundancy_optimizer_trains_and_resumes_as_one_process_does(results: Any) -> None:
    assert results["zero_redundancy", 2] == [True, True]
