"""Values of a block on a geometric grid in float64, from its formula. Imports nothing from the package."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from tests.reference.block_quant import nearest_bfloat16

Array = NDArray[np.float64]


def geometric(values: Array, bits: int) -> Array:
    """v̂ = ±lo·(hi/lo)^(c/n), c = round(n·ln(|v|/lo)/ln(hi/lo)), of finite values of one block.

    n is the largest number that a code has beside the sign; one less where a code stands for zero, which is the nearest
    of everything below the smallest normal float32.
    """
    magnitude = np.abs(values)
    usual = magnitude >= 2.0**-126
    if not usual.any():
        return np.zeros_like(values)
    lo, hi = magnitude[usual].min(), magnitude[usual].max()
    n = 2 ** (bits - 1) - 1 - (not usual.all())
    if lo == hi:
        return np.where(usual, values, 0.0)
    c = np.floor(n * np.log(np.where(usual, magnitude, lo) / lo) / np.log(hi / lo) + 0.5)
    return np.where(usual, np.sign(values) * lo * (hi / lo) ** (c / n), 0.0)


def stored(values: Array, value_dtype: str) -> Array:
    """Values of one block as they are read back."""
    if value_dtype == "fp32":
        return values
    return nearest_bfloat16(values) if value_dtype == "bf16" else geometric(values, int(value_dtype[0]))
