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

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from hf_lowmem_optim.ops.block_grid import Piece, Region, Storage, Vectors, Width
from hf_lowmem_optim.ops.constants import constant
from hf_lowmem_optim.ops.dispatch import Op, chosen_backend
from hf_lowmem_optim.ops.inverse_root import largest_and_norm
from hf_lowmem_optim.spec import TensorSpec

__all__ = ["Semidefinite", "Symmetric", "semidefinite_factor", "triangle_constants"]

_JITTER = 1e-6
#: With the last one, the sum is diagonally dominant.
_ATTEMPTS = 8
#: From this side on, a CPU computes symmetric products by halves: an even multiple of what keeps those aligned.
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
        diagonal, lower = values.new_empty(len(values), n), values.new_empty(len(values), n * (n - 1) // 2)
        _take_triangles(values, diagonal, lower)
        for part, each in zip(self._parts, (diagonal, lower), strict=True):
            part.write_(state, piece, each)

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
        parts = [part.read(state, piece) for part in self._parts]
        if self.storage == "fp32":
            return parts[0].view(-1, n, n)
        out = parts[0].new_empty(len(parts[0]), n, n)
        _fill_squares(out, *parts, mirrored)
        return out


class Semidefinite(Symmetric):
    """A positive semidefinite matrix for each block; of triangles, those of its Cholesky factor."""

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
        old = stored if self.storage == "fp32" else _gram(stored, None, 0.0, 1.0, triangular=True)
        S = _gram(A, old, decay, share)
        self.write_(state, piece, S if self.storage == "fp32" else semidefinite_factor(S))
        return S


def _gram(A: Tensor, S: Tensor | None, beta: float, alpha: float, *, triangular: bool = False) -> Tensor:
    """Return beta·S + alpha·AAᵀ for each matrix of a stack, symmetric to the bit.

    Args:
        A: float32 [matrices, n, any].
        S: float32 [matrices, n, n], symmetric, or None for zeros; only read.
        beta: Factor of S.
        alpha: Factor of the products.
        triangular: Whether A is lower triangular: half of it is zero then.
    """
    n, h = A.shape[1], A.shape[1] // 2
    if A.device.type != "cpu" or n < _HALVED or n % 32:
        return alpha * (A @ A.mT) if S is None else torch.baddbmm(S, A, A.mT, beta=beta, alpha=alpha)
    out = A.new_empty(len(A), n, n)
    for rows, columns in ((slice(h), slice(h)), (slice(h, n), slice(h)), (slice(h, n), slice(h, n))):
        inner = columns.stop if triangular else A.shape[2]
        part = out[:, rows, columns]
        if S is not None:
            part.copy_(S[:, rows, columns])
        part.baddbmm_(A[:, rows, :inner], A[:, columns, :inner].mT, beta=beta, alpha=alpha)
    out[:, :h, h:] = out[:, h:, :h].mT
    return out


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


def triangle_constants(sides: Iterable[int], device: torch.device) -> dict[Hashable, TensorSpec]:
    """Describe what triangles of these sides hold on a device for the whole process, by the key of the constant."""
    if chosen_backend(device) == "cpu":  # numba's loops count for themselves
        return {}
    return {("triangle", n, device): TensorSpec((n * (n - 1) // 2,), torch.int64, "triangles") for n in set(sides)}


def _strict_lower(n: int, device: torch.device) -> Tensor:
    """Return the places of the strict lower triangle in a flattened matrix, row by row."""

    def make() -> Tensor:
        rows, columns = torch.tril_indices(n, n, -1, device=device)
        return rows * n + columns

    return constant(("triangle", n, device), make)


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
    out.zero_().flatten(1).index_copy_(1, _strict_lower(n, out.device), lower)
    if mirrored:
        out.add_(out.mT.clone())
    out.diagonal(dim1=1, dim2=2).copy_(diagonal)


@Op
def _take_triangles(square: Tensor, diagonal: Tensor, lower: Tensor) -> None:
    """Write the diagonals and strict lower triangles of matrices, the converse of :func:`_fill_squares`.

    Args:
        square: float32 [matrices, n, n], those next to each other, of rows or of columns next to each other.
        diagonal: float32 [matrices, n], contiguous.
        lower: float32 [matrices, n·(n − 1)/2], contiguous.
    """
    diagonal.copy_(square.diagonal(dim1=1, dim2=2))
    torch.index_select(square.flatten(1), 1, _strict_lower(square.shape[-1], square.device), out=lower)
