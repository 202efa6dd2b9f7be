"""The window of a preconditioned optimizer as what pruning reads: pieces of the matrix G, whose rows are gradients."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from hf_lowmem_optim.ops.block_topk import kept_per_block
from hf_lowmem_optim.ops.sparse_window import SparseWindow

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
        indices, values, numel, block_size, kept = (
            getattr(self.window, name) for name in ("indices", "values", "numel", "block_size", "kept_per_block")
        )
        blocks = max(1, _PIECE_NUMBERS // (len(indices) * block_size))
        for first in range(0, self.window.num_blocks, blocks):
            columns = slice(first * kept, min((first + blocks) * kept, indices.shape[1]))
            entries = slice(first * block_size, min((first + blocks) * block_size, numel))
            starts = torch.arange(columns.stop - columns.start, device=indices.device) // kept * block_size
            piece = torch.zeros(len(indices), entries.stop - entries.start, dtype=torch.float64, device=indices.device)
            # a row that was not written yet has zeros at one place: it does not matter which of them stays
            yield entries, piece.scatter_(1, starts + indices[:, columns], values[:, columns].double())


def rows_of(state: Mapping[str, Any], shape: Sequence[int], options: Any) -> Rows | None:
    """Return the window in the state of one tensor (or of one matrix of a stack), None before its first gradient."""
    if "rows" in state:
        return DenseRows(state["rows"])
    if "left" in state:
        return LowRankRows(state["left"], state["right"])
    if "indices" not in state:
        return None
    kept = kept_per_block(options.block_size, options.density)
    return SparseRows(SparseWindow(state["indices"], state["values"], math.prod(shape), options.block_size, kept))
