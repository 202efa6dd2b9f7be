"""How tensors reach the loops: as arrays, and cut into pieces, on threads that sleep between calls.

A piece is one call of a compiled loop, which runs without the GIL. Where a tensor is cut into pieces depends on sizes
only, so that no result depends on the number of threads.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from functools import lru_cache
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from hf_lowmem_optim.ops.block_quant import Quantized
from hf_lowmem_optim.ops.window import SparseWindow

__all__ = [
    "DTYPE_CODES",
    "ENTRIES_PER_PIECE",
    "NO_BYTES",
    "block_ranges",
    "buffer_arguments",
    "run_pieces",
    "window_arguments",
]

R = TypeVar("R")

#: How a loop is told the dtype of a tensor of floats, which it takes as bytes; ``floats.py`` has the same numbers.
DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
#: Stand for tensors that are not there.
_ONE_GRID, _NO_CODES = np.zeros((1, 1), np.float32), np.zeros((1, 1), np.uint8)
NO_BYTES: NDArray[np.uint8] = np.empty(0, np.uint8)

_MAX_THREADS = 16
#: Another thread costs more than it gains if it has fewer entries than that.
_ENTRIES_PER_THREAD = 1 << 18
#: Between operations of torch, whose OpenMP threads spin on the other cores for some milliseconds after each.
ENTRIES_PER_THREAD_BETWEEN = 1 << 21
#: Work for some 100 microseconds, of which the call of a loop is a few.
ENTRIES_PER_PIECE = 1 << 17


def buffer_arguments(buffer: Quantized) -> tuple[Any, ...]:
    """Return what a loop takes a buffer apart into: codes, lo, hi, dtype code of both, bits, block size."""
    lo, hi, fmt = buffer.lo.view(torch.uint8).numpy(), buffer.hi.view(torch.uint8).numpy(), buffer.format
    return buffer.codes.numpy(), lo, hi, DTYPE_CODES[buffer.lo.dtype], fmt.bits, fmt.block_size


def window_arguments(window: SparseWindow) -> tuple[Any, ...]:
    """Return what the loops take for a window, with a code of the storage of its values: 3 for 8 bits, 4 for 4."""
    values, grids = window.values, window.grids
    stored = _NO_CODES if values is None else values.view(torch.uint8).numpy()
    lo, step = (_ONE_GRID, _ONE_GRID) if grids is None else (grids.lo.numpy(), grids.step.numpy())
    code = 4 if values is None else 3 if grids is not None else DTYPE_CODES[values.dtype]
    return window.indices.numpy(), stored, code, lo, step


@lru_cache  # the same few sizes at every step
def block_ranges(numel: int, block_size: int) -> tuple[tuple[int, int], ...]:
    """Cut a tensor into pieces of whole blocks: the first block of each, and the one after its last."""
    num_blocks, step = -(-numel // block_size), max(1, ENTRIES_PER_PIECE // block_size)
    return tuple((first, min(first + step, num_blocks)) for first in range(0, num_blocks, step))


def run_pieces(
    loop: Callable[..., R], pieces: Iterable[tuple[Any, ...]], entries: int, *, each: int | None = None
) -> list[R]:
    """Call a loop for every piece, on as many threads as torch may use and the entries are worth.

    Args:
        loop: The loop.
        pieces: Its arguments, piece by piece; taken one at a time by whichever thread is free.
        entries: Entries of all pieces together.
        each: Entries that are worth a thread; some default if None.

    Returns:
        What the loop returned, in the order of the pieces.

    Raises:
        BaseException: What a piece, or the making of one, has raised. No other is begun then, and none still runs.
    """
    threads = min(torch.get_num_threads(), _MAX_THREADS, entries // (each or _ENTRIES_PER_THREAD))
    if threads <= 1:
        return [loop(*piece) for piece in pieces]
    shared = _SharedPieces(loop, pieces)
    futures: list[Future[None]] = []
    try:
        with suppress(RuntimeError):  # the interpreter ends, or no thread is to be had: this one does the work
            for _ in range(threads - 1):
                futures.append(_pool(os.getpid()).submit(shared.work))
        shared.work()
    finally:
        shared.stop()
        _join(futures)
    for future in futures:
        if not future.cancelled():
            future.result()
    return shared.results


@lru_cache(maxsize=1)
def _pool(process: int) -> ThreadPoolExecutor:
    """Return the threads of a process, which sleep between calls; a forked child has none of its parent's."""
    return ThreadPoolExecutor(_MAX_THREADS - 1, thread_name_prefix="hf_lowmem_optim")


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


def _join(futures: list[Future[None]]) -> None:
    """Wait for what runs, and call off what has found no core yet; an interrupt meanwhile is raised afterwards."""
    interrupt: BaseException | None = None
    while True:
        try:
            wait([future for future in futures if not future.cancel()])
            break
        except BaseException as error:
            interrupt = error
    if interrupt is not None:
        raise interrupt
