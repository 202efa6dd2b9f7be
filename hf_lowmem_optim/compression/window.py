"""Windows: the last m compressed gradients of one tensor as rows of a matrix G that is never formed.

Three ways to store a row, with the same three operations: ``gram_row`` (⟨gᵢ, g_row⟩ for every i), ``combine_``
(out ← out + Gᵀ·w) and ``clear_`` (g_row ← 0). A view holds the tensors of the state, it owns nothing; a row that was
never written is zero. Rows form a ring: who writes one decides which. Inner products are float64, because the Gram
matrix of gradients that resemble each other is ill-conditioned.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from hf_lowmem_optim.kernels.sparse_window import SparseWindow, window_combine_, window_gram_row

__all__ = ["DenseRows", "LowRankRows", "SparseRows", "Window", "widened_entries"]

#: Entries that are widened to float64 at a time.
_CHUNK_ENTRIES = 1 << 22


class Window(Protocol):
    """What the preconditioned optimizers need of a tensor's window."""

    def gram_row(self, row: int) -> Tensor:
        """Return ⟨gᵢ, g_row⟩ for every row i, float64 [m]."""

    def combine_(self, out: Tensor, weights: Tensor) -> None:
        """Add Σ wᵢ·gᵢ to ``out``, float32 [numel]; ``weights`` are float32 [m]."""

    def clear_(self, row: int) -> None:
        """Set g_row to zero."""


@dataclass(frozen=True)
class DenseRows:
    """Rows stored as they are: for small tensors.

    Attributes:
        rows: float32 [m, numel].
    """

    rows: Tensor

    def gram_row(self, row: int) -> Tensor:
        """See :class:`Window`."""
        newest = self.rows[row].double()
        return torch.cat([part.double() @ newest for part in _parts(self.rows)])

    def combine_(self, out: Tensor, weights: Tensor) -> None:
        """See :class:`Window`."""
        out.addmv_(self.rows.T, weights)

    def clear_(self, row: int) -> None:
        """See :class:`Window`."""
        self.rows[row] = 0


@dataclass(frozen=True)
class LowRankRows:
    """Rows gᵢ = PᵢQᵢᵀ stored as their factors.

    Attributes:
        left: Pᵢᵀ, float32 [m, r, p].
        right: Qᵢᵀ, float32 [m, r, q].
    """

    left: Tensor
    right: Tensor

    def gram_row(self, row: int) -> Tensor:
        """See :class:`Window`: ⟨P₁Q₁ᵀ, P₂Q₂ᵀ⟩ = Σ (P₁ᵀP₂)∘(Q₁ᵀQ₂)."""
        overlaps = []
        for factors in (self.left, self.right):
            newest = factors[row].double().T  # [p or q, r]
            overlaps.append(torch.cat([part.double() @ newest for part in _parts(factors)]))  # [m, r, r]
        return (overlaps[0] * overlaps[1]).sum(dim=(1, 2))

    def combine_(self, out: Tensor, weights: Tensor) -> None:
        """See :class:`Window`: one product over all rows, [p, m·r] by [m·r, q]."""
        weighted = (self.left * weights[:, None, None]).flatten(0, 1)
        out.view(self.left.shape[2], -1).addmm_(weighted.T, self.right.flatten(0, 1))

    def clear_(self, row: int) -> None:
        """See :class:`Window`. The right factor before goes on to this row, so that the next one can start from it."""
        self.left[row] = 0
        self.right[row] = self.right[row - 1]


@dataclass(frozen=True)
class SparseRows:
    """Rows stored as the entries that block Top-K kept.

    Attributes:
        entries: Indices and values.
    """

    entries: SparseWindow

    def gram_row(self, row: int) -> Tensor:
        """See :class:`Window`."""
        return window_gram_row(self.entries, row)

    def combine_(self, out: Tensor, weights: Tensor) -> None:
        """See :class:`Window`."""
        window_combine_(out, self.entries, weights)

    def clear_(self, row: int) -> None:
        """See :class:`Window`."""
        self.entries.values[row] = 0


def _parts(rows: Tensor) -> Iterator[Tensor]:
    """Cut [m, …] into pieces of a bounded number of entries."""
    return iter(torch.split(rows, _rows_at_a_time(rows[0].numel())))


def widened_entries(window: int, row_entries: int) -> int:
    """Return how many entries of a window of dense or low-rank rows are in float64 at a time.

    Args:
        window: Rows of the window.
        row_entries: Entries of a row, or of one factor of a row.

    Returns:
        The entries of some whole rows.
    """
    return min(window, _rows_at_a_time(row_entries)) * row_entries


def _rows_at_a_time(row_entries: int) -> int:
    return max(1, _CHUNK_ENTRIES // max(1, row_entries))
