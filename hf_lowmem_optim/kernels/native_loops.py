"""Compiled loops on the threads that torch itself uses.

After a parallel operation torch's OpenMP threads wait actively for the next one, some milliseconds long, in the way of
any other thread. They need not be ended where they do the work themselves, and begin it in some microseconds, whatever
holds Python's lock. A parallel region that begins with one call and ends with another one lets the calling thread
prepare work for the others in between. (Compilers made such regions up to OpenMP 3.1; GNU's library keeps the
functions, LLVM's and Intel's have them for programs that were built for GNU's.)
"""

# mypy: disable-error-code="no-untyped-call, attr-defined"
from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import numba
import numpy as np
import torch
from numba.core import types

from hf_lowmem_optim.kernels.workers import num_workers, openmp_library, run_workers

__all__ = ["NativeLoop", "num_threads", "run_native"]


class NativeLoop:
    """A function of one pointer to its arguments; compiled at its first use.

    It needs no Python, and may run on any thread. What it raises (numba checks that it has memory) is printed and goes
    no further: it has to leave a trace of having run.

    Args:
        function: What numba is to compile.
        arguments: Numba's type of what is at the pointer. It is part of the key of numba's cache on disk, which knows
            nothing of other files: all that the function reads belongs there.
    """

    def __init__(self, function: Callable[..., None], arguments: Any) -> None:
        self._function = function
        self._signature = types.void(types.CPointer(arguments))

    @functools.cached_property
    def _compiled(self) -> Any:
        return numba.cfunc(self._signature, cache=True, error_model="numpy")(self._function)

    @functools.cached_property
    def run(self) -> Callable[[int], None]:
        """Run it on this thread, without Python's lock; takes the address of the arguments."""
        return ctypes.CFUNCTYPE(None, ctypes.c_void_p)(self.address)

    @property
    def address(self) -> int:
        """Where it is."""
        address: int = self._compiled.address
        return address


def num_threads(most: int) -> int:
    """Return on how many threads a loop runs.

    Args:
        most: On how many it pays.

    Returns:
        All that torch uses, or 1: OpenMP would end those that a smaller team leaves out, so that the loop has to.
    """
    if most < 2:
        return 1
    return torch.get_num_threads() if _team() else num_workers(most)


def run_native(
    loop: NativeLoop,
    arguments: np.ndarray[Any, Any],
    threads: int,
    prepare: Callable[[], None],
    stop: Callable[[], object],
) -> None:
    """Run a loop on several threads at the same time, with the same arguments; return when all have ended.

    Args:
        loop: The loop.
        arguments: What it finds at its pointer.
        threads: How many; the calling one is the first.
        prepare: What the calling thread does before, while the others have begun.
        stop: Called when that fails or is interrupted, to tell the others to come to an end. No function of Python's,
            which a second interrupt could keep from doing so.

    Raises:
        Exception: What ``prepare`` raised; all threads have ended then, too.
    """
    address, at = loop.address, arguments.ctypes.data

    def work() -> None:
        loop.run(at)

    def prepare_and_work() -> None:
        prepare()
        work()

    if threads == 1:
        prepare_and_work()
    elif (team := _team()) is None:
        run_workers([prepare_and_work, *[work] * (threads - 1)], stop)
    else:
        try:
            # an interrupt cannot come between `try` and this call
            team.begin(address, at, threads)
            prepare_and_work()
        except BaseException:
            stop()
            raise
        finally:
            team.end()


class _Team(NamedTuple):
    """The functions that begin and end a parallel region on the calling thread's team."""

    begin: Callable[[int, int, int], None]
    end: Callable[[], None]


@functools.cache
def _team() -> _Team | None:
    """The functions of the library that torch uses; None where there are none."""
    library = openmp_library()
    begin, end = (getattr(library, f"GOMP_parallel_{name}", None) for name in ("start", "end"))
    if begin is None or end is None:
        return None
    begin.argtypes, begin.restype = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint), None
    end.argtypes, end.restype = (), None
    return _Team(begin, end)


if hasattr(os, "register_at_fork"):
    # the team is not there any more
    os.register_at_fork(after_in_child=_team.cache_clear)
