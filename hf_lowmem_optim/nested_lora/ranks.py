"""Ranks, scales, and the diagonal that they put between A and B; the area under a curve of scores by rank."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Literal, get_args

from hf_lowmem_optim.words import nearest, shown

__all__ = [
    "MODES",
    "RULES",
    "SCALINGS",
    "Mode",
    "Rule",
    "Scaling",
    "aurac",
    "check_choice",
    "check_rank",
    "check_ranks",
    "component_weights",
    "doubling_ranks",
    "scale_at",
]

Mode = Literal["matryoshka", "lora", "dylora", "losses"]
Rule = Literal["paper", "nested"]
Scaling = Literal["none", "rank", "sqrt"]
MODES: tuple[Mode, ...] = get_args(Mode)
RULES: tuple[Rule, ...] = get_args(Rule)
SCALINGS: tuple[Scaling, ...] = get_args(Scaling)


def scale_at(alpha: float, rank: int, scaling: Scaling) -> float:
    """Return s(r): a, a/r or a/√r."""
    return {"none": alpha, "rank": alpha / rank, "sqrt": alpha / math.sqrt(rank)}[scaling]


def doubling_ranks(largest: int) -> tuple[int, ...]:
    """Return 1, 2, 4, … below the largest rank, and that."""
    return (*(2**power for power in range((largest - 1).bit_length())), largest)


def component_weights(
    ranks: Sequence[int], own_rank: int, alpha: float, scaling: Scaling, rank: int | None, rule: Rule
) -> list[float]:
    """Return what each component of a layer is multiplied by: the diagonal of P, or of inference at a rank.

    Args:
        ranks: Those that are trained. The ones above the layer's own rank drop out; where none is left, its own rank
            takes their place.
        own_rank: The layer's R.
        alpha: The layer's ``lora_alpha``.
        scaling: What s(r) is.
        rank: Of inference; None for training with all ranks at once.
        rule: Of inference. ``"paper"``: s(r) alone; ``"nested"``: the terms of all trained ranks up to r.
    """
    trained = [each for each in ranks if each <= own_rank] or [own_rank]
    if rank is None:
        terms = trained
    elif rule == "paper":
        terms = [min(rank, own_rank)]
    else:
        terms = [each for each in trained if each <= rank]
    # p_i = Σ_{r_j ≥ i} s(r_j)
    return [math.fsum(scale_at(alpha, each, scaling) for each in terms if each > i) for i in range(own_rank)]


def aurac(scores: Sequence[float], ranks: Sequence[int], scale: Literal["log2", "linear"] = "log2") -> float:
    """Return the area under the curve of scores by rank, divided by the width of the range of ranks.

    A constant has itself for its area, so that the result is a mean score in which every doubling of the rank counts
    alike (``"log2"``), or every component (``"linear"``).

    Args:
        scores: One for each rank: accuracies, losses, ...
        ranks: Strictly ascending.
        scale: ``"log2"``: trapezoids over log2(rank), as in the authors' second version; ``"linear"``: over the rank.

    Raises:
        ValueError: Lengths differ, there is no rank, or ranks do not ascend.

    Example:
        >>> aurac([0.5, 0.7, 0.8], [1, 2, 4])
        0.675
    """
    check_choice("scale", scale, ("log2", "linear"))
    ranks = check_ranks(ranks)
    if len(scores) != len(ranks):
        raise ValueError(f"{len(scores)} scores for {len(ranks)} ranks")
    if len(ranks) == 1:
        return float(scores[0])
    x = [math.log2(rank) if scale == "log2" else float(rank) for rank in ranks]
    areas = ((x[i + 1] - x[i]) * (scores[i] + scores[i + 1]) / 2 for i in range(len(x) - 1))
    return math.fsum(areas) / (x[-1] - x[0])


def check_choice(name: str, value: Any, choices: Sequence[Any]) -> None:
    """Raise ValueError for a value that is none of the choices."""
    if value not in choices:
        known = ", ".join(map(repr, choices))
        near = nearest(value, [each for each in choices if each is not None]) if isinstance(value, str) else ""
        raise ValueError(f"{name}={shown(value)} is none of {known}{near}")


def check_rank(rank: Any, largest: int) -> None:
    """Raise for what is no rank of an adapter of rank ``largest``: TypeError, or ValueError out of range."""
    if not isinstance(rank, int) or isinstance(rank, bool):
        raise TypeError(f"rank={shown(rank)} must be an integer")
    if not 1 <= rank <= largest:
        raise ValueError(f"rank={shown(rank)} must be from 1 to {largest}, the adapter's own rank")


def check_ranks(ranks: Any, largest: int | None = None) -> tuple[int, ...]:
    """Return ranks as a tuple.

    Raises:
        TypeError: They are no sequence of integers.
        ValueError: There is none, one is below 1 or above ``largest``, or they do not ascend.
    """
    if not isinstance(ranks, Sequence) or not all(isinstance(r, int) and not isinstance(r, bool) for r in ranks):
        raise TypeError(f"ranks={shown(ranks)} must be a sequence of integers, such as (1, 2, 4, 8)")
    if not ranks or ranks[0] < 1:
        raise ValueError(f"ranks={shown(ranks)} must begin with 1 or more")
    if any(before >= after for before, after in pairwise(ranks)):
        raise ValueError(f"ranks={shown(ranks)} must ascend, each only once")
    if largest is not None and ranks[-1] > largest:
        raise ValueError(f"ranks={shown(ranks)}: {shown(ranks[-1])} is above {largest}, the adapter's own rank")
    return tuple(ranks)
