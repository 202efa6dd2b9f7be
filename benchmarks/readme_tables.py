"""The README's tables, rendered from result files: what stands there is what a command of this repository wrote.

    python benchmarks/readme_tables.py            # write them into README.md
    python benchmarks/readme_tables.py --check    # exit status 1 and a diff if they differ; CI runs this
    python benchmarks/readme_tables.py --list     # the tables there are, their files, whether the README has them

A table stands between two lines, of which everything in between is replaced:

    <!-- table: step_time_minilm -->
    …
    <!-- end -->

To add a table: let the benchmark write ``benchmarks/results/NAME.json`` (``results.describe_run`` makes a Run of this
process, ``dataclasses.replace(run, rows=[…])`` fills it, ``results.save_run`` writes JSON and CSV; commit both); write
a function that turns the Run into Markdown, for which ``markdown_table`` and ``labelled`` are there; register it in
``TABLES`` as ``"table_name": Table(render, "NAME.json")``; put the two marker lines into the README; run this script.
A renderer that takes several Runs names several files. One that takes none prints what a command prints.
Renderers live in tables.py and convergence_tables.py, where importing them costs nothing.
"""

from __future__ import annotations

import argparse
import difflib
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from convergence_tables import convergence_rates, convergence_report
from results import RESULTS, load_run
from tables import labelled, markdown_table, memory_table, requirements_table, scaling_table, step_time_table

from hf_lowmem_optim.memory.table import optimizer_table

__all__ = ["TABLES", "Table", "labelled", "markdown_table", "marked_tables", "render_readme"]

README = Path(__file__).parent.parent / "README.md"
_MARKED = re.compile(r"^<!-- table: (?P<name>\S+) -->\n(?P<content>.*?)^<!-- end -->$", re.MULTILINE | re.DOTALL)
_MARKER = re.compile(r"^<!-- table: \S+ -->$", re.MULTILINE)


class Table:
    """One table: the files that it is made from, and how.

    Args:
        render: Takes a Run per file and returns Markdown.
        *files: Names in ``benchmarks/results``.
    """

    def __init__(self, render: Callable[..., str], *files: str) -> None:
        self.render = render
        self.files = files

    def text(self, results: Path = RESULTS) -> str:
        """Render it.

        Raises:
            FileNotFoundError: A result file is missing.
            ValueError: A file is no result file, or has no rows for the table.
        """
        return self.render(*(load_run(results / name) for name in self.files)).strip()


def marked_tables(text: str) -> list[tuple[str, str]]:
    """Name and present content of the tables that a README marks.

    Raises:
        ValueError: A marker has no end.
    """
    found = _MARKED.findall(text)
    if len(found) != len(_MARKER.findall(text)):
        raise ValueError("a '<!-- table: … -->' of the README has no '<!-- end -->' on a line of its own")
    return found


def render_readme(text: str, tables: Mapping[str, Table], results: Path = RESULTS) -> str:
    """Return the README with every marked table rendered anew.

    Raises:
        FileNotFoundError: A marked table has no result file.
        ValueError: A marked table is not registered, or its marker has no end.
    """

    def rendered(match: re.Match[str]) -> str:
        name = match["name"]
        if name not in tables:
            raise ValueError(f"the README marks the table {name!r}, which is not one of {', '.join(tables)}")
        return f"<!-- table: {name} -->\n{tables[name].text(results)}\n<!-- end -->"

    marked_tables(text)
    return _MARKED.sub(rendered, text)


TABLES: dict[str, Table] = {
    "optimizers": Table(optimizer_table),
    "step_time_minilm": Table(step_time_table("minilm"), "step_time.json"),
    "step_time_llama": Table(step_time_table("llama"), "step_time.json"),
    "step_time_lora": Table(step_time_table("lora"), "step_time.json"),
    "step_time_matrix": Table(step_time_table("matrix"), "step_time.json"),
    "step_time_small": Table(step_time_table("small"), "step_time.json"),
    "step_time_gpu_minilm": Table(step_time_table("minilm"), "step_time_gpu.json"),
    "step_time_gpu_llama": Table(step_time_table("llama"), "step_time_gpu.json"),
    "step_time_gpu_large": Table(step_time_table("large"), "step_time_gpu.json"),
    "scaling": Table(scaling_table, "scaling.json"),
    "requirements": Table(requirements_table, "requirements.json"),
    "memory": Table(memory_table, "memory.json"),
    "memory_gpu": Table(memory_table, "memory_gpu.json"),
    "convergence_pretrain": Table(convergence_report, "convergence_pretrain.json"),
    "convergence_pretrain_rates": Table(convergence_rates, "convergence_pretrain.json"),
    "convergence_finetune": Table(convergence_report, "convergence_finetune.json"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Write, check or list; the exit status is 1 if the check finds a difference, 2 if something is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--check", action="store_true", help="change nothing; exit status 1 if a table differs")
    action.add_argument("--list", action="store_true", help="list the tables")
    parser.add_argument("--readme", type=Path, default=README)
    arguments = parser.parse_args(argv)
    old = arguments.readme.read_text()
    if arguments.list:
        marked = {name for name, _ in marked_tables(old)}
        for name, table in TABLES.items():
            source = " ".join(table.files) or "a command"
            print(f"{name:24} {source:24} {'in' if name in marked else 'not in'} the README")
        return 0
    try:
        new = render_readme(old, TABLES)
    except (FileNotFoundError, ValueError) as error:
        print(f"readme_tables: {error}", file=sys.stderr)
        return 2
    if not arguments.check:
        arguments.readme.write_text(new)
        return 0
    difference = difflib.unified_diff(old.splitlines(), new.splitlines(), "README.md", "from the results", lineterm="")
    lines = list(difference)
    print("\n".join(lines) or "the README's tables are those of benchmarks/results")
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
