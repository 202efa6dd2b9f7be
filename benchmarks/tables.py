"""Result files as Markdown: what the benchmarks print and the README shows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from results import Run

from hf_lowmem_optim.memory.units import format_bytes

__all__ = [
    "labelled",
    "markdown_table",
    "memory_rows",
    "memory_table",
    "requirement_rows",
    "requirements_table",
    "scaling_table",
    "step_time_rows",
    "step_time_table",
    "sweep_rows",
]

Row = Mapping[str, Any]


def markdown_table(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A Markdown table; None is a dash, a float has two decimals."""
    lines = [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    lines += [f"| {' | '.join(_cell(value) for value in row)} |" for row in rows]
    return "\n".join(lines)


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    return f"{value:.2f}" if isinstance(value, float) else str(value)


def labelled(run: Run, table: str) -> str:
    """A table of figures that depend on the machine, under what they were measured with and the command."""
    note = f" {run.note}" if run.note else ""
    return f"```bash\n{run.command}\n```\n\nMeasured on {run.label()}.{note}\n\n{table}"


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


def step_time_rows(rows: Sequence[Row]) -> str:
    """The step times of what could be measured; columns that no row has are left out."""
    rows = [row for row in rows if row.get("median_ms") is not None]
    columns = {title: key for title, key in _STEP_TIME.items() if any(row.get(key) is not None for row in rows)}
    return markdown_table(list(columns), [[_value(row, key) for key in columns.values()] for row in rows])


def step_time_table(shapes: str) -> Callable[[Run], str]:
    """The renderer of a shape set's step times."""

    def render(run: Run) -> str:
        rows = [row for row in run.rows if row["shapes"] == shapes]
        if not rows:
            raise ValueError(f"{run.benchmark}.json has no rows for the shapes {shapes!r}")
        return labelled(run, step_time_rows(rows))

    return render


def sweep_rows(rows: Sequence[Row]) -> str:
    """One sweep: a line per optimizer, a column per point, last how far the cost per parameter is from flat."""
    values = list(dict.fromkeys(row["value"] for row in rows))
    cells: list[list[Any]] = []
    for name in dict.fromkeys(row["optimizer"] for row in rows):
        found = {row["value"]: row["ns_per_parameter"] for row in rows if row["optimizer"] == name}
        cells.append([name, *(found.get(value) for value in values), max(found.values()) / min(found.values())])
    return markdown_table([f"ns per parameter, {rows[0]['unit']}:", *map(str, values), "largest / smallest"], cells)


def scaling_table(run: Run) -> str:
    """All sweeps, one below the other."""
    sweeps = dict.fromkeys(row["sweep"] for row in run.rows)
    return labelled(run, "\n\n".join(sweep_rows([row for row in run.rows if row["sweep"] == name]) for name in sweeps))


def requirement_rows(rows: Sequence[Row]) -> str:
    """Figure, limit, and whether it is met."""
    words = {True: "yes", False: "**no**", None: "–"}
    keys = ("requirement", "figure", "spread", "limit")
    cells = [[*(row[key] for key in keys), words[row["met"]]] for row in rows]
    return markdown_table(["requirement", "measured", "10–90%, or made from", "limit", "met"], cells)


def requirements_table(run: Run) -> str:
    """The requirements under what they were measured with."""
    return labelled(run, requirement_rows(run.rows))


_MEMORY = {
    "optimizer": "optimizer",
    "measured peak": "peak_bytes",
    "planned": "planned_bytes",
    "weights": "planned_weights_bytes",
    "gradients": "planned_gradients_bytes",
    "state": "planned_state_bytes",
    "step": "planned_step_bytes",
}


def memory_rows(rows: Sequence[Row]) -> str:
    """Measured and planned peaks and what the plan is made of, the smallest peak first."""
    measured = sorted((row for row in rows if row.get("peak_bytes") is not None), key=lambda row: row["peak_bytes"])
    cells = [
        [*(_value(row, key) for key in _MEMORY.values()), row["peak_bytes"] / row["planned_bytes"]] for row in measured
    ]
    return markdown_table([*_MEMORY, "measured / planned"], cells)


def memory_table(run: Run) -> str:
    """The peaks under what they were measured with."""
    return labelled(run, memory_rows(run.rows))


def _value(row: Row, key: str) -> Any:
    """A cell's value; bytes in the unit that is easy to read."""
    value = row.get(key)
    return format_bytes(value) if key.endswith("_bytes") and value is not None else value
