"""Symmetric matrices of the blocks of a grid, stored in full or as quantized triangles.

``"fp32"`` keeps all n² entries; the other storages the diagonal in float32, and the strict lower triangle row by row:
of a root itself (:class:`Symmetric`), of a positive semidefinite statistic of its Cholesky factor
(:class:`Semidefinite`):

    write:  j ← 1e-6·‖S‖_F;  C ← chol(S + j·I), where that fails with ten times the j;  Q(C)
    read:   S ← Q⁻¹(C)·Q⁻¹(C)ᵀ

which is positive semidefinite whatever the rounding. S itself, rounded, would not be, and Newton's iterations explode
on negative eigenvalues. 8 bits take 0.53 bytes per entry of the matrix, 4 bits 0.28.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from hf_lowmem_optim.ops.block_grid import Piece, Region, Storage, Vectors, Width
from hf_lowmem_optim.ops.dispatch import Op
from hf_lowmem_optim.ops.inverse_root import largest_and_norm
from hf_lowmem_optim.spec import TensorSpec

__all__ = ["Semidefinite", "Symmetric", "semidefinite_factor"]

_JITTER = 1e-6
#: With the last one, the sum is diagonally dominant.
_ATTEMPTS = 8
#: From this side on, a CPU leaves out a quarter of a symmetric product.
_HALVED = 256


@dataclass(frozen=True)
class Symmetric:
    """A symmetric matrix for each block, in the state of its tensor.

    Attributes:
        key: Prefix of its state keys.
        component: Name under which its bytes are counted.
        side: Its rows, from a block's rows and columns.
        storage: How it is stored.
    """

    key: str
    component: str
    side: Width
    storage: Storage

    def specs(self, regions: Sequence[Region]) -> dict[str, TensorSpec]:
        """Describe its state."""
        return {key: spec for part in self._parts for key, spec in part.specs(regions).items()}

    def read(self, state: Mapping[str, Tensor], piece: Piece) -> Tensor:
        """Return the matrices of a piece, float32 [blocks, n, n]; a view of what is stored in full."""
        return self._stored(state, piece, mirrored=True)

    def write_(self, state: Mapping[str, Tensor], piece: Piece, values: Tensor) -> None:
        """Store float32 [blocks, n, n], of which only the lower triangle counts unless it is stored in full."""
        if self.storage == "fp32":
            self._parts[0].write_(state, piece, values.flatten(1))
            return
        n = values.shape[-1]
        lower = values.new_empty(len(values), n * (n - 1) // 2)
        _take_triangles(values, lower)
        self._parts[0].write_(state, piece, values.diagonal(dim1=1, dim2=2))
        self._parts[1].write_(state, piece, lower)

    @cached_property
    def _parts(self) -> list[Vectors]:
        side, counted = self.side, self.component
        if self.storage == "fp32":
            return [Vectors(self.key, counted, lambda a, b: side(a, b) ** 2)]
        lower = Vectors(self.key, counted, lambda a, b: side(a, b) * (side(a, b) - 1) // 2, self.storage)
        return [Vectors(f"{self.key}_diagonal", counted, side), lower]

    def _stored(self, state: Mapping[str, Tensor], piece: Piece, *, mirrored: bool) -> Tensor:
        """Return the matrices as stored; of triangles mirrored ones, or zeros above the diagonal."""
        n = self.side(piece.region.a, piece.region.b)
        if self.storage == "fp32":
            return self._parts[0].read(state, piece).view(-1, n, n)
        diagonal, lower = (part.read(state, piece) for part in self._parts)
        out = diagonal.new_empty(len(diagonal), n, n)
        _fill_squares(out, diagonal, lower, mirrored)
        return out


class Semidefinite(Symmetric):
    """A positive semidefinite matrix for each block; of triangles, those of its Cholesky factor."""

    def read(self, state: Mapping[str, Tensor], piece: Piece) -> Tensor:
        """Return the matrices of a piece, as :meth:`Symmetric.read`."""
        stored = self._stored(state, piece, mirrored=False)
        return stored if self.storage == "fp32" else _mirror_(_product(stored))

    def write_(self, state: Mapping[str, Tensor], piece: Piece, values: Tensor) -> None:
        """Store float32 [blocks, n, n]."""
        super().write_(state, piece, values if self.storage == "fp32" else semidefinite_factor(values))

    def update_(self, state: Mapping[str, Tensor], piece: Piece, A: Tensor, decay: float, share: float) -> Tensor:
        """Replace the matrices S of a piece by decay·S + share·AAᵀ, and return those, a copy.

        Args:
            state: The state; written.
            piece: The piece.
            A: float32 [blocks, n, any].
            decay: Factor of the old ones.
            share: Factor of the products.
        """
        stored = self._stored(state, piece, mirrored=False)
        S = stored.clone() if self.storage == "fp32" else _product(stored)
        _add_gram_(S, A, decay, share)
        _mirror_(S)
        self.write_(state, piece, S)
        return S


def _product(C: Tensor) -> Tensor:
    """Return C·Cᵀ of lower triangular matrices; where it has halves, but its upper quarter."""
    S = torch.empty_like(C)
    _add_gram_(S, C, 0.0, 1.0, triangular=True)
    return S


def _half(S: Tensor) -> int:
    """Return the side of the quarters by which a CPU computes symmetric matrices; 0 for whole ones."""
    n = S.shape[-1]
    return n // 2 if S.device.type == "cpu" and n >= _HALVED and n % 32 == 0 else 0


def _add_gram_(S: Tensor, A: Tensor, beta: float, alpha: float, *, triangular: bool = False) -> None:
    """Replace symmetric S by beta·S + alpha·AAᵀ for each matrix of a stack; where it has halves, but its upper quarter.

    Args:
        S: float32 [matrices, n, n]; with a beta of 0 of any values.
        A: float32 [matrices, n, any].
        beta: Factor of S.
        alpha: Factor of the products.
        triangular: Whether A is lower triangular: half of it is zero then.
    """
    h, n = _half(S), S.shape[-1]
    if h == 0:
        S.baddbmm_(A, A.mT, beta=beta, alpha=alpha)
        return
    for rows, columns in ((slice(h), slice(h)), (slice(h, n), slice(h)), (slice(h, n), slice(h, n))):
        inner = columns.stop if triangular else A.shape[2]
        left, right = A[:, rows, :inner], A[:, columns, :inner]
        S[:, rows, columns].baddbmm_(left, right.mT, beta=beta, alpha=alpha)


def _mirror_(S: Tensor) -> Tensor:
    """Write the upper quarter that :func:`_add_gram_` leaves out."""
    h = _half(S)
    S[:, :h, h:] = S[:, h:, :h].mT
    return S


def semidefinite_factor(S: Tensor) -> Tensor:
    """Return lower triangular C with C·Cᵀ = S + j·I for each positive semidefinite matrix of a stack.

    Args:
        S: float32 [number of matrices, n, n]; left as it is.

    Returns:
        The factors; zeros for a matrix of zeros, NaN for one that is not finite.
    """
    norm = largest_and_norm(S)[1].flatten()
    zero, finite = norm == 0, norm < torch.inf
    jitter = torch.where(zero, 1, _JITTER * norm)
    C, info = _cholesky(S, jitter)
    # most often none, so that nothing goes through all matrices again
    (odd,) = torch.nonzero((info != 0) | zero | ~finite, as_tuple=True)
    if len(odd) == 0:
        return C
    for _ in range(_ATTEMPTS):
        (failed,) = torch.nonzero((info != 0) & finite, as_tuple=True)
        if len(failed) == 0:
            break
        jitter[failed] *= 10
        C[failed], info[failed] = _cholesky(S[failed], jitter[failed])
    C[odd] = torch.where(finite[odd, None, None], C[odd], torch.nan).masked_fill_(zero[odd, None, None], 0)
    return C


def _cholesky(S: Tensor, jitter: Tensor) -> tuple[Tensor, Tensor]:
    """Return the factor of S + j·I, which torch copies, and whether there is none; S is left as it was."""
    diagonal = S.diagonal(dim1=1, dim2=2)
    before = diagonal.clone()
    diagonal.add_(jitter[:, None])
    C, info = torch.linalg.cholesky_ex(S)
    diagonal.copy_(before)
    return C, info


@Op
def _fill_squares(out: Tensor, diagonal: Tensor, lower: Tensor, mirrored: bool) -> None:
    """Write matrices from their diagonals and strict lower triangles.

    Args:
        out: float32 [matrices, n, n], contiguous; all of it is written.
        diagonal: float32 [matrices, n].
        lower: float32 [matrices, n·(n − 1)/2], row by row, each contiguous.
        mirrored: Whether they are symmetric; else there are zeros above the diagonal.
    """
    n = out.shape[-1]
    # made anew each time: 16 bytes per entry would be much to keep
    rows, columns = torch.tril_indices(n, n, -1, device=out.device)
    if mirrored:
        out[:, columns, rows] = lower
    else:
        out.zero_()
    out[:, rows, columns] = lower
    out.diagonal(dim1=1, dim2=2).copy_(diagonal)


@Op
def _take_triangles(square: Tensor, lower: Tensor) -> None:
    """Write the strict lower triangles of matrices.

    Args:
        square: float32 [matrices, n, n], of which the rows or the columns are contiguous.
        lower: float32 [matrices, n·(n − 1)/2], row by row, contiguous; all of it is written.
    """
    rows, columns = torch.tril_indices(square.shape[-1], square.shape[-1], -1, device=square.device)
    lower.copy_(square[:, rows, columns])
