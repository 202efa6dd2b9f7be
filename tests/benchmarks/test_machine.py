"""The gate that keeps timings from a busy machine, on a clock of its own."""

from __future__ import annotations

import machine
import pytest


def test_others_are_waited_for_whatever_this_process_does(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = {"time": 0.0, "busy": 0.0, "own": 0.0, "others": 1.5}

    def sleep(seconds: float) -> None:
        now["time"] += seconds
        now["own"] += 2.0 * seconds
        now["busy"] += seconds * (2.0 + now["others"] * (now["time"] < 10 or now["time"] > 50))

    for name in ("monotonic", "perf_counter"):
        monkeypatch.setattr(machine.time, name, lambda: now["time"])
    monkeypatch.setattr(machine.time, "process_time", lambda: now["own"])
    monkeypatch.setattr(machine.time, "sleep", sleep)
    monkeypatch.setattr(machine, "_busy_seconds", lambda: now["busy"])
    assert machine.wait_until_quiet(patience_s=60) == 0.0
    # quiet from second 10 on, and three quiet seconds are enough
    assert now["time"] == 12.0
    assert capsys.readouterr().out.count("which use 1.50 cores") == 1
    now["time"] = 60.0
    with pytest.raises(machine.BusyMachineError, match=r"use 1\.50 cores .*--ignore-load"):
        machine.wait_until_quiet(patience_s=20)
