"""Sharded parameters, in several processes."""

from __future__ import annotations

from pathlib import Path

from tests.sharding.processes import launch

JOBS = "tests.sharding.jobs"


def test_all_processes_count_a_first_step_at_a_rate_of_zero_alike(tmp_path: Path) -> None:
    assert launch([(f"{JOBS}:steps_from_a_rate_of_zero", 2)], tmp_path) == [[[3], [3]]]
