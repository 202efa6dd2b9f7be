"""The README's tables are those of the files in benchmarks/results, and its plans those that the command prints."""

from __future__ import annotations

import re
import shlex

import pytest
import readme_tables
from results import RESULTS

from hf_lowmem_optim.__main__ import main

PLANS = dict(
    re.findall(r"^```text\n\$ hf-lowmem-optim (plan .*)\n((?:.+\n|\n)+?)```$", readme_tables.README.read_text(), re.M)
)


def test_no_table_of_the_readme_has_drifted_from_its_results() -> None:
    text = readme_tables.README.read_text()
    assert readme_tables.render_readme(text, readme_tables.TABLES) == text


def test_the_table_of_optimizers_and_the_step_times_are_checked() -> None:
    text = readme_tables.README.read_text()
    assert {"optimizers", "step_time_minilm"} <= {name for name, _ in readme_tables.marked_tables(text)}


def test_every_result_file_has_its_csv_and_names_no_folder_of_the_machine() -> None:
    for path in RESULTS.glob("*.json"):
        assert path.with_suffix(".csv").is_file()
        for text in (path.read_text(), path.with_suffix(".csv").read_text()):
            assert not any(folder in text for folder in ("/work/", "/home/", "/root/", "/tmp/"))


def test_the_plans_are_found() -> None:
    assert len(PLANS) == 3


@pytest.mark.slow
@pytest.mark.parametrize("command", PLANS)
def test_a_plan_in_the_readme_is_what_the_command_prints(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    status = main(shlex.split(command))
    out, err = capsys.readouterr()
    assert PLANS[command].strip() in (err if status else out)
