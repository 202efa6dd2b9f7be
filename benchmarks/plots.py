"""Pictures of benchmark results, sized for a laptop's screen: about 1200 pixels wide."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

from results import Run

__all__ = ["plot_memory", "plot_scaling", "plot_step_time"]

_DPI = 110
_WIDTH = 11.0  # inches
_OURS, _THEIRS = "#2f6db5", "#b8bcc4"


def _pyplot() -> Any:
    """Matplotlib without a window system, loaded only where a picture is wanted."""
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError("a plot needs matplotlib: pip install 'hf-lowmem-optim[plot]'") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _save(figure: Any, run: Run, title: str, path: Path) -> None:
    """Put the title above and the circumstances below, and write the file."""
    figure.suptitle(title, fontsize=12)
    figure.supxlabel("\n".join(textwrap.wrap(run.label(), 170)), fontsize=7.5, color="#555555")
    figure.savefig(path)
    _pyplot().close(figure)


def _is_ours(name: str) -> bool:
    """Our optimizers are called by their strings."""
    from hf_lowmem_optim import OPTIMIZERS

    return name.split()[0] in OPTIMIZERS


def plot_step_time(run: Run, path: Path) -> None:
    """Draw, per set of shapes, the ratio to AdamW foreach as bars, the fastest on top, and the bytes of state as text.

    Args:
        run: Rows of step_time.py.
        path: Where the picture goes; the suffix chooses the format.
    """
    pyplot = _pyplot()
    keys = list(dict.fromkeys((row["shapes"], row["dtype"], row.get("threads")) for row in run.rows))
    sets = [
        [r for r in run.rows if (r["shapes"], r["dtype"], r.get("threads")) == key and r.get("median_ms") is not None]
        for key in keys
    ]
    height = 1.4 + sum(0.6 + 0.24 * len(rows) for rows in sets)
    figure, all_axes = pyplot.subplots(
        len(sets),
        1,
        figsize=(_WIDTH, height),
        dpi=_DPI,
        layout="constrained",
        squeeze=False,
        height_ratios=[2 + len(rows) for rows in sets],
    )
    for axes, key, rows in zip(all_axes[:, 0], keys, sets, strict=True):
        rows = sorted(rows, key=lambda row: row["ratio_to_foreach"])
        names = [row["optimizer"] for row in rows]
        ratios = [row["ratio_to_foreach"] for row in rows]
        # older files have no percentiles
        lows = [row.get("ratio_to_foreach_p10", row["ratio_to_foreach"]) for row in rows]
        highs = [row.get("ratio_to_foreach_p90", row["ratio_to_foreach"]) for row in rows]
        errors = [
            [max(0.0, middle - low) for middle, low in zip(ratios, lows, strict=True)],
            [max(0.0, high - middle) for middle, high in zip(ratios, highs, strict=True)],
        ]
        colors = [_OURS if _is_ours(name) else _THEIRS for name in names]
        axes.barh(names, ratios, color=colors, xerr=errors, ecolor="#3f3f46", error_kw={"elinewidth": 0.9})
        for name, row, high in zip(names, rows, highs, strict=True):
            text = f"{row['ratio_to_foreach']:.2f} ×, {row['state_bytes_per_parameter']:.2f} B/param"
            end = max(high, row["ratio_to_foreach"])
            axes.annotate(text, (end, name), xytext=(5, 0), textcoords="offset points", va="center", fontsize=8)
        axes.axvline(1.0, color="black", linewidth=0.8, linestyle="--")
        axes.set_xscale("log")
        axes.set_xlim(min(ratios) / 1.3, max(ratios) * 3.5)
        axes.invert_yaxis()
        axes.tick_params(axis="y", labelsize=8.5)
        shapes, dtype, threads = key
        axes.set_title(f"{shapes}, {dtype}, {threads} threads", fontsize=10, loc="left")
        axes.spines[["top", "right"]].set_visible(False)
    all_axes[-1, 0].set_xlabel("time of step(), ratio to torch AdamW foreach (log scale; bars: median, lines: 10–90%)")
    _save(figure, run, "Time of optimizer.step() and bytes of state (blue: hf_lowmem_optim)", path)


def plot_scaling(run: Run, path: Path) -> None:
    """Draw each sweep of scaling.py as lines, one per optimizer.

    Args:
        run: Rows of scaling.py.
        path: Where the picture goes.
    """
    pyplot = _pyplot()
    sweeps = list(dict.fromkeys(row["sweep"] for row in run.rows))
    columns = min(2, len(sweeps))
    lines = -(-len(sweeps) // columns)
    figure, grid = pyplot.subplots(
        lines, columns, figsize=(_WIDTH, 1.0 + 3.0 * lines), dpi=_DPI, layout="constrained", squeeze=False
    )
    for axes, sweep in zip(grid.flat, sweeps, strict=False):
        rows = [row for row in run.rows if row["sweep"] == sweep]
        for name in dict.fromkeys(row["optimizer"] for row in rows):
            points = sorted((row["value"], row["ns_per_parameter"]) for row in rows if row["optimizer"] == name)
            style = {} if _is_ours(name) else {"linestyle": "--", "color": "#8d93a0" if "fused" in name else "#3f3f46"}
            axes.plot(*zip(*points, strict=True), marker="o", markersize=4, label=name, **style)
        axes.set_title(rows[0]["title"], fontsize=10)
        axes.set_xlabel(rows[0]["unit"], fontsize=9)
        axes.set_ylabel("ns per parameter and step", fontsize=9)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(fontsize=8, frameon=False)
    for axes in list(grid.flat)[len(sweeps) :]:
        axes.set_visible(False)
    _save(figure, run, "What a step costs per parameter", path)


def plot_memory(run: Run, path: Path) -> None:
    """Draw the measured peak of a training step beside what the planner predicts, one pair of bars per optimizer.

    Args:
        run: Rows of memory.py.
        path: Where the picture goes.
    """
    pyplot = _pyplot()
    rows = sorted((r for r in run.rows if r.get("peak_bytes") is not None), key=lambda row: row["peak_bytes"])
    figure, axes = pyplot.subplots(figsize=(_WIDTH, 1.8 + 0.55 * len(rows)), dpi=_DPI, layout="constrained")
    parts = {"weights": "#b8bcc4", "gradients": "#8d93a0", "state": "#5aa0dc", "step": "#3f3f46"}
    unit = 2**20

    def write(count: float, place: float) -> None:
        end = {"xytext": (4, 0), "textcoords": "offset points", "va": "center", "fontsize": 8}
        axes.annotate(f"{count:.0f}", (count, place), **end)

    for place, row in enumerate(rows):
        measured = row["peak_bytes"] / unit
        axes.barh(place - 0.2, measured, 0.36, color="#d0743c", label="measured peak" if not place else None)
        write(measured, place - 0.2)
        start = 0.0
        for part, color in parts.items():
            count = (row.get(f"planned_{part}_bytes") or 0) / unit
            label = f"planned: {part}" if not place else None
            axes.barh(place + 0.2, count, 0.36, left=start, color=color, label=label)
            start += count
        write(start, place + 0.2)
    axes.set_yticks(range(len(rows)), [row["optimizer"] for row in rows])
    axes.invert_yaxis()
    axes.set_xlabel("MiB above the process without model")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize=9, frameon=False)
    _save(figure, run, f"Peak memory of a training step, {run.settings.get('model', '')}", path)
