"""Local updates in the Trainer, in two processes under DDP and in one: train, save, resume, refuse."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.local_updates.trainer_jobs import RUNS
from tests.sharding.processes import GROUP_TIMEOUT, launch

#: What is done, and by how many processes.
JOBS = [
    *(("train", 2), ("resume", 2), ("resume", 1), ("killed", 2), ("resume_the_killed", 2), ("refusals", 2)),
    ("run_example", 2),
    ("again", 2),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("local_updates")


@pytest.fixture(scope="module")
def results(folder: Path) -> dict[tuple[str, int], list[Any]]:
    """Return what each process of each job returned."""
    jobs = [(f"tests.local_updates.trainer_jobs:{name}", world) for name, world in JOBS]
    return dict(zip(JOBS, launch(jobs, folder, timeout=600), strict=True))


def test_workers_step_apart_and_are_equal_after_every_sync(results: Any) -> None:
    here, there = results["train", 2]
    for name in RUNS:
        every = 2 if name == "outer" else 4
        # the last step always, and with epochs of five steps where each ends
        synced = {t for t in range(1, 11) if t % every == 0} | {10} | ({5} if name == "epochs" else set())
        for t, weights in here[name]["weights"].items():
            # what an epoch's end syncs, the recorder does not see
            if (name, t) != ("epochs", 5):
                assert torch.equal(weights, there[name]["weights"][t]) == (t in synced), (name, t)
        numel, sent = here[name]["weights"][1].numel(), here[name]["sent"]
        moments = 0 if name == "own state" else 2 * len([t for t in synced if t % 4 == 0 or t in (5, 10)])
        if name != "lordo":
            assert sent == there[name]["sent"] == 4 * numel * (len(synced) + moments)
        # LoRDO's first basis is of the mean of all gradients
        assert (here[name]["logged"][0] == 0) == (name != "lordo") and here[name]["logged"][-1] == sent
        assert here[name]["outer"] == (8 * numel if "outer" in RUNS[name][0] else None)
        expected = [5, 10] if name == "epochs" else [4, 8, 10]
        assert here[name]["saved"] == sorted(f"checkpoint-{step}" for step in expected)


def test_runs_resume_to_the_bit_and_in_one_process(results: Any) -> None:
    for before, after in zip(results["train", 2], results["resume", 2], strict=True):
        for name, end in after.items():
            assert torch.equal(before[name]["weights"][10], end), name
    (alone,) = results["resume", 1]
    for name, end in alone.items():
        assert bool(end.isfinite().all()) and not torch.equal(end, results["train", 2][0][name]["weights"][10])


def test_when_a_worker_is_killed_the_others_end_and_the_last_sync_resumes(results: Any) -> None:
    seconds, nothing = results["killed", 2]
    assert nothing is None and seconds < GROUP_TIMEOUT.total_seconds() + 10
    for end, run in zip(results["resume_the_killed", 2], results["train", 2], strict=True):
        assert torch.equal(end, run["local adam"]["weights"][10])


def test_what_communicates_at_every_step_is_refused(results: Any) -> None:
    assert results["refusals", 2] == [None, None]


def test_a_second_train_syncs_where_it_saves(results: Any) -> None:
    here, there = results["again", 2]
    assert torch.equal(here[4], there[4]) and not torch.equal(here[2], there[2])


def test_the_example_runs(results: Any) -> None:
    main, other = results["run_example", 2]
    (sent, gradients) = re.findall(r"sent (.*) MB a step; gradients every step are (.*) MB", main)[0]
    # weights and both moments, every second step
    assert float(sent) == pytest.approx(1.5 * float(gradients), rel=1e-2) and "sent" not in other
