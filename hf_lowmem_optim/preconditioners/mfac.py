"""M-FAC: the inverse empirical Fisher matrix applied to the newest gradient of a window (arXiv 2107.03356).

With the window's rows g₁ … g_m as G and the newest gradient c as its row r, that is c = Gᵀe_r, the paper's
u = F⁻¹c = (1/λ)·[c − Gᵀ(mλI + GGᵀ)⁻¹Gc] with F = λI + GᵀG/m becomes

    u = Gᵀw,   w = m·(mλI + GGᵀ)⁻¹e_r

which is the same vector without the difference of two nearly equal ones: for ‖c‖² ≫ mλ the bracket is a small part of
c, and float32 leaves little of it. Only the m × m Gram matrix enters, in float64.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hf_lowmem_optim.kernels.gram_solve import damped_inverse_column
from hf_lowmem_optim.preconditioners.spectrum import spectral_weights

__all__ = ["mfac_weights"]

#: Below this pivot, for rows of unit length, a gradient counts as nearly a combination of the others.
_DEPENDENT = 1e-3
#: Damping relative to the largest S² from which on weights that cancel do no harm in float32.
_HARMLESS = 1e-3


def mfac_weights(gram: Tensor, newest: int, *, damping: float) -> Tensor:
    """Return the weights w of the window's rows in u = F⁻¹c = Gᵀw.

    By Cholesky, scaled to rows of unit length so that the sizes of the gradients do not matter. Where rows depend on
    each other (a gradient repeats), by eigendecomposition, which leaves the directions out that have no weight in u.

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
    if smallest_pivot > _DEPENDENT:
        return column.mul_(window)
    del column
    # entries are sums of products of float32 numbers: those that are finite do not overflow when they are added up
    if not math.isfinite(float(gram.sum())):
        return torch.full((window,), torch.nan, dtype=gram.dtype, device=gram.device)
    return spectral_weights(
        gram, newest, lambda squares: window / (total + squares), keep_all=lambda most: total > _HARMLESS * most
    )
