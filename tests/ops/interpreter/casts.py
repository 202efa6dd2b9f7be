"""fp32 ↔ bf16 casts as the hardware does them: to nearest even, subnormals exact, NaN kept."""

from __future__ import annotations

from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

_stock_cast = InterpreterBuilder.cast_impl
_stock_fp_to_fp = InterpreterBuilder.create_fp_to_fp

_CASTS = (
    "create_si_to_fp",
    "create_ui_to_fp",
    "create_fp_to_si",
    "create_fp_to_ui",
    "create_fp_ext",
    "create_fp_trunc",
)


def float32_to_bfloat16_bits(x: np.ndarray) -> np.ndarray:
    """Round float32 to the nearest bfloat16, ties to even; return the bits as uint16."""
    bits = np.ascontiguousarray(x, dtype=np.float32).view(np.uint32).astype(np.uint64)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(x), np.uint16(0x7FC0), rounded)


def bfloat16_bits_to_float32(bits: np.ndarray) -> np.ndarray:
    """Widen bfloat16 bits (uint16) to float32; exact for every value."""
    return (np.ascontiguousarray(bits).astype(np.uint32) << 16).view(np.float32)


def _cast(self: InterpreterBuilder, source: TensorHandle, target: Any) -> TensorHandle:
    """Like the stock cast, with bf16 on either side going through float32."""
    from_type, to_type = source.dtype.scalar, target.scalar
    if from_type == to_type or tl.bfloat16 not in (from_type, to_type):
        # a float outside an integer's range is undefined on every target; numpy only warns about it
        with np.errstate(invalid="ignore", over="ignore"):
            return _stock_cast(self, source, target)
    if to_type == tl.bfloat16:
        # float64 would round twice on its way through float32, and integers above 2^24 too: no kernel of ours does it
        return TensorHandle(float32_to_bfloat16_bits(source.data.astype(np.float32)), to_type)
    wide = TensorHandle(bfloat16_bits_to_float32(source.data), tl.float32)
    return wide if to_type == tl.float32 else _stock_cast(self, wide, target)


def _fp_to_fp(self: InterpreterBuilder, source: TensorHandle, target: Any, rounding_mode: Any) -> TensorHandle:
    pair = {source.dtype.scalar, target.scalar}
    if pair == {tl.float32, tl.bfloat16}:
        return _cast(self, source, target)
    return _stock_fp_to_fp(self, source, target, rounding_mode)


def enable() -> None:
    """Replace the casts of the interpreter's builder."""
    InterpreterBuilder.cast_impl = _cast
    InterpreterBuilder.create_fp_to_fp = _fp_to_fp
    for name in _CASTS:  # the stock lambdas are bound late, but subclasses and versions differ: pin them
        setattr(InterpreterBuilder, name, lambda self, source, target: self.cast_impl(source, target))
