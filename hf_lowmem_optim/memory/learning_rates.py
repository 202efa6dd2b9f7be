"""The learning rate to start from, given the one that AdamW would have: the ratios of the best rates measured."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

from hf_lowmem_optim.words import shown

__all__ = ["FACTORS", "LearningRate", "learning_rates"]

FACTORS: dict[str, tuple[float, float]] = {"ldadam": (2.5, 8.0), "microadam": (1.0, 4.0)}
"""Best rate by AdamW's best rate, fine-tuning and from scratch; the tests hold them against benchmarks/results."""


@dataclass(frozen=True)
class LearningRate:
    """Where to start with an optimizer: factors to AdamW's rate, None where nothing was measured."""

    name: str
    adamw: float
    fine_tuning: float | None
    from_scratch: float | None

    source: ClassVar[str] = (
        "Measured: the best of rates a factor of two apart, over AdamW's best; fine-tuning a 23M encoder for 450 "
        "steps, a 3M language model from scratch for 300 (benchmarks/results/convergence_finetune.json, "
        "convergence_pretrain.json). Larger models were not tried: try half and double as well, and less for a longer "
        "run with microadam."
    )


def learning_rates(names: Iterable[str], adamw: float) -> tuple[LearningRate, ...]:
    """Return where to start with some optimizers; a layer-wise one takes the rate of its normal mode.

    Raises:
        TypeError: AdamW's rate is no number.
        ValueError: It is not positive, or 1 and more.
    """
    if isinstance(adamw, bool) or not isinstance(adamw, (int, float)):
        raise TypeError(f"adamw_lr={shown(adamw)} is a {type(adamw).__name__}; it must be a float > 0")
    if not 0 < adamw < 1:
        raise ValueError(f"adamw_lr={adamw:g} is no learning rate: it must be more than 0 and less than 1")
    found = ((name, FACTORS.get(name.removesuffix("_layerwise"), (None, None))) for name in names)
    return tuple(LearningRate(name, adamw, *factors) for name, factors in found)
