"""DCT-AdamW in float64 numpy, from arXiv 2505.17967; imports nothing from the package.

``ReferenceDCTAdamW`` keeps moments of all rows, zero where a row is not chosen, and the error in the basis.
``PaperDCTAdamW`` is the paper's own form: the error ξ beside the weights, and the moments turned by R = B_IᵀB_I₋.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def cosine_basis(n: int, dct_type: int) -> Array:
    """B, whose columns are the basis vectors."""
    k, i = np.arange(n)[:, None], np.arange(n)[None, :]
    C = np.sqrt(2 / n) * np.cos(np.pi * k * (2 * i + 1) / (2 * n))
    C[0] = np.sqrt(1 / n)
    return C if dct_type == 3 else C.T


def largest_rows(S: Array, count: int, ranking: str) -> NDArray[np.int64]:
    """Indices of the rows of largest norm, ascending; ties to the lowest index."""
    norms = np.abs(S).sum(1) if ranking == "l1" else np.sqrt((S * S).sum(1))
    return np.sort(np.argsort(-norms, kind="stable")[:count])


class ReferenceDCTAdamW:
    """One matrix W, given and kept in the parameter's own orientation."""

    def __init__(
        self,
        W: Array,
        B: Array,
        *,
        rank: int,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        update_interval: int = 1,
        ranking: str = "l1",
        error_feedback: bool = True,
    ) -> None:
        self.W = np.array(W, dtype=np.float64)
        self.tall = self.W.shape[0] >= self.W.shape[1]
        self.B, self.rank, self.betas, self.eps, self.weight_decay = B, rank, betas, eps, weight_decay
        self.update_interval, self.ranking, self.error_feedback = update_interval, ranking, error_feedback
        shape = self.W.T.shape if self.tall else self.W.shape
        self.m, self.v, self.E = np.zeros(shape), np.zeros(shape), np.zeros(shape)
        self.rows = np.arange(0)
        self.t = 0

    def _oriented(self, gradient: Array) -> tuple[Array, Array]:
        g = np.asarray(gradient, dtype=np.float64)
        return (self.W.T, g.T) if self.tall else (self.W, g)

    def step(self, gradient: Array, lr: float) -> None:
        W, g = self._oriented(gradient)
        beta1, beta2 = self.betas
        self.t += 1
        t = self.t
        S = self.B.T @ g + self.E
        if t == 1 or t % self.update_interval == 0:
            self.rows = largest_rows(S, self.rank, self.ranking)
            others = np.setdiff1d(np.arange(len(S)), self.rows)
            self.m[others] = 0
            self.v[others] = 0
        projected = np.zeros_like(S)
        projected[self.rows] = S[self.rows]
        if self.error_feedback:
            self.E = S - projected
        self.m[self.rows] = beta1 * self.m[self.rows] + (1 - beta1) * projected[self.rows]
        self.v[self.rows] = beta2 * self.v[self.rows] + (1 - beta2) * projected[self.rows] ** 2
        m_hat, v_hat = self.m / (1 - beta1**t), self.v / (1 - beta2**t)
        W *= 1 - lr * self.weight_decay
        W -= lr * (self.B @ (m_hat / (np.sqrt(v_hat) + self.eps)))


class PaperDCTAdamW(ReferenceDCTAdamW):
    """The same with ξ and R, as the paper has it."""

    def step(self, gradient: Array, lr: float) -> None:
        W, g = self._oriented(gradient)
        beta1, beta2 = self.betas
        self.t += 1
        t = self.t
        a = g + self.E  # here ξ
        if t == 1:
            self.m, self.v = np.zeros((self.rank, a.shape[1])), np.zeros((self.rank, a.shape[1]))
        if t == 1 or t % self.update_interval == 0:
            old, self.rows = self.rows, largest_rows(self.B.T @ a, self.rank, self.ranking)
            if t > 1:
                # zeros and ones; the rounding of the zeros would leak into v, which is small
                R = np.rint(self.B[:, self.rows].T @ self.B[:, old])
                self.m, self.v = R @ self.m, np.abs(R @ self.v)
        Q = self.B[:, self.rows]
        projected = Q.T @ a
        if self.error_feedback:
            self.E = a - Q @ projected
        self.m = beta1 * self.m + (1 - beta1) * projected
        self.v = beta2 * self.v + (1 - beta2) * projected**2
        m_hat, v_hat = self.m / (1 - beta1**t), self.v / (1 - beta2**t)
        W *= 1 - lr * self.weight_decay
        W -= lr * (Q @ (m_hat / (np.sqrt(v_hat) + self.eps)))
