"""Result files survive a round trip; tables and pictures can be made of those that are there; a drift is found."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import render
from results import RESULTS, Run, describe_run, load_run, save_run


@pytest.fixture
def run() -> Run:
    row = {"shapes": "minilm", "dtype": "float32", "optimizer": "a"}
    rows = [{**row, "median_ms": 1.25, "peak_temporary_bytes": 2048}, {**row, "problem": "not installed"}]
    machine = {"processor": "P", "architecture": "x86_64", "cores": 2, "memory_gib": 4, "gpu": None, "system": "Linux"}
    software = {"versions": {"torch": "2"}, "commit": "abc", "environment": {}, "malloc": "default"}
    return Run("step_time", "python benchmarks/step_time.py", "2026-01-02", machine, software, {"threads": 2}, rows)


def test_a_run_is_read_as_it_was_written(run: Run, tmp_path: Path) -> None:
    save_run(run, tmp_path / "r.json")
    assert load_run(tmp_path / "r.json") == run
    csv = (tmp_path / "r.csv").read_text().splitlines()
    assert "# command: python benchmarks/step_time.py" in csv
    assert csv[-2:] == ["minilm,float32,a,1.25,2048,", "minilm,float32,a,,,not installed"]


def test_a_command_names_no_folder_of_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [str(tmp_path / "x.py"), "--seconds", "8", "--save", str(tmp_path / "r.json")])
    assert describe_run("x", {}).command == "python benchmarks/x.py --seconds 8 --save r.json"


@pytest.mark.parametrize("content", ["", "[]", '{"schema": "other"}', '{"schema": "hf-lowmem-optim/benchmark/1"}'])
def test_what_is_no_result_file_is_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / "r.json").write_text(content)
    with pytest.raises(ValueError, match=r"r\.json"):
        load_run(tmp_path / "r.json")


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*.json")), ids=lambda path: path.stem)
def test_every_result_file_can_be_printed_and_drawn_and_names_no_folder(path: Path, tmp_path: Path) -> None:
    run = load_run(path)
    assert run.command in render.report(run)
    for text in (path.read_text(), path.with_suffix(".csv").read_text()):
        assert not any(folder in text for folder in ("/work/", "/home/", "/root/", "/tmp/"))
    if run.benchmark in render.PLOTS:
        pytest.importorskip("matplotlib")
        render.PLOTS[run.benchmark](run, tmp_path / "picture.png")
        content = (tmp_path / "picture.png").read_bytes()
        # as wide as a laptop shows: width is the first number of the header chunk
        assert content.startswith(b"\x89PNG") and 1100 <= int.from_bytes(content[16:20], "big") <= 1300


def test_the_check_finds_a_changed_figure(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_run(run, tmp_path / "step_time.json")
    readme = tmp_path / "README.md"
    readme.write_text("<!-- test command -->\nx\n<!-- end -->\n<!-- table: step_time_minilm -->\n<!-- end -->\nafter\n")
    arguments = ["--pages", str(readme), "--results", str(tmp_path)]
    assert render.main([*arguments, "--check"]) == 1
    assert render.main(arguments) == 0 == render.main([*arguments, "--check"])
    written = readme.read_text()
    # what is not installed has no row, what no row has no column, and other marked parts stay as they are
    assert written.startswith("<!-- test command -->\nx\n<!-- end -->\n")
    assert "| a | 1.25 | 2 KiB |\n<!-- end -->\nafter" in written and "first step" not in written
    save_run(replace(run, rows=[{**run.rows[0], "median_ms": 1.35}]), tmp_path / "step_time.json")
    capsys.readouterr()
    assert render.main([*arguments, "--check"]) == 1 and readme.read_text() == written
    assert {"-| a | 1.25 | 2 KiB |", "+| a | 1.35 | 2 KiB |"} <= set(capsys.readouterr().out.splitlines())
    for text, message in (("| a |\n", "no '<!-- end"), ("<!-- end -->\n", "'none'")):
        with pytest.raises(ValueError, match=message):
            render.render_page(f"<!-- table: none -->\n{text}", tmp_path)
