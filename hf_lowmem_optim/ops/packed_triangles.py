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
from functools import cached_property, lru_cache

import torch
from torch import Tensor

from hf_lowmem_optim.ops.block_grid import Piece, Region, Storage, Vectors, Width
from hf_lowmem_optim.ops.inverse_root import largest_and_norm
from hf_lowmem_optim.spec import TensorSpec

__all__ = ["Semidefinite", "Symmetric", "semidefinite_factor"]

_JITTER = 1e-6
#: With the last one, the sum is diagonally dominant.
_ATTEMPTS = 8


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
        if self.storage == "fp32":
            return self._full(state, piece)
        lower = self._lower(state, piece)
        lower.diagonal(dim1=1, dim2=2).mul_(0.5)
        return lower + lower.mT

    def write_(self, state: Mapping[str, Tensor], piece: Piece, values: Tensor) -> None:
        """Store float32 [blocks, n, n], of which only the lower triangle counts unless it is stored in full."""
        flat = values.flatten(1)
        if self.storage == "fp32":
            self._parts[0].write_(state, piece, flat)
            return
        places = _strict_lower(values.shape[-1], values.device)
        self._parts[0].write_(state, piece, values.diagonal(dim1=1, dim2=2))
        self._parts[1].write_(state, piece, flat.index_select(1, places))

    @cached_property
    def _parts(self) -> list[Vectors]:
        side, counted = self.side, self.component
        if self.storage == "fp32":
            return [Vectors(self.key, counted, lambda a, b: side(a, b) ** 2)]
        lower = Vectors(self.key, counted, lambda a, b: side(a, b) * (side(a, b) - 1) // 2, self.storage)
        return [Vectors(f"{self.key}_diagonal", counted, side), lower]

    def _full(self, state: Mapping[str, Tensor], piece: Piece) -> Tensor:
        n = self.side(piece.region.a, piece.region.b)
        return self._parts[0].read(state, piece).view(-1, n, n)

    def _lower(self, state: Mapping[str, Tensor], piece: Piece) -> Tensor:
        """Return the stored triangles with their diagonals, and zeros above."""
        diagonal, lower = (part.read(state, piece) for part in self._parts)
        n = diagonal.shape[1]
        out = diagonal.new_zeros(len(diagonal), n, n)
        out.flatten(1).index_copy_(1, _strict_lower(n, out.device), lower)
        out.diagonal(dim1=1, dim2=2).copy_(diagonal)
        return out


class Semidefinite(Symmetric):
    """A positive semidefinite matrix for each block; of triangles, those of its Cholesky factor."""

    def read(self, state: Mapping[str, Tensor], piece: Piece) -> Tensor:
        """Return the matrices of a piece, as :meth:`Symmetric.read`."""
        if self.storage == "fp32":
            return self._full(state, piece)
        C = self._lower(state, piece)
        return C @ C.mT

    def write_(self, state: Mapping[str, Tensor], piece: Piece, values: Tensor) -> None:
        """Store float32 [blocks, n, n]."""
        super().write_(state, piece, values if self.storage == "fp32" else semidefinite_factor(values))


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
    for _ in range(_ATTEMPTS):
        (failed,) = torch.nonzero((info != 0) & finite, as_tuple=True)
        if len(failed) == 0:
            break
        jitter[failed] *= 10
        C[failed], info[failed] = _cholesky(S[failed], jitter[failed])
    # a scatter to the few, if any, where a mask would go through all
    for which, value in ((zero, 0.0), (~finite, torch.nan)):
        C[which] = value
    return C


def _cholesky(S: Tensor, jitter: Tensor) -> tuple[Tensor, Tensor]:
    """Return the factor of S + j·I, which torch copies, and whether there is none; S is left as it was."""
    diagonal = S.diagonal(dim1=1, dim2=2)
    before = diagonal.clone()
    diagonal.add_(jitter[:, None])
    C, info = torch.linalg.cholesky_ex(S)
    diagonal.copy_(before)
    return C, info


@lru_cache(maxsize=8)
def _strict_lower(n: int, device: torch.device) -> Tensor:
    """Return the places of the strict lower triangle in a flattened matrix, row by row."""
    places: Tensor = torch.tril_indices(n, n, -1, device=device)
    return places[0] * n + places[1]
