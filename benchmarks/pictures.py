"""Draw result files and plans: PNG files about 1200 pixels wide."""

from __future__ import annotations

import itertools
import statistics
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from results import Row, Run
from tables import by_entry

from hf_lowmem_optim import OPTIMIZERS, plan_memory

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


def _curves(runs: Sequence[Row]) -> list[list[float]]:
    """Return steps, and mean, least and largest training loss of the seeds there; the first steps are left out."""
    curves = [row["curve"] for row in runs]
    count = min(map(len, curves))
    chosen = range(int(_SKIPPED * count), count)
    steps = [runs[0]["steps"] / len(curves[0]) * (i + 1) for i in chosen]
    return [steps, *([f([curve[i] for curve in curves]) for i in chosen] for f in (statistics.fmean, min, max))]


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
        steps, mean, low, high = _curves(runs)
        right.plot(steps, mean, color=colors[entry], linewidth=1.5)
        right.fill_between(steps, low, high, color=colors[entry], alpha=0.12, linewidth=0)
    right.set(xlabel="step", ylabel="training loss (mean and range of the seeds)")
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=9, frameon=False)
    _save(figure, f"{run.settings['task']}: each optimizer at the best of its learning rates", path)


#: The optimizers of the picture of a whole step, with what the reader knows them by.
_SHOWN = {
    "adamw_torch_fused": "AdamW, the Trainer's default",
    "adamw_8bit": "8-bit AdamW (bitsandbytes)",
    "galore_adamw": "GaLore, rank 128",
    "ldadam": "LDAdam, rank 16",
    "ldadam_layerwise": "LDAdam layer-wise, rank 16",
}


def plot_parts(path: Path, model: str = "llama-3.1-8b") -> None:
    """Draw what a training step of a model holds, as planned: weights, gradients, state, and what step() allocates."""
    plan = plan_memory(model, list(_SHOWN)).to_dict()
    rows = {row["name"]: row for row in plan["optimizers"]}
    figure, grid = _subplots(3.6)
    axes = grid[0, 0]
    starts = dict.fromkeys(_SHOWN, 0.0)
    parts = {
        "weights": (_THEIRS, lambda row: sum(plan["weight_bytes"].values())),
        "gradients": ("#8d93a0", lambda row: sum(row["gradient_bytes"].values())),
        "optimizer state": (_OURS, lambda row: row["state_bytes"]),
        "allocated by step(), at most": ("#d0743c", lambda row: row["temporary_bytes"] or 0),
    }
    for label, (color, size) in parts.items():
        widths = [size(rows[name]) / 2**30 for name in _SHOWN]
        axes.barh(list(_SHOWN.values()), widths, 0.62, left=list(starts.values()), color=color, label=label)
        starts = {name: starts[name] + width for name, width in zip(_SHOWN, widths, strict=True)}
    for place, total in enumerate(starts.values()):
        _write(axes, f"{total:.1f}", total, place)
    axes.invert_yaxis()
    axes.set_xlabel("GiB, without activations")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=9, frameon=False)
    title = (
        f"Full fine-tuning of {model} in bfloat16: {plan['num_parameters'] / 1e9:.1f} billion parameters, all trained"
    )
    _save(figure, title, path)


_CURVES = {
    "adamw": "AdamW",
    "adamw_8bit": "8-bit AdamW",
    "galore:rank=16": "GaLore, rank 16",
    "ldadam:rank=16": "LDAdam, rank 16",
    "microadam": "MicroAdam",
}


_TASKS = {"pretrain": "From scratch: a Llama of 3.3 M parameters", "finetune": "Fine-tuning: MiniLM-L6 on film reviews"}
_SMOOTHED = 5  # points, each the mean of 10 steps


def _smooth(curve: Sequence[float]) -> list[float]:
    """Return the mean of each point and those before it."""
    return [statistics.fmean(curve[i : i + _SMOOTHED]) for i in range(len(curve) - _SMOOTHED + 1)]


def plot_losses(runs: Sequence[Run], path: Path) -> None:
    """Draw training loss over steps, a panel per run, each optimizer at the best of its rates."""
    figure, grid = _subplots(4.4, 1, len(runs))
    colors = dict(zip(_CURVES, (_DARK, "#8d93a0", "#d0743c", _OURS, "#2a9d8f"), strict=True))
    lines: dict[str, Any] = {}
    for axes, run in zip(grid.flat, runs, strict=True):
        for (entry, _), found in by_entry(run.rows, "test").items():
            if entry in _CURVES:
                steps, *values = _curves(found)
                mean, low, high = (_smooth(curve) for curve in values)
                steps = steps[-len(mean) :]
                (lines[_CURVES[entry]],) = axes.plot(steps, mean, color=colors[entry], linewidth=1.6)
                axes.fill_between(steps, low, high, color=colors[entry], alpha=0.1, linewidth=0)
        axes.set_title(_TASKS[run.settings["task"]], fontsize=10, loc="left")
        axes.set(xlabel="step", ylabel="training loss")
    shown = {name: lines[name] for name in _CURVES.values()}
    figure.legend(shown.values(), shown, loc="outside lower center", ncols=len(shown), fontsize=9, frameon=False)
    _save(
        figure,
        "Training loss, each optimizer at the best of its learning rates (50 steps' mean; range of three seeds)",
        path,
    )


PLOTS = {"step_time": plot_step_time, "memory": plot_memory, "convergence": plot_convergence}
