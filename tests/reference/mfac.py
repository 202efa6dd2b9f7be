"""EFCP with M-FAC in float64 numpy, by definition: a D × D Fisher matrix, solved. Imports nothing from the package.

arXiv 2306.06098, algorithm 1; ALGORITHMS section 4. All tensors together are one vector of D entries.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray

from tests.reference import block_topk, window_values

Array = NDArray[np.float64]
#: (name, acc, number of the tensor's update from 1) → c, shaped like acc.
Compressor = Callable[[str, Array, int], Array]


def keep_everything(name: str, acc: Array, t: int) -> Array:
    return acc.copy()


def top_k(*, density: float, block_size: int, value_dtype: str) -> Compressor:
    def compress(name: str, acc: Array, t: int) -> Array:
        flat, c = acc.reshape(-1), np.zeros(acc.size)
        for start in range(0, flat.size, block_size):
            kept, values, _ = block_topk.step(flat[start : start + block_size], block_size, density)
            c[start + kept] = window_values.stored(values, value_dtype)
        return c.reshape(acc.shape)

    return compress


def power_sgd(start: Mapping[str, Array]) -> Compressor:
    """One warm-started power iteration for the matrices in ``start`` (q × r each); others are kept as they are."""
    right = dict(start)

    def compress(name: str, acc: Array, t: int) -> Array:
        if name not in right:
            return acc.copy()
        matrix = acc.reshape(acc.shape[0], -1)
        P = np.linalg.qr(matrix @ right[name])[0]
        right[name] = matrix.T @ P
        return (P @ right[name].T).reshape(acc.shape)

    return compress


class ReferenceMFAC:
    """All compressed tensors of an optimizer."""

    def __init__(
        self,
        params: Mapping[str, Array],
        *,
        window: int,
        damping: float,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        compress: Compressor = keep_everything,
    ) -> None:
        self.W = {k: np.array(v, dtype=np.float64) for k, v in params.items()}
        self.xi = {k: np.zeros_like(v) for k, v in self.W.items()}
        self.velocity = {k: np.zeros_like(v) for k, v in self.W.items()}
        self.updates = dict.fromkeys(self.W, 0)
        self.m, self.damping, self.momentum, self.weight_decay = window, damping, momentum, weight_decay
        self.compress = compress
        self.G = np.zeros((window, sum(v.size for v in self.W.values())))
        self.t = 0

    def precondition(self, c: Array) -> Array:
        """u = F⁻¹c."""
        F = self.damping * np.eye(c.size) + self.G.T @ self.G / self.m
        return np.linalg.solve(F, c)

    def step(self, gradients: Mapping[str, Array], lr: float) -> None:
        """A tensor that is not among the gradients counts as zero and is not moved."""
        self.t += 1
        pieces = []
        for key, W in self.W.items():
            c = np.zeros_like(W)
            if key in gradients:
                self.updates[key] += 1
                acc = self.xi[key] + np.asarray(gradients[key], dtype=np.float64)
                c = self.compress(key, acc, self.updates[key])
                self.xi[key] = acc - c
            pieces.append(c.reshape(-1))
        c = np.concatenate(pieces)
        self.G[(self.t - 1) % self.m] = c
        u = self.precondition(c)
        start = 0
        for key, W in self.W.items():
            part = u[start : start + W.size].reshape(W.shape)
            start += W.size
            if key in gradients:
                self.velocity[key] = self.momentum * self.velocity[key] + part
                self.W[key] = W * (1 - lr * self.weight_decay) - lr * self.velocity[key]
