"""The runs of ``convergence.py``: what one is, and their file, which is written after every run."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from results import Run, describe_run, load_run, save_run

__all__ = ["ConvergenceRow", "RunStore", "by_entry", "read_rows"]


@dataclass(frozen=True)
class ConvergenceRow:
    """One run.

    Attributes:
        task: Name of the task.
        entry: Optimizer and settings.
        lr: Peak of the schedule.
        seed: Of initialization and data order.
        steps: Number of steps.
        precision: ``"fp32"`` or ``"bf16"`` (autocast).
        held_out: Which set it was evaluated on in the end: ``"validation"`` or ``"test"``.
        train_loss: Mean over the last 50 steps.
        held_out_loss: On that set.
        accuracy: On that set.
        state_bytes: Bytes of optimizer state.
        parameters: Number of parameters of the model.
        seconds: Wall time of the steps.
        curve: Training loss, means over ten steps each.
    """

    task: str
    entry: str
    lr: float
    seed: int
    steps: int
    precision: str
    held_out: str
    train_loss: float
    held_out_loss: float
    accuracy: float
    state_bytes: int
    parameters: int
    seconds: float
    curve: Sequence[float]


class RunStore:
    """Runs of one task that are done, in memory, and in a file if there is one.

    Args:
        path: The file (``….json``); continued if it exists, and written after every run.
        task: Name of the task.
        steps: Number of steps of all runs.
        precision: ``"fp32"`` or ``"bf16"``.
        note: What a reader must know about the runs; by default what the file says.

    Raises:
        ValueError: The file has figures of another task, machine or versions, or with other settings: they cannot
            stand in one table.
    """

    def __init__(self, path: Path | None, task: str, steps: int, precision: str, note: str = "") -> None:
        self.path = path
        settings = {
            "task": task,
            "steps": steps,
            "dtype": precision,
            "threads": torch.get_num_threads(),
            "device": "cpu",
        }
        self._run = describe_run("convergence", settings, note)
        self._command = self._run.command
        self._wanted: dict[tuple[str, float, int, str], None] = {}
        self.rows: list[ConvergenceRow] = []
        if path is None or not path.exists():
            return
        old = load_run(path)
        for what, before, now in (
            ("benchmark", old.benchmark, self._run.benchmark),
            ("machine", old.machine, self._run.machine),
            ("versions", old.software["versions"], self._run.software["versions"]),
            ("settings", old.settings, self._run.settings),
        ):
            if before != now:
                raise ValueError(f"{path} has another {what}, {before}, than this process, {now}: choose another file")
        self.rows = read_rows(old)
        commands = dict.fromkeys((*old.command.split("\n"), self._run.command))
        self._run = dataclasses.replace(self._run, command="\n".join(commands), note=note or old.note)

    def find(self, entry: str, lr: float, seed: int, held_out: str) -> ConvergenceRow | None:
        """Return a run, None if it has not been done."""
        wanted = (entry, lr, seed, held_out)
        self._wanted[wanted] = None
        return next((row for row in self.rows if (row.entry, row.lr, row.seed, row.held_out) == wanted), None)

    def add(self, row: ConvergenceRow) -> None:
        """Keep a run."""
        self.rows.append(row)
        self._save()

    def finish(self) -> None:
        """If this process has asked for every run of the file, make it what this process alone would have written.

        That is: the runs in the order in which they were asked for, under this process's command.
        """
        order = {wanted: place for place, wanted in enumerate(self._wanted)}
        places = [order.get((row.entry, row.lr, row.seed, row.held_out)) for row in self.rows]
        if self.rows and None not in places:
            self.rows.sort(key=lambda row: order[row.entry, row.lr, row.seed, row.held_out])
            self._run = dataclasses.replace(self._run, command=self._command)
            self._save()

    def _save(self) -> None:
        if self.path is not None:
            save_run(dataclasses.replace(self._run, rows=[asdict(r) for r in self.rows]), self.path)


def read_rows(run: Run) -> list[ConvergenceRow]:
    """The runs of a file."""
    return [ConvergenceRow(**row) for row in run.rows]


def by_entry(rows: Iterable[ConvergenceRow], held_out: str) -> dict[tuple[str, float], list[ConvergenceRow]]:
    """Runs that were evaluated on one set, by entry and rate, both in the order of the file."""
    found: dict[tuple[str, float], list[ConvergenceRow]] = {}
    for row in rows:
        if row.held_out == held_out:
            found.setdefault((row.entry, row.lr), []).append(row)
    return found
