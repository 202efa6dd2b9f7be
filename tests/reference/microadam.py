"""MicroAdam in float64 numpy, entry by entry from the paper's algorithm; imports nothing from the package.

Only what *is* stored in few bits is rounded: the window's values as they are kept, the error to codes with bfloat16
statistics rounded outwards. Loops over blocks, a dense buffer per window row: slow, and plainly right.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from tests.reference import block_quant, block_topk, window_values

Array = NDArray[np.float64]


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
        bits: int = 4,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        bias_correction: str = "step",
        alpha: float = 0.0,
        value_dtype: str = "bf16",
    ) -> None:
        self.W = np.array(W, dtype=np.float64)
        self.window, self.density, self.block_size = window, density, block_size
        self.quant_block_size, self.bits = quant_block_size, bits
        self.betas, self.eps, self.weight_decay = betas, eps, weight_decay
        self.bias_correction, self.alpha, self.value_dtype = bias_correction, alpha, value_dtype
        self.error = np.zeros_like(self.W)
        self.rows: list[dict[int, float]] = []
        self.t = 0

    def step(self, gradient: Array, lr: float) -> None:
        self.t += 1
        applied = self.alpha * self.error
        a = np.asarray(gradient, dtype=np.float64) + (1 - self.alpha) * self.error
        row: dict[int, float] = {}
        for start in range(0, a.size, self.block_size):
            indices, values, _ = block_topk.step(a[start : start + self.block_size], self.block_size, self.density)
            kept = window_values.stored(values, self.value_dtype)
            row.update(zip((start + indices).tolist(), kept.tolist(), strict=True))
        for index, value in row.items():
            a[index] -= value
        stored = block_quant.quantize(a, self.bits, self.quant_block_size, bf16=True)
        self.error = block_quant.dequantize(*stored, self.bits, self.quant_block_size)
        self.rows = [*self.rows, row][-self.window :]

        beta1, beta2 = self.betas
        last = self.t if self.bias_correction == "step" else min(self.t, self.window)
        z1, z2 = np.zeros_like(a), np.zeros_like(a)
        for age, past in enumerate(reversed(self.rows)):
            for index, value in past.items():
                z1[index] += (1 - beta1) / (1 - beta1**last) * beta1**age * value
                z2[index] += (1 - beta2) / (1 - beta2**last) * beta2**age * value**2
        self.W = self.W * (1 - lr * self.weight_decay) - lr * (z1 / (np.sqrt(z2) + self.eps) + applied)
