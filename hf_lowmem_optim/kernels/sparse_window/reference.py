"""Plain torch: the specification of the operations on a sparse window.

Each row is scattered into a dense piece of at most ``CHUNK_ENTRIES`` entries (or one block), so that the temporaries
stay bounded. Rows are added in the order of their storage, which fixes the result to the last bit.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_lowmem_optim.kernels.sparse_window.layout import SparseWindow, WindowStep

__all__ = [
    "combine_",
    "descend_all_",
    "dots",
    "gram_row",
    "update_all_",
]

CHUNK_ENTRIES = 3 << 15
"""Entries of the tensor that are worked on at a time."""

UNTOUCHED_BITS = -(2**31)
"""The bits of −0.0, from which z2 starts: a sum that has met any w2·V² is +0.0 or more, or NaN, never −0.0."""


@dataclass(frozen=True)
class _Chunk:
    """Some neighbouring blocks: entries ``entries`` of the tensor, columns ``columns`` of the rows."""

    entries: slice
    columns: slice
    block_starts: Tensor  # int64 [columns]: start of each column's block, relative to the chunk

    @property
    def numel(self) -> int:
        return int(self.entries.stop - self.entries.start)

    def positions(self, indices: Tensor, row: int) -> Tensor:
        """Positions of a row's entries relative to the chunk, int64 ``[columns]``."""
        return self.block_starts + indices[row, self.columns]


def _chunks(window: SparseWindow) -> Iterator[_Chunk]:
    blocks_per_chunk = max(1, CHUNK_ENTRIES // window.block_size)
    columns_per_chunk = blocks_per_chunk * window.kept_per_block
    entries_per_chunk = blocks_per_chunk * window.block_size
    column = torch.arange(min(columns_per_chunk, window.kept), device=window.indices.device)
    block_starts = column // window.kept_per_block * window.block_size
    for number in range(-(-window.num_blocks // blocks_per_chunk)):
        columns = slice(number * columns_per_chunk, min((number + 1) * columns_per_chunk, window.kept))
        entries = slice(number * entries_per_chunk, min((number + 1) * entries_per_chunk, window.numel))
        yield _Chunk(entries, columns, block_starts[: columns.stop - columns.start])


def update_all_(windows: Sequence[SparseWindow], steps: Iterable[WindowStep]) -> None:
    """See :func:`hf_lowmem_optim.kernels.sparse_window.foreach_window_update_`."""
    for param, rows, weights, lr, weight_decay, eps in steps:
        _update_(param, rows, weights, lr, eps, weight_decay)


def _update_(param: Tensor, window: SparseWindow, weights: Tensor, lr: float, eps: float, weight_decay: float) -> None:
    rows = [(row, w1, w2) for row, (w1, w2) in enumerate(weights.T.tolist()) if w1 != 0 or w2 != 0]
    if not rows and weight_decay == 0:
        return
    for chunk in _chunks(window):
        z1 = torch.zeros(chunk.numel, device=param.device)
        z2 = torch.full_like(z1, -0.0)
        for row, w1, w2 in rows:
            positions = chunk.positions(window.indices, row)
            value = window.values[row, chunk.columns].float()
            z1.scatter_add_(0, positions, w1 * value)
            z2.scatter_add_(0, positions, w2 * (value * value))

        z2.masked_fill_(z2.view(torch.int32) == UNTOUCHED_BITS, 1)  # z1 is 0 there: no step, whatever eps is
        root = z2.double().sqrt_().float()  # torch's float32 square root on the CPU is not correctly rounded
        update = z1.div_(root.add_(eps)).mul_(lr)
        piece = param[chunk.entries]
        stepped = piece if piece.dtype == torch.float32 else piece.float()
        if weight_decay != 0:
            stepped.mul_(1 - lr * weight_decay)
        stepped.sub_(update)
        if stepped is not piece:
            piece.copy_(stepped)


def dots(window: SparseWindow, dense: Tensor) -> Tensor:
    """See :func:`hf_lowmem_optim.kernels.sparse_window.window_dots`."""
    dots = torch.zeros(window.window, dtype=torch.float64, device=dense.device)
    for chunk in _chunks(window):
        piece = dense[chunk.entries].double()
        for row in range(window.window):
            value = window.values[row, chunk.columns].double()
            dots[row] += torch.dot(piece[chunk.positions(window.indices, row)], value)
    return dots


def combine_(out: Tensor, window: SparseWindow, weights: Tensor) -> None:
    """See :func:`hf_lowmem_optim.kernels.sparse_window.window_combine_`."""
    rows = [(row, weight) for row, weight in enumerate(weights.tolist()) if weight != 0]
    for chunk in _chunks(window):
        piece = out[chunk.entries]
        for row, weight in rows:
            value = window.values[row, chunk.columns].float()
            piece.scatter_add_(0, chunk.positions(window.indices, row), weight * value)


def gram_row(window: SparseWindow, row: int) -> Tensor:
    """See :func:`hf_lowmem_optim.kernels.sparse_window.window_gram_row`."""
    dots = torch.zeros(window.window, dtype=torch.float64, device=window.indices.device)
    for chunk in _chunks(window):
        piece = torch.zeros(chunk.numel, dtype=torch.float64, device=dots.device)
        piece[chunk.positions(window.indices, row)] = window.values[row, chunk.columns].double()
        for other in range(window.window):
            value = window.values[other, chunk.columns].double()
            dots[other] += torch.dot(piece[chunk.positions(window.indices, other)], value)
    return dots


def descend_all_(windows: Sequence[SparseWindow], steps: Iterable[WindowStep]) -> None:
    """See :func:`hf_lowmem_optim.kernels.sparse_window.foreach_window_descend_`."""
    for param, rows, weights, lr, weight_decay, _ in steps:
        _descend_(param, rows, weights, lr, weight_decay)


def _descend_(param: Tensor, window: SparseWindow, weights: Tensor, lr: float, weight_decay: float) -> None:
    rows = [(row, weight) for row, weight in enumerate(weights.tolist()) if weight != 0]
    for chunk in _chunks(window):
        direction = torch.zeros(chunk.numel, device=param.device)
        for row, weight in rows:
            value = window.values[row, chunk.columns].float()
            direction.scatter_add_(0, chunk.positions(window.indices, row), weight * value)
        piece = param[chunk.entries]
        decayed = piece.float()
        if weight_decay != 0:
            decayed = decayed * (1 - lr * weight_decay)
        piece.copy_(decayed - direction.mul_(lr))
