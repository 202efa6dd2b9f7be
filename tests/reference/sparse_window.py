"""MicroAdam's statistics and step, and G·x and Gᵀw, entry by entry in float64 (arXiv 2405.15593, algorithm 1).

Imports nothing from the package. A row is a list of ``(position in the tensor, value)``.
"""

from __future__ import annotations

import numpy as np

Row = list[tuple[int, float]]


def rows_of_window(indices, values, block_size: int, kept_per_block: int) -> list[Row]:
    """Read the packed layout: column ``c`` belongs to block ``c // kept_per_block``."""
    return [
        [
            (column // kept_per_block * block_size + int(index), float(value))
            for column, (index, value) in enumerate(zip(row_indices, row_values, strict=True))
        ]
        for row_indices, row_values in zip(indices, values, strict=True)
    ]


def adam_weights(step: int, window: int, beta: float) -> np.ndarray:
    """(1−β)/(1−βᵗ)·β^age per row of a window whose row (t−1) mod m was written at step t; 0 for a row not written."""
    weights = np.zeros(window)
    for t in range(max(1, step - window + 1), step + 1):
        weights[(t - 1) % window] = (1 - beta) / (1 - beta**step) * beta ** (step - t)
    return weights


def step(param, rows: list[Row], w1, w2, lr: float, eps: float, weight_decay: float) -> np.ndarray:
    """W ← W·(1 − lr·wd) − lr·z1/(√z2 + eps) at touched entries."""
    param = np.array(param, dtype=np.float64)
    z1: dict[int, float] = {}
    z2: dict[int, float] = {}
    for row, weight1, weight2 in zip(rows, w1, w2, strict=True):
        if weight1 == 0 and weight2 == 0:
            continue
        for position, value in row:
            z1[position] = z1.get(position, 0.0) + weight1 * value
            z2[position] = z2.get(position, 0.0) + weight2 * value * value
    out = param * (1 - lr * weight_decay)
    for position in z1:
        out[position] -= lr * z1[position] / (np.sqrt(z2[position]) + eps)
    return out


def dots(rows: list[Row], dense) -> np.ndarray:
    """G·x."""
    return np.array([sum(float(dense[position]) * value for position, value in row) for row in rows])


def combine(rows: list[Row], weights, numel: int) -> np.ndarray:
    """Gᵀw."""
    out = np.zeros(numel)
    for row, weight in zip(rows, weights, strict=True):
        for position, value in row:
            out[position] += weight * value
    return out
