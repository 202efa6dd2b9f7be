"""Render result files as Markdown tables and pictures, and keep the README's tables those of the files.

    python benchmarks/render.py benchmarks/results/memory.json [--plot out.png]      # print (and draw) any result file
    python benchmarks/render.py            # write the README's tables anew; also --check (exit status 1 and a diff)

A table of the README stands between ``<!-- table: NAME -->`` and ``<!-- end -->``. To add one: let the benchmark write
``benchmarks/results/FILE.json``, register how it is rendered in :data:`TABLES`, put the two lines into the README, run
this script.
"""

from __future__ import annotations

import argparse
import difflib
import itertools
import re
import statistics
import sys
import textwrap
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from results import RESULTS, Row, Run, load_run

from hf_lowmem_optim import OPTIMIZERS
from hf_lowmem_optim.memory.table import optimizer_table

README = Path(__file__).parent.parent / "README.md"
_MARKED = re.compile(r"^<!-- table: (?P<name>\S+) -->\n(?P<content>.*?)^<!-- end -->$", re.MULTILINE | re.DOTALL)
_MARKER = re.compile(r"^<!-- table: \S+ -->$", re.MULTILINE)

# --- tables


def markdown_table(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Return a Markdown table; None is a dash, a float has two decimals."""
    lines = [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    lines += [f"| {' | '.join(_cell(value) for value in row)} |" for row in rows]
    return "\n".join(lines)


def _cell(value: Any) -> str:
    return "–" if value is None else f"{value:.2f}" if isinstance(value, float) else str(value)


def _value(row: Row, key: str) -> Any:
    """Return a cell's value; bytes with three digits and a binary unit."""
    value = row.get(key)
    if not key.endswith("_bytes") or value is None:
        return value
    power = max(0, value.bit_length() - 1) // 10
    size, unit = value / 1024**power, ("B", "KiB", "MiB", "GiB", "TiB")[power]
    return f"{size:.3g} {unit}" if size < 1000 else f"{size:.0f} {unit}"


_STEP_TIME = {
    "optimizer": "optimizer",
    "median ms": "median_ms",
    "10–90% ms": "spread_ms",
    "× foreach": "ratio_to_foreach",
    "× fused": "ratio_to_fused",
    "first step ms": "first_step_ms",
    "B/param": "state_bytes_per_parameter",
    "step allocates": "peak_temporary_bytes",
}


def step_time_rows(rows: Sequence[Row], shapes: str | None = None) -> str:
    """Return the step times of what could be measured on one set of shapes; columns that no row has are left out."""
    rows = [row for row in rows if shapes in (None, row["shapes"])]
    if not rows:
        raise ValueError(f"there are no rows for the shapes {shapes!r}")
    if len({(row["shapes"], row["dtype"], row.get("threads")) for row in rows}) > 1:
        raise ValueError("the rows are of several shapes, dtypes or numbers of threads; a table shows one")
    rows = [row for row in rows if row.get("median_ms") is not None]
    columns = {title: key for title, key in _STEP_TIME.items() if any(row.get(key) is not None for row in rows)}
    return markdown_table(list(columns), [[_value(row, key) for key in columns.values()] for row in rows])


def all_rows(rows: Sequence[Row]) -> str:
    """Return everything in a result's rows but loss curves, as it is."""
    columns = [key for key in dict.fromkeys(key for row in rows for key in row) if key != "curve"]
    return markdown_table(columns, [[_value(row, key) for key in columns] for row in rows])


def requirement_rows(rows: Sequence[Row]) -> str:
    """Return figure, limit, and whether it is met."""
    keys = ("requirement", "figure", "spread", "limit")
    words = {True: "yes", False: "**no**", None: "–"}
    cells = [[*(row[key] for key in keys), words[row["met"]]] for row in rows]
    return markdown_table(["requirement", "measured", "10–90%, or made from", "limit", "met"], cells)


_MEMORY = {"optimizer": "optimizer", "measured peak": "peak_bytes", "planned": "planned_bytes"}
_MEMORY |= {part: f"planned_{part}_bytes" for part in ("weights", "gradients", "state", "step")}


def memory_rows(rows: Sequence[Row]) -> str:
    """Return measured and planned peaks and what the plan is made of, the smallest peak first."""
    measured = sorted((row for row in rows if row.get("peak_bytes") is not None), key=lambda row: row["peak_bytes"])
    cells = []
    for row in measured:
        planned = row.get("planned_bytes")
        quotient = row["peak_bytes"] / planned if planned else None
        cells.append([*(_value(row, key) for key in _MEMORY.values()), quotient])
    return markdown_table([*_MEMORY, "measured / planned"], cells)


def by_entry(rows: Iterable[Row], held_out: str) -> dict[tuple[str, float], list[Row]]:
    """Return runs of convergence.py on one held-out set by entry and rate, both in the order of the file."""
    found: dict[tuple[str, float], list[Row]] = {}
    for row in rows:
        if row["held_out"] == held_out:
            found.setdefault((row["entry"], row["lr"]), []).append(row)
    return found


def _with_spread(values: Sequence[float], form: str = ".3f") -> str:
    """Return mean ± standard deviation between seeds."""
    spread = f" ± {statistics.stdev(values):{form}}".replace("+", "") if len(values) > 1 else ""
    return f"{statistics.mean(values):{form}}{spread}"


def convergence_rows(rows: Sequence[Row]) -> str:
    """Return each optimizer at its rate on the test set; "% to AdamW" is the mean of the ratios from the same seed."""
    tried, reported = by_entry(rows, "validation"), by_entry(rows, "test")
    baseline = {
        row["seed"]: row["held_out_loss"] for row in rows if (row["entry"], row["held_out"]) == ("adamw", "test")
    }
    lines: list[dict[str, Any]] = []
    for (entry, lr), runs in reported.items():
        rates = ", ".join(f"{rate:g}" for rate in sorted(rate for name, rate in tried if name == entry))
        paired = [100 * (r["held_out_loss"] / baseline[r["seed"]] - 1) for r in runs if r["seed"] in baseline]
        cells = {
            "optimizer": entry,
            "rate": f"{lr:g}",
            "tried": rates or None,
            "seeds": ", ".join(str(row["seed"]) for row in runs),
            "training loss": _with_spread([row["train_loss"] for row in runs]),
            "test loss": _with_spread([row["held_out_loss"] for row in runs]),
            "% to AdamW": _with_spread(paired, "+.1f") if paired and entry != "adamw" else None,
            "accuracy": _with_spread([row["accuracy"] for row in runs]),
            "B/param": runs[0]["state_bytes"] / runs[0]["parameters"],
            "s": f"{statistics.median(row['seconds'] for row in runs):.0f}",
        }
        lines.append(cells)
    return markdown_table(list(lines[0]), [list(cells.values()) for cells in lines])


def rate_rows(rows: Sequence[Row]) -> str:
    """Return the loss on the validation set, a line per optimizer and a column per rate, the best in bold."""
    tried = {key: runs[0]["held_out_loss"] for key, runs in by_entry(rows, "validation").items()}
    rates = sorted({rate for _, rate in tried})
    lines = []
    for entry in dict.fromkeys(name for name, _ in tried):
        best = min(loss for (name, _), loss in tried.items() if name == entry)
        losses = [tried.get((entry, rate)) for rate in rates]
        cells = [None if x is None else f"**{x:.3f}**" if x == best else f"{x:.3f}" for x in losses]
        lines.append([entry, *cells])
    return markdown_table(["validation loss at rate", *(f"{rate:g}" for rate in rates)], lines)


def labelled(rows: Callable[[Sequence[Row]], str], run: Run) -> str:
    """Return a table of figures that depend on the machine, under the command and what they were measured with."""
    note = f" {run.note}" if run.note else ""
    return f"```bash\n{run.command}\n```\n\nMeasured on {run.label()}.{note}\n\n{rows(run.rows)}"


def convergence_report(run: Run) -> str:
    """Return what each optimizer reached, under the circumstances."""
    note = (
        f"{run.settings['steps']} steps a run; mean ± standard deviation between seeds, % to AdamW from the same seed;"
    )
    return labelled(convergence_rows, replace(run, note=f"{note} s is wall time. {run.note}".strip()))


def report(run: Run) -> str:
    """Return every table of a result file."""
    if run.benchmark == "step_time":
        sets = dict.fromkeys(row["shapes"] for row in run.rows)
        return "\n\n".join(labelled(partial(step_time_rows, shapes=name), run) for name in sets)
    if run.benchmark == "convergence":
        return f"{convergence_report(run)}\n\n{rate_rows(run.rows)}"
    return labelled({"memory": memory_rows, "requirements": requirement_rows}.get(run.benchmark, all_rows), run)


# --- the README

#: How each table is rendered, and from which file.
TABLES: dict[str, tuple[Callable[[Run], str], str]] = {
    "requirements": (partial(labelled, requirement_rows), "requirements.json"),
    "memory": (partial(labelled, memory_rows), "memory.json"),
    "memory_gpu": (partial(labelled, memory_rows), "memory_gpu.json"),
    **{f"convergence_{task}": (convergence_report, f"convergence_{task}.json") for task in ("pretrain", "finetune")},
}
for _name in ("minilm", "llama", "lora", "small"):
    TABLES[f"step_time_{_name}"] = partial(labelled, partial(step_time_rows, shapes=_name)), "step_time.json"
for _name in ("large", "llama", "minilm"):
    TABLES[f"step_time_gpu_{_name}"] = partial(labelled, step_time_rows), f"step_time_gpu_{_name}.json"


def render_table(name: str, results: Path = RESULTS) -> str:
    """Return a table of the README; ValueError if there is none of that name."""
    if name == "optimizers":
        return optimizer_table()
    if name not in TABLES:
        raise ValueError(f"the README marks the table {name!r}, which is not one of optimizers, {', '.join(TABLES)}")
    render, file = TABLES[name]
    return render(load_run(results / file)).strip()


def render_readme(text: str, results: Path = RESULTS) -> str:
    """Return the README with every marked table rendered anew; ValueError if a marker has no table or no end."""
    if len(_MARKED.findall(text)) != len(_MARKER.findall(text)):
        raise ValueError("a '<!-- table: … -->' of the README has no '<!-- end -->' on a line of its own")
    return _MARKED.sub(lambda m: f"<!-- table: {m['name']} -->\n{render_table(m['name'], results)}\n<!-- end -->", text)


# --- pictures, about 1200 pixels wide

_OURS, _THEIRS, _DARK = "#2f6db5", "#b8bcc4", "#3f3f46"
_PALETTE = (_DARK, _OURS, "#d0743c", "#2a9d8f", "#7a5195", "#86c06c", "#e0a030", "#b5493a", "#5aa0dc", "#8d93a0")
_SKIPPED = 0.2  # of a loss curve: its start dwarfs the rest


def _subplots(height: float, rows: int = 1, columns: int = 1, **settings: Any) -> tuple[Any, Any]:
    """Return a figure and its axes, without a window system."""
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError("a plot needs matplotlib: pip install 'hf-lowmem-optim[plot]'") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    settings |= {"figsize": (11.0, height), "dpi": 110, "layout": "constrained", "squeeze": False}
    figure, axes = pyplot.subplots(rows, columns, **settings)
    for each in axes.flat:
        each.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _save(figure: Any, title: str, path: Path, below: str = "") -> None:
    figure.suptitle(title, fontsize=12)
    if below:
        figure.supxlabel("\n".join(textwrap.wrap(below, 170)), fontsize=7.5, color="#555555")
    figure.savefig(path)


def plot_step_time(run: Run, path: Path) -> None:
    """Draw the ratio to AdamW foreach as bars, per set of shapes, the fastest on top, with the bytes of state."""
    sets: dict[tuple[Any, ...], list[Row]] = {}
    for row in run.rows:
        if row.get("median_ms") is not None:
            sets.setdefault((row["shapes"], row["dtype"], row.get("threads")), []).append(row)
    heights = [2 + len(rows) for rows in sets.values()]
    figure, grid = _subplots(1.4 + 0.24 * sum(heights), len(sets), height_ratios=heights)
    for axes, (key, rows) in zip(grid.flat, sets.items(), strict=True):
        rows = sorted(rows, key=lambda row: row["ratio_to_foreach"])
        ratios = [row["ratio_to_foreach"] for row in rows]
        spreads = [
            [abs(row[f"ratio_to_foreach_{end}"] - row["ratio_to_foreach"]) for row in rows] for end in ("p10", "p90")
        ]
        colors = [_OURS if row["optimizer"].split()[0] in OPTIMIZERS else _THEIRS for row in rows]
        axes.barh([row["optimizer"] for row in rows], ratios, color=colors, xerr=spreads, ecolor=_DARK)
        for place, row in enumerate(rows):
            text = f"{row['ratio_to_foreach']:.2f} ×, {row['state_bytes_per_parameter']:.2f} B/param"
            _write(axes, text, row["ratio_to_foreach_p90"], place)
        axes.axvline(1.0, color="black", linewidth=0.8, linestyle="--")
        axes.set_xscale("log")
        axes.set_xlim(min(ratios) / 1.3, max(ratios) * 3.5)
        axes.invert_yaxis()
        axes.tick_params(axis="y", labelsize=8.5)
        axes.set_title(f"{key[0]}, {key[1]}, {key[2]} threads", fontsize=10, loc="left")
    grid[-1, 0].set_xlabel("time of step(), ratio to torch AdamW foreach (log scale; bars: median, lines: 10–90%)")
    _save(figure, "Time of optimizer.step() and bytes of state (blue: hf_lowmem_optim)", path, run.label())


def _write(axes: Any, text: str, end: float, place: float) -> None:
    """Write beside the end of a bar."""
    axes.annotate(text, (end, place), xytext=(5, 0), textcoords="offset points", va="center", fontsize=8)


def plot_memory(run: Run, path: Path) -> None:
    """Draw the measured peak of a training step beside what the planner predicts, one pair of bars per optimizer."""
    rows = sorted((r for r in run.rows if r.get("peak_bytes") is not None), key=lambda row: row["peak_bytes"])
    figure, grid = _subplots(1.8 + 0.55 * len(rows))
    axes = grid[0, 0]
    places = range(len(rows))
    starts = [0.0] * len(rows)
    peaks = [row["peak_bytes"] / 2**20 for row in rows]
    axes.barh([place - 0.2 for place in places], peaks, 0.36, color="#d0743c", label="measured peak")
    colors = {"weights": _THEIRS, "gradients": "#8d93a0", "state": "#5aa0dc", "step": _DARK}
    for part, color in colors.items():
        counts = [(row.get(f"planned_{part}_bytes") or 0) / 2**20 for row in rows]
        above = [place + 0.2 for place in places]
        axes.barh(above, counts, 0.36, left=starts, color=color, label=f"planned: {part}")
        starts = [start + count for start, count in zip(starts, counts, strict=True)]
    for place in places:
        _write(axes, f"{peaks[place]:.0f}", peaks[place], place - 0.2)
        _write(axes, f"{starts[place]:.0f}" if starts[place] else "not planned", starts[place], place + 0.2)
    axes.set_yticks(places, [row["optimizer"] for row in rows])
    axes.invert_yaxis()
    axes.set_xlabel("MiB above the process without model")
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize=9, frameon=False)
    _save(figure, f"Peak memory of a training step, {run.settings.get('model', '')}", path, run.label())


def plot_convergence(run: Run, path: Path) -> None:
    """Draw validation loss over learning rate, and the loss curves at the chosen rates, a colour per optimizer."""
    rows = run.rows
    colors = dict(zip(dict.fromkeys(row["entry"] for row in rows), itertools.cycle(_PALETTE), strict=False))
    figure, grid = _subplots(5.0, 1, 2)
    left, right = grid.flat
    tried = by_entry(rows, "validation")
    for entry, color in colors.items():
        points = sorted((lr, runs[0]["held_out_loss"]) for (name, lr), runs in tried.items() if name == entry)
        left.plot([x for x, _ in points], [y for _, y in points], "o-", color=color, label=entry, markersize=5)
    left.set_xscale("log")
    left.set(xlabel="learning rate (peak)", ylabel="validation loss")
    for (entry, _), runs in by_entry(rows, "test").items():
        curves = [row["curve"] for row in runs]
        count = min(map(len, curves))
        width = runs[0]["steps"] / len(curves[0])
        chosen = range(int(_SKIPPED * count), count)
        steps = [width * (i + 1) for i in chosen]
        mean, low, high = ([f([curve[i] for curve in curves]) for i in chosen] for f in (statistics.fmean, min, max))
        right.plot(steps, mean, color=colors[entry], linewidth=1.5)
        right.fill_between(steps, low, high, color=colors[entry], alpha=0.12, linewidth=0)
    right.set(xlabel="step", ylabel="training loss (mean and range of the seeds)")
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=9, frameon=False)
    _save(figure, f"{run.settings['task']}: each optimizer at the best of its learning rates", path)


PLOTS = {"step_time": plot_step_time, "memory": plot_memory, "convergence": plot_convergence}


def main(argv: Sequence[str] | None = None) -> int:
    """Print and draw a file, or write or check the README; the status is 1 if the check finds a difference."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, nargs="?", help="a result file to print")
    parser.add_argument("--plot", type=Path, metavar="PATH.png", help="draw the file (extra plot)")
    parser.add_argument("--check", action="store_true", help="change nothing; exit status 1 if a table differs")
    parser.add_argument("--readme", type=Path, default=README)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the result files")
    arguments = parser.parse_args(argv)
    if arguments.file:
        run = load_run(arguments.file)
        print(report(run))
        if arguments.plot:
            PLOTS[run.benchmark](run, arguments.plot)
        return 0
    old = arguments.readme.read_text()
    new = render_readme(old, arguments.results)
    if not arguments.check:
        arguments.readme.write_text(new)
        return 0
    lines = list(difflib.unified_diff(old.splitlines(), new.splitlines(), "README.md", "results", lineterm=""))
    print("\n".join(lines) or "the README's tables are those of benchmarks/results")
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
