"""The window of a preconditioned optimizer as what pruning reads: pieces of the matrix G, whose rows are gradients."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from hf_lowmem_optim.ops.window import SparseWindow, windows_of

__all__ = ["DenseRows", "LowRankRows", "Rows", "SparseRows", "rows_of"]

#: Numbers of a piece, of which float64 takes 16 MiB.
_PIECE_NUMBERS = 1 << 21


class Rows(Protocol):
    """The columns of G that belong to one tensor."""

    def pieces(self) -> Iterator[tuple[slice, Tensor]]:
        """Yield entries of the flat tensor, from first to last, with their columns of G, float64 [m, entries]."""


@dataclass(frozen=True)
class DenseRows:
    """Gradients as they came: float32 [m, n]."""

    rows: Tensor

    def pieces(self) -> Iterator[tuple[slice, Tensor]]:
        """Yield the columns."""
        window, numel = self.rows.shape
        length = max(1, _PIECE_NUMBERS // window)
        for start in range(0, numel, length):
            entries = slice(start, min(start + length, numel))
            yield entries, self.rows[:, entries].double()


@dataclass(frozen=True)
class LowRankRows:
    """Gradients of a p × q matrix as products PQᵀ: P float32 [m, r, p], Q float32 [m, r, q]."""

    left: Tensor
    right: Tensor

    def pieces(self) -> Iterator[tuple[slice, Tensor]]:
        """Yield the columns of some rows of the matrix at a time."""
        window, _, p = self.left.shape
        q = self.right.shape[2]
        right, length = self.right.double(), max(1, _PIECE_NUMBERS // (window * q))
        for start in range(0, p, length):
            left = self.left[:, :, start : start + length].double()
            yield slice(start * q, (start + left.shape[2]) * q), (left.mT @ right).view(window, -1)


@dataclass(frozen=True)
class SparseRows:
    """Gradients of which each block keeps its largest entries."""

    window: SparseWindow

    def pieces(self) -> Iterator[tuple[slice, Tensor]]:
        """Yield the columns of some blocks at a time, scattered."""
        G = self.window
        kept, block_size = G.kept_per_block, G.block_size
        blocks = max(1, _PIECE_NUMBERS // (G.window * block_size))
        for first in range(0, G.num_blocks, blocks):
            columns = slice(first * kept, min((first + blocks) * kept, G.kept))
            entries = slice(first * block_size, min((first + blocks) * block_size, G.numel))
            starts = torch.arange(columns.stop - columns.start, device=G.device) // kept * block_size
            piece = torch.zeros(G.window, entries.stop - entries.start, dtype=torch.float64, device=G.device)
            indices, values = G.read(columns)
            # a row that was not written yet has zeros at one place: it does not matter which of them stays
            yield entries, piece.scatter_(1, starts + indices, values.double())


def rows_of(state: Mapping[str, Any], shape: Sequence[int], options: Any) -> Rows | None:
    """Return the window in the state of one tensor (or of one matrix of a stack), None before its first gradient."""
    if "rows" in state:
        return DenseRows(state["rows"])
    if "left" in state:
        return LowRankRows(state["left"], state["right"])
    if "indices" not in state:
        return None
    one = {key: [part] for key, part in state.items() if isinstance(part, Tensor)}
    (window,) = windows_of(one, [math.prod(shape)], options.block_size, options.density)
    window.check()
    return SparseRows(window)
