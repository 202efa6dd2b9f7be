"""Inverses of full-matrix statistics, reduced to the small Gram matrix of a window of gradients.

The window's rows g₁ … g_m are G, and the newest gradient c is its row r, that is c = Gᵀe_r. Both rules return weights w
of the rows in u = Gᵀw, so that only the m × m matrix GGᵀ enters, in float64. That is the same vector as the papers'
formulas give, without the difference of two nearly equal ones, of which float32 would leave little.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from hf_lowmem_optim.ops.step_numbers import Number

__all__ = [
    "damped_inverse_column",
    "filtered_inverse_column",
    "ggt_weights",
    "mfac_weights",
    "write_gram_row_",
]

#: Below this pivot, for rows of unit length, a gradient counts as nearly a combination of the others.
_DEPENDENT = 1e-3
#: Damping relative to the largest S² (M-FAC) or S (GGT) from which on weights that cancel do no harm in float32.
_HARMLESS = 1e-3
#: A direction whose squared singular value S² is below this part of the largest is a rounding error of the Gram matrix.
_DROPPED = 1e-12
#: Devices on which a look at a number waits for nothing.
_READABLE: tuple[str, ...] = ("cpu",)
#: Steps that make a projector's values 0 or 1 to float64's precision, unless S² is within a factor of 3 of that bound.
_PURIFICATIONS = 8


def write_gram_row_(
    gram: Tensor, row: Any, products: Sequence[Tensor], everywhere: Callable[[Tensor], Tensor] | None = None
) -> None:
    """Write row and column of GGᵀ ← G c, a sum over tensors.

    Args:
        gram: GGᵀ, float64 [m, m].
        row: The row of the newest gradient.
        products: The tensors' shares, float64 [number of tensors, m] each.
        everywhere: Adds the shares of the tensors that other processes update.
    """
    shares = torch.cat([product.to(gram.device) for product in products])
    if everywhere is not None:
        shares = everywhere(shares)
    total = shares[0] if len(shares) == 1 else shares.sum(dim=0)
    at = row.index() if isinstance(row, Number) else row
    gram[at] = total
    gram.mT[at] = total


def mfac_weights(gram: Tensor, newest: Any, *, damping: float) -> Tensor:
    """Return the weights w of the window's rows in M-FAC's u = F⁻¹c = Gᵀw, F = λI + GᵀG/m.

    The paper's u = (1/λ)·[c − Gᵀ(mλI + GGᵀ)⁻¹Gc] becomes w = m·(mλI + GGᵀ)⁻¹e_r; for ‖c‖² ≫ mλ the bracket is a small
    part of c. By Cholesky, scaled to rows of unit length so that the sizes of the gradients do not matter. Where rows
    depend on each other (a gradient repeats), the directions that these have not are filtered out before. A GPU
    computes both, rather than wait for the answer.

    Args:
        gram: GGᵀ, float64 [m, m], symmetric positive semidefinite. A row of zeros is a gradient of zero, as in a window
            that is not full yet: m is the window's size from the first step on.
        newest: Row r of the newest gradient, the one to which F⁻¹ is applied.
        damping: λ > 0.

    Returns:
        float64 [m]. Zero for rows of zeros; all NaN if ``gram`` is not finite, which carries NaN on as AdamW does.

    Source: arXiv 2107.03356, section 3; the closed form is Woodbury's identity.
    """
    window = gram.shape[0]
    total = window * damping
    # w ← m·(mλI + GGᵀ)⁻¹e_r
    column, smallest_pivot = damped_inverse_column(gram, newest, total)
    independent = smallest_pivot > _DEPENDENT
    if gram.device.type not in _READABLE or not independent:
        column = torch.where(independent, column, filtered_inverse_column(gram, newest, total))
        column = torch.where(_is_finite(gram), column, torch.nan)
    return column.mul_(window)


def _is_finite(gram: Tensor) -> Tensor:
    """Return whether all entries are finite: these do not overflow in a sum, as products of float32 numbers."""
    return gram.sum().isfinite()


def ggt_weights(gram: Tensor, newest: int, *, damping: float) -> Tensor:
    """Return the weights w of the window's rows in GGT's u = (eps·I + (GᵀG)^½)⁻¹c = Gᵀw.

    GGT is full-matrix AdaGrad over a window. With GGᵀ = K S² Kᵀ and B = GᵀKS⁻¹, the paper's
    u = c/eps + B[(S + eps)⁻¹ − 1/eps]Bᵀc becomes w = K(S + eps)⁻¹Kᵀe_r, since c lies in the span of B.

    Args:
        gram: GGᵀ, float64 [m, m], symmetric positive semidefinite. A row of zeros is a gradient of zero.
        newest: Row r of the newest gradient.
        damping: eps > 0, added to the singular values S.

    Returns:
        float64 [m]. Zero for rows of zeros; all NaN if ``gram`` is not finite, which carries NaN on as AdamW does.

    Source: arXiv 2306.06098 (its sparse GGT); arXiv 1806.02958, section 2.
    """
    # repeated gradients give S = 0, where the weights cancel each other, and float32's rounding is all that is left of
    # them: such directions are dropped, unless their response 1/eps is small enough to do no harm
    finite = _is_finite(gram)
    squares, K = torch.linalg.eigh(torch.where(finite, gram, 0.0))  # ascending
    squares = squares.clamp(min=0)
    kept = (squares > _DROPPED * squares[-1]) | (damping > _HARMLESS * squares[-1].sqrt())
    weights = K @ (torch.where(kept, 1 / (squares.sqrt() + damping), 0.0) * K[newest])
    weights = torch.where(gram.diagonal() > 0, weights, 0.0)
    return torch.where(finite, weights, torch.nan)


def damped_inverse_column(gram: Tensor, column: Any, shift: float) -> tuple[Tensor, Tensor]:
    """Return (G + shift·I)⁻¹e_c, and how far the rows of G are from depending on each other.

    Computed from K = D·G·D with a diagonal of ones, D = diag(G)^(-1/2), so that the rows' sizes do not matter:
    D·(K + shift·D²)⁻¹·D·e_c. A row of zeros couples with nothing.

    Args:
        gram: G, float64 [m, m], contiguous, symmetric positive semidefinite.
        column: c.
        shift: Not negative.

    Returns:
        float64 [m], zero for rows of zeros; and, a scalar, the least entry on the diagonal of K's Cholesky factor.
        That is NaN or not positive if K is not positive definite in float64, and NaN if G is not finite; then the
        column is of no use.

    Raises:
        ValueError: ``gram`` is no such matrix, or there is no such column.
    """
    size = gram.shape[0]
    if gram.dtype != torch.float64 or gram.shape != (size, size) or not gram.is_contiguous():
        raise ValueError(f"gram must be contiguous, float64 [m, m], got {gram.dtype} {[*gram.shape]}")
    if not 0 <= column < size:
        raise ValueError(f"column {column} is not one of {size}")
    norm = gram.diagonal().sqrt()
    alive = norm > 0
    scale = norm.reciprocal().where(alive, 0.0)  # D
    # K; rows of zeros become rows of the identity
    unit = (gram * scale).mul_(scale[:, None])
    unit.diagonal().masked_fill_(~alive, 1.0)
    smallest = torch.linalg.cholesky_ex(unit)[0].diagonal().min() + 0.0 * gram.sum()  # 0 · x is NaN if x is not finite
    unit.diagonal().addcmul_(scale, scale, value=shift)
    target = torch.zeros_like(norm)
    at = column.index() if isinstance(column, Number) else column
    target[at] = scale[at]
    factor = torch.linalg.cholesky_ex(unit)[0]
    return torch.cholesky_solve(target[:, None], factor)[:, 0].mul_(scale), smallest


def filtered_inverse_column(gram: Tensor, column: Any, shift: float) -> Tensor:
    """Return (G + shift·I)⁻¹e_c without the part of e_c in directions that are noise, unless that does no harm.

    With rows that repeat, that part is as large as 1/shift, and cancels in Gᵀw up to float32's rounding. P, which
    projects onto the others, comes from products alone: F = G(G + δI)⁻¹ has values above ½ where G's are above δ, and
    each F ← 3F² − 2F³ (McWeeny's purification) squares their distance from 0 or 1.

    Args:
        gram: G, finite, float64 [m, m], symmetric positive semidefinite; not zero.
        column: c.
        shift: Not negative.

    Returns:
        float64 [m], zero for rows of zeros.
    """
    most = gram.abs().sum(1).amax()  # at least the largest eigenvalue
    unit, shift_of_unit = gram / most, shift / most
    identity = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    # F = I − δ·(G + δI)⁻¹, in which the rounding of the inverse does not matter
    factor = torch.linalg.cholesky_ex(identity.mul(_DROPPED).add_(unit))[0]
    P = torch.cholesky_solve(identity, factor).mul_(-_DROPPED).add_(identity)
    del factor
    for _ in range(_PURIFICATIONS):
        square = P @ P
        P = torch.addmm(square, square, P, beta=3, alpha=-2)
    del square
    P = torch.where(shift_of_unit > _HARMLESS, identity, P)
    target = P.mT[column.index() if isinstance(column, Number) else column].clone().view(-1)
    # 1 instead of what is left of G in the directions of noise
    unit.add_(identity.mul_(1 + shift_of_unit)).sub_(P)
    del identity, P
    found = torch.cholesky_solve(target[:, None], torch.linalg.cholesky_ex(unit)[0])[:, 0].div_(most)
    return torch.where(gram.diagonal() > 0, found, 0.0)
