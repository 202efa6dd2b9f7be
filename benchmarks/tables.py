"""Turn the rows of result files into Markdown tables; render.py puts them into README and docs."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from results import Row, Run


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
    "host ms": "host_ms",
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


def gpu_ratio_rows(rows: Sequence[Row]) -> str:
    """Return each optimizer's times over fused AdamW's by shapes, and how many milliseconds the host took."""
    shapes = list(dict.fromkeys(row["shapes"] for row in rows))
    of = {(row["optimizer"], row["shapes"]): row for row in rows}
    keys = {"× fused": "ratio_to_fused", "host ms": "host_ms"}
    cells = [
        [name, *(_value(of.get((name, each), {}), key) for each in shapes for key in keys.values())]
        for name in dict.fromkeys(row["optimizer"] for row in rows if row.get("median_ms") is not None)
    ]
    return markdown_table(["optimizer", *(f"{each} {title}" for each in shapes for title in keys)], cells)


def training_rows(rows: Sequence[Row]) -> str:
    """Return what each training run reached, how long a step took, and the state's bytes."""
    columns = ["optimizer", "rate", "held-out loss", "training loss", "ms a step", "B/param"]
    cells = []
    for row in rows:
        losses = [f"{row[key]:.4f}" for key in ("held_out_loss", "train_loss")]
        per_parameter = row["state_bytes"] / row["parameters"]
        cells.append([row["entry"], f"{row['lr']:g}", *losses, row["ms_per_step"], per_parameter])
    return markdown_table(columns, cells)


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


def format_rows(rows: Sequence[Row]) -> str:
    """Return bits and errors of storage formats, by the numbers that they store."""
    columns = ["numbers", "format", "stored bits", "GMSE", "effective bits", "effective / stored"]
    cells = [
        [
            row["numbers"],
            row["format"],
            row["stored_bits"],
            f"{row['gmse']:.1e}",
            row["effective_bits"],
            row["efficiency"],
        ]
        for row in rows
        if row["table"] == "values"
    ]
    return markdown_table(columns, cells)


def packing_rows(rows: Sequence[Row]) -> str:
    """Return bytes and times of a window's indices with codes of 4 bits."""
    columns = {"packing": "packing", "bytes an entry": "bytes_per_entry", "bits an index": "bits_per_index"}
    columns |= {"pack, ns an entry": "pack_ns", "unpack, ns an entry": "unpack_ns"}
    columns |= {"MicroAdam, bytes a parameter": "microadam_bytes_per_parameter"}
    rows = [row for row in rows if row["table"] == "indices"]
    return markdown_table(list(columns), [[row[key] for key in columns.values()] for row in rows])


def host_cost_rows(rows: Sequence[Row]) -> str:
    """Return what a step costs the host for each tensor, and beside torch's fused AdamW."""
    columns = [key for key in rows[0] if key != "optimizer"]
    cells = [[row["optimizer"], *[f"{row[key]:.1f}" for key in columns]] for row in rows]
    return markdown_table(["optimizer", *[key.replace("us", "µs a tensor") for key in columns]], cells)


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


def nested_lora_rows(rows: Sequence[Row]) -> str:
    """Return test losses by rank, means over seeds, and their AURAC with its spread."""
    ranks = [key for key in rows[0] if key.startswith("rank_")]
    lines = []
    for (entry, lr), runs in by_entry(rows, "test").items():
        means = [f"{statistics.mean(row[key] for row in runs):.3f}" for key in ranks]
        lines.append([entry, f"{lr:g}" if lr else None, *means, _with_spread([row["held_out_loss"] for row in runs])])
    return markdown_table(["mode:rule", "rate", *(key.replace("_", " ") for key in ranks), "AURAC"], lines)


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


#: Of the budget in a column of the table of local training.
_SENT_BYTES = 8 << 20


def local_training_rows(rows: Sequence[Row]) -> str:
    """Return each entry at the rate that was best on the validation set: losses by tokens and by bytes sent."""
    best: dict[str, Row] = {}
    for row in rows:
        if row["validation_loss"] < best.get(row["entry"], {"validation_loss": math.inf})["validation_loss"]:
            best[row["entry"]] = row
    names = {"ddp": "{0} under DDP", "local": "local AdamW, K = {0}", "lordo": "LoRDO, K = {0}, ω = {1}"}
    cells = []
    for entry, row in sorted(best.items(), key=lambda item: [f"{part:0>4}" for part in item[0].split(":")]):
        kind, *rest = entry.split(":")
        curve, rates = row["curve"], [each["lr"] for each in rows if each["entry"] == entry]
        name = names[kind].format(*({"adamw": "AdamW", "ldadam": "LDAdam"}.get(part, part) for part in rest))
        quarter, half, place = len(curve) // 4, len(curve) // 2, int(len(curve) * _SENT_BYTES / row["sent_bytes"])
        at_budget = curve[min(place, len(curve) - 1)]
        bracketed = min(rates) < row["lr"] < max(rates)
        cells.append([name, f"{row['lr']:g}" + " (edge)" * (not bracketed), row["test_loss"]])
        cells[-1] += [curve[quarter - 1], curve[half - 1], curve[-1], at_budget, _value(row, "sent_bytes")]
    columns = ["optimizer", "rate", "test loss", "training loss at ¼ of the tokens", "½", "all", "after 8 MiB", "sent"]
    return markdown_table(columns, cells)


def report(run: Run) -> str:
    """Return every table of a result file."""
    if run.benchmark == "step_time":
        sets = dict.fromkeys(row["shapes"] for row in run.rows)
        return "\n\n".join(labelled(partial(step_time_rows, shapes=name), run) for name in sets)
    if run.benchmark == "convergence":
        return f"{convergence_report(run)}\n\n{rate_rows(run.rows)}"
    rows = {"memory": memory_rows, "requirements": requirement_rows, "nested_lora": nested_lora_rows}
    rows |= {"local_training": local_training_rows, "gpu_training": training_rows}
    return labelled(rows.get(run.benchmark, all_rows), run)
