"""Checks of hyper-parameters: one function per kind of value, each error naming argument, value and what is right."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

__all__ = [
    "as_plain",
    "check_betas",
    "check_bool",
    "check_choice",
    "check_eps",
    "check_fraction",
    "check_lr",
    "check_positive",
    "check_positive_int",
    "check_unit_interval",
    "check_weight_decay",
    "nearest",
]


def nearest(name: str, known: Iterable[str], cutoff: float = 0.6) -> str:
    """Return ``"; did you mean 'x'?"`` for the known name closest to ``name``, or an empty string."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=cutoff)
    return f"; did you mean {close[0]!r}?" if close else ""


def as_plain(value: Any) -> Any:
    """A numpy scalar as a Python number: it could be saved, but not loaded with ``weights_only=True``."""
    if isinstance(value, np.generic):
        return value.item()
    return tuple(map(as_plain, value)) if isinstance(value, (tuple, list)) else value


def _check_real(name: str, value: Any, expected: str) -> float:
    """Return ``value`` if it is a finite real number (no bool, no string), else raise naming ``expected``."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}={value!r} is a {type(value).__name__}; it must be {expected}")
    if not math.isfinite(value):
        raise ValueError(f"{name}={value!r} is not finite; it must be {expected}")
    return float(value)


def check_lr(value: Any, name: str = "lr") -> None:
    """Learning rate: a finite float ≥ 0."""
    if _check_real(name, value, "a float ≥ 0") < 0:
        raise ValueError(f"{name}={value!r} is negative; it must be a float ≥ 0")


def check_weight_decay(value: Any) -> None:
    """Weight decay: a finite float ≥ 0."""
    check_lr(value, "weight_decay")


def check_eps(value: Any) -> None:
    """Epsilon: a finite float > 0, so that a zero gradient never divides zero by zero."""
    if _check_real("eps", value, "a float > 0") <= 0:
        raise ValueError(f"eps={value!r} is not positive; it must be a float > 0, for example 1e-8")


def check_positive(name: str, value: Any) -> None:
    """A finite float > 0."""
    if _check_real(name, value, "a float > 0") <= 0:
        raise ValueError(f"{name}={value!r} is not positive; it must be a float > 0")


def check_unit_interval(name: str, value: Any) -> None:
    """A float in [0, 1)."""
    if not 0.0 <= _check_real(name, value, "a float in [0, 1)") < 1.0:
        raise ValueError(f"{name}={value!r} is outside [0, 1)")


def check_fraction(name: str, value: Any, *, or_none: str) -> None:
    """A float in (0, 1], or None, which means ``or_none``."""
    if value is None:
        return
    expected = f"a float in (0, 1], or None ({or_none})"
    if not 0.0 < _check_real(name, value, expected) <= 1.0:
        raise ValueError(f"{name}={value!r} is out of range; it must be {expected}")


def check_bool(name: str, value: Any) -> None:
    """True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name}={value!r} is a {type(value).__name__}; it must be True or False")


def check_betas(value: Any) -> None:
    """Decay rates of the moments: two floats in [0, 1)."""
    if isinstance(value, str) or not isinstance(value, Sequence) or len(value) != 2:
        raise TypeError(f"betas={value!r} must be two floats in [0, 1), for example betas=(0.9, 0.99)")
    for index, beta in enumerate(value):
        check_unit_interval(f"betas[{index}]", beta)


def check_positive_int(name: str, value: Any, *, or_none: str | None = None, maximum: int | None = None) -> None:
    """An int ≥ 1.

    Args:
        name: Name of the argument.
        value: What was given.
        or_none: What ``None`` means, if it is allowed as well.
        maximum: The largest value allowed, if there is one.
    """
    expected = "an int ≥ 1" if maximum is None else f"an int from 1 to {maximum}"
    if or_none is not None:
        if value is None:
            return
        expected += f", or None ({or_none})"
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}={value!r} is a {type(value).__name__}; it must be {expected}")
    if value < 1 or (maximum is not None and value > maximum):
        raise ValueError(f"{name}={value!r} is out of range; it must be {expected}")


def check_choice(name: str, value: Any, choices: Sequence[str] | Sequence[int]) -> None:
    """One of a few strings or ints."""
    if isinstance(value, bool) or value not in choices:
        hint = nearest(value, map(str, choices)) if isinstance(value, str) else ""
        raise ValueError(f"{name}={value!r} is not one of {', '.join(map(repr, choices))}{hint}")
