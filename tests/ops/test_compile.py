"""Every Triton launch compiles for every target: no spills, shared memory within the limit, vectorized global loads."""

from __future__ import annotations

import json

import pytest

from benchmarks.ahead_of_time import TARGETS
from tests.ops.backends import python

pytest.importorskip("triton")


@pytest.mark.slow
def test_every_launch_compiles_well_for_every_target() -> None:
    """From one process without the interpreter."""
    run = python("-m", "benchmarks.ahead_of_time", "--rotate", TRITON_INTERPRET=None)
    assert run.returncode == 0, run.stderr
    results = json.loads(run.stdout)
    assert {each["target"] for each in results} == set(TARGETS)
    assert [each for each in results if each["error"]] == []
    limits = {name: target.shared_per_program for name, target in TARGETS.items()}
    assert [each for each in results if each["spill_bytes"] or each["shared_bytes"] > limits[each["target"]]] == []
    assert [each for each in results if each["occupancy"] <= 0 or each["widest_load"] < each["required_load"]] == []
