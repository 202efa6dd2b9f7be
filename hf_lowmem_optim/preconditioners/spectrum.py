"""A function of the window's singular values applied to its newest gradient, without directions that are noise."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["DROPPED", "spectral_weights"]

#: A direction whose squared singular value S² is below this part of the largest is a rounding error of the Gram matrix.
DROPPED = 1e-12


def spectral_weights(
    gram: Tensor, newest: int, response: Callable[[Tensor], Tensor], *, keep_all: Callable[[Tensor], Tensor]
) -> Tensor:
    """Return w = K·response(S²)·Kᵀe_r with GGᵀ = K S² Kᵀ.

    For singular vectors bᵢ = GᵀKᵢ/Sᵢ this makes Gᵀw = Σ bᵢ·response(Sᵢ²)·⟨bᵢ, c⟩ for the newest gradient c = Gᵀe_r.
    Repeated gradients give S = 0, where the weights of the rows cancel each other; if the response is large there, the
    float32 rounding of Gᵀw is all that is left of them. So such directions are dropped, unless ``keep_all``.

    Args:
        gram: GGᵀ, finite, float64 [m, m].
        newest: Row r.
        response: Function of S², finite for every S² ≥ 0.
        keep_all: Given the largest S², whether the response to zero is small enough to drop nothing.

    Returns:
        float64 [m], zero for rows of zeros.
    """
    squares, K = torch.linalg.eigh(gram)  # ascending
    squares = squares.clamp(min=0)
    kept = (squares > DROPPED * squares[-1]) | keep_all(squares[-1])
    weights = K @ (torch.where(kept, response(squares), 0.0) * K[newest])
    return torch.where(gram.diagonal() > 0, weights, 0.0)
