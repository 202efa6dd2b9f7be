"""Narrow weights with an 8-bit correction: a bfloat16 or float16 weight and an int8 beside it hold 24 bits.

A float32 value x is rounded to nearest (ties to even) to the narrow dtype's own format with 8 more bits of mantissa.
The 23 bits after the sign of that number are an integer p, which counts the numbers of the format from 0 on. Weight and
correction are its digits:

1. w ← ⌊(p + 128) / 256⌋, the narrow weight's bits after the sign: the nearest weight, of two equally near the larger
2. c ← p − 256·w, in [−128, 127]: how far the magnitude is from the weight's, in 256ths of their distance

So p = 256·w + c. Joined and split again, every pair is what it was; every value that has 16 significant bits (19 for
float16), or is a subnormal number of the wider format, comes back exactly; any other is at most 2^−9 of the distance
of two neighbouring weights off. Signs of zeros stay. A value that rounds to an infinite weight, infinities and NaN have
the correction 0, and a correction beside such a weight counts as 0.

A correction says nothing by itself: one that was left beside another weight moves that by half the distance to its
neighbour at most, and beside a zero never across it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hf_lowmem_optim.ops.dispatch import Op

__all__ = ["CORRECTION", "join_weights", "split_weights_"]

#: The key under which a compensated weight's state keeps its correction.
CORRECTION = "weight_correction"

#: Of a weight that is infinite: its bits.
_INFINITE = {torch.bfloat16: 0x7F80, torch.float16: 0x7C00}
#: float32's infinity, and what its bits have more than a float16's of the same value, moved to the same place.
_INFINITE_WIDE, _BIAS = 0x7F800000, 112 << 23
#: Below, float16 has subnormal numbers: in float32's bits, and as p.
_SMALLEST_NORMAL, _SMALLEST_NORMAL_P = 113 << 23, 1 << 18


@Op
def join_weights(weights: Sequence[Tensor], corrections: Sequence[Tensor]) -> list[Tensor]:
    """Return the float32 values of weights with their corrections.

    Args:
        weights: bfloat16 or float16, on one device; any shapes and layouts.
        corrections: int8, of the same shapes, contiguous.

    Returns:
        float32, of the same shapes, contiguous.
    """
    joined = [torch.empty(weight.shape, dtype=torch.float32, device=weight.device) for weight in weights]
    for weight, correction, out in zip(weights, corrections, joined, strict=True):
        w, c, x = weight.reshape(-1), correction.view(-1), out.view(-1)
        for part in _slices(x):
            x[part] = _join(w[part], c[part])
    return joined


@Op
def split_weights_(weights: Sequence[Tensor], corrections: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """Write float32 values to weights and their corrections.

    Args:
        weights: bfloat16 or float16, on one device; any shapes and layouts.
        corrections: int8, of the same shapes, contiguous.
        values: float32, of the same shapes, contiguous.
    """
    for weight, correction, value in zip(weights, corrections, values, strict=True):
        if not weight.is_contiguous():
            copy = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)
            split_weights_.torch_version([copy], [correction], [value])
            weight.copy_(copy)
            continue
        w, c, x = weight.view(-1), correction.view(-1), value.view(-1)
        for part in _slices(x):
            w[part], c[part] = _split(x[part], w.dtype)


def _slices(x: Tensor) -> list[slice]:
    """Cut entries into slices that a CPU's cache holds; few launches elsewhere."""
    length = 1 << 15 if x.device.type == "cpu" else 1 << 21
    return [slice(start, start + length) for start in range(0, x.numel(), length)]


def _join(weight: Tensor, correction: Tensor) -> Tensor:
    magnitude = weight.view(torch.int16).to(torch.int32) & 0x7FFF
    p = ((magnitude << 8) + correction).clamp_(min=0)
    if weight.dtype == torch.bfloat16:
        value = (p << 8).view(torch.float32)
    else:
        normal = ((p << 5) + _BIAS).view(torch.float32)
        value = torch.where(p < _SMALLEST_NORMAL_P, p * 2.0**-32, normal)
    value = value.copysign(weight.float())
    return torch.where(magnitude < _INFINITE[weight.dtype], value, weight)


def _split(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    bits = x.view(torch.int32)
    magnitude = (bits & 0x7FFFFFFF).clamp_(max=_INFINITE_WIDE)
    if dtype == torch.bfloat16:
        p = _nearest(magnitude, 8)
    else:
        small = (x.abs().clamp_(max=2.0**-14) * 2.0**32).round_().to(torch.int32)
        p = torch.where(magnitude < _SMALLEST_NORMAL, small, _nearest(magnitude - _BIAS, 5))
    weight = ((p + 128) >> 8).clamp_(max=_INFINITE[dtype])
    correction = torch.where(weight < _INFINITE[dtype], p - (weight << 8), 0)
    narrow = (weight | (bits >> 31 << 15)).to(torch.int16).view(dtype)
    return torch.where(x.isnan(), x.to(dtype), narrow), correction.to(torch.int8)


def _nearest(bits: Tensor, dropped: int) -> Tensor:
    """Return bits without the last ones, rounded to nearest, ties to even."""
    return (bits + ((1 << dropped - 1) - 1) + ((bits >> dropped) & 1)) >> dropped
