"""The gate that keeps timings from a busy machine, on a clock of its own."""

from __future__ import annotations

import machine
import pytest


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """Time, and processor time of all and of this process, per second of sleep."""
    now = {"time": 0.0, "busy": 0.0, "own": 0.0, "others": 0.0, "ours": 0.0}

    def sleep(seconds: float) -> None:
        now["time"] += seconds
        now["own"] += seconds * now["ours"]
        now["busy"] += seconds * (now["ours"] + now["others"])
        if now["time"] >= now.get("quiet_from", float("inf")):
            now["others"] = 0.0

    for name in ("monotonic", "perf_counter"):
        monkeypatch.setattr(machine.time, name, lambda: now["time"])
    monkeypatch.setattr(machine.time, "process_time", lambda: now["own"])
    monkeypatch.setattr(machine.time, "sleep", sleep)
    monkeypatch.setattr(machine, "_busy_seconds", lambda: now["busy"])
    return now


def test_a_quiet_machine_is_measured_after_three_seconds_whatever_this_process_does(clock: dict[str, float]) -> None:
    clock["ours"] = 2.0
    assert machine.wait_until_quiet() == 0.0
    assert clock["time"] == 3.0


def test_it_waits_for_others_to_end(clock: dict[str, float], capsys: pytest.CaptureFixture[str]) -> None:
    clock |= {"others": 1.5, "quiet_from": 10.0}
    machine.wait_until_quiet(patience_s=60)
    assert clock["time"] == 13.0
    assert capsys.readouterr().out.count("which use 1.50 cores") == 1


def test_it_gives_up_with_the_reason(clock: dict[str, float]) -> None:
    clock["others"] = 0.5
    with pytest.raises(machine.BusyMachineError, match=r"use 0\.50 cores .*--ignore-load"):
        machine.wait_until_quiet(patience_s=20)


def test_what_a_figure_depends_on_is_described() -> None:
    described = machine.describe_software()
    assert described["versions"]["torch"] and described["malloc"]
    assert {"processor", "cores", "memory_gib", "gpu"} <= set(machine.describe_machine())
