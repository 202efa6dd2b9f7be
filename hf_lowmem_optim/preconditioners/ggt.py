"""GGT: full-matrix AdaGrad over a window of gradients, applied to the newest one (arXiv 1806.02958).

With the window's rows as G, GGᵀ = K S² Kᵀ, B = GᵀKS⁻¹ and the newest gradient c as row r of G, the paper's
u = (eps·I + (GᵀG)^½)⁻¹c = c/eps + B[(S + eps)⁻¹ − 1/eps]Bᵀc becomes, since c = Gᵀe_r lies in the span of B,

    u = Gᵀw,   w = K(S + eps)⁻¹Kᵀe_r

without a division by S and without the difference of two nearly equal vectors.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hf_lowmem_optim.preconditioners.spectrum import spectral_weights

__all__ = ["ggt_weights"]

#: Damping relative to the largest S from which on weights that cancel do no harm in float32.
_HARMLESS = 1e-3


def ggt_weights(gram: Tensor, newest: int, *, damping: float) -> Tensor:
    """Return the weights w of the window's rows in u = (damping·I + (GᵀG)^½)⁻¹c = Gᵀw.

    Args:
        gram: GGᵀ, float64 [m, m], symmetric positive semidefinite. A row of zeros is a gradient of zero.
        newest: Row r of the newest gradient.
        damping: eps > 0, added to the singular values S.

    Returns:
        float64 [m]. Zero for rows of zeros; all NaN if ``gram`` is not finite, which carries NaN on as AdamW does.

    Source: arXiv 2306.06098 (its sparse GGT); arXiv 1806.02958, section 2.
    """
    if not torch.isfinite(gram).all():
        return torch.full_like(gram[0], torch.nan)
    return spectral_weights(
        gram,
        newest,
        lambda squares: 1 / (squares.sqrt() + damping),
        keep_all=lambda most: damping > _HARMLESS * most.sqrt(),
    )
