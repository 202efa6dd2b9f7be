"""Work on a CPU on several threads, each of which has torch to itself with one thread.

Pieces of compiled loops and whole updates (``optimizers/side_by_side.py``) run on them. numba's own
parallel loops would bring a second set of OpenMP threads, which waits actively for work where torch's wants to run.
"""

from __future__ import annotations

import ctypes
import functools
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from typing import Any

import torch

__all__ = ["MAX_WORKERS", "num_workers", "one_thread", "openmp_library", "run_pieces", "run_workers"]

#: Bounds what is there at once on machines with many cores.
MAX_WORKERS = 16
_POLL_SECONDS = 2e-5
_PAUSE_SOFT = 1
_PROCESS = os.getpid()


def num_workers(num_jobs: int = MAX_WORKERS) -> int:
    """Return on how many threads so many jobs run: as many as torch may use.

    Args:
        num_jobs: The jobs there are.

    Returns:
        1 where the calling thread does them alone.
    """
    # other builds of torch have one pool of threads for all callers, and no number of threads for each
    threads = torch.get_num_threads() if _has_openmp() else 1
    return max(1, min(threads, num_jobs, MAX_WORKERS))


def run_workers(works: list[Callable[[], None]], stop: Callable[[], object]) -> None:
    """Run functions at the same time, the first on the calling thread; return when all have ended.

    Args:
        works: At most :func:`num_workers` functions.
        stop: Called when the first one fails or is interrupted, to tell the others to come to an end.

    Raises:
        Exception: What a function raised, the first of several; all have ended then, too.
    """
    if len(works) > 1:
        _end_waiting_threads()
    futures: list[Future[None]] = [_executor(torch.get_num_threads()).submit(work) for work in works[1:]]
    try:
        with one_thread():
            works[0]()
        # Whom another thread wakes, Linux puts on that thread's core, where the next work would then wait some
        # milliseconds for its turn. Whom a clock wakes stays on its own.
        while not all(future.done() for future in futures):
            time.sleep(_POLL_SECONDS)
    except BaseException:
        # what has begun must not go on behind the caller's back
        stop()
        wait(futures)
        raise
    for future in futures:
        future.result()


@contextmanager
def one_thread() -> Iterator[None]:
    """Let torch use one thread, as workers do: its others would go on waiting actively, in the way of the workers."""
    threads = torch.get_num_threads()
    if threads == 1 or not _has_openmp():
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def run_pieces(loop: Callable[..., Any], arguments: tuple[object, ...], num_blocks: int, pieces: int) -> list[Any]:
    """Cut a compiled loop over blocks into pieces of about one size and run them at the same time.

    Args:
        loop: Takes the arguments, its first block, and the block after its last one.
        arguments: The same for all pieces.
        num_blocks: How many blocks there are.
        pieces: How many pieces; :func:`num_workers` at most.

    Returns:
        What the loop returned, piece by piece.
    """
    if pieces == 1:
        return [loop(*arguments, 0, num_blocks)]
    returned: list[Any] = [None] * pieces

    def run(piece: int) -> None:
        first, stop = (end * num_blocks // pieces for end in (piece, piece + 1))
        returned[piece] = loop(*arguments, first, stop)

    run_workers([functools.partial(run, piece) for piece in range(pieces)], lambda: None)
    return returned


def _end_waiting_threads() -> None:
    """Let the threads of OpenMP end that wait actively after torch's last parallel operation, some milliseconds long.

    The workers would share their cores with them. The next parallel operation begins new ones.
    """
    if (pause := _openmp_pause()) is not None:
        pause(_PAUSE_SOFT)


@functools.cache
def _openmp_pause() -> Callable[[int], int] | None:
    """``omp_pause_resource_all`` (OpenMP 5.0) of the library that torch uses, None where there is none."""
    return None if (library := openmp_library()) is None else getattr(library, "omp_pause_resource_all", None)


def openmp_library() -> ctypes.CDLL | None:
    """What has the functions of OpenMP's library; None in a forked process, where it waits for threads long gone."""
    return ctypes.CDLL(None) if _has_openmp() and os.name == "posix" and os.getpid() == _PROCESS else None


@functools.cache
def _has_openmp() -> bool:
    # torch has not annotated this function
    return bool(torch.backends.openmp.is_available())  # type: ignore[no-untyped-call]


@functools.cache
def _executor(threads: int) -> ThreadPoolExecutor:
    """The threads of this process.

    ``torch.set_num_threads`` sets the number of the calling thread, and that with which later threads begin. So all
    workers begin here, and then the latter is what it was.
    """
    count = min(threads, MAX_WORKERS) - 1
    all_there = threading.Barrier(count)

    def begin() -> None:
        torch.set_num_threads(1)
        # a thread takes over the number with which it begins when it is first asked for it: now
        torch.get_num_threads()
        all_there.wait()

    executor = ThreadPoolExecutor(count, thread_name_prefix="hf_lowmem_optim")
    wait([executor.submit(begin) for _ in range(count)])
    torch.set_num_threads(threads)
    return executor


if hasattr(os, "register_at_fork"):
    # a child has none of its parent's threads
    os.register_at_fork(after_in_child=_executor.cache_clear)
    os.register_at_fork(after_in_child=_openmp_pause.cache_clear)
