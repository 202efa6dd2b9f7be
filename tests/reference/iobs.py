"""I-OBS in float64 numpy, by definition: quadratics of D × D matrices, minimized. Imports nothing from the package.

arXiv 2408.17163; ALGORITHMS section 9. θ is one vector of D entries, ``pruned`` a bool vector.
"""

from __future__ import annotations

import itertools
import math

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Mask = NDArray[np.bool_]


def fisher(G: Array, damping: float) -> Array:
    return damping * np.eye(G.shape[1]) + G.T @ G / len(G)


def increase(x: Array, theta: Array, F: Array) -> float:
    """The quadratic model's loss at x, of which θ is the minimum."""
    return float(0.5 * (x - theta) @ F @ (x - theta))


def minimizer(theta: Array, F: Array, pruned: Mask) -> Array:
    """argmin ½(x − θ)ᵀF(x − θ) over x_S = 0, by the normal equations on Q: F_QQ (x − θ)_Q = F_QS θ_S."""
    kept = ~pruned
    x = np.zeros_like(theta)
    x[kept] = theta[kept] + np.linalg.solve(F[np.ix_(kept, kept)], F[np.ix_(kept, pruned)] @ theta[pruned])
    return x


def textbook(theta: Array, F: Array, pruned: Mask) -> Array:
    """θ − F⁻¹E_S (E_SᵀF⁻¹E_S)⁻¹ θ_S."""
    inverse = np.linalg.inv(F)
    x = theta - inverse[:, pruned] @ np.linalg.solve(inverse[np.ix_(pruned, pruned)], theta[pruned])
    x[pruned] = 0.0
    return x


def by_window(theta: Array, G: Array, damping: float, pruned: Mask) -> tuple[Array, float]:
    """The m × m form, and its loss increase."""
    kept = ~pruned
    h = G[:, pruned] @ theta[pruned]
    w = np.linalg.solve(len(G) * damping * np.eye(len(G)) + G[:, kept] @ G[:, kept].T, h)
    x = np.where(kept, theta + G.T @ w, 0.0)
    return x, float(0.5 * damping * (theta[pruned] @ theta[pruned] + h @ w))


def lowest(saliency: Array, count: int) -> Mask:
    """The ``count`` lowest, of equal ones the first."""
    pruned = np.zeros(saliency.size, dtype=bool)
    pruned[np.argsort(saliency, kind="stable")[:count]] = True
    return pruned


def saliency(theta: Array, F: Array | None) -> Array:
    """Magnitude; with F, θ²/[F⁻¹]ᵢᵢ."""
    return np.abs(theta) if F is None else theta**2 / np.diag(np.linalg.inv(F))


def best_support(theta: Array, F: Array, count: int) -> float:
    """The least loss increase of any support, by trying all."""
    return min(
        increase(minimizer(theta, F, mask), theta, F)
        for chosen in itertools.combinations(range(theta.size), count)
        for mask in [np.isin(np.arange(theta.size), chosen)]
    )


def cubic(n: int, begin: int, end: int, initial: float, final: float) -> float:
    return final + (initial - final) * (1 - (n - begin) / (end - begin)) ** 3


def sweep(W: Array, H: Array, sparsity: float, block_size: int) -> Array:
    """SparseGPT one column after the other, with the inverse of the columns that are left, eliminated one by one."""
    W, inverse = W.copy(), np.linalg.inv(H)
    out, columns = W.shape
    # [H⁻¹]_jj after the columns before j were eliminated
    diagonal, rest = np.zeros(columns), inverse.copy()
    for j in range(columns):
        diagonal[j] = rest[j, j]
        rest = rest - np.outer(rest[:, j], rest[j]) / rest[j, j]
    rest = inverse
    for j in range(columns):
        if j % block_size == 0:
            end = min(j + block_size, columns)
            count = math.floor(sparsity * out * end) - math.floor(sparsity * out * j)
            mask = lowest((W[:, j:end] ** 2 / diagonal[j:end]).reshape(-1), count).reshape(out, end - j)
        error = np.where(mask[:, j % block_size], W[:, j], 0.0) / rest[j, j]
        W -= np.outer(error, rest[j])
        W[mask[:, j % block_size], j] = 0.0
        rest = rest - np.outer(rest[:, j], rest[j]) / rest[j, j]
    return W
