"""``hf-lowmem-optim run``: somebody else's training script, unmodified, with our optim strings registered.

``import hf_lowmem_optim`` has already arranged for the strings to be added when the script imports transformers. What
is left is to run the script as Python itself would: same ``sys.argv`` and ``sys.path``, same ``__main__``, same exit
code, same traceback. Arguments, exceptions and signals pass through untouched.
"""

from __future__ import annotations

import argparse
import builtins
import functools
import io
import re
import runpy
import sys
from collections.abc import Sequence
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any

__all__ = ["run_script"]

USAGE = """usage: hf-lowmem-optim run SCRIPT [args ...]
       hf-lowmem-optim run -m MODULE [args ...]

Runs a training script as python would, with the optim strings of this package registered, so that
--optim ldadam is accepted. With several processes:
    accelerate launch -m hf_lowmem_optim run SCRIPT [args ...]
    torchrun -m hf_lowmem_optim run SCRIPT [args ...]
"""
_REFUSED = re.compile(r"argument --optim: invalid choice: '([^']*)'")


def run_script(argv: Sequence[str]) -> int:
    """Run a script or a module; what it raises is raised, its own ``sys.exit`` too.

    Args:
        argv: What follows ``run``: the script or ``-m MODULE``, then its own arguments.

    Returns:
        0 at its end, or 2 if there is nothing to run.
    """
    is_module = argv[:1] == ["-m"]
    target, *arguments = argv[is_module:] or [""]
    if target in ("-h", "--help"):
        print(USAGE, end="")
        return 0
    wrong = ""
    if not target or target.startswith("-"):
        wrong = (f"unknown option {target!r} before the script" if target else "nothing to run") + f"\n{USAGE}"
    elif not is_module and not Path(target).is_file():
        wrong = f"there is no file {target!r} to run\n"
    if wrong:
        print(f"hf-lowmem-optim run: {wrong}", file=sys.stderr, end="")
        return 2
    _suggest_names()
    sys.excepthook = functools.partial(_report, sys.excepthook)
    sys.argv = [target, *arguments]
    # As python does: the script's folder, or for a module the working directory.
    sys.path[0] = str(Path.cwd() if is_module else Path(target).resolve().parent)
    if is_module:
        runpy.run_module(target, run_name="__main__", alter_sys=True)
    else:
        _run_file(Path(target).resolve())
    return 0


def _run_file(path: Path) -> None:
    """Execute a file as the module ``__main__``, which stays in place for what runs at exit."""
    main = ModuleType("__main__")
    # python gives the script its absolute path, but leaves sys.argv[0] as it was typed
    main.__file__, main.__loader__ = str(path), SourceFileLoader("__main__", str(path))
    main.__dict__["__builtins__"] = builtins
    sys.modules["__main__"] = main
    with io.open_code(str(path)) as file:
        code = compile(file.read(), str(path), "exec", dont_inherit=True)
    exec(code, main.__dict__)


def _report(hook: Any, kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Report an exception without the frames between the interpreter's start and the script."""
    while trace is not None and trace.tb_frame.f_code is not run_script.__code__:
        trace = trace.tb_next
    ours = {run_script.__code__.co_filename, runpy.run_path.__code__.co_filename}
    while trace is not None and trace.tb_frame.f_code.co_filename in ours:
        trace = trace.tb_next
    hook(kind, error.with_traceback(trace), trace)


def _suggest_names() -> None:
    """Add "did you mean" where a command line refuses a value of ``--optim``; what is refused stays as it is."""
    complain = argparse.ArgumentParser.error

    @functools.wraps(complain)
    def error(self: argparse.ArgumentParser, message: str) -> Any:
        if refused := _REFUSED.match(message):
            # here, so that a script starts as fast as without us
            from hf_lowmem_optim.engine.options import nearest
            from hf_lowmem_optim.registry import OPTIMIZERS

            message += nearest(refused[1], OPTIMIZERS)
        complain(self, message)

    argparse.ArgumentParser.error = error  # type: ignore[method-assign]
