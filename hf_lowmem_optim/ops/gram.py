"""Inverses of full-matrix statistics, reduced to the small Gram matrix of a window of gradients.

The window's rows g₁ … g_m are G, and the newest gradient c is its row r, that is c = Gᵀe_r. Both rules return weights w
of the rows in u = Gᵀw, so that only the m × m matrix GGᵀ enters, in float64. That is the same vector as the papers'
formulas give, without the difference of two nearly equal ones, of which float32 would leave little.

Systems of several tensors are solved in one batch: each as it is by itself, whatever the others are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from hf_lowmem_optim.ops.inverse_root import alike_in_a_stack
from hf_lowmem_optim.ops.step_numbers import Number, select

__all__ = [
    "damped_inverse_column",
    "filtered_inverse_column",
    "ggt_weights",
    "mfac_weights",
    "most_systems",
    "update_systems_",
]

#: Below this pivot, for rows of unit length, a gradient counts as nearly a combination of the others.
_DEPENDENT = 1e-3
#: Damping relative to the largest S² (M-FAC) or S (GGT) from which on weights that cancel do no harm in float32.
_HARMLESS = 1e-3
#: A direction whose squared singular value S² is below this part of the largest is a rounding error of the Gram matrix.
_DROPPED = 1e-12
#: Devices on which a look at a number waits for nothing, and systems are to be rounded as each is alone.
_READABLE: tuple[str, ...] = ("cpu",)
#: Bytes of the systems that are solved together, unless one has more: on a CPU what its cache holds, and on other
#: devices so few systems of more than 512 rows that cuBLAS solves them one by one, instead of MAGMA, which waits.
_CPU_BYTES, _DEVICE_BYTES = 1 << 20, 1 << 24
#: Steps that make a projector's values 0 or 1 to float64's precision, unless S² is within a factor of 3 of that bound.
_PURIFICATIONS = 8


def most_systems(system_bytes: int, device: torch.device) -> int:
    """Return how many systems of a size are solved together: that takes some copies of them.

    Args:
        system_bytes: Bytes of each.
        device: Where they lie; the meta device counts as a GPU.
    """
    return max(1, (_CPU_BYTES if device.type == "cpu" else _DEVICE_BYTES) // system_bytes)


def update_systems_(
    grams: Sequence[Tensor],
    row: Any,
    products: Sequence[Tensor],
    everywhere: Callable[[Tensor], Tensor] | None,
    weights: Callable[[Tensor, Any], Tensor],
) -> Tensor:
    """Write row and column of GGᵀ ← G c of a system over all tensors, or of one for each, and solve them.

    Args:
        grams: GGᵀ of every system, float64 [m, m]; written.
        row: The row of the newest gradient.
        products: The tensors' shares, float64 [number of tensors, m] each.
        everywhere: Adds the shares of the tensors that other processes update.
        weights: What solves a batch of systems, given them and the row, such as :func:`mfac_weights`.

    Returns:
        The weights, float32 [m] of one system, [systems, m] of several.
    """
    shares = torch.cat([product.to(grams[0].device) for product in products])
    if everywhere is not None:
        shares = everywhere(shares)
    totals = shares if len(grams) == len(shares) else shares.sum(dim=0, keepdim=True)
    at = row.index() if isinstance(row, Number) else slice(row, row + 1)
    size, device, found = len(grams[0]), grams[0].device, []
    alone = len(grams) == 1 or (device.type in _READABLE and not alike_in_a_stack(size, size, device))
    most = 1 if alone else most_systems(grams[0].nbytes, device)
    for start in range(0, len(grams), most):
        some, total = list(grams[start : start + most]), totals[start : start + most]
        batch = torch.stack(some) if len(some) > 1 else some[0][None]
        batch[:, at], batch[:, :, at] = total[:, None], total[:, :, None]
        if len(some) > 1:
            torch._foreach_copy_(some, batch.unbind())
        found.append(weights(batch, row).float())
    return torch.cat(found) if len(grams) > 1 else found[0][0]


def mfac_weights(gram: Tensor, newest: Any, *, damping: float) -> Tensor:
    """Return the weights w of the window's rows in M-FAC's u = F⁻¹c = Gᵀw, F = λI + GᵀG/m.

    The paper's u = (1/λ)·[c − Gᵀ(mλI + GGᵀ)⁻¹Gc] becomes w = m·(mλI + GGᵀ)⁻¹e_r; for ‖c‖² ≫ mλ the bracket is a small
    part of c. By Cholesky, scaled to rows of unit length so that the sizes of the gradients do not matter. Where rows
    depend on each other (a gradient repeats), the directions that these have not are filtered out before. A GPU
    computes both, rather than wait for the answer.

    Args:
        gram: GGᵀ, float64 [..., m, m], symmetric positive semidefinite. A row of zeros is a gradient of zero, as in a
            window that is not full yet: m is the window's size from the first step on.
        newest: Row r of the newest gradient, the one to which F⁻¹ is applied.
        damping: λ > 0.

    Returns:
        float64 [..., m]. Zero for rows of zeros; all NaN if ``gram`` is not finite, which carries NaN on as AdamW does.

    Source: arXiv 2107.03356, section 3; the closed form is Woodbury's identity.
    """
    window = gram.shape[-1]
    total = window * damping
    # w ← m·(mλI + GGᵀ)⁻¹e_r
    column, smallest_pivot = damped_inverse_column(gram, newest, total)
    independent = smallest_pivot > _DEPENDENT
    if gram.device.type not in _READABLE:
        column = torch.where(independent[..., None], column, filtered_inverse_column(gram, newest, total))
    else:
        for place in map(tuple, (~independent).nonzero().tolist()):
            column[place] = filtered_inverse_column(gram[place], newest, total)
    return column.mul_(window)


def _is_finite(gram: Tensor) -> Tensor:
    """Return whether all entries are finite: these do not overflow in a sum, as products of float32 numbers."""
    return gram.sum((-2, -1)).isfinite()[..., None]


def ggt_weights(gram: Tensor, newest: int, *, damping: float) -> Tensor:
    """Return the weights w of the window's rows in GGT's u = (eps·I + (GᵀG)^½)⁻¹c = Gᵀw.

    GGT is full-matrix AdaGrad over a window. With GGᵀ = K S² Kᵀ and B = GᵀKS⁻¹, the paper's
    u = c/eps + B[(S + eps)⁻¹ − 1/eps]Bᵀc becomes w = K(S + eps)⁻¹Kᵀe_r, since c lies in the span of B.

    Args:
        gram: GGᵀ, float64 [..., m, m], symmetric positive semidefinite. A row of zeros is a gradient of zero.
        newest: Row r of the newest gradient.
        damping: eps > 0, added to the singular values S.

    Returns:
        float64 [..., m]. Zero for rows of zeros; all NaN if ``gram`` is not finite, which carries NaN on as AdamW does.

    Source: arXiv 2306.06098 (its sparse GGT); arXiv 1806.02958, section 2.
    """
    # repeated gradients give S = 0, where the weights cancel each other, and float32's rounding is all that is left of
    # them: such directions are dropped, unless their response 1/eps is small enough to do no harm
    finite = _is_finite(gram)
    squares, K = torch.linalg.eigh(torch.where(finite[..., None], gram, 0.0))  # ascending
    squares = squares.clamp(min=0)
    largest = squares[..., -1:]
    kept = (squares > _DROPPED * largest) | (damping > _HARMLESS * largest.sqrt())
    answer = torch.where(kept, 1 / (squares.sqrt() + damping), 0.0) * K[..., newest, :]
    if K.dim() == 3 and K.device.type in _READABLE:
        weights = torch.stack([vectors @ each for vectors, each in zip(K, answer, strict=True)])
    else:
        weights = (K @ answer[..., None])[..., 0]
    weights = torch.where(torch.linalg.diagonal(gram) > 0, weights, 0.0)
    return torch.where(finite, weights, torch.nan)


def damped_inverse_column(gram: Tensor, column: Any, shift: float) -> tuple[Tensor, Tensor]:
    """Return (G + shift·I)⁻¹e_c, and how far the rows of G are from depending on each other.

    Computed from K = D·G·D with a diagonal of ones, D = diag(G)^(-1/2), so that the rows' sizes do not matter:
    D·(K + shift·D²)⁻¹·D·e_c. A row of zeros couples with nothing.

    Args:
        gram: G, float64 [..., m, m], contiguous, symmetric positive semidefinite.
        column: c.
        shift: Not negative.

    Returns:
        float64 [..., m], zero for rows of zeros; and, [...], the least entry on the diagonal of K's Cholesky factor.
        That is NaN or not positive if K is not positive definite in float64, and NaN if G is not finite; then the
        column is of no use.

    Raises:
        ValueError: ``gram`` is no such matrix, or there is no such column.
    """
    size = gram.shape[-1]
    if gram.dtype != torch.float64 or gram.shape[-2:] != (size, size) or not gram.is_contiguous():
        raise ValueError(f"gram must be contiguous, float64 [..., m, m], got {gram.dtype} {[*gram.shape]}")
    if not 0 <= column < size:
        raise ValueError(f"column {column} is not one of {size}")
    norm = torch.linalg.diagonal(gram).sqrt()
    alive = norm > 0
    scale = norm.reciprocal().where(alive, 0.0)  # D
    # K; rows of zeros become rows of the identity
    unit = (gram * scale[..., None, :]).mul_(scale[..., None])
    diagonal = torch.linalg.diagonal(unit).masked_fill_(~alive, 1.0)
    smallest = torch.linalg.diagonal(torch.linalg.cholesky_ex(unit)[0]).amin(-1)
    smallest += 0.0 * gram.sum((-2, -1))  # 0 · x is NaN if x is not finite
    diagonal.addcmul_(scale, scale, value=shift)
    target = torch.zeros_like(norm)
    at = column.index() if isinstance(column, Number) else column
    target[..., at] = scale[..., at]
    factor = torch.linalg.cholesky_ex(unit)[0]
    # of a batch, cholesky_solve takes one matrix after the other, or waits for a GPU
    half = torch.linalg.solve_triangular(factor, target[..., None], upper=False)
    return torch.linalg.solve_triangular(factor.mT, half, upper=True)[..., 0].mul_(scale), smallest


def filtered_inverse_column(gram: Tensor, column: Any, shift: float) -> Tensor:
    """Return (G + shift·I)⁻¹e_c without the part of e_c in directions that are noise, unless that does no harm.

    With rows that repeat, that part is as large as 1/shift, and cancels in Gᵀw up to float32's rounding. P, which
    projects onto the others, comes from products alone: F = G(G + δI)⁻¹ has values above ½ where G's are above δ, and
    each F ← 3F² − 2F³ (McWeeny's purification) squares their distance from 0 or 1.

    Args:
        gram: G, float64 [..., m, m], symmetric positive semidefinite; not zero.
        column: c.
        shift: Not negative.

    Returns:
        float64 [..., m], zero for rows of zeros; all NaN if G is not finite.
    """
    most = gram.abs().sum(-1).amax(-1)[..., None]  # at least the largest eigenvalue
    unit, shift_of_unit = gram / most[..., None], (shift / most)[..., None]
    identity = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    # F = I − δ·(G + δI)⁻¹, in which the rounding of the inverse does not matter
    P = _solve(torch.add(unit, identity, alpha=_DROPPED), identity).mul_(-_DROPPED).add_(identity)
    plus_product = torch.baddbmm if P.dim() == 3 else torch.addmm
    for _ in range(_PURIFICATIONS):
        square = P @ P
        P = plus_product(square, square, P, beta=3, alpha=-2)
    del square
    P = torch.where(shift_of_unit > _HARMLESS, identity, P)
    target = select(P, -1, column).clone()
    # 1 instead of what is left of G in the directions of noise
    torch.linalg.diagonal(unit).add_((1 + shift_of_unit)[..., 0])
    unit.sub_(P)
    del P
    found = _solve(unit, target[..., None])[..., 0].div_(most)
    found = torch.where(torch.linalg.diagonal(gram) > 0, found, 0.0)
    return torch.where(_is_finite(gram), found, torch.nan)


def _solve(A: Tensor, targets: Tensor) -> Tensor:
    factor = torch.linalg.cholesky_ex(A)[0]
    half = torch.linalg.solve_triangular(factor, targets, upper=False)
    solved: Tensor = torch.linalg.solve_triangular(factor.mT, half, upper=True)
    return solved
