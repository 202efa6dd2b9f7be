"""``tl.fma`` in float32 with one rounding, as the hardware does it: the stock interpreter rounds the product, too."""

from __future__ import annotations

from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

_stock_fma = InterpreterBuilder.create_fma


def fused(x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
    """Return x·y + z: the product is exact in float64, and the sum is rounded to odd there, then to float32."""
    with np.errstate(all="ignore"):
        product, addend = x.astype(np.float64) * y.astype(np.float64), z.astype(np.float64)
        total = product + addend
        back = total - product
        lost = (product - (total - back)) + (addend - back)
        bits = np.ascontiguousarray(total).view(np.int64)
        odd = (lost != 0) & np.isfinite(total) & ((bits & 1) == 0)
        total = np.where(odd, (bits + np.where((lost > 0) == (total > 0), 1, -1)).view(np.float64), total)
        return total.astype(np.float32)


def _fma(self: InterpreterBuilder, x: TensorHandle, y: TensorHandle, z: TensorHandle) -> Any:
    if x.dtype.scalar != tl.float32:
        return _stock_fma(self, x, y, z)
    return TensorHandle(fused(x.data, y.data, z.data), tl.float32)


def enable() -> None:
    """Replace the operation of the interpreter's builder."""
    InterpreterBuilder.create_fma = _fma
