"""MatryoshkaLoRA as its definition reads: sums of adapters of smaller ranks, in the dtype of what comes in."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def scale(a: float, r: int, scaling: str) -> float:
    return a if scaling == "none" else a / r if scaling == "rank" else a / math.sqrt(r)


def summed(x: Tensor, A: Tensor, B: Tensor, a: float, scaling: str, ranks: Sequence[int]) -> Tensor:
    """Σ_j s(r_j)·B[:, :r_j]·A[:r_j]·x for rows x."""
    y = x.new_zeros(len(x), len(B))
    for r in ranks:
        y = y + scale(a, r, scaling) * x @ A[:r].T @ B[:, :r].T
    return y


def at_rank(x: Tensor, A: Tensor, B: Tensor, a: float, scaling: str, r: int) -> Tensor:
    return summed(x, A, B, a, scaling, [r])


def diagonal(a: float, R: int, scaling: str, ranks: Sequence[int]) -> Tensor:
    """p_i = Σ_{r_j ≥ i} s(r_j)."""
    p = [sum(scale(a, r, scaling) for r in ranks if r >= i) for i in range(1, R + 1)]
    return torch.tensor(p, dtype=torch.float64)
