"""Interrupted runs go on where they were, but not on another machine; every kind of result can be drawn."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import plots
import pytest
from results import Run, describe_run, resume_run, save_run


def test_a_run_goes_on_with_the_rows_that_were_saved(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    began = replace(describe_run("scaling", {"seed": 0, "only": ["a"]}), command="python first", date="2026-01-02")
    assert resume_run(began, path) is began
    save_run(replace(began, rows=[{"sweep": "rank"}]), path)
    resumed = resume_run(describe_run("scaling", {"seed": 0, "only": ["a"]}), path)
    assert (resumed.rows, resumed.command, resumed.date) == ([{"sweep": "rank"}], "python first", "2026-01-02")
    for other in (replace(began, settings={"seed": 1}), replace(began, machine={**began.machine, "cores": 512})):
        with pytest.raises(SystemExit, match="another machine, version or setting"):
            resume_run(other, path)


STEP = {"shapes": "minilm", "dtype": "float32", "threads": 2, "median_ms": 2.0, "state_bytes_per_parameter": 8.0}
SWEEP = {"sweep": "rank", "title": "rank", "unit": "rank", "optimizer": "ldadam"}
MEMORY = {"peak_bytes": 2**28, "planned_weights_bytes": 2**27, "planned_state_bytes": 2**27}


@pytest.mark.parametrize(
    ("draw", "rows"),
    [
        (
            plots.plot_step_time,
            [
                {**STEP, "optimizer": "torch AdamW foreach", "ratio_to_foreach": 1.0},
                {**STEP, "optimizer": "ldadam rank=16", "ratio_to_foreach": 0.5, "ratio_to_foreach_p10": 0.4},
                {"shapes": "minilm", "dtype": "float32", "threads": 2, "optimizer": "x", "problem": "not installed"},
            ],
        ),
        (plots.plot_scaling, [{**SWEEP, "value": value, "ns_per_parameter": 1.0 + value} for value in (4, 8)]),
        (plots.plot_memory, [{**MEMORY, "optimizer": "ldadam"}, {"optimizer": "x", "problem": "not installed"}]),
    ],
)
def test_a_picture_is_as_wide_as_a_laptop_shows(
    draw: Callable[[Run, Path], None], rows: list[dict[str, Any]], tmp_path: Path
) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "picture.png"
    draw(replace(describe_run("step_time", {"dtype": "float32"}), rows=rows), path)
    content = path.read_bytes()
    assert content.startswith(b"\x89PNG")
    # width is the first number of the header chunk
    assert 1100 <= int.from_bytes(content[16:20], "big") <= 1300
