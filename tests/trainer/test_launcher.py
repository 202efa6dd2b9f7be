"""`hf-lowmem-optim run`: the script cannot tell it from python, except that our optimizers are there."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LAUNCHER = [sys.executable, "-m", "hf_lowmem_optim", "run"]

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


def run(command: list[str], folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "COLUMNS": "300", **environment}
    return subprocess.run(command, cwd=folder, env=env, text=True, capture_output=True, input="typed\n", timeout=300)


@pytest.mark.parametrize("as_module", [False, True], ids=["script", "module"])
@pytest.mark.parametrize("name", SCRIPTS)
def test_it_is_as_if_run_by_python(name: str, as_module: bool, tmp_path: Path) -> None:
    (tmp_path / "beside.py").write_text("VALUE = 5")
    (tmp_path / "broken.py").write_text("import beside\nbeside.nothing")
    folder = tmp_path / "scripts"
    folder.mkdir()
    home = tmp_path if as_module else folder
    for module in ("beside.py", "broken.py"):
        (home / module).write_text((tmp_path / module).read_text())
    (home / "job.py").write_text(SCRIPTS[name])
    target = ["-m", "job"] if as_module else ["scripts/job.py"]
    arguments = ["--optim", "x", "-m", "--", "--help"]
    direct = run([sys.executable, *target, *arguments], tmp_path)
    launched = run([*LAUNCHER, *target, *arguments], tmp_path)
    assert launched.returncode == direct.returncode
    assert launched.stdout == direct.stdout
    assert launched.stderr == direct.stderr
    # a job in the background of a shell ignores interrupts
    if name == "interrupted" and signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
        assert launched.returncode == -signal.SIGINT


TRAINING = """
from dataclasses import dataclass, field

from transformers import HfArgumentParser, TrainingArguments


@dataclass
class DataArguments:
    num_rows: int = field(default=8)


def main():
    data, args = HfArgumentParser((DataArguments, TrainingArguments)).parse_args_into_dataclasses()
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, Trainer
    config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1)
    rows = [{"input_ids": (r := torch.arange(i, i + 16) % 64), "labels": r} for i in range(data.num_rows)]
    trainer = Trainer(LlamaForCausalLM(config), args, train_dataset=rows)
    trainer.train()
    print("trained with", type(trainer.optimizer.optimizer).__name__, trainer.optimizer.param_groups[0]["rank"])


if __name__ == "__main__":
    main()
"""


@pytest.mark.slow
def test_an_unmodified_script_trains_with_our_optimizers(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(TRAINING)
    settings = ["--output_dir", "out", "--max_steps", "2", "--report_to", "none", "--use_cpu", "true"]
    arguments = [*settings, "--optim", "ldadam", "--optim_args", "rank=4"]
    assert run([sys.executable, "train.py", *arguments], tmp_path).returncode == 2
    accelerate = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1"]
    launched = run([*accelerate, "-m", "hf_lowmem_optim", "run", "train.py", *arguments], tmp_path)
    assert launched.returncode == 0, launched.stderr
    assert "trained with LDAdam 4" in launched.stdout
    wrong = run([*LAUNCHER, "train.py", *settings, "--optim", "ldamm"], tmp_path)
    assert wrong.returncode == 2
    assert "did you mean 'ldadam'" in wrong.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [([], "nothing to run"), (["-m"], "nothing to run"), (["-x", "job.py"], "'-x'"), (["job.py"], "no file 'job.py'")],
)
def test_what_cannot_be_run(arguments: list[str], message: str, tmp_path: Path) -> None:
    refused = run([*LAUNCHER, *arguments], tmp_path)
    assert refused.returncode == 2
    assert message in refused.stderr
