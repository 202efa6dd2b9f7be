"""The Trainer with accelerate's FSDP2 in two processes: train, save in full and in parts, resume."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.sharding.processes import GROUP_TIMEOUT, launch
from tests.trainer.fsdp2_jobs import RUNS

#: What is done, and by how many processes.
JOBS = [("train", 2), ("resume", 2), ("resume", 1), ("killed", 2), ("resume_the_killed", 2)]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, int], list[Any]]:
    """Return what each process of each job returned."""
    jobs = [(f"tests.trainer.fsdp2_jobs:{name}", world) for name, world in JOBS]
    return dict(zip(JOBS, launch(jobs, tmp_path_factory.mktemp("fsdp2"), timeout=300), strict=True))


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
