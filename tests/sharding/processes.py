"""Runs functions in several processes that are one gloo group, and says what each returned or how it failed.

The processes are forked from one that has imported all modules and computed nothing: starts take seconds otherwise, and
a fork of a process that has used OpenMP may hang. Nothing waits forever: the group has a timeout.
"""

from __future__ import annotations

import gc
import importlib
import os
import pickle
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

GROUP_TIMEOUT = timedelta(seconds=20)
#: A job's function by module and name, and how many processes run it.
Job = tuple[str, int]


def launch(jobs: Sequence[Job], folder: Path, *, timeout: float = 120) -> list[list[Any]]:
    """Run jobs one after the other, and return what each process of each returned.

    Args:
        jobs: ``("module:function", processes)``; the function is called with its rank, the number of processes, and
            the folder.
        folder: For whatever the jobs leave to each other.
        timeout: Seconds for all of them.

    Returns:
        What each process of each job returned; None for one that called :func:`die`.

    Raises:
        AssertionError: A process failed; the message has the traceback of the first.
    """
    names = [f"{function}={world}" for function, world in jobs]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", __name__, str(folder), str(timeout), *names]
    root = Path(__file__).parent.parent.parent
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout + 30, env=environment, cwd=root)
    assert done.returncode == 0, done.stderr[-4000:]
    return [
        [pickle.loads(path.read_bytes()) if path.exists() else None for path in paths]
        for paths in ([folder / f"{index}.{rank}" for rank in range(world)] for index, (_, world) in enumerate(jobs))
    ]


def die(folder: Path) -> None:
    """End this process at once, as a test of what becomes of the others; that is no failure."""
    (folder / f"{os.getpid()}.died").touch()
    os.kill(os.getpid(), signal.SIGKILL)


def _main(folder: Path, timeout: float, names: Sequence[str]) -> int:
    import torch.distributed.checkpoint.state_dict
    import torch.distributed.fsdp
    import torch.distributed.tensor

    torch.set_num_threads(1)
    for module in {name.partition(":")[0] for name in names}:
        importlib.import_module(module)
    # what was imported is nothing that the garbage collectors of the children need to look at
    gc.freeze()
    deadline = time.monotonic() + timeout
    for index, name in enumerate(names):
        function, _, world = name.partition("=")
        children = [_fork(index, rank, int(world), function, folder) for rank in range(int(world))]
        if not _all_ended_well(children, deadline, folder):
            failures = [folder / f"{index}.{rank}.failed" for rank in range(int(world))]
            # the first to fail: the others waited for it
            told = sorted((path for path in failures if path.exists()), key=lambda path: path.stat().st_mtime_ns)
            print(told[0].read_text() if told else f"{name}: no end within {timeout} seconds", file=sys.stderr)
            return 1
    return 0


def _all_ended_well(children: Sequence[int], deadline: float, folder: Path) -> bool:
    left, well = set(children), True
    while left:
        ended, status = os.waitpid(-1, os.WNOHANG)
        if ended:
            left.discard(ended)
            well &= status == 0 or (folder / f"{ended}.died").exists()
        elif time.monotonic() > deadline:
            for child in left:
                os.kill(child, 9)
                os.waitpid(child, 0)
            return False
        else:
            time.sleep(0.02)
    return well


def _fork(index: int, rank: int, world: int, function: str, folder: Path) -> int:
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        import torch

        group = f"file://{folder}/group{index}"
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))
        torch.distributed.init_process_group("gloo", group, GROUP_TIMEOUT, world_size=world, rank=rank)
        module, _, name = function.partition(":")
        result = getattr(importlib.import_module(module), name)(rank, world, folder)
        (folder / f"{index}.{rank}").write_bytes(pickle.dumps(result))
        status = 0
    except BaseException:
        text = f"process {rank} of {world} in {function}:\n{traceback.format_exc()}"
        (folder / f"{index}.{rank}.failed").write_text(text)
    finally:
        os._exit(status)


if __name__ == "__main__":
    sys.exit(_main(Path(sys.argv[1]), float(sys.argv[2]), sys.argv[3:]))
