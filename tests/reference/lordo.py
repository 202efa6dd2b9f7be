"""LoRDO in float64 numpy, all workers in one process, line by line; imports nothing from the package.

A worker keeps its own weights, moments and error; basis and anchor are common. The product of anchor and Ω is taken
when it is needed, from a copy of the weights, as nothing has to be small here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

Array = NDArray[np.float64]

OVERSAMPLING = 8


def gaussian(rows: int, columns: int, t: int) -> Array:
    """Ω of the period that begins after step t."""
    drawn = torch.randn(rows, columns, generator=torch.Generator().manual_seed(t), dtype=torch.float32)
    return drawn.double().numpy()


@dataclass
class Worker:
    """What one worker has of one tensor; moments of the rank for a compressed one, else of the tensor's shape."""

    W: Array
    u: Array
    v: Array
    E: Array


class ReferenceLoRDO:
    """M workers that train the same tensors; matrices whose dimensions exceed the rank are compressed."""

    def __init__(
        self,
        weights: Sequence[Array],
        workers: int,
        *,
        rank: int,
        sync_every: int,
        omega: float = 0.9,
        mu: float = 1.0,
        betas: tuple[float, float] = (0.9, 0.99),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        clip_norm: float | None = None,
        error_feedback: bool = False,
        projection: str = "sketch",
    ) -> None:
        self.r, self.K, self.omega, self.mu, self.betas, self.eps = rank, sync_every, omega, mu, betas, eps
        self.weight_decay, self.clip_norm, self.error_feedback = weight_decay, clip_norm, error_feedback
        self.projection, self.t = projection, 0
        self.tall = [W.ndim == 2 and W.shape[0] > W.shape[1] for W in weights]
        upright = [self._turn(i, np.array(W, dtype=np.float64)) for i, W in enumerate(weights)]
        self.compressed = [W.ndim == 2 and min(W.shape) > rank for W in upright]
        self.anchor = [W.copy() for W in upright]
        self.Q: list[Array] = [
            np.zeros((len(W), rank)) if c else W for W, c in zip(upright, self.compressed, strict=True)
        ]
        self.workers: list[list[Worker]] = []
        for _ in range(workers):
            tensors = []
            for W, compressed in zip(upright, self.compressed, strict=True):
                shape = (rank, W.shape[1]) if compressed else W.shape
                tensors.append(Worker(W.copy(), np.zeros(shape), np.zeros(shape), np.zeros(W.shape)))
            self.workers.append(tensors)

    def _turn(self, i: int, matrix: Array) -> Array:
        return matrix.T.copy() if self.tall[i] else matrix

    def weights(self, worker: int = 0) -> list[Array]:
        """Return a worker's weights as they were given."""
        return [self._turn(i, tensor.W) for i, tensor in enumerate(self.workers[worker])]

    def step(self, gradients: Sequence[Sequence[Array | None]], lr: float) -> None:
        """Take a step with every worker's gradients; None counts as zero."""
        self.t += 1
        G: list[list[Array]] = []
        for own in gradients:
            start = self.weights()
            given = [
                np.zeros(W.shape) if g is None else np.asarray(g, np.float64) for g, W in zip(own, start, strict=True)
            ]
            whole = [self._turn(i, g) for i, g in enumerate(given)]
            if self.clip_norm is not None:
                norm = np.sqrt(sum((g**2).sum() for g in whole))
                whole = [min(1.0, self.clip_norm / norm) * g if norm > 0 else g for g in whole]
            G.append(whole)
        if self.t == 1:
            for i in range(len(self.Q)):
                if self.compressed[i]:
                    mean = np.mean([own[i] for own in G], axis=0)
                    self.Q[i] = np.linalg.svd(mean, full_matrices=False)[0][:, : self.r]
        for tensors, own in zip(self.workers, G, strict=True):
            for i, tensor in enumerate(tensors):
                (self._compressed if self.compressed[i] else self._dense)(i, tensor, own[i], lr)
        if self.t % self.K == 0:
            self.sync(renew=True)

    def _compressed(self, i: int, x: Worker, G: Array, lr: float) -> None:
        (beta1, beta2), Q, p = self.betas, self.Q[i], len(G)
        a = G + x.E
        g = Q.T @ a
        if self.error_feedback:
            x.E = a - Q @ g
        # ω = 0 needs no u, which counts as zero in the transport of v
        x.u = beta1 * x.u + (1 - beta1) * g if self.omega > 0 else x.u
        x.v = beta2 * x.v + (1 - beta2) * g**2
        u_hat, v_hat = x.u / (1 - beta1**self.t), x.v / (1 - beta2**self.t)
        phi = np.sqrt(v_hat.sum(axis=0) / p)
        low_rank = Q @ (u_hat / (np.sqrt(v_hat) + self.eps))
        full_rank = G / (self.mu * (phi + self.eps))
        x.W = x.W * (1 - lr * self.weight_decay) - lr * (self.omega * low_rank + (1 - self.omega) * full_rank)

    def _dense(self, i: int, x: Worker, G: Array, lr: float) -> None:
        beta1, beta2 = self.betas
        x.u = beta1 * x.u + (1 - beta1) * G
        x.v = beta2 * x.v + (1 - beta2) * G**2
        u_hat, v_hat = x.u / (1 - beta1**self.t), x.v / (1 - beta2**self.t)
        x.W = x.W * (1 - lr * self.weight_decay) - lr * u_hat / (np.sqrt(v_hat) + self.eps)

    def sync(self, *, renew: bool) -> None:
        """Average W, u and v; ``renew`` the basis, too: not at a sync out of turn."""
        for i in range(len(self.Q)):
            for key in ("W", "u", "v"):
                mean = np.mean([getattr(tensors[i], key) for tensors in self.workers], axis=0)
                for tensors in self.workers:
                    setattr(tensors[i], key, mean.copy())
            if renew and self.compressed[i]:
                self._renew(i)

    def _renew(self, i: int) -> None:
        W, u, v, old = self.workers[0][i].W, self.workers[0][i].u, self.workers[0][i].v, self.Q[i]
        change, whole = W - self.anchor[i], W
        if self.projection == "sketch":
            Omega = gaussian(W.shape[1], self.r + OVERSAMPLING, self.t - self.K)
            change, whole = W @ Omega - self.anchor[i] @ Omega, W @ Omega
        left, sizes, _ = np.linalg.svd(change, full_matrices=False)
        known = min(int((sizes > 2.0**-52 * np.linalg.norm(whole)).sum()), self.r)
        new = left[:, :known]
        if known == 0:
            new = old
        elif known < self.r:
            rest = np.linalg.svd(old - new @ (new.T @ old))[0][:, : self.r - known]
            new = np.concatenate([new, rest], axis=1)
        R, c1, c2 = new.T @ old, 1 - self.betas[0] ** self.t, 1 - self.betas[1] ** self.t
        v = c2 * np.abs((R * R) @ (v / c2 - (u / c1) ** 2) + (R @ u / c1) ** 2)
        u = R @ u
        self.Q[i], self.anchor[i] = new, W.copy()
        for tensors in self.workers:
            tensors[i].u, tensors[i].v = u.copy(), v.copy()
