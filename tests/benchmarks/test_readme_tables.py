"""Result files survive a round trip; a table that differs from its file, or has none, is found."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import readme_tables
from readme_tables import TABLES, Table, markdown_table, render_readme
from results import Run, load_run, save_run


@pytest.fixture
def run() -> Run:
    rows = [
        {"shapes": "minilm", "dtype": "float32", "optimizer": "a", "median_ms": 1.25, "peak_temporary_bytes": 2048},
        {"shapes": "minilm", "dtype": "float32", "optimizer": "b", "median_ms": None, "problem": "not installed"},
    ]
    machine = {"processor": "P", "architecture": "x86_64", "cores": 2, "memory_gib": 4, "gpu": None, "system": "Linux"}
    software = {"versions": {"torch": "2"}, "commit": "abc", "environment": {}, "malloc": "default"}
    return Run("step_time", "python benchmarks/step_time.py", "2026-01-02", machine, software, {"threads": 2}, rows)


def test_a_run_is_read_as_it_was_written(run: Run, tmp_path: Path) -> None:
    save_run(run, tmp_path / "r.json")
    assert load_run(tmp_path / "r.json") == run
    csv = (tmp_path / "r.csv").read_text().splitlines()
    assert "# malloc" not in csv and "# command: python benchmarks/step_time.py" in csv
    assert csv[-2:] == ["minilm,float32,a,1.25,2048,", "minilm,float32,b,,,not installed"]


def test_a_table_of_step_times_is_of_one_dtype(run: Run) -> None:
    render = TABLES["step_time_minilm"].render
    with pytest.raises(ValueError, match="several dtypes"):
        render(replace(run, rows=[*run.rows, {**run.rows[0], "dtype": "bfloat16"}]))
    with pytest.raises(ValueError, match="no rows for the shapes 'minilm'"):
        render(replace(run, rows=[{**run.rows[0], "shapes": "llama"}]))


@pytest.mark.parametrize("content", ["", "[]", '{"schema": "other"}', '{"schema": "hf-lowmem-optim/benchmark/1"}'])
def test_what_is_no_result_file_is_refused(content: str, tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"r\.json"):
        load_run(path)


def test_the_check_finds_a_changed_figure(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save_run(run, tmp_path / "step_time.json")
    monkeypatch.setattr(readme_tables, "render_readme", lambda text, tables: render_readme(text, tables, tmp_path))
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- table: step_time_minilm -->\n<!-- end -->\nafter\n")
    arguments = ["--readme", str(readme)]
    assert readme_tables.main([*arguments, "--check"]) == 1
    assert readme_tables.main(arguments) == 0
    written = readme.read_text()
    # what is not installed has no row, what no row has no column
    assert "| a | 1.25 | 2 KiB |\n<!-- end -->\nafter" in written
    assert "first step" not in written and "Measured on P (x86_64, 2 cores), torch 2, threads 2" in written
    assert readme_tables.main([*arguments, "--check"]) == 0
    changed = json.loads((tmp_path / "step_time.json").read_text())
    changed["rows"][0]["median_ms"] = 1.35
    (tmp_path / "step_time.json").write_text(json.dumps(changed))
    capsys.readouterr()
    assert readme_tables.main([*arguments, "--check"]) == 1
    assert readme.read_text() == written
    assert {"-| a | 1.25 | 2 KiB |", "+| a | 1.35 | 2 KiB |"} <= set(capsys.readouterr().out.splitlines())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<!-- table: none -->\n<!-- end -->\n", "'none'"),
        ("<!-- table: step_time_minilm -->\n| a |\n", "end"),
        ("<!-- table: optimizers -->\n\n<!-- table: step_time_minilm -->\n<!-- end -->\n", "end"),
    ],
)
def test_a_marker_without_table_or_end_is_an_error(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        render_readme(text, TABLES)


def test_a_table_without_its_file_is_an_error(tmp_path: Path) -> None:
    text = "<!-- table: step_time_minilm -->\n<!-- end -->\n"
    with pytest.raises(FileNotFoundError, match=r"step_time\.json"):
        render_readme(text, TABLES, tmp_path)
    # other marked parts of the README stay as they are
    other = "<!-- test command -->\n```bash\nx\n```\n<!-- end -->\n" + text
    assert render_readme(other, {"step_time_minilm": Table(lambda: "y")}) == other.replace(
        "-->\n<!-- end", "-->\ny\n<!-- end"
    )


def test_cells_of_a_markdown_table() -> None:
    assert markdown_table(["a", "b", "c"], [(1, 0.5, None)]) == "| a | b | c |\n|---|---|---|\n| 1 | 0.50 | – |"
