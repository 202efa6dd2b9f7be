"""Error-feedback Top-K in float64 numpy, written from MicroAdam (arXiv 2405.15593), Algorithm 1. No package code."""

from __future__ import annotations

import math

import numpy as np


def step(a: np.ndarray, block: int, density: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Split the accumulated gradient: (index relative to its block, value) of the kept entries, and the rest."""
    rest = a.astype(np.float64).copy()
    indices, values = [], []
    for start in range(0, len(a), block):
        part = rest[start : start + block]
        k = math.ceil(round(density * len(part), 9))
        order = sorted(range(len(part)), key=lambda i: (-abs(part[i]), i))  # largest first, ties to the lowest index
        kept = sorted(order[:k])
        indices += kept
        values += [part[i] for i in kept]
        part[kept] = 0.0
    return np.array(indices), np.array(values), rest
