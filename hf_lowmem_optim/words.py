"""What error messages say about a wrong value. Without torch, so that a typo is refused before that is loaded."""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Iterable
from typing import Any

__all__ = ["check_type", "nearest", "shown"]

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxlong = _SHORT.maxother = 200
_SHORT.maxlist = _SHORT.maxtuple = _SHORT.maxdict = 12


def check_type(name: str, value: Any, kinds: type | tuple[type, ...], expected: str) -> None:
    """Raise TypeError, naming argument, value and what is right, for a value of another type."""
    if not isinstance(value, kinds):
        raise TypeError(f"{name}={shown(value)} is a {type(value).__name__}; it must be {expected}")


def nearest(name: str, known: Iterable[str], cutoff: float = 0.6) -> str:
    """Return ``"; did you mean 'x'?"`` for the first known name that goes on from ``name``, or the closest, or ""."""
    known = sorted(known) if isinstance(known, set) else list(known)
    close = [each for each in known if len(name) > 2 and each.startswith(name)]
    if not close and len(name) <= 200:  # the time that difflib takes grows with the length, to minutes
        close = difflib.get_close_matches(name, known, n=1, cutoff=cutoff)
    return f"; did you mean {close[0]!r}?" if close else ""


def shown(value: Any) -> str:
    """Return ``repr`` of what somebody gave, shortened where it is long or nested deep."""
    return _SHORT.repr(value)
