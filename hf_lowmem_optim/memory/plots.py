"""Pictures of plans and reports, sized for a laptop's screen: about 1200 pixels wide."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

from hf_lowmem_optim.memory.byte_sizes import format_bytes
from hf_lowmem_optim.memory.plan_types import MemoryPlan, OptimizerPlan

__all__ = ["COLORS", "plot_plan", "plot_report", "plot_runs"]

_DPI = 110
_WIDTH = 11.0  # inches
#: One for each part, the same in every picture.
COLORS = {"weights": "#b8bcc4", "gradients": "#8d93a0", "step temporaries": "#3f3f46"}
COLORS |= {"dense": "#e0a030", "dense statistics": "#f0cd86", "state of other optimizers": "#a89a84"}
COLORS |= {"error": "#8f2f22", "error codes": "#b5493a", "error statistics": "#e3988c"}
COLORS |= {"basis": "#2f6db5", "first_moment": "#5aa0dc", "second_moment": "#a9d0f2", "dct_basis": "#17406f"}
COLORS |= {"indices": "#2a9d8f", "values": "#86c06c", "rows": "#c7d59f", "gram": "#d0743c", "factors": "#5f6b3a"}
COLORS |= {"value grids": "#1d5c53"}
COLORS |= {"momentum": "#7a5195", "statistics": "#c58bd0", "roots": "#4b2a63", "triangles": "#e6c3ec"}
_PALETTE = ("#00bcd4", "#cddc39", "#ff80ab", "#80a8a0")  # of components that a method of somebody else names


def _pyplot() -> Any:
    """Load matplotlib without a window system, only where a picture is wanted."""
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError("a plot needs matplotlib: pip install 'hf-lowmem-optim[plot]'") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def plot_plan(plan: MemoryPlan, path: str | Path) -> None:
    """Draw a plan as one stacked bar per optimizer, the smallest on top; the path's suffix chooses the format.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: No optimizer of the plan can be used.
    """
    pyplot = _pyplot()
    rows = sorted((r for r in plan.optimizers if r.state is not None), key=lambda r: plan.total_bytes(r) or 0)
    if not rows:
        raise ValueError("there is nothing to plot: no optimizer of this plan can be used for the model")
    stacks = {_label(row): _stack(plan, row) for row in rows}
    figure, axes = pyplot.subplots(figsize=(_WIDTH, min(2.0 + 0.35 * len(rows), 8.0)), dpi=_DPI, layout="constrained")
    _draw_stacks(axes, stacks)
    if plan.budget_bytes is not None:
        unit = _unit(stacks.values())[0]
        axes.axvline(plan.budget_bytes / unit, color="black", linestyle="--", linewidth=1.2)
        _note(axes, f"budget {format_bytes(plan.budget_bytes)}", (plan.budget_bytes / unit, -0.5), (4, 3))
    per_gpu = f", per GPU of {plan.processes.gpus} ({plan.processes.sharding.upper()})" * (plan.processes.gpus > 1)
    figure.suptitle(f"{plan.source} ({plan.description}){per_gpu}: memory at optimizer.step()", fontsize=12)
    figure.savefig(path)
    pyplot.close(figure)


def plot_report(report: Mapping[str, Any], path: str | Path) -> None:
    """Draw what a report file holds: state by component, predicted and measured, and the curves of the run.

    Raises:
        ImportError: matplotlib is not installed.
    """
    pyplot = _pyplot()
    predicted, measured = report.get("predicted"), report["measured"]
    stacks = {} if predicted is None else {"predicted": predicted["component_bytes"]}
    stacks |= {
        "measured": measured["component_bytes"],
        "AdamW fp32": {"two float32 moments": report["adamw_fp32_bytes"]},
    }
    figure = pyplot.figure(figsize=(_WIDTH, 6.2), dpi=_DPI, layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=(1.0, 1.35))
    _draw_stacks(top.subplots(), stacks)
    loss, rate = bottom.subplots(1, 2)
    history = report["log_history"]
    _draw_curve(loss, history, {"loss": "training", "eval_loss": "evaluation"}, "loss")
    _draw_curve(rate, history, {"learning_rate": "learning rate"}, "learning rate")
    figure.suptitle(f"{report['optimizer']}: {report['num_parameters']:,} trained parameters", fontsize=12)
    figure.savefig(path)
    pyplot.close(figure)


def plot_runs(
    histories: Mapping[str, Sequence[Mapping[str, Any]]], stacks: Mapping[str, Mapping[str, int]], path: str | Path
) -> None:
    """Draw runs beside each other: their training losses, and the state of each by component.

    Args:
        histories: What each run logged, by the run's name.
        stacks: Bytes of state by component, by the run's name.
        path: The picture; its suffix chooses the format.

    Raises:
        ImportError: matplotlib is not installed.
    """
    pyplot = _pyplot()
    figure = pyplot.figure(figsize=(_WIDTH, 6.2), dpi=_DPI, layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=(1.35, 1.0))
    losses = [{"step": e.get("step"), name: e.get("loss")} for name, history in histories.items() for e in history]
    _draw_curve(top.subplots(), losses, {name: name for name in histories}, "training loss")
    _draw_stacks(bottom.subplots(), stacks)
    figure.savefig(path)
    pyplot.close(figure)


def _label(row: OptimizerPlan) -> str:
    """Return the name of a bar, with the setting that scales the state."""
    sizes = [f"{key} {row.settings[key]}" for key in ("rank", "window") if row.settings.get(key) is not None]
    return f"{row.name} ({', '.join(sizes)})" if sizes else row.name


def _stack(plan: MemoryPlan, row: OptimizerPlan) -> dict[str, int]:
    """Return the parts of one bar, from the axis outwards."""
    weights = plan.weights
    stack = {"weights": sum(weights.weight_bytes.values()), "gradients": sum(plan.gradient_bytes(row).values())}
    components = {} if row.state is None else dict(row.state.component_bytes)
    if not row.registered:
        # The keys of other optimizers' states would fill the legend and say little.
        components = {"state of other optimizers": sum(components.values())}
    return {**stack, **components, "step temporaries": row.temporary_bytes or 0}


def _unit(stacks: Iterable[Mapping[str, int]]) -> tuple[int, str]:
    """Return bytes and name of the unit in which the largest bar is easy to read."""
    largest = max(sum(stack.values()) for stack in stacks)
    units = ((1024**power, name) for power, name in ((4, "TiB"), (3, "GiB"), (2, "MiB"), (1, "KiB")))
    return next(((unit, name) for unit, name in units if largest >= 2 * unit), (1, "B"))


def _draw_stacks(axes: Any, stacks: Mapping[str, Mapping[str, int]]) -> None:
    """Draw horizontal stacked bars, the first on top, with totals at their ends and one legend."""
    unit, unit_name = _unit(stacks.values())
    found = dict.fromkeys(part for stack in stacks.values() for part, count in stack.items() if count)
    # what is freed again comes last, outside of what is kept
    parts = sorted(found, key=lambda part: part == "step temporaries")
    others = cycle(_PALETTE)
    starts = dict.fromkeys(stacks, 0)
    style = {"height": 0.68, "edgecolor": "white", "linewidth": 0.4}
    for part in parts:
        counts = {bar: stack.get(part, 0) for bar, stack in stacks.items()}
        color = COLORS.get(part) or next(others)
        widths, left = ([count / unit for count in each.values()] for each in (counts, starts))
        axes.barh(list(stacks), widths, left=left, color=color, label=part, **style)
        starts = {bar: start + counts[bar] for bar, start in starts.items()}
    # so that the budget's line does not cross it out
    box = {"facecolor": "white", "edgecolor": "none", "pad": 1}
    for bar, total in starts.items():
        _note(axes, format_bytes(total), (total / unit, bar), (5, 0), va="center", bbox=box)
    axes.invert_yaxis()
    axes.set_xlim(0, max(*starts.values(), 1) / unit * 1.1)
    axes.set_xlabel(unit_name)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize=9, frameon=False)


def _note(axes: Any, text: str, place: tuple[float, float | str], offset: tuple[int, int], **style: Any) -> None:
    """Write a text beside a place, ``offset`` points away."""
    axes.annotate(text, place, xytext=offset, textcoords="offset points", fontsize=9, **style)


def _draw_curve(axes: Any, history: Sequence[Mapping[str, Any]], keys: Mapping[str, str], title: str) -> None:
    """Draw logged values over the steps, a line per key that occurs."""
    pairs = {label: [(e.get("step"), e.get(key)) for e in history] for key, label in keys.items()}
    # NaN leaves a gap; text and numbers beyond every axis have no place
    lines = {
        label: [pair for pair in points if all(isinstance(x, (int, float)) and not abs(x) > 1e300 for x in pair)]
        for label, points in pairs.items()
    }
    drawn = {label: points for label, points in lines.items() if points}
    for label, points in drawn.items():
        axes.plot(*zip(*points, strict=True), marker="o", markersize=3 if len(points) > 40 else 5, label=label)
    axes.set_title(title, fontsize=11)
    axes.set_xlabel("step")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if not drawn:
        axes.text(0.5, 0.5, "nothing logged", ha="center", va="center", transform=axes.transAxes)
    if len(drawn) > 1:
        axes.legend(fontsize=9, frameon=False)
