"""Read and write result files: rows, and everything that their figures depend on, as JSON and as CSV.

``benchmarks/results/NAME.json`` is what tables and pictures are made from (see render.py):

    {"schema": "hf-lowmem-optim/benchmark/1", "benchmark": "step_time", "command": "python benchmarks/step_time.py …",
     "date": "2026-11-24", "machine": {…}, "software": {"versions": {…}, "malloc": …}, "settings": {…}, "rows": [{…}]}

``NAME.csv`` has the same rows, and the rest as comment lines in front (``pandas.read_csv(path, comment="#")``).
"""

from __future__ import annotations

import csv
import datetime
import io
import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from machine import describe_machine, describe_software

SCHEMA = "hf-lowmem-optim/benchmark/1"
RESULTS = Path(__file__).parent / "results"

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Run:
    """Hold what a benchmark found, and under which circumstances.

    Attributes:
        benchmark: Its name: ``"step_time"``.
        command: What to type to run it again.
        date: Day of the run, UTC.
        machine: See :func:`machine.describe_machine`.
        software: See :func:`machine.describe_software`.
        settings: The benchmark's own settings: seed, threads, device, dtype, rounds, ...
        rows: The figures.
        note: What a reader must know about this run, if anything.
    """

    benchmark: str
    command: str
    date: str
    machine: Mapping[str, Any]
    software: Mapping[str, Any]
    settings: Mapping[str, Any]
    rows: Sequence[Row] = field(default_factory=list)
    note: str = ""

    def label(self) -> str:
        """Return where and when, in a line: the heading of figures that depend on the machine."""
        machine, versions = self.machine, self.software["versions"]
        where = f"{machine['processor']} ({machine['architecture']}, {machine['cores']} cores)"
        if self.settings.get("device", "cpu") != "cpu":
            where = str(machine["gpu"])
        what = ", ".join(f"{name} {versions[name]}" for name in ("torch", "transformers", "numba") if name in versions)
        settings = ", ".join(
            f"{key} {self.settings[key]}" for key in ("dtype", "threads", "seed") if self.settings.get(key) is not None
        )
        return f"{where}, {what}, {settings}, malloc {self.software['malloc']}, {self.date}"


def describe_run(benchmark: str, settings: Mapping[str, Any], note: str = "") -> Run:
    """Return a run that starts now, still without rows; its command is that of this process."""
    # a script in a folder that imports its neighbours is run by its path; this machine's folders are nobody else's
    arguments = [Path(each).name if Path(each).is_absolute() else each for each in sys.argv[1:]]
    command = f"python benchmarks/{Path(sys.argv[0]).name} {shlex.join(arguments)}".strip()
    date = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
    return Run(benchmark, command, date, describe_machine(), describe_software(), dict(settings), [], note)


def save_run(run: Run, path: Path) -> None:
    """Write ``path`` (``….json``) and the CSV beside it; each file is complete or as it was before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"schema": SCHEMA, **asdict(run)}
    _replace(path.with_suffix(".json"), json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    text = io.StringIO()
    for key in ("benchmark", "command", "date", "machine", "software", "settings", "note"):
        value = content[key]
        text.write(f"# {key}: {value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)}\n")
    writer = csv.DictWriter(text, list(dict.fromkeys(key for row in run.rows for key in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(run.rows)
    _replace(path.with_suffix(".csv"), text.getvalue())


def load_run(path: Path) -> Run:
    """Read a JSON file that :func:`save_run` wrote.

    Raises:
        FileNotFoundError: There is none.
        ValueError: It is not a result file of this schema.
    """
    try:
        content = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path.name} is not JSON: {error}") from error
    if not isinstance(content, dict) or content.get("schema") != SCHEMA:
        raise ValueError(f"{path.name} is no result file: its schema is not {SCHEMA!r}")
    names = {each.name for each in fields(Run)}
    if missing := names - set(content) - {"note"}:
        raise ValueError(f"{path.name} lacks {', '.join(sorted(missing))}")
    return Run(**{key: content[key] for key in names & set(content)})


def _replace(path: Path, text: str) -> None:
    """Write a file so that an interruption leaves the old one."""
    temporary = path.with_name(path.name + ".new")
    temporary.write_text(text)
    temporary.replace(path)
