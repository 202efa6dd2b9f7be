"""`hf-lowmem-optim run`: the script cannot tell it from python, except that our optimizers are there.

In two real processes too, with DDP over gloo: replicas stay equal, checkpoints resume, and only one process reports.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils import _pytree as pytree
from transformers import HfArgumentParser, TrainingArguments

from hf_lowmem_optim.memory.report import REPORT_NAME
from hf_lowmem_optim.trainer.launcher import suggest_names
from tests.local_updates.trainer_jobs import say_where_the_group_is
from tests.optimizers.cases import CASES
from tests.sharding import processes
from tests.trainer import training_script
from tests.trainer.runs import REPOSITORY, assert_equal_to_the_bit, moved, run_python, values

LAUNCHER = ["-m", "hf_lowmem_optim", "run"]
SCRIPT = REPOSITORY / "tests/trainer/training_script.py"
#: What a script may look at or do; {folder} has the module `beside.py`.
SCRIPTS = {
    "ordinary": """
import atexit, multiprocessing, pickle, sys
import beside
class A: pass
Y = 3
def work(): print("worked", flush=True)
if __name__ == "__main__":
    atexit.register(lambda: print(Y))
    main = sys.modules["__main__"]
    print(sys.argv, __file__, main.Y, beside.VALUE, type(pickle.loads(pickle.dumps(A()))).__module__, input())
    process = multiprocessing.get_context("spawn").Process(target=work)
    process.start()
    process.join()
    print(process.exitcode)
""",
    "exit code": "import sys; sys.exit(7)",
    "exit message": "import sys; sys.exit('no data')",
    "raises": "def f():\n    raise ValueError('bad data')\nf()",
    "raises from": "try:\n    1 / 0\nexcept ZeroDivisionError as e:\n    raise OSError('gone') from e",
    "raises while importing": "import broken",
    "syntax error": "x = = 1",
    "interrupted": "import os, signal; os.kill(os.getpid(), signal.SIGINT)",
    "terminated": "import os, signal; os.kill(os.getpid(), signal.SIGTERM)",
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
    assert name != "ordinary" or launched.stdout.endswith("__main__ typed\nworked\n0\n3\n")
    assert launched.stdout == direct.stdout
    assert launched.stderr == direct.stderr
    # a job in the background of a shell ignores interrupts
    if name == "interrupted" and signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
        assert launched.returncode == -signal.SIGINT


def test_a_command_line_is_told_the_name_it_may_have_meant(monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.setattr(argparse.ArgumentParser, "error", argparse.ArgumentParser.error)  # what is patched is put back
    suggest_names.__wrapped__()  # as before transformers is imported
    with pytest.raises(SystemExit) as refused:
        HfArgumentParser(TrainingArguments).parse_args_into_dataclasses(["--output_dir", "out", "--optim", "ldamm"])
    assert refused.value.code == 2 and "did you mean 'ldadam'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [([], "nothing to run"), (["-m"], "nothing to run"), (["-x", "job.py"], "'-x'"), (["job.py"], "no file 'job.py'")],
)
def test_what_cannot_be_run(arguments: list[str], message: str, tmp_path: Path) -> None:
    refused = run_python(*LAUNCHER, *arguments, folder=tmp_path)
    assert refused.returncode == 2
    assert message in refused.stderr


SETTINGS = [
    *("--output_dir", "out", "--report_to", "none", "--use_cpu", "true", "--disable_tqdm", "true"),
    *("--max_steps", "4", "--save_steps", "2", "--logging_steps", "1", "--per_device_train_batch_size", "2"),
    *("--learning_rate", "1e-2", "--optim", "ldadam", "--optim_args", "rank=4"),
    *("--callback", "hf_lowmem_optim:OptimizerStateMemoryCallback"),
]


def resume(rank: int, world: int, folder: Path) -> None:
    """Go on with the script where it saved, in processes that nobody but torch started."""
    os.chdir(folder)
    say_where_the_group_is()
    more = ["--dump", "resumed", "--resume_from_checkpoint", "out/checkpoint-2"]
    sys.argv = [str(SCRIPT), *SETTINGS, *more]
    training_script.main()


def ends(folder: Path) -> list[dict[str, Any]]:
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.slow
@pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.3"),
    reason="its Trainer asks torch for the place 'cpu:0', which torch does not know, to load an optimizer on two CPUs",
)
def test_an_unmodified_script_trains_and_resumes_and_replicas_stay_equal(tmp_path: Path) -> None:
    """Under ``accelerate launch``, which starts two processes as torchrun does."""
    accelerate = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0"]
    run = run_python(*accelerate, *LAUNCHER, str(SCRIPT), *SETTINGS, "--dump", "straight", folder=tmp_path)
    assert run.returncode == 0, run.stderr[-3000:]
    assert run.stdout.count("trained with LDAdam to step 4") == 1
    assert run.stdout.count("Optimizer state of LDAdam") == 1
    for text in ("LDAdam for 14,432 trainable parameters", "compressed (rank=4, "):
        assert run.stderr.count(text) == 1
    (tmp_path / "out" / REPORT_NAME).unlink()
    processes.launch([(f"{__name__}:resume", 2), (f"{__name__}:replicas", 2)], tmp_path, timeout=600)
    assert (tmp_path / "out" / REPORT_NAME).is_file()
    first, second = ends(tmp_path / "straight")
    assert (first["world_size"], first["wrapped"]) == (2, "DistributedDataParallel")
    # what is told once is told by the first process
    logs = [[log for log in end["logs"] if "loss" in log] for end in (first, second)]
    assert [log["step"] for log in logs[0]] == [log["step"] for log in logs[1]] == [1, 2, 3, 4]
    assert all("optimizer_state/total_bytes" in log for log in logs[0])
    assert not any(key.startswith("optimizer_state/") for log in second["logs"] for key in log)
    assert logs[0][-1]["loss"] < logs[0][0]["loss"]
    assert {state["step"] for state in first["optimizer"]["state"].values()} == {4}
    for end in (second, *ends(tmp_path / "resumed")):
        for part in ("parameters", "optimizer"):
            assert_equal_to_the_bit(end[part], first[part])


def replicas(rank: int, world: int, folder: Path) -> None:
    """Train every optimizer on data of this process alone; what differs from the other process is an error."""
    for case in CASES.values():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(12, 40), nn.GELU(), nn.Linear(40, 12))
        if case.layerwise or case.hyper.get("error_feedback") == "grad":
            with pytest.raises(NotImplementedError, match="before DDP or FSDP has averaged it"):
                case.build(model.parameters())
            continue
        wrapped = DistributedDataParallel(model)
        optimizer = case.build(wrapped.parameters())
        generator = torch.Generator().manual_seed(rank)
        start = values(model)
        for _ in range(6):
            wrapped(torch.randn(8, 12, generator=generator)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        mine = [*model.parameters(), *pytree.tree_leaves(optimizer.state_dict()["state"])]
        for tensor in (each.detach() for each in mine if isinstance(each, torch.Tensor)):
            both = [torch.empty_like(tensor) for _ in range(2)]
            # gloo knows no int16
            torch.distributed.all_gather([b.view(torch.uint8) for b in both], tensor.contiguous().view(torch.uint8))
            assert torch.equal(both[0], both[1]), case.name
        assert moved(model, start) == set(start)
