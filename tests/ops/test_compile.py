"""Every Triton launch compiles for every target: no spills, shared memory within the limit, vectorized global loads."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.ops.ahead_of_time import TARGETS, Compiled

pytest.importorskip("triton")


@pytest.mark.slow
def test_every_launch_compiles_well_for_every_target() -> None:
    """The whole table, from one process without the interpreter."""
    run = subprocess.run(
        [sys.executable, "-m", "tests.ops.ahead_of_time"],
        cwd=Path(__file__).parents[2],
        env={name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    results = [Compiled(**result) for result in json.loads(run.stdout)]
    assert {each.target for each in results} == set(TARGETS)
    assert [(each.launch, each.target, each.error) for each in results if each.error] == []
    assert [(each.launch, each.target, each.spill_bytes) for each in results if each.spill_bytes] == []
    limits = {name: target.shared_per_program for name, target in TARGETS.items()}
    over = [each for each in results if each.shared_bytes > limits[each.target]]
    assert [(each.launch, each.target, each.shared_bytes) for each in over] == []
    assert all(each.occupancy > 0 for each in results)
    narrow = [each for each in results if each.widest_load < each.required_load]
    assert [(each.launch, each.target, each.widest_load) for each in narrow] == []
