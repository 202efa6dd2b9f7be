"""What the operation takes besides the tensors of the state, and how a large matrix is cut for several threads."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

__all__ = ["FEW_TERMS", "PIECE", "Buffers", "Coefficients"]

#: Columns, rows or entries of a piece are a multiple: so the same ones are left over after whole vectors, and no block
#: of a quantized error is in two pieces.
PIECE = 256
#: Rank up to which a GPU adds to narrow weights in one pass; torch's products are faster for more terms, for which
#: reading and writing W is a small part.
FEW_TERMS = 32


class Coefficients(NamedTuple):
    """The numbers of one step.

    Attributes:
        momentum_weight: s.
        gradient_weight: 1 − ρ.
        beta1: β1.
        beta2: β2.
        correction: k.
        damping: δ.
        decay: Factor of W.
        step_size: Factor of U d.
    """

    momentum_weight: float
    gradient_weight: float
    beta1: float
    beta2: float
    correction: float
    damping: float
    decay: float
    step_size: float


class Buffers(NamedTuple):
    """What the operation overwrites with anything, float32 and contiguous; or, as all tensors, a batch.

    Attributes:
        bases: (2·r, p), for U₋ᵀ and Uᵀ.
        projected: (r, q), for V, p̃ and d; d is what it holds in the end.
        right: (2·r, q), for c·m and −(p̃ + c·m̃).
    """

    bases: Tensor
    projected: Tensor
    right: Tensor
