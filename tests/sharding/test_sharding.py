"""Sharded parameters, in several processes that share one start: what they do is in ``jobs.py``."""

from __future__ import annotations

from typing import Any

import pytest

from tests.sharding.processes import launch

#: What is done, and by how many processes.
JOBS = [
    ("save", 2),
    ("resume", 1),
    ("resume", 2),
    ("resume", 4),
    ("resume_plain", 1),
    ("steps_from_a_rate_of_zero", 2),
    ("refused", 1),
    ("fsdp2", 2),
    ("placements", 4),
    ("tensor_parallel", 4),
    ("traffic", 2),
]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, int], list[Any]]:
    """Return what each process of each job returned."""
    jobs = [(f"tests.sharding.jobs:{name}", world) for name, world in JOBS]
    return dict(zip(JOBS, launch(jobs, tmp_path_factory.mktemp("sharding"), timeout=300), strict=True))


def test_every_optimizer_computes_what_one_process_does_and_resumes_on_any_number(results: Any) -> None:
    cases = results["save", 2][0]
    assert len(cases) >= 9
    for job in JOBS:
        assert job[0] not in ("save", "resume", "resume_plain") or all(each == cases for each in results[job])


def test_all_processes_count_a_first_step_at_a_rate_of_zero_alike(results: Any) -> None:
    assert results["steps_from_a_rate_of_zero", 2] == [[3], [3]]


def test_placements_and_refusals(results: Any) -> None:
    for job in (("refused", 1), ("fsdp2", 2), ("placements", 4), ("tensor_parallel", 4)):
        assert results[job] == [job[1]] * job[1]


def test_a_step_sends_what_the_readme_says(results: Any) -> None:
    """The gradient once, weights and state twice, less the half that is at home; M-FAC one table of rows as well."""
    here, there = results["traffic", 2]
    for name in here:
        state, sent = (sum(each[name][index] for each in (here, there)) for index in (2, 1))
        weights, table = 3 * 64 * 96 * 4, 0
        if name == "sparse_mfac":
            # GG^T is on every process
            table, state = 3 * 4 * 8, state - 2 * 4 * 4 * 8
        assert here[name][0] == ({"all_to_all_single": 2, "all_reduce": 1} if table else {"all_to_all_single": 2})
        assert abs(sent - (3 * weights + 2 * state) // 2 - 2 * table) <= 8 * 2 * 3 * 8  # padding
        assert 0.49 < here[name][2] / (state + 2 * table) < 0.52
