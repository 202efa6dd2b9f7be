"""Pieces of work on several threads, which begin and end with the call.

A piece is one call of a compiled loop, which runs without the GIL. Where a tensor is cut into pieces depends on sizes
only, so that no result depends on the number of threads.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any, Generic, TypeVar

import torch

__all__ = ["block_ranges", "num_pieces", "run_pieces"]

R = TypeVar("R")

_MAX_THREADS = 16
#: Another thread costs more than it gains if it has fewer entries than that.
_ENTRIES_PER_THREAD = 1 << 18
#: Work for some 100 microseconds, of which the call of a loop is a few.
_ENTRIES_PER_PIECE = 1 << 17


def num_pieces(num_blocks: int, block_size: int) -> int:
    """Return into how many pieces blocks of so many entries are cut."""
    return -(-num_blocks // max(1, _ENTRIES_PER_PIECE // block_size))


def block_ranges(num_blocks: int, block_size: int) -> Iterator[tuple[int, int]]:
    """Cut blocks of so many entries into pieces: the first block of each, and the one after its last."""
    step = max(1, _ENTRIES_PER_PIECE // block_size)
    for first in range(0, num_blocks, step):
        yield first, min(first + step, num_blocks)


def run_pieces(loop: Callable[..., R], pieces: Iterable[tuple[Any, ...]], entries: int) -> list[R]:
    """Call a loop for every piece, on as many threads as torch may use and the entries are worth.

    Args:
        loop: The loop.
        pieces: Its arguments, piece by piece; taken one at a time by whichever thread is free.
        entries: Entries of all pieces together.

    Returns:
        What the loop returned, in the order of the pieces.

    Raises:
        BaseException: What a piece, or the making of one, has raised. No other is begun then, and none still runs.
    """
    threads = min(torch.get_num_threads(), _MAX_THREADS, entries // _ENTRIES_PER_THREAD)
    if threads <= 1:
        return [loop(*piece) for piece in pieces]
    shared = _SharedPieces(loop, pieces)
    pool = ThreadPoolExecutor(threads - 1, thread_name_prefix="hf_lowmem_optim")
    futures: list[Future[None]] = []
    try:
        for _ in range(threads - 1):
            futures.append(pool.submit(shared.work))
        shared.work()
    finally:
        shared.stop()
        _close(pool, futures)
    for future in futures:
        future.result()
    return shared.results


class _SharedPieces(Generic[R]):
    """Pieces that several threads take from one iterator, and what came of them."""

    def __init__(self, loop: Callable[..., R], pieces: Iterable[tuple[Any, ...]]) -> None:
        self.results: list[Any] = []
        self._loop = loop
        self._pieces = iter(pieces)
        self._lock = threading.Lock()
        self._stopped = False

    def work(self) -> None:
        """Do one piece after the other while there are any."""
        try:
            while True:
                with self._lock:
                    piece = None if self._stopped else next(self._pieces, None)
                    if piece is None:
                        return
                    place = len(self.results)
                    self.results.append(None)
                self.results[place] = self._loop(*piece)
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """Let no thread take another piece."""
        self._stopped = True


def _close(pool: ThreadPoolExecutor, futures: list[Future[None]]) -> None:
    """Wait for the threads to end; an interrupt meanwhile is raised when they have."""
    interrupt: BaseException | None = None
    while True:
        try:
            # before the pool: in some versions of Python, a thread whose join was interrupted passes for ended
            wait(futures)
            pool.shutdown()
            break
        except BaseException as error:
            interrupt = error
    if interrupt is not None:
        raise interrupt
