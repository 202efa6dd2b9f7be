"""Trion in float64 numpy, in the form of arXiv 2505.17967: momentum and its error beside the weights, not in the basis.

Imports nothing from the package.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from tests.reference.dct_adamw import largest_rows

Array = NDArray[np.float64]

MUON = [(3.4445, -4.7750, 2.0315)] * 5
POLAR = [
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
]


def newton_schulz(b: Array, polynomials: str) -> Array:
    X = b / (np.linalg.norm(b) + 1e-7)
    for a, b_, c in MUON if polynomials == "muon" else POLAR:
        G = X @ X.T
        X = a * X + (b_ * G + c * (G @ G)) @ X
    return X


class ReferenceTrion:
    """One matrix W, given and kept in the parameter's own orientation; with a rank of p or more it is Muon."""

    def __init__(
        self,
        W: Array,
        B: Array,
        *,
        rank: int,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        ranking: str = "l1",
        scaling: str = "muon",
        newton_schulz: str = "muon",
    ) -> None:
        self.W = np.array(W, dtype=np.float64)
        out, inner = self.W.shape
        self.tall = out >= inner
        self.B, self.rank, self.mu, self.weight_decay = B, min(rank, out, inner), momentum, weight_decay
        self.ranking, self.polynomials = ranking, newton_schulz
        self.c = {
            "muon": np.sqrt(max(1, out / inner)),
            "dion": np.sqrt(out / inner),
            "kimi": 0.2 * np.sqrt(max(out, inner)),
            "none": 1.0,
        }[scaling]
        self.M = np.zeros((inner, out) if self.tall else (out, inner))
        self.rows = np.arange(0)

    def step(self, gradient: Array, lr: float) -> None:
        g = np.asarray(gradient, dtype=np.float64)
        W, g = (self.W.T, g.T) if self.tall else (self.W, g)
        total = self.M + g
        N = self.B.T @ total
        self.rows = largest_rows(N, self.rank, self.ranking)
        Q, b = self.B[:, self.rows], N[self.rows]
        delta = total - Q @ b
        self.M = self.mu * total + (1 - self.mu) * delta
        W *= 1 - lr * self.weight_decay
        W -= lr * self.c * (Q @ newton_schulz(b, self.polynomials))
