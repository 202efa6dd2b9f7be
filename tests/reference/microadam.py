"""MicroAdam in float64 numpy, entry by entry from the paper's algorithm; imports nothing from the package.

Only what *is* stored in few bits is rounded: the window's values to bfloat16, the error to codes with bfloat16
statistics rounded outwards. Loops over blocks, a dense buffer per window row: slow, and plainly right.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def round_bfloat16(x: float, direction: str = "nearest") -> float:
    """Round to 8 significant bits: to nearest even, "down" or "up" (normal range only)."""
    if x == 0:
        return 0.0
    ulp = 2.0 ** (math.floor(math.log2(abs(x))) - 7)
    scaled = x / ulp
    whole = {"nearest": np.rint, "down": np.floor, "up": np.ceil}[direction](scaled)
    return float(whole * ulp)


class ReferenceMicroAdam:
    """One tensor of d entries."""

    def __init__(
        self,
        W: Array,
        *,
        window: int = 10,
        density: float = 0.01,
        block_size: int = 4096,
        quant_block_size: int = 64,
        bits: int | None = 4,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        bias_correction: str = "step",
        alpha: float = 0.0,
    ) -> None:
        self.W = np.array(W, dtype=np.float64)
        self.window, self.density, self.block_size = window, density, block_size
        self.quant_block_size, self.bits = quant_block_size, bits
        self.betas, self.eps, self.weight_decay = betas, eps, weight_decay
        self.bias_correction, self.alpha = bias_correction, alpha
        self.error = np.zeros_like(self.W)
        self.rows: list[dict[int, float]] = []
        self.t = 0

    def quantize(self, a: Array) -> Array:
        """Q⁻¹(Q(a))."""
        if self.bits is None:
            return a.copy()
        out, levels = np.empty_like(a), 2**self.bits - 1
        for start in range(0, a.size, self.quant_block_size):
            block = a[start : start + self.quant_block_size]
            low, high = round_bfloat16(block.min(), "down"), round_bfloat16(block.max(), "up")
            u = (high - low) / levels
            codes = np.clip(np.floor((block - low) / u + 0.5), 0, levels) if u > 0 else np.zeros(block.size)
            out[start : start + self.quant_block_size] = codes * u + low
        return out

    def step(self, gradient: Array, lr: float) -> None:
        self.t += 1
        applied = self.alpha * self.error
        a = np.asarray(gradient, dtype=np.float64) + (1 - self.alpha) * self.error
        row: dict[int, float] = {}
        for start in range(0, a.size, self.block_size):
            block = a[start : start + self.block_size]
            # a stable sort of the negated magnitudes: ties stay in the order of their indices
            kept = np.argsort(-np.abs(block), kind="stable")[: math.ceil(round(self.density * block.size, 9))]
            for index in kept:
                row[start + int(index)] = round_bfloat16(float(block[index]))
        for index, value in row.items():
            a[index] -= value
        self.error = self.quantize(a)
        self.rows = [*self.rows, row][-self.window :]

        beta1, beta2 = self.betas
        last = self.t if self.bias_correction == "step" else min(self.t, self.window)
        z1, z2 = np.zeros_like(a), np.zeros_like(a)
        for age, past in enumerate(reversed(self.rows)):
            for index, value in past.items():
                z1[index] += (1 - beta1) / (1 - beta1**last) * beta1**age * value
                z2[index] += (1 - beta2) / (1 - beta2**last) * beta2**age * value**2
        self.W = self.W * (1 - lr * self.weight_decay) - lr * (z1 / (np.sqrt(z2) + self.eps) + applied)
