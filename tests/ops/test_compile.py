"""Every Triton launch compiles for every target: no spills, shared memory within the limit, vectorized global loads.

And the main ones cost no more than what is recorded, in registers, shared memory, instructions, bytes and launches.
"""

from __future__ import annotations

import json

import pytest

from benchmarks.ahead_of_time import TARGETS, nvidia_tool
from benchmarks.kernel_report import RECORD, add_instructions, to_record, what_is_worse
from tests.ops.backends import python

triton = pytest.importorskip("triton")


@pytest.mark.slow
def test_every_launch_compiles_well_and_the_main_ones_no_worse_than_recorded() -> None:
    """From one process without the interpreter, where nothing is compiled twice, and one with it.

    What was recorded with another compiler does not compare; ``python benchmarks/kernel_report.py --record`` records.
    """
    run = python("-m", "benchmarks.ahead_of_time", "--rotate", TRITON_INTERPRET=None)
    assert run.returncode == 0, run.stderr
    results = json.loads(run.stdout)
    assert {each["target"] for each in results} == set(TARGETS)
    assert [each for each in results if each["error"]] == []
    limits = {name: target.shared_per_program for name, target in TARGETS.items()}
    assert [each for each in results if each["spill_bytes"] or each["shared_bytes"] > limits[each["target"]]] == []
    assert [each for each in results if each["occupancy"] <= 0 or each["widest_load"] < each["required_load"]] == []

    run = python("-m", "benchmarks.kernel_report", "--count", "--main", TRITON_INTERPRET="1")
    assert run.returncode == 0, run.stderr
    recorded, counted = json.loads(RECORD.read_text()), json.loads(run.stdout)
    add_instructions(results, counted)
    found = to_record(results, counted)
    assert what_is_worse(found["launches"], recorded["launches"]) == []
    if recorded["triton"] != triton.__version__:
        pytest.skip(f"kernels were recorded as Triton {recorded['triton']} compiles them")
    assert nvidia_tool("nvdisasm"), "triton has no nvdisasm"
    assert what_is_worse(found["kernels"], recorded["kernels"]) == []


def test_a_kernel_that_got_worse_is_told() -> None:
    """In any of its figures, by more than the slack, or not there at all."""
    recorded = json.loads(RECORD.read_text())["kernels"]
    assert what_is_worse(recorded, recorded) == []
    for figure in ("registers", "spill_bytes", "shared_bytes", "instructions"):
        assert what_is_worse([{**recorded[0], figure: recorded[0][figure] * 1.06 + 1}, *recorded[1:]], recorded)
    assert len(what_is_worse(recorded[1:], recorded)) == 1
