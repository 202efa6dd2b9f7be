"""How the loops are compiled: once for each, on its first call, and kept in numba's cache where that works.

numba's cache does not notice that a function of another file has changed (numba#1833): after an edit to ``floats.py``
or ``block_quant.py``, delete the ``__pycache__`` of this folder. An installation writes all files anew.
"""

from __future__ import annotations

import functools
import logging
import threading
import time
from collections.abc import Callable
from typing import Any, ClassVar, Generic, Literal, TypeVar

import numba
from numba.core import event

__all__ = ["Loop", "inlined", "loop"]

logger = logging.getLogger(__name__)

R = TypeVar("R")

if numba.config.DISABLE_JIT:  # type: ignore[attr-defined]
    raise ImportError("NUMBA_DISABLE_JIT is set")

# "python" would test every division for zero. No fastmath: the torch versions are met bit for bit.
_ERROR_MODEL: Literal["numpy"] = "numpy"

#: For what a loop calls; becomes part of the loop's machine code.
inlined: Callable[[Callable[..., Any]], Callable[..., Any]] = numba.njit(forceinline=True, error_model=_ERROR_MODEL)


class Loop(Generic[R]):
    """A compiled loop, which runs without the GIL.

    It is compiled, or loaded from numba's cache, on the first call, and for the types of that call alone: whoever calls
    passes the same types every time.

    Args:
        function: The loop, in the part of Python that numba compiles.
    """

    _reported: ClassVar[bool] = False

    def __init__(self, function: Callable[..., R]) -> None:
        functools.update_wrapper(self, function)  # type: ignore[arg-type]
        self._function = function
        self._compiled: Callable[..., R] | None = None
        self._lock = threading.Lock()
        #: Runs the loop: compiles it first, until that is done.
        self.run: Callable[..., R] = self._first_run

    def _first_run(self, *args: Any) -> R:
        self.run = self._compile(args)
        return self.run(*args)

    def _compile(self, args: tuple[Any, ...]) -> Callable[..., R]:
        with self._lock:
            if self._compiled is None:
                types = tuple(map(numba.typeof, args))
                try:
                    compiled = _compile(self._function, types, cache=True)
                # No folder to write to, a full disk, a damaged file: the cache raises whatever opening, writing or
                # unpickling does (only machine code that was changed in place goes unnoticed). An error of the
                # compilation itself is raised by the second attempt.
                except Exception as error:
                    compiled = _compile(self._function, types, cache=False)
                    _report(error)
                self._compiled = compiled
            return self._compiled


#: What ``@loop`` makes of a function.
loop = Loop


def _compile(function: Callable[..., R], types: tuple[Any, ...], *, cache: bool) -> Callable[..., R]:
    dispatcher = numba.njit(function, cache=cache, nogil=True, error_model=_ERROR_MODEL)
    compilation = _Compilation()
    with event.install_listener("numba:compile", compilation):
        dispatcher.compile(types)
    if compilation.seconds:
        logger.warning("numba compiled the loop %r in %.1f s", function.__name__.lstrip("_"), compilation.seconds)
    dispatcher.disable_compile()
    return dispatcher  # type: ignore[no-any-return]


class _Compilation(event.Listener):
    """Explains the wait, once in a process, and takes the time, where a loop is not in numba's cache."""

    _said: ClassVar[bool] = False

    def __init__(self) -> None:
        self.seconds = 0.0
        self._starts: list[float] = []  # what a loop calls is compiled within it

    def on_start(self, event: Any) -> None:
        """Note the time."""
        if not _Compilation._said:
            _Compilation._said = True
            logger.warning("numba compiles the loops of the first step, up to a minute, once for each installation")
        self._starts.append(time.perf_counter())

    def on_end(self, event: Any) -> None:
        """Take the time; that of the loop itself comes last."""
        self.seconds = time.perf_counter() - self._starts.pop()


def _report(error: Exception) -> None:
    """Log, once in a process, why loops are compiled without numba's cache."""
    if not Loop._reported:
        Loop._reported = True
        logger.warning(
            "numba's cache cannot be used (%s: %s): the loops are compiled anew in each process, which takes some "
            "seconds. Make its folder writable, delete it if it is damaged, or set NUMBA_CACHE_DIR to another one",
            type(error).__name__,
            error,
        )
