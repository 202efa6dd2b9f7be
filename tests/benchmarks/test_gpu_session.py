"""The session with a GPU: what a part leaves, what is run again, and that each part's command is one that it takes."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import gpu_session
import gpu_tests
import pytest
import tables
import torch
from gpu_session import PARTS, Part, is_done, run_parts
from results import SCHEMA, load_run

#: Writes a result as often as it is asked to; then starts a process that goes on for long, and waits for it.
SCRIPT = """
import json, os, subprocess, sys, time
saved = sys.argv[sys.argv.index("--save") + 1]
for given in sys.argv[1:sys.argv.index("--save")]:
    word, _, value = given.partition("=")
    if word == "rows":
        rows = [{"n": n, "limit": sys.argv[-1]} for n in range(int(value))]
        content = json.loads(os.environ["CONTENT"]) | {"rows": rows, "settings": {"complete": "whole" in sys.argv}}
        os.makedirs(os.path.dirname(saved), exist_ok=True)
        json.dump(content, open(saved, "w"))
    elif word == "exit":
        sys.exit(int(value))
    elif word == "hang":
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
        open(value, "w").write(f"{os.getpid()} {child.pid}")
        time.sleep(60)
"""


def exists(process: int) -> bool:
    """Whether a process runs; one that has ended, and that nobody has asked about, does not."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks into /proc")
def test_parts_are_ended_kept_and_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script, out = tmp_path / "part.py", tmp_path / "results"
    script.write_text(SCRIPT)
    empty: dict[str, Any] = {"benchmark": "b", "command": "c", "date": "d", "machine": {}, "settings": {}, "rows": []}
    monkeypatch.setenv("CONTENT", json.dumps({"schema": SCHEMA, **empty, "software": {"commit": "abc"}}))

    def part(name: str, *what: str, seconds: int = 20, timed: bool = False) -> Part:
        return Part(name, (str(script), *what), seconds, timed)

    ids = tmp_path / "ids"
    parts = [
        part("hanging", "rows=1", f"hang={ids}", seconds=1),
        part("failing", "exit=3"),
        part("stopping", "rows=2", timed=True),
        part("whole", "rows=3", "whole"),
    ]
    missing = run_parts(parts, out, 1.0, "abc")
    assert missing == {"hanging": "ran out of time", "failing": "exit status 3", "stopping": "incomplete"}
    assert not any(exists(int(each)) for each in ids.read_text().split())
    assert [len(load_run(out / f"{name}.json").rows) for name in ("hanging", "stopping", "whole")] == [1, 2, 3]
    assert load_run(out / "stopping.json").rows[0]["limit"] == "12"
    assert [each.name for each in parts if is_done(each, out, "abc")] == ["whole"]
    # of another commit, or of none, nothing is done
    assert not is_done(parts[-1], out, "abd") and not is_done(parts[-1], out, None)

    again = [part("hanging", "rows=4", "whole"), part("whole", "exit=1")]
    assert run_parts(again, out, 1.0, "abc") == {}
    assert len(load_run(out / "hanging.json").rows) == 4
    assert run_parts([parts[1]], out, 0.0, "abc") == {"failing": "no time left"}
    # what only prepares others is left out where nothing is left to do
    prepares = Part("compile", (str(script), "exit=4", "--save", "nowhere"), 5, kept=False)
    assert run_parts([prepares, *again], out, 1.0, "abc") == {}
    assert run_parts([prepares, parts[1]], out, 1.0, "abc")["compile"] == "exit status 4"


def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as stopped:
        gpu_session.main(["--commit", "abc"])
    assert stopped.value.code == 3 and "torch sees no GPU" in capsys.readouterr().err


class Understood(Exception):
    """A script has read its arguments."""


@pytest.mark.parametrize("part", PARTS, ids=lambda part: part.name)
def test_a_script_takes_the_arguments_of_its_part(part: Part, monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module(Path(part.command[0]).stem)
    first = {"gpu_compile": "gpu_compile.os.cpu_count", "gpu_tests": "gpu_tests.run_pytest"}
    first |= {"gpu_kernels": "gpu_kernels.copy_bandwidth", "memory_gpu": "memory.build_model"}

    def stop(*_: object, **__: object) -> None:
        raise Understood

    monkeypatch.setattr(first.get(part.name, f"{module.__name__}.describe_run"), stop)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (1 << 36, 1 << 36))
    monkeypatch.setattr("transformers.utils.logging.set_verbosity_error", lambda: None)  # for all tests after this one
    given = [*part.command, *(["--save", "x.json"] if part.kept else []), *(["--seconds", "5"] if part.timed else [])]
    monkeypatch.setattr(sys, "argv", given)
    with pytest.raises(Understood):
        module.main()


def test_what_pytest_printed_is_counted() -> None:
    lines = [
        "[gw0] [ 25%] PASSED tests/a.py::test_x[FAILED] ",
        "tests/a.py::test_y SKIPPED (needs two) [ 50%]",
        "[gw1] [ 75%] FAILED tests/a.py::test_z ",
        "FAILED tests/a.py::test_z - assert 0",
        "ERROR tests/b.py - ModuleNotFoundError",
        "==== 1 failed, 1 passed, 1 skipped, 1 error in 2.00s ====",
    ]
    row = gpu_tests.row_of(lines, 1)
    assert row["failed"] == ["FAILED tests/a.py::test_z", "ERROR tests/b.py"] and row["exit_status"] == 1
    assert {key: row[key] for key in ("passed", "skipped", "failed")} == {
        "passed": 1,
        "skipped": 1,
        "failed": row["failed"],
    }


def test_a_stopped_run_of_pytest_leaves_what_it_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped in its second test; and it is told to compile kernels."""
    (tmp_path / "test_some.py").write_text(
        "import os, pathlib, time\n"
        "def test_quick(): assert os.environ['TRITON_INTERPRET'] == '0'\n"
        "def test_slow(): pathlib.Path(__file__).with_name('there').touch(); time.sleep(60)\n"
    )

    class Process(subprocess.Popen[str]):
        def wait(self, timeout: float | None = None) -> int:
            while timeout == 99.0 and not (tmp_path / "there").exists():
                time.sleep(0.05)
            return super().wait(0.0 if timeout == 99.0 else timeout)

    monkeypatch.setattr(subprocess, "Popen", Process)
    plain = ["--rootdir", str(tmp_path), "--noconftest", "-p", "no:hypothesispytest", "-p", "no:anyio"]
    lines, status = gpu_tests.run_pytest([str(tmp_path), *plain], 99.0)
    assert status is None and gpu_tests.row_of(lines, status)["passed"] == 1


def test_times_of_a_step_make_a_table() -> None:
    """Rows as step_time.py writes them, also of a peer that is missing."""
    timed = {"dtype": "bfloat16", "threads": 1, "median_ms": 2.0, "host_ms": 0.5, "ratio_to_fused": 2.0}
    rows = [{"shapes": "large", "optimizer": "a", **timed}, {"shapes": "large", "optimizer": "b", "problem": "none"}]
    assert tables.gpu_ratio_rows([*rows, {"shapes": "small", "optimizer": "a", **timed, "ratio_to_fused": 3.0}]) == (
        "| optimizer | large × fused | large host ms | small × fused | small host ms |\n|---|---|---|---|---|\n"
        "| a | 2.00 | 0.50 | 3.00 | 0.50 |"
    )
