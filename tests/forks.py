"""Fresh processes that need not import torch and transformers anew: forks of one that has only imported them."""

from __future__ import annotations

import multiprocessing
import os
import runpy
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

#: Packages of others: what a process needs of this one, it imports itself.
IMPORTED = ["transformers.trainer", "transformers.models.llama.modeling_llama", "peft", "accelerate.commands.launch"]
#: Seconds for one process, which takes a few: also on a machine that is much slower or busy.
LIMIT = 600


@dataclass(frozen=True)
class Ended:
    """A process that has ended, and what it printed."""

    returncode: int | None
    stdout: str
    stderr: str


def in_fork(function: Callable[..., None], *arguments: Any, output: Path, limit: int = LIMIT) -> Ended:
    """Call a function in a fresh process; what it prints goes to files in the folder ``output``."""
    output.mkdir(exist_ok=True)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED)
    process = context.Process(target=_call, args=(function, arguments, str(output)))
    process.start()
    process.join(limit)
    if process.exitcode is None:
        process.kill()
    return Ended(process.exitcode, *((output / stream).read_text() for stream in ("stdout", "stderr")))


def _call(function: Callable[..., None], arguments: tuple[Any, ...], output: str) -> None:
    for name, stream in (("stdout", 1), ("stderr", 2)):
        with Path(output, name).open("w") as file:
            os.dup2(file.fileno(), stream)
    function(*arguments)


def run_script(target: str, argv: list[str], folder: Path) -> None:
    """Do what ``python TARGET ARGV`` does in a folder, or ``python -m TARGET ARGV`` if it is no file."""
    os.chdir(folder)
    sys.argv = [target, *argv]
    if target.endswith(".py"):
        sys.path.insert(0, str(Path(target).parent))
        runpy.run_path(target, run_name="__main__")
    else:
        runpy.run_module(target, run_name="__main__", alter_sys=True)
