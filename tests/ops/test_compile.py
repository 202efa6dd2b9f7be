"""Every Triton launch compiles for every target: no spills, shared memory within the limit, vectorized global loads."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.ops.ahead_of_time import TARGETS, Compiled

pytestmark = pytest.mark.slow
pytest.importorskip("triton")


@pytest.fixture(scope="module")
def compiled() -> list[Compiled]:
    """The whole table, from one process without the interpreter."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "-m", "tests.ops.ahead_of_time"],
        cwd=Path(__file__).parents[2],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    results = [Compiled(**result) for result in json.loads(run.stdout)]
    assert {result.target for result in results} == set(TARGETS)
    return results


def test_every_launch_compiles(compiled):
    assert [(result.launch, result.target, result.error) for result in compiled if result.error] == []


def test_no_spills(compiled):
    spilled = [result for result in compiled if result.spill_bytes]
    assert [(result.launch, result.target, result.spill_bytes) for result in spilled] == []


def test_shared_memory_fits(compiled):
    over = [result for result in compiled if result.shared_bytes > TARGETS[result.target].shared_per_program]
    assert [(result.launch, result.target, result.shared_bytes) for result in over] == []
    assert all(result.occupancy > 0 for result in compiled if not result.error)


def test_global_loads_are_vectorized(compiled):
    narrow = [result for result in compiled if result.widest_load < result.required_load]
    assert [(result.launch, result.target, result.widest_load) for result in narrow] == []
