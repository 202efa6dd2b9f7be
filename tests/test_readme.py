"""The README's tables are those that the benchmarks' results give, and its plans those that the command prints."""

from __future__ import annotations

import re
import shlex

import pytest
import render

from hf_lowmem_optim.__main__ import main

README = render.README.read_text()
PLANS = dict(re.findall(r"^```text\n\$ hf-lowmem-optim (plan .*)\n((?:.+\n|\n)+?)```$", README, re.M))


def test_the_tables_of_the_readme_are_what_the_command_prints() -> None:
    assert "<!-- table: optimizers -->" in README
    assert render.render_readme(README) == README


def test_the_plans_are_found() -> None:
    assert len(PLANS) == 3


@pytest.mark.slow
@pytest.mark.parametrize("command", PLANS)
def test_a_plan_in_the_readme_is_what_the_command_prints(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    main(shlex.split(command))
    assert PLANS[command].strip() in capsys.readouterr().out
