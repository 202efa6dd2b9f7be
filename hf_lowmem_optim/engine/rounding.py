"""Stochastic rounding of float32 values to bfloat16 or float16: unbiased, and seeded.

A value between two neighbours a < b of the narrow dtype becomes b with probability (x − a)/(b − a), else a, so that
updates far below the spacing of the weights add up in the mean; rounding to nearest loses each of them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hf_lowmem_optim.ops.block_quant import rounding_keys

__all__ = ["StochasticRounding", "seed_of_part"]

_EXPONENT_BITS = 0x7F800000


def seed_of_part(seed: int, index: int) -> int:
    """Return the seed of a part of a tensor, which is none of those of whole tensors."""
    low, high = (key & 0xFFFFFFFF for key in rounding_keys(seed))
    return (high << 32 | low) + index


class StochasticRounding:
    """Rounds the weights of one tensor in one step.

    Args:
        seed: What the draws depend on, with the device and the order of the calls.
        device: Where the tensors lie.
    """

    def __init__(self, seed: int, device: torch.device) -> None:
        # neighbouring seeds must give unrelated draws; a CPU generator looks at 32 bits only
        low, high = (key & 0xFFFFFFFF for key in rounding_keys(seed))
        self._generator = torch.Generator(device=device).manual_seed(high << 31 ^ low)

    def round_(self, out: Tensor, wide: Tensor) -> None:
        """Write ``wide`` to ``out``, rounded.

        What ``out`` can represent stays as it is, and so do infinities and NaN. Beyond the largest value of the narrow
        dtype the next neighbour is infinity.

        Args:
            out: bfloat16 or float16, any shape and layout.
            wide: float32, same shape.
        """
        if not (out.is_contiguous() and wide.is_contiguous()):
            copy = torch.empty(out.shape, dtype=out.dtype, device=out.device)
            self.round_(copy, wide.contiguous())
            out.copy_(copy)
            return
        narrow, source = out.view(-1), wide.view(-1)
        # slices that a CPU's cache holds; few launches elsewhere
        length = 1 << 15 if out.device.type == "cpu" else 1 << 21
        for start in range(0, source.numel(), length):
            self._round_slice_(narrow[start : start + length], source[start : start + length])

    def _round_slice_(self, out: Tensor, x: Tensor) -> None:
        kind = torch.finfo(out.dtype)
        # the distance of neighbours: a power of two, so that dividing by it is exact; finite for an infinite x
        unit = x.view(torch.int32).bitwise_and(_EXPONENT_BITS).view(torch.float32)
        unit.clamp_(kind.smallest_normal, 2.0**127).mul_(kind.eps)
        t = x / unit
        below = t.floor()
        draws = torch.rand(x.shape, generator=self._generator, dtype=torch.float32, device=x.device)
        up = draws < t.sub_(below)
        below.add_(up).mul_(unit)
        # where subnormal numbers count as zero, so does the distance of the smallest values: those are as good as zero
        torch.eq(unit, 0, out=up)
        out.copy_(torch.where(up, x, below, out=below))
