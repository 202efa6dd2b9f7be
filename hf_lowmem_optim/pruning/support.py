"""Which entries are pruned: exactly the ⌊s·n⌋ of smallest saliency, or N:M patterns; and masks of one bit an entry."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

__all__ = ["Bits", "NotFiniteError", "check_pattern", "count_to_prune", "lowest_of_all", "lowest_of_each"]

#: A float32 number ≥ 0 is ordered as its bits: those before the last 16, and the last 16.
_HALF, _NUM_HIGH, _NUM_LOW = 16, 1 << 15, 1 << 16


class NotFiniteError(ValueError):
    """Weights have entries of which none is lowest."""


def count_to_prune(sparsity: float, numel: int) -> int:
    """Return ⌊s·n⌋, with s as it is written: 0.29 of 100 are 29."""
    return math.floor(Fraction(repr(float(sparsity))) * numel)


def check_pattern(pattern: Sequence[int] | None, sparsity: float | None) -> tuple[tuple[int, int] | None, float]:
    """Check an N:M pattern and a sparsity, of which one may follow from the other.

    Returns:
        The pattern, and the sparsity: 0.5 if nothing is given.

    Raises:
        TypeError: They are not what they should be.
        ValueError: They are out of range or contradict each other.
    """
    if sparsity is not None and (isinstance(sparsity, bool) or not isinstance(sparsity, (int, float))):
        raise TypeError(f"sparsity={sparsity!r} must be a float in [0, 1)")
    if sparsity is not None and not 0 <= sparsity < 1:
        raise ValueError(f"sparsity={sparsity!r} is out of range; it must be a float in [0, 1)")
    if pattern is None:
        return None, 0.5 if sparsity is None else float(sparsity)
    if not isinstance(pattern, Sequence) or len(pattern) != 2 or not all(isinstance(each, int) for each in pattern):
        raise TypeError(f"pattern={pattern!r} must be (N, M), for example (2, 4)")
    kept, of = pattern
    if not 1 <= kept < of:
        raise ValueError(f"pattern={pattern!r} must have 1 ≤ N < M: N of M neighbours are kept")
    implied = (of - kept) / of
    if sparsity is not None and abs(sparsity - implied) > 1e-6:
        raise ValueError(
            f"sparsity={sparsity!r} contradicts pattern={tuple(pattern)!r}, which prunes {of - kept} of {of}: leave "
            f"the sparsity out, or set it to {implied:g}"
        )
    return (kept, of), implied


@torch.no_grad()
def lowest_of_all(saliencies: Sequence[Callable[[], Tensor]], count: int) -> list[Tensor]:
    """Return which entries of several tensors are the lowest of all, exactly ``count``; of equal ones the first.

    The threshold is found by two histograms of the numbers' bits, so that one tensor at a time is looked at.

    Args:
        saliencies: Each computes the saliency of a tensor, float32 and ≥ 0, flat: it is called three times.
        count: How many, from 0 to the number of all entries.

    Returns:
        bool, of each tensor, flat.

    Raises:
        NotFiniteError: A saliency is not finite.
    """
    if count == 0:
        return [torch.zeros_like(compute(), dtype=torch.bool) for compute in saliencies]
    high = torch.zeros(_NUM_HIGH, dtype=torch.int64)
    for compute in saliencies:
        saliency = compute()
        if not bool(torch.isfinite(saliency).all()):
            raise NotFiniteError
        high += torch.bincount(_bits(saliency) >> _HALF, minlength=_NUM_HIGH).cpu()
    bucket, left = _find(high, count)
    low = torch.zeros(_NUM_LOW, dtype=torch.int64)
    for compute in saliencies:
        bits = _bits(compute())
        low += torch.bincount(bits[bits >> _HALF == bucket] & (_NUM_LOW - 1), minlength=_NUM_LOW).cpu()
    place, left = _find(low, left)
    threshold = bucket << _HALF | place
    chosen = []
    for compute in saliencies:
        bits = _bits(compute())
        equal = (bits == threshold).nonzero()[:, 0][:left]
        chosen.append((bits < threshold).index_fill_(0, equal, True))
        left -= len(equal)
    return chosen


def _bits(saliency: Tensor) -> Tensor:
    # −0.0 has the bits of no number ≥ 0
    return (saliency + 0.0).view(torch.int32)


def _find(histogram: Tensor, count: int) -> tuple[int, int]:
    """Return the class of the ``count``-th smallest number, and its place in there, from 1 on."""
    ends = histogram.cumsum(0)
    index = int(torch.searchsorted(ends, count))
    return index, count - (int(ends[index - 1]) if index else 0)


@torch.no_grad()
def lowest_of_each(saliency: Tensor, count: int, of: int) -> Tensor:
    """Return which ``count`` of each ``of`` neighbours are the lowest, bool; of equal ones the first."""
    if not bool(torch.isfinite(saliency).all()):
        raise NotFiniteError
    order = saliency.reshape(-1, of).argsort(dim=1, stable=True)
    chosen = torch.zeros_like(order, dtype=torch.bool)
    return chosen.scatter_(1, order[:, :count], True).view(saliency.shape)


@dataclass(frozen=True)
class Bits:
    """A flat mask, packed to one bit an entry."""

    packed: Tensor
    numel: int

    @classmethod
    def pack(cls, mask: Tensor) -> Bits:
        """Pack a flat bool tensor."""
        padded = torch.zeros(-(-mask.numel() // 8) * 8, dtype=torch.uint8, device=mask.device)
        padded[: mask.numel()] = mask
        packed = padded.view(-1, 8)[:, 0].clone()
        for place in range(1, 8):
            packed |= padded.view(-1, 8)[:, place] << place
        return cls(packed, mask.numel())

    def unpack(self) -> Tensor:
        """Return the flat bool tensor."""
        places = torch.arange(8, dtype=torch.uint8, device=self.packed.device)
        return (self.packed[:, None] >> places & 1).bool().view(-1)[: self.numel]
