"""`hf-lowmem-optim run`: the script cannot tell it from python, except that our optimizers are there.

In two real processes too, with DDP over gloo: replicas stay equal, checkpoints resume, and only one process reports.
"""

from __future__ import annotations

import shutil
import signal
import socket
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils import _pytree as pytree

from hf_lowmem_optim.memory.report import REPORT_NAME
from tests.optimizers.cases import CASES
from tests.sharding import processes
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


@pytest.mark.slow
def test_an_unmodified_script_trains_with_our_optimizers(tmp_path: Path) -> None:
    shutil.copy(SCRIPT, tmp_path / "train.py")
    settings = ["--output_dir", "out", "--max_steps", "2", "--report_to", "none", "--use_cpu", "true"]
    arguments = [*settings, "--optim", "ldadam", "--optim_args", "rank=4"]
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


SETTINGS = [
    *("--output_dir", "out", "--report_to", "none", "--use_cpu", "true", "--disable_tqdm", "true"),
    *("--max_steps", "4", "--save_steps", "2", "--logging_steps", "1", "--per_device_train_batch_size", "2"),
    *("--learning_rate", "1e-2", "--optim", "ldadam", "--optim_args", "rank=4"),
    *("--callback", "hf_lowmem_optim:OptimizerStateMemoryCallback"),
]


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def launch(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the script in two processes; accelerate itself starts several on CPUs by MPI only."""
    torchrun = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(free_port())]
    done = run_python(*torchrun, *LAUNCHER, str(SCRIPT), *SETTINGS, *arguments, folder=folder)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def ends(folder: Path) -> list[dict[str, Any]]:
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.slow
@pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.3"),
    reason="its Trainer asks torch for the place 'cpu:0', which torch does not know, to load an optimizer on two CPUs",
)
def test_an_unmodified_script_trains_in_two_processes(tmp_path: Path) -> None:
    straight = launch(tmp_path, "--dump", "straight")
    (tmp_path / "out" / REPORT_NAME).unlink()
    checkpoint = tmp_path / "out" / "checkpoint-2"
    resumed = launch(tmp_path, "--dump", "resumed", "--resume_from_checkpoint", str(checkpoint))
    assert (tmp_path / "out" / REPORT_NAME).is_file()
    for run in (straight, resumed):
        assert run.stdout.count("trained with LDAdam to step 4") == 1
        assert run.stdout.count("Optimizer state of LDAdam") == 1
        assert run.stderr.count("LDAdam for 14,432 trainable parameters") == 1
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


@pytest.mark.slow
def test_replicas_of_every_optimizer_stay_equal(tmp_path: Path) -> None:
    processes.launch([(f"{__name__}:replicas", 2)], tmp_path, timeout=600)
