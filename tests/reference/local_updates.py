"""Local AdamW of M workers in float64 numpy, in one process; imports nothing from the package.

A worker has a least-squares problem of its own at every step, so that its gradient depends on where it is.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def batch(worker: int, t: int, outputs: int, inputs: int) -> tuple[Array, Array]:
    """Return what worker sees at step t, in float32 numbers: samples and targets, one a row."""
    random = np.random.default_rng([worker, t])
    x = random.standard_normal((8, inputs)).astype(np.float32)
    y = random.standard_normal((8, outputs)).astype(np.float32) + worker
    return x.astype(np.float64), y.astype(np.float64)


def local_adamw(
    start: Array,
    workers: Sequence[int],
    *,
    steps: int,
    lr: float,
    weight_decay: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    periods: dict[str, int],
    outer: tuple[float, float] | None = None,
) -> Iterator[dict[str, list[Array]]]:
    """Yield weights and both moments of all workers after each step."""
    count = len(workers)
    W, m, v = ([np.array(first) for _ in workers] for first in (start, 0 * start, 0 * start))
    anchor, momentum = np.array(start), 0 * start
    for t in range(1, steps + 1):
        for i, worker in enumerate(workers):
            x, y = batch(worker, t, *start.shape)
            g = 2 * (x @ W[i].T - y).T @ x / y.size
            m[i] = betas[0] * m[i] + (1 - betas[0]) * g
            v[i] = betas[1] * v[i] + (1 - betas[1]) * g * g
            unbiased = m[i] / (1 - betas[0] ** t), v[i] / (1 - betas[1] ** t)
            W[i] = W[i] * (1 - lr * weight_decay) - lr * unbiased[0] / (np.sqrt(unbiased[1]) + eps)
        for key, each in (("params", W), ("exp_avg", m), ("exp_avg_sq", v)):
            if key in periods and t % periods[key] == 0:
                mean = np.mean(each, axis=0)
                if key == "params" and outer is not None:
                    momentum = outer[1] * momentum + (anchor - mean)
                    mean = anchor - outer[0] * (anchor - mean + outer[1] * momentum)
                    anchor = mean
                each[:] = [mean.copy() for _ in range(count)]
        yield {"params": [w.copy() for w in W], "exp_avg": [x.copy() for x in m], "exp_avg_sq": [x.copy() for x in v]}
