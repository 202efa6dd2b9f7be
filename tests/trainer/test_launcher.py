"""`hf-lowmem-optim run`: the script cannot tell it from python, except that our optimizers are there."""

from __future__ import annotations

import shutil
import signal
from pathlib import Path

import pytest

from tests.trainer.runs import REPOSITORY, run_python

LAUNCHER = ["-m", "hf_lowmem_optim", "run"]

#: What a script may look at or do; {folder} has the module `beside.py`.
SCRIPTS = {
    "argv": "import sys; print(sys.argv)",
    "main": "import sys; m = sys.modules['__main__']; print(__name__, m.X if hasattr(m, 'X') else None, __file__)",
    "imports from its folder": "import beside; print(beside.VALUE)",
    "pickles its own class": "import pickle\nclass A: pass\nprint(type(pickle.loads(pickle.dumps(A()))).__module__)",
    "spawns": (
        "import multiprocessing\ndef work(): print('worked', flush=True)\nif __name__ == '__main__':\n"
        "    p = multiprocessing.get_context('spawn').Process(target=work); p.start(); p.join(); print(p.exitcode)"
    ),
    "exit code": "import sys; sys.exit(7)",
    "exit message": "import sys; sys.exit('no data')",
    "raises": "def f():\n    raise ValueError('bad data')\nf()",
    "raises from": "try:\n    1 / 0\nexcept ZeroDivisionError as e:\n    raise OSError('gone') from e",
    "raises while importing": "import broken",
    "syntax error": "x = = 1",
    "interrupted": "import os, signal; os.kill(os.getpid(), signal.SIGINT)",
    "terminated": "import os, signal; os.kill(os.getpid(), signal.SIGTERM)",
    "reads stdin": "print(input())",
    "at exit": "import atexit\nY = 3\natexit.register(lambda: print(Y))",
}


@pytest.mark.parametrize("as_module", [False, True], ids=["script", "module"])
@pytest.mark.parametrize("name", SCRIPTS)
def test_it_is_as_if_run_by_python(name: str, as_module: bool, tmp_path: Path) -> None:
    home = tmp_path if as_module else tmp_path / "scripts"
    home.mkdir(exist_ok=True)
    for module, code in {
        "beside": "VALUE = 5",
        "broken": "import beside\nbeside.nothing",
        "job": SCRIPTS[name],
    }.items():
        (home / f"{module}.py").write_text(code)
    target = ["-m", "job"] if as_module else ["scripts/job.py"]
    arguments = ["--optim", "x", "-m", "--", "--help"]
    direct = run_python(*target, *arguments, folder=tmp_path)
    launched = run_python(*LAUNCHER, *target, *arguments, folder=tmp_path)
    assert launched.returncode == direct.returncode
    assert launched.stdout == direct.stdout
    if as_module:
        # python -m shows its own two frames of runpy
        kept = [line for line in direct.stderr.splitlines() if "frozen runpy" not in line]
        assert launched.stderr.splitlines() == kept
    else:
        assert launched.stderr == direct.stderr
    # a job in the background of a shell ignores interrupts
    if name == "interrupted" and signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
        assert launched.returncode == -signal.SIGINT


@pytest.mark.slow
def test_an_unmodified_script_trains_with_our_optimizers(tmp_path: Path) -> None:
    shutil.copy(REPOSITORY / "tests/trainer/training_script.py", tmp_path / "train.py")
    settings = ["--output_dir", "out", "--max_steps", "2", "--report_to", "none", "--use_cpu", "true"]
    arguments = [*settings, "--optim", "ldadam", "--optim_args", "rank=4"]
    assert run_python("train.py", *arguments, folder=tmp_path).returncode == 2
    accelerate = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1"]
    launched = run_python(*accelerate, *LAUNCHER, "train.py", *arguments, folder=tmp_path)
    assert launched.returncode == 0, launched.stderr
    assert "trained with LDAdam to step 2" in launched.stdout
    assert "compressed (rank=4, " in launched.stderr
    wrong = run_python(*LAUNCHER, "train.py", *settings, "--optim", "ldamm", folder=tmp_path)
    assert wrong.returncode == 2
    assert "did you mean 'ldadam'" in wrong.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [([], "nothing to run"), (["-m"], "nothing to run"), (["-x", "job.py"], "'-x'"), (["job.py"], "no file 'job.py'")],
)
def test_what_cannot_be_run(arguments: list[str], message: str, tmp_path: Path) -> None:
    refused = run_python(*LAUNCHER, *arguments, folder=tmp_path)
    assert refused.returncode == 2
    assert message in refused.stderr
