"""``hf-lowmem-optim run``: somebody else's training script, unmodified, with our optim strings registered.

The script is run by python itself, which takes the place of this process: the command line loses ``-m hf_lowmem_optim
run``, and the environment gains a folder on ``PYTHONPATH`` whose ``sitecustomize.py`` python runs first. Environments
are inherited, so whatever processes the script starts have the strings as well.
"""

from __future__ import annotations

import argparse
import functools
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

__all__ = ["run_script", "suggest_names"]

USAGE = """usage: hf-lowmem-optim run SCRIPT [args ...]
       hf-lowmem-optim run -m MODULE [args ...]

Runs a training script as python would, with the optim strings of this package registered, so that
--optim ldadam is accepted, by the processes that it starts as well. With several processes:
    accelerate launch -m hf_lowmem_optim run SCRIPT [args ...]
    torchrun -m hf_lowmem_optim run SCRIPT [args ...]
"""
_REFUSED = re.compile(r"argument --optim: invalid choice: '([^']*)'")


def run_script(argv: Sequence[str]) -> int:
    """Run a script or a module in place of this process.

    Args:
        argv: What follows ``run``: the script or ``-m MODULE``, then its own arguments.

    Returns:
        0 for help, 2 if there is nothing to run; the script's exit status on Windows, or if a program called ``main``.
    """
    target = next(iter(argv[argv[:1] == ["-m"] :]), "")
    if target in ("-h", "--help"):
        print(USAGE, end="")
        return 0
    wrong = ""
    if not target or target.startswith("-"):
        wrong = (f"unknown option {target!r} before the script" if target else "nothing to run") + f"\n{USAGE}"
    elif argv[0] != "-m" and not Path(target).exists():
        wrong = f"there is no file {target!r} to run\n"
    elif sys.flags.ignore_environment or sys.flags.no_site:
        wrong = "python's options -I, -E and -S keep the optim strings from the script; leave them out\n"
    if wrong:
        print(f"hf-lowmem-optim run: {wrong}", file=sys.stderr, end="")
        return 2
    given = _interpreter_arguments(["run", *argv])
    command = [sys.executable, *(given or ()), *argv]
    if given is None or os.name == "nt":  # there, exec returns to the shell at once
        return subprocess.call(command, env=_environment())
    return os.execve(command[0], command, _environment())


def _interpreter_arguments(ours: Sequence[str]) -> list[str] | None:
    """Return what python was given before ``-m hf_lowmem_optim run …``; None if this is no such command line."""
    before = sys.orig_argv[1 : len(sys.orig_argv) - len(ours)]
    if not before or sys.orig_argv[1 + len(before) :] != ours:
        return None
    *options, program = before
    if options and re.fullmatch("-[A-Za-z]*c", options[-1]):  # code that called main()
        return None
    if program.startswith("-"):  # -mhf_lowmem_optim in one word
        options.append(program.partition("m")[0] + "m")
    if options and re.fullmatch("-[A-Za-z]*m", options[-1]):  # other flags may be joined to -m: -um
        flags = options.pop().removesuffix("m")
        options += [flags] * (flags != "-")
    return options


def _environment() -> dict[str, str]:
    """Return the environment of a run, which all of its processes inherit."""
    startup, before = str(Path(__file__).with_name("startup")), os.environ.get("PYTHONPATH")
    others = [folder for folder in before.split(os.pathsep) if folder != startup] if before else []
    paths = os.pathsep.join([startup, *others])
    return {**os.environ, "PYTHONPATH": paths, "HF_LOWMEM_OPTIM_RUN": os.path.realpath(sys.prefix)}


@functools.cache
def suggest_names() -> None:
    """Add "did you mean" where a command line refuses a value of ``--optim``; what is refused stays as it is."""
    complain = argparse.ArgumentParser.error

    @functools.wraps(complain)
    def error(self: argparse.ArgumentParser, message: str) -> Any:
        if refused := _REFUSED.match(message):
            from hf_lowmem_optim.engine.options import nearest
            from hf_lowmem_optim.registry import OPTIMIZERS

            message += nearest(refused[1], OPTIMIZERS)
        complain(self, message)

    argparse.ArgumentParser.error = error  # type: ignore[method-assign]
