"""What the methods on rows of a cosine transform share: options, the sides of a matrix, the step along a basis."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from hf_lowmem_optim.engine.options import COUNT, Options, option
from hf_lowmem_optim.ops.cosine_basis import Basis, Ranking, Transform, basis_columns, basis_constants, by_fft
from hf_lowmem_optim.optimizers.ldadam import ldadam_descend_
from hf_lowmem_optim.spec import TensorSpec

__all__ = ["BasisOptions", "basis_state", "descend_", "one_by_one", "sides", "upright"]


@dataclass(frozen=True)
class BasisOptions(Options):
    """What the methods on rows of a cosine transform share."""

    rank: int | None = option(128, "r, how many rows are chosen.", within=COUNT, none="dense AdamW", shapes_state=True)
    ranking: Ranking = option("l1", 'Norm of the rows that are compared: ``"l1"`` or ``"l2"``.')
    dct_type: Literal[2, 3] = option(
        3, "Type of the cosine transform; 3 is the paper's formula. Neither is better.", shapes_state=True
    )
    transform: Transform = option(
        "auto",
        'How the cosine transform is computed: ``"matmul"``, ``"fft"``, or ``"auto"``, by size and kind of device.',
    )
    state_dtype: Literal["fp32", "param"] = option(
        "fp32", 'Storage of the moments: ``"fp32"``, or ``"param"`` for the parameter\'s dtype.', shapes_state=True
    )

    def basis_of(self, p: int, device: torch.device) -> Basis:
        """Return the basis for a dimension."""
        return Basis("dct2" if self.dct_type == 2 else "dct3", p, by_fft(p, self.transform, device))


def sides(shape: Sequence[int]) -> tuple[int, int]:
    """Return p and q of a matrix (of three and more dimensions, as (out, rest)), 0 and 0 of what is none."""
    if len(shape) < 2:
        return 0, 0
    p, q = sorted((shape[0], math.prod(shape[1:])))
    return p, q


def one_by_one(W: Sequence[Tensor]) -> bool:
    """Return whether matrices are updated one by one: products of several at once may be rounded otherwise on a CPU."""
    return len(W) > 1 and W[0].device.type == "cpu"


def upright(matrices: Sequence[Tensor]) -> list[Tensor]:
    """Return matrices of one shape as (p, q): tall and square ones transposed."""
    return [matrix.mT for matrix in matrices] if matrices[0].shape[0] >= matrices[0].shape[1] else list(matrices)


def descend_(W: Sequence[Tensor], d: Tensor, basis: Basis, rows: Tensor, decay: float, step_size: float) -> None:
    """Write W ← decay·W − step_size·B_I d for each of n weights, rounded once.

    Args:
        W: Matrices [p, q] or transposes of such, of one shape and dtype.
        d: float32 [n, r, q].
        basis: B.
        rows: I, int64 [n, r].
        decay: Factor of the weights.
        step_size: Factor of the product.
    """
    if basis.kind != "identity":
        ldadam_descend_(W, basis_columns(basis, rows), d, decay, step_size)
        return
    for weight, chosen, direction in zip(W, rows, d, strict=True):
        moved = weight.index_select(0, chosen).float().mul_(decay).sub_(direction, alpha=step_size)
        weight.mul_(decay).index_copy_(0, chosen, moved.to(weight.dtype))


def basis_state(shape: Sequence[int], device: torch.device, o: BasisOptions) -> dict[Hashable, TensorSpec]:
    """Describe the constants that a matrix of a shape needs."""
    return basis_constants(o.basis_of(sides(shape)[0], device), device)
