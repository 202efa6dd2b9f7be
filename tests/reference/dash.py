"""Dash in float64 numpy, block by block from its description; imports nothing from the package.

Roots are functions of eigenvalues: a solver is a scalar recursion, applied to the eigenvalues of the damped statistic.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
PRIMES = (2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37, 41, 43, 47, 53)


def scale_of(A: Array, scaling: str) -> float:
    if scaling == "frobenius":
        return float(np.linalg.norm(A))
    if scaling == "power_norm":
        return float(np.sum(np.linalg.eigvalsh(A) ** 8) ** 0.125)
    best = 0.0
    for prime in PRIMES:
        v = np.arange(1, len(A) + 1) * np.sqrt(prime) % 1 - 0.5
        for _ in range(11):
            v = v / np.linalg.norm(v)
            value, v = v @ A @ v, A @ v
        best = max(best, value)
    return 2 * float(best)


def denman_beavers(x: Array, s: float, iterations: int) -> tuple[Array, Array]:
    """x^(1/2) and x^(−1/2) of eigenvalues, as Newton's iteration has them."""
    e = 1.5 - 0.5 * x / s
    y, z = x / s * e, e
    for _ in range(iterations - 1):
        e = 1.5 - 0.5 * z * y
        y, z = y * e, e * z
    return y * np.sqrt(s), z / np.sqrt(s)


def coupled_newton(x: Array, Q: Array, s: float, iterations: int, tolerance: float) -> Array:
    z = 5 / (2 * s)
    m, root = z * x, np.full_like(x, z**0.25)
    for _ in range(iterations):
        t = 1.25 - m / 4
        root, m = root * t, t**4 * m
        if np.abs((Q * (m - 1)) @ Q.T).max() < tolerance:
            break
    return root


def inverse_fourth_root(
    A: Array,
    *,
    solver: str,
    iterations: int = 10,
    tolerance: float = 1e-6,
    scaling: str = "power_norm",
    damping: float = 1e-10,
    relative_damping: float = 1e-6,
) -> Array:
    if not np.isfinite(A).all():
        return np.full_like(A, np.nan)
    if not A.any():
        return np.eye(len(A))
    d = max(damping, relative_damping * float(np.linalg.norm(A)))
    values, Q = np.linalg.eigh(A)
    if solver == "eigh":
        values = values - min(values.min(), 0.0) + d
        return (Q * values**-0.25) @ Q.T
    s = scale_of(A + d * np.eye(len(A)), scaling)
    if solver == "coupled_newton":
        root = coupled_newton(values + d, Q, s, iterations, tolerance)
    else:
        half = denman_beavers(values + d, s, iterations)[0]
        root = denman_beavers(half, np.sqrt(s), iterations)[1]
    return (Q * root) @ Q.T


class Block:
    """One block, which is a parameter of its own."""

    def __init__(self, W: Array, phase: int, hyper: dict[str, Any]) -> None:
        self.W, self.phase, self.hyper = W, phase, hyper
        a, b = W.shape
        self.L, self.R = np.zeros((a, a)), np.zeros((b, b))
        self.roots: tuple[Array, Array] | None = None
        self.m, self.v, self.M = np.zeros((a, b)), np.zeros((a, b)), np.zeros((a, b))
        self.rho, self.tau = np.zeros(a), np.zeros(b)

    def step(self, G: Array, t: int, lr: float) -> None:
        h = self.hyper
        (beta1, beta2), beta = h["betas"], h["shampoo_beta"]
        self.W *= 1 - lr * h["weight_decay"]
        share = 1.0 if beta == 1 else 1 - beta
        self.L = beta * self.L + share * G @ G.T
        self.R = beta * self.R + share * G.T @ G
        if h["grafting"] == "adafactor":
            self.rho = beta2 * self.rho + (1 - beta2) * (G**2).sum(1)
            self.tau = beta2 * self.tau + (1 - beta2) * (G**2).sum(0)
            self.v = np.outer(self.rho, self.tau) / (self.rho.sum() or 1.0)
        else:
            self.v = beta2 * self.v + (1 - beta2) * G**2
        start, every = h["start_step"], h["precondition_frequency"]
        if h["spread"]:
            due = t >= start and (t - start - self.phase) % every == 0
        else:
            due = t >= start and (self.roots is None or t % every == 0)
        if due:
            left, right = (inverse_fourth_root(A, **h["root"]) for A in (self.L, self.R))
            self.roots = left, right
        self.m = beta1 * self.m + (1 - beta1) * G
        c1, c2 = (1 - beta1**t, 1 - beta2**t) if h["bias_correction"] else (1.0, 1.0)
        D = (self.m / c1) / (h["eps"] + np.sqrt(self.v / c2))
        P = D
        if t >= start and self.roots is not None:
            P = self.roots[0] @ self.m @ self.roots[1]
            if h["grafting"] != "none":
                P = P * np.linalg.norm(D) / (np.linalg.norm(P) + 1e-16)
        if h["momentum"] > 0:
            self.M = h["momentum"] * self.M + P
            P = P + h["momentum"] * self.M if h["nesterov"] else self.M
        self.W -= lr * P


DEFAULTS: dict[str, Any] = {
    "betas": (0.9, 0.95),
    "eps": 1e-8,
    "weight_decay": 0.0,
    "shampoo_beta": 0.95,
    "precondition_frequency": 10,
    "start_step": 1,
    "grafting": "adam",
    "momentum": 0.0,
    "nesterov": False,
    "bias_correction": True,
    "spread": False,
}


class ReferenceDash:
    """One tensor, as the matrix (out, rest). ``root`` are the arguments of the roots, ``place`` the tensor's place."""

    def __init__(self, W: Array, *, block_size: int, root: dict[str, Any], place: int = 0, **hyper: Any) -> None:
        assert hyper.keys() <= DEFAULTS.keys()
        hyper = {**DEFAULTS, **hyper, "root": root}
        self.shape, self.t = W.shape, 0
        self.W = np.array(W, dtype=np.float64).reshape(W.shape[0], -1)
        p, q = self.W.shape
        whole, B = [p // block_size * block_size, q // block_size * block_size], block_size
        # numbered by kind, in each row by row
        kinds: list[tuple[range, range]] = [
            (rows, columns)
            for rows in (range(0, whole[0], B), range(whole[0], p, B))
            for columns in (range(0, whole[1], B), range(whole[1], q, B))
        ]
        self.cells = [(i, j) for rows, columns in kinds for i in rows for j in columns]
        first = int(place * (np.sqrt(5) - 1) / 2 % 1 * hyper["precondition_frequency"])
        self.blocks = [
            Block(self.W[i : i + B, j : j + B], first + number, hyper) for number, (i, j) in enumerate(self.cells)
        ]
        self.B = B

    def step(self, gradient: Array, lr: float) -> None:
        self.t += 1
        G = np.asarray(gradient, dtype=np.float64).reshape(self.W.shape)
        for block, (i, j) in zip(self.blocks, self.cells, strict=True):
            block.step(G[i : i + self.B, j : j + self.B], self.t, lr)
