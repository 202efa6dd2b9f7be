"""Sharded parameters, in several processes."""

from __future__ import annotations

from pathlib import Path

from tests.sharding.processes import launch

JOBS = "tests.sharding.jobs"


def test_all_processes_count_a_first_step_at_a_rate_of_zero_alike(tmp_path: Path) -> None:
    assert launch([(f"{JOBS}:steps_from_a_rate_of_zero", 2)], tmp_path) == [[[3], [3]]]


def test_every_optimizer_computes_what_one_process_does_and_resumes_on_any_number(tmp_path: Path) -> None:
    jobs = [("save", 2), ("resume", 1), ("resume", 2), ("resume", 4), ("resume_plain", 1)]
    results = launch([(f"{JOBS}:{name}", world) for name, world in jobs], tmp_path)
    cases = results[0][0]
    assert len(cases) >= 6 and all(each == cases for result in results for each in result)
