"""Tables of what ``convergence.py`` found, in Markdown."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Sequence
from typing import Any

from convergence_results import ConvergenceRow, by_entry, read_rows
from results import Run
from tables import labelled, markdown_table

__all__ = ["convergence_rates", "convergence_report", "convergence_table", "rates_table"]


def _with_spread(values: Sequence[float], form: str = ".3f") -> str:
    """Mean ± standard deviation between seeds."""
    spread = f" ± {statistics.stdev(values):{form}}" if len(values) > 1 else ""
    return f"{statistics.mean(values):{form}}{spread}"


def _to_reference(runs: Sequence[ConvergenceRow], reference: Sequence[ConvergenceRow]) -> str | None:
    """Held-out loss relative to the reference's of the same seed, in percent; None without seeds in common."""
    losses = {row.seed: row.held_out_loss for row in reference}
    ratios = [100 * (row.held_out_loss / losses[row.seed] - 1) for row in runs if row.seed in losses]
    return _with_spread(ratios, "+.1f").replace("± +", "± ") if ratios else None


def convergence_table(rows: Sequence[ConvergenceRow]) -> str:
    """Markdown: each optimizer at its rate on the test set, mean ± standard deviation between seeds.

    The column "to AdamW" is the mean over seeds of the ratio to AdamW's loss from the same start on the same batches.
    """
    tried = by_entry(rows, "validation")
    reported = by_entry(rows, "test")
    reference = [row for (entry, _), runs in reported.items() if entry == "adamw" for row in runs]
    lines: list[Sequence[Any]] = []
    for (entry, lr), runs in reported.items():
        rates = ", ".join(f"{rate:g}" for rate in sorted(rate for name, rate in tried if name == entry))
        lines.append(
            [
                entry,
                f"{lr:g}",
                rates or None,
                ", ".join(str(row.seed) for row in runs),
                _with_spread([row.train_loss for row in runs]),
                _with_spread([row.held_out_loss for row in runs]),
                _to_reference(runs, reference) if entry != "adamw" else None,
                _with_spread([row.accuracy for row in runs]),
                runs[0].state_bytes / runs[0].parameters,
                f"{statistics.median(row.seconds for row in runs):.0f}",
            ]
        )
    columns = ["optimizer", "rate", "tried", "seeds", "training loss", "test loss", "% to AdamW", "accuracy"]
    return markdown_table([*columns, "B/param", "s"], lines)


def rates_table(rows: Sequence[ConvergenceRow]) -> str:
    """Markdown: held-out loss on the validation set, a line per optimizer and a column per rate."""
    tried = by_entry(rows, "validation")
    rates = sorted({rate for _, rate in tried})
    lines = []
    for entry in dict.fromkeys(name for name, _ in tried):
        losses = [tried[entry, rate][0].held_out_loss if (entry, rate) in tried else None for rate in rates]
        best = min(loss for loss in losses if loss is not None)
        lines.append([entry, *(None if x is None else f"**{x:.3f}**" if x == best else f"{x:.3f}" for x in losses)])
    return markdown_table(["optimizer", *(f"{rate:g}" for rate in rates)], lines)


def convergence_report(run: Run) -> str:
    """For the README: what each optimizer reached, under the circumstances."""
    note = (
        f"{run.settings['steps']} steps a run; mean ± standard deviation between seeds, % to AdamW from the same seed; "
        f"s is wall time. {run.note}"
    )
    return labelled(dataclasses.replace(run, note=note.strip()), convergence_table(read_rows(run)))


def convergence_rates(run: Run) -> str:
    """For the README: what each learning rate gave; the circumstances are those of the report."""
    return rates_table(read_rows(run))
