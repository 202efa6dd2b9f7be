"""The picture of what ``convergence.py`` found: the grids of learning rates, and the loss curves at the chosen ones."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from convergence_results import ConvergenceRow, by_entry, read_rows
from results import Run

__all__ = ["plot_convergence"]

_DPI = 110
_WIDTH = 11.0  # inches
_PALETTE = (
    "#3f3f46",
    "#2f6db5",
    "#d0743c",
    "#2a9d8f",
    "#7a5195",
    "#86c06c",
    "#e0a030",
    "#b5493a",
    "#5aa0dc",
    "#8d93a0",
    "#3b5b92",
    "#c77fb0",
)
_SKIPPED = 0.2  # of a curve: its start dwarfs the rest


def plot_convergence(run: Run, path: Path) -> None:
    """Draw held-out loss over learning rate and training loss over steps, a colour per optimizer.

    Args:
        run: Rows of convergence.py, of one task.
        path: Where the picture goes; the suffix chooses the format.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: The runs are of several tasks, or none.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError("a plot needs matplotlib: pip install 'hf-lowmem-optim[plot]'") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = read_rows(run)
    tasks = {row.task for row in rows}
    if len(tasks) != 1:
        raise ValueError(f"a picture is of one task; there are runs of {', '.join(sorted(tasks)) or 'none'}")
    colors = dict(zip(dict.fromkeys(row.entry for row in rows), itertools.cycle(_PALETTE), strict=False))
    figure, (grid, curves) = pyplot.subplots(1, 2, figsize=(_WIDTH, 5.0), dpi=_DPI, layout="constrained")
    _draw_rates(grid, rows, colors)
    _draw_curves(curves, rows, colors)
    for axes in (grid, curves):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    handles, labels = grid.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=9, frameon=False)
    figure.suptitle(f"{tasks.pop()}: each optimizer at the best of its learning rates", fontsize=12)
    figure.savefig(path)
    pyplot.close(figure)


def _draw_rates(axes: Any, rows: Sequence[ConvergenceRow], colors: dict[str, str]) -> None:
    """Loss on the validation set over the rate; a run that diverged is left out."""
    tried = by_entry(rows, "validation")
    for entry, color in colors.items():
        points = sorted((lr, runs[0].held_out_loss) for (name, lr), runs in tried.items() if name == entry)
        axes.plot([lr for lr, _ in points], [loss for _, loss in points], "o-", color=color, label=entry, markersize=5)
    axes.set_xscale("log")
    axes.set_xlabel("learning rate (peak)")
    axes.set_ylabel("validation loss")
    axes.set_title("learning rate, chosen on the validation set", fontsize=10, loc="left")


def _draw_curves(axes: Any, rows: Sequence[ConvergenceRow], colors: dict[str, str]) -> None:
    """Mean training loss over the seeds of the report; the band is from the least to the greatest."""
    for (entry, _), runs in by_entry(rows, "test").items():
        curves = [row.curve for row in runs]
        points = min(map(len, curves))
        width = runs[0].steps / len(runs[0].curve)
        chosen = range(int(_SKIPPED * points), points)
        steps = [width * (i + 1) for i in chosen]
        mean, low, high = ([f(curve[i] for curve in curves) for i in chosen] for f in (statistics.fmean, min, max))
        axes.plot(steps, mean, color=colors[entry], linewidth=1.5)
        axes.fill_between(steps, low, high, color=colors[entry], alpha=0.12, linewidth=0)
    axes.set_xlabel("step")
    axes.set_ylabel("training loss (means of 10 steps)")
    axes.set_title("training loss at that rate, mean and range of the seeds", fontsize=10, loc="left")
