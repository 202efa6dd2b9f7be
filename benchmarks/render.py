"""Print and draw result files, and keep the figures of README and docs those of the files and of the commands.

    python benchmarks/render.py benchmarks/results/memory.json [--plot out.png]      # print (and draw) any result file
    python benchmarks/render.py             # write the pages' tables and plans anew; --check: exit status 1 and a diff
    python benchmarks/render.py --pictures  # draw the pages' pictures anew (docs/assets, extra plot)

A table of a page stands between ``<!-- table: NAME -->`` and ``<!-- end -->``. To add one: let the benchmark write
``benchmarks/results/FILE.json``, register how it is rendered in :data:`TABLES`, put the two lines into the page, run
this script. A block ``text`` that begins with ``$ hf-lowmem-optim plan …`` is what that command prints.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import io
import re
import shlex
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from communication import SHOWN
from communication import table as communication_table
from pictures import PLOTS, plot_losses, plot_parts
from results import RESULTS, Run, load_run
from summary import choice_table, fit_table, learning_rate_table, option_table
from tables import (
    convergence_report,
    format_rows,
    host_cost_rows,
    labelled,
    local_training_rows,
    memory_rows,
    nested_lora_rows,
    packing_rows,
    report,
    requirement_rows,
    step_time_rows,
    training_rows,
)

from hf_lowmem_optim import OPTIMIZERS, Options
from hf_lowmem_optim.__main__ import main as command_line
from hf_lowmem_optim.memory.table import optimizer_table

ROOT = Path(__file__).parent.parent
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))
ASSETS = ROOT / "docs" / "assets"
_MARKED = re.compile(r"^<!-- table: (?P<name>\S+) -->\n(?P<content>.*?)^<!-- end -->$", re.MULTILINE | re.DOTALL)
_MARKER = re.compile(r"^<!-- table: \S+ -->$", re.MULTILINE)
_PLAN = re.compile(r"^```text\n\$ hf-lowmem-optim (?P<command>plan .*)\n(?P<output>(?:.+\n|\n)+?)```$", re.MULTILINE)

#: How each table is rendered, and from which file.
TABLES: dict[str, tuple[Callable[[Run], str], str]] = {
    "requirements": (partial(labelled, requirement_rows), "requirements.json"),
    "formats": (lambda run: format_rows(run.rows), "formats.json"),
    "packings": (partial(labelled, packing_rows), "formats.json"),
    "host_cost": (partial(labelled, host_cost_rows), "host_cost.json"),
    "memory": (partial(labelled, memory_rows), "memory.json"),
    "local_training": (partial(labelled, local_training_rows), "local_training.json"),
    "memory_gpu": (partial(labelled, memory_rows), "memory_gpu.json"),
    "gpu_training": (partial(labelled, training_rows), "gpu_training.json"),
}
for _name in (
    *("pretrain", "finetune", "rows", "dash", "dash_finetune", "window", "window_finetune"),
    *("products", "products_finetune", "rows_finetune"),
):
    TABLES[f"convergence_{_name}"] = convergence_report, f"convergence_{_name}.json"
for _name in ("nested_lora", "nested_lora_price"):
    TABLES[_name] = partial(labelled, nested_lora_rows), f"{_name}.json"
for _name in ("minilm", "llama", "lora", "small"):
    TABLES[f"step_time_{_name}"] = partial(labelled, partial(step_time_rows, shapes=_name)), "step_time.json"
for _name in ("large", "llama", "minilm", "small"):
    TABLES[f"step_time_gpu_{_name}"] = partial(labelled, step_time_rows), f"step_time_gpu_{_name}.json"

#: Tables that are made from several files, or from none.
_MADE: dict[str, Callable[[Path], str]] = {
    "optimizers": lambda _: optimizer_table(),
    "choice": choice_table,
    "learning_rates": learning_rate_table,
    "fits": fit_table,
    "options": partial(option_table, Options),
    "communication": lambda _: communication_table(("llama-2-7b",), (8, 64), SHOWN),
}
for _entry in OPTIMIZERS.values():
    _MADE[f"options_{_entry.name}"] = partial(option_table, _entry.optimizer_class.method.options)


def render_table(name: str, results: Path = RESULTS) -> str:
    """Return a table of the pages; ValueError if there is none of that name."""
    if name in _MADE:
        return _MADE[name](results)
    if name not in TABLES:
        known = ", ".join([*_MADE, *TABLES])
        raise ValueError(f"a page marks the table {name!r}, which is not one of {known}")
    render, file = TABLES[name]
    return render(load_run(results / file)).strip()


def print_plan(command: str) -> str:
    """Return what ``hf-lowmem-optim plan …`` prints; where it refuses, the message."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        command_line(shlex.split(command))
    # what a library says as it is imported is not the command's
    return out.getvalue() or err.getvalue()[err.getvalue().find("hf-lowmem-optim plan:") :]


def render_page(text: str, results: Path = RESULTS) -> str:
    """Return a page with its tables and plans anew; ValueError if a marker has no table or no end."""
    if len(_MARKED.findall(text)) != len(_MARKER.findall(text)):
        raise ValueError("a '<!-- table: … -->' of the page has no '<!-- end -->' on a line of its own")
    text = _MARKED.sub(lambda m: f"<!-- table: {m['name']} -->\n{render_table(m['name'], results)}\n<!-- end -->", text)
    return _PLAN.sub(lambda m: f"```text\n$ hf-lowmem-optim {m['command']}\n{print_plan(m['command'])}```", text)


def draw_pictures(folder: Path = ASSETS, results: Path = RESULTS) -> None:
    """Draw the pictures that the pages show."""
    folder.mkdir(parents=True, exist_ok=True)
    plot_parts(folder / "memory.png")
    plot_losses(
        [load_run(results / f"convergence_{task}.json") for task in ("pretrain", "finetune")], folder / "loss.png"
    )
    for name in ("convergence_pretrain", "memory", "step_time"):
        run = load_run(results / f"{name}.json")
        PLOTS[run.benchmark](run, folder / f"{name}{'_measured' * (name == 'memory')}.png")


def main(argv: Sequence[str] | None = None) -> int:
    """Print and draw a file, or write or check the pages; the status is 1 if the check finds a difference."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, nargs="?", help="a result file to print")
    parser.add_argument("--plot", type=Path, metavar="PATH.png", help="draw the file (extra plot)")
    parser.add_argument("--pictures", action="store_true", help="draw the pages' pictures anew (extra plot)")
    parser.add_argument("--check", action="store_true", help="change nothing; exit status 1 if a page differs")
    parser.add_argument("--pages", type=Path, nargs="+", default=PAGES, help="README.md and docs")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the result files")
    arguments = parser.parse_args(argv)
    if arguments.file:
        run = load_run(arguments.file)
        print(report(run))
        if arguments.plot:
            PLOTS[run.benchmark](run, arguments.plot)
        return 0
    if arguments.pictures:
        draw_pictures(ASSETS, arguments.results)
        return 0
    differences: list[str] = []
    for page in arguments.pages:
        old = page.read_text()
        new = render_page(old, arguments.results)
        if not arguments.check:
            page.write_text(new)
        differences += difflib.unified_diff(old.splitlines(), new.splitlines(), page.name, "results", lineterm="")
    if not arguments.check:
        return 0
    print("\n".join(differences) or "the pages' figures are those of benchmarks/results and of the commands")
    return 1 if differences else 0


if __name__ == "__main__":
    sys.exit(main())
