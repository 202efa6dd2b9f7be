"""A plan as a table for the terminal, and as CSV."""

from __future__ import annotations

import csv
import io
import textwrap
from collections.abc import Iterator, Mapping, Sequence

from hf_lowmem_optim.memory.byte_sizes import format_bytes
from hf_lowmem_optim.memory.communication import fsdp_sent_bytes, traffic_text
from hf_lowmem_optim.memory.plan_types import NOT_COUNTED, MemoryPlan, OptimizerPlan

__all__ = ["align", "plan_csv", "plan_text"]


def align(rows: Sequence[Sequence[str]], *, left: int = 1) -> list[str]:
    """Return rows of cells as lines with aligned columns: the first ``left`` to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    styles = ["<" if column < left else ">" for column in range(len(widths))]
    padded = ([f"{c:{s}{w}}" for c, s, w in zip(row, styles, widths, strict=True)] for row in rows)
    return ["  ".join(cells).rstrip() for cells in padded]


def plan_text(plan: MemoryPlan) -> str:
    """Write a plan for people to read, also when it is piped: plain text, under 120 columns wide."""
    weights, processes = plan.weights, plan.processes
    share = f", per GPU of {processes.gpus} with {processes.sharding.upper()}" if processes.gpus > 1 else ""
    kinds = {"  weights": weights.weight_bytes, "  gradients": weights.gradient_bytes}
    lines = [
        f"{plan.source}: {weights.num_parameters:,} parameters, {weights.num_trainable:,} of them trained; "
        f"{plan.description}{share}",
        *align([(name, _size(sum(parts.values())), _parts(parts)) for name, parts in kinds.items()], left=3),
        "",
        *_optimizer_lines(plan),
        "",
        "B/param: state per trained parameter, and per parameter that is compressed. Step: what step() allocates and",
        "frees, at most (–: not known). Total: weights, gradients, state, step.",
        f"Not counted: {NOT_COUNTED}.",
    ]
    if plan.suggestions:
        rows = [("  fits" if s.fits else "  does not fit", _size(s.total_bytes), s.change) for s in plan.suggestions]
        lines += ["", "What to change for the budget:", *align(rows, left=3)]
    return "\n".join(lines)


def _optimizer_lines(plan: MemoryPlan) -> Iterator[str]:
    """Yield the table of optimizers, each of ours with its settings and components below it."""
    header = ["optimizer", "state", "B/param", "compressed", "step", "total"]
    if plan.budget_bytes is not None:
        header += [f"≤ {format_bytes(plan.budget_bytes)}", "largest that fits"]
    cells = [header, *(_cells(plan, row) for row in plan.optimizers)]
    aligned = align(cells)
    yield aligned[0]
    for line, row in zip(aligned[1:], plan.optimizers, strict=True):
        yield line
        if row.settings:
            yield from _indented(", ".join(f"{key}={value}" for key, value in row.settings.items()))
        if row.state is not None and row.registered:
            yield from _indented(_parts(row.state.component_bytes))
        if row.state is not None and (kept := row.state.in_gradient_bytes):
            yield f"    error: in {_size(kept)} of the gradients, which stay in memory between steps"
        if row.gradient_bytes is not None:
            yield f"    gradients: {_size(sum(row.gradient_bytes.values()))} at once, one tensor after the other"
        if row.traffic is not None:
            held, shards = plan.weights, plan.processes.num_shards
            own = fsdp_sent_bytes(sum(held.weight_bytes.values()), sum(held.gradient_bytes.values()), shards)
            yield from _indented(traffic_text(row.traffic, shards, own))
        if row.problem is not None:
            yield f"    cannot be used: {row.problem}"
        elif row.registered and row.compressed_bytes_per_parameter is None:
            yield "    compresses nothing at these settings: everything takes the dense rule"


def _indented(text: str) -> list[str]:
    """Return lines below an optimizer's own, no wider than a terminal of 120 columns."""
    return textwrap.wrap(text, 116, initial_indent="    ", subsequent_indent="      ", break_on_hyphens=False)


def _cells(plan: MemoryPlan, row: OptimizerPlan) -> list[str]:
    """Return one optimizer's line."""
    per_parameter = (row.bytes_per_parameter, row.compressed_bytes_per_parameter)
    cells = [
        row.name,
        _size(None if row.state is None else row.state.total_bytes),
        *("–" if value is None else f"{value:.3g}" for value in per_parameter),
        _size(row.temporary_bytes),
        _size(plan.total_bytes(row)),
    ]
    if plan.budget_bytes is not None:
        largest = " ".join(f"{key}={value}" for key, value in row.largest.items() if value)
        cells += ["yes" if plan.fits(row) else "no", largest or ("–" if not row.largest else "none")]
    return cells


def _size(count: int | None) -> str:
    return "–" if count is None else format_bytes(count)


def _parts(counts: Mapping[str, int]) -> str:
    """Return names with bytes, the largest first."""
    ordered = sorted(counts.items(), key=lambda item: -item[1])
    return ", ".join(f"{name} {format_bytes(count)}" for name, count in ordered)


def plan_csv(plan: MemoryPlan) -> str:
    """Write one line per optimizer, bytes as plain numbers, what is not known left empty."""
    content = plan.to_dict()
    before = ("name", "registered", "settings", "weight_bytes", "gradient_bytes")
    after = ("state_bytes", "temporary_bytes", "total_bytes", "bytes_per_parameter", "fits", "problem")
    text = io.StringIO()
    writer = csv.DictWriter(text, (*before, *after), extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for row in content["optimizers"]:
        row["settings"] = ",".join(f"{key}={value}" for key, value in row["settings"].items())
        row["weight_bytes"] = sum(content["weight_bytes"].values())
        row["gradient_bytes"] = sum(row["gradient_bytes"].values())
        writer.writerow(row)
    return text.getvalue()
