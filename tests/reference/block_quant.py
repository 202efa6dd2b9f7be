"""Block quantization in float64 numpy, written from MicroAdam (arXiv 2405.15593), section 3. No package code."""

from __future__ import annotations

import numpy as np


def round_to_bfloat16(x: np.ndarray, direction: float) -> np.ndarray:
    """The nearest bfloat16 value not beyond x against ``direction`` (±inf): float64 in, float64 out."""
    near = (np.asarray(x, np.float32).view(np.uint32) & 0xFFFF0000).view(np.float32).astype(np.float64)  # toward zero
    step = np.where(near == 0, 2.0**-133, 2.0 ** (np.maximum(np.frexp(near)[1], -125) - 8))
    if direction > 0:
        return np.where(near < x, near + step, near)
    return np.where(near > x, near - step, near)


def nearest_bfloat16(x: np.ndarray) -> np.ndarray:
    """Nearest bfloat16, ties to even; float64 in and out, by way of float32."""
    bits = x.astype(np.float32).view(np.uint32).astype(np.uint64)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
    return rounded.astype(np.uint32).view(np.float32).astype(np.float64)


def quantize(x: np.ndarray, bits: int, block: int, bf16: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes (one per entry, not packed), lo and hi of each block."""
    levels = 2**bits - 1
    codes, lows, highs = [], [], []
    for start in range(0, len(x), block):
        part = x[start : start + block].astype(np.float64)
        lo, hi = part.min(), part.max()
        if bf16:
            lo, hi = round_to_bfloat16(lo, -np.inf).item(), round_to_bfloat16(hi, np.inf).item()
        u = (hi - lo) / levels
        codes.append(np.clip(np.floor((part - lo) / u + 0.5), 0, levels) if u > 0 else np.zeros(len(part)))
        lows.append(lo)
        highs.append(hi)
    return np.concatenate(codes).astype(np.int64), np.array(lows), np.array(highs)


def dequantize(codes: np.ndarray, lo: np.ndarray, hi: np.ndarray, bits: int, block: int) -> np.ndarray:
    """Entries as float64."""
    of = np.arange(len(codes)) // block
    return codes * ((hi - lo) / (2**bits - 1))[of] + lo[of]


def pack(codes: np.ndarray, bits: int) -> np.ndarray:
    """Bytes: 4-bit codes with the even index in the high nibble."""
    if bits == 8:
        return codes.astype(np.uint8)
    padded = np.append(codes, 0) if len(codes) % 2 else codes
    return (padded[0::2] * 16 + padded[1::2]).astype(np.uint8)
