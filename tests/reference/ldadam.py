"""LDAdam in float64 numpy, line by line from the paper's algorithm; imports nothing from the package.

b and the rotated second moment are formed in full, products are in the paper's order: slow, and plainly right.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


class ReferenceLDAdam:
    """One matrix W (p × q), given and kept in the parameter's own orientation."""

    def __init__(
        self,
        W: Array,
        *,
        rank: int,
        betas: tuple[float, float] = (0.908, 0.99),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        rho: float = 0.908,
        error_feedback: bool = True,
    ) -> None:
        self.W = np.array(W, dtype=np.float64)
        self.tall = self.W.shape[0] > self.W.shape[1]
        self.rank, self.betas, self.eps, self.weight_decay, self.rho = rank, betas, eps, weight_decay, rho
        self.error_feedback = error_feedback
        p, q = sorted(self.W.shape)
        self.U = np.zeros((p, rank))
        self.m = np.zeros((rank, q))
        self.v = np.zeros((rank, q))
        self.xi = np.zeros((p, q))
        self.t = 0

    def step(self, gradient: Array, lr: float) -> None:
        beta1, beta2 = self.betas
        W = self.W.T if self.tall else self.W
        g = np.asarray(gradient, dtype=np.float64)
        g = g.T if self.tall else g
        self.t += 1
        t = self.t

        a = g + self.xi
        U_old, m_old, v_old = self.U, self.m, self.v
        if t == 1:
            U = np.linalg.svd(a, full_matrices=False)[0][:, : self.rank]
            R = np.zeros((self.rank, self.rank))
        else:
            s = self.rho / (1 - beta1 ** (t - 1))
            b = s * (U_old @ m_old) + (1 - self.rho) * a
            U = np.linalg.qr(b @ (b.T @ U_old))[0]
            R = U.T @ U_old
        p_new = U.T @ a
        m_moved = R @ m_old
        c = beta1 / (1 - beta1)
        if self.error_feedback:
            self.xi = a - U @ (p_new + c * m_moved) + c * (U_old @ m_old)
        v_moved = v_old
        if t > 1:
            c1, c2 = 1 - beta1 ** (t - 1), 1 - beta2 ** (t - 1)
            m_hat = m_old / c1
            v_moved = c2 * np.abs((R * R) @ (v_old / c2 - m_hat**2) + (R @ m_hat) ** 2)
        self.U = U
        self.m = beta1 * m_moved + (1 - beta1) * p_new
        self.v = beta2 * v_moved + (1 - beta2) * p_new**2
        m_hat = self.m / (1 - beta1**t)
        v_hat = self.v / (1 - beta2**t)
        W *= 1 - lr * self.weight_decay
        W -= lr * (U @ (m_hat / (np.sqrt(v_hat) + self.eps)))
