"""Numbers of bytes, written and read. Without torch, so that a wrong budget is refused before that is loaded."""

from __future__ import annotations

import re

from hf_lowmem_optim.words import shown

__all__ = ["default_reserve", "format_bytes", "parse_bytes", "parse_reserve"]

_BINARY = ("B", "KiB", "MiB", "GiB", "TiB")
_FACTORS = {unit.lower(): 1024**power for power, unit in enumerate(_BINARY)}
_FACTORS.update((unit, 1000**power) for power, unit in enumerate(("b", "kb", "mb", "gb", "tb")))


def format_bytes(count: int, digits: int = 3) -> str:
    """Write a number of bytes with some digits and a binary unit."""
    size, unit = float(count), "B"
    for larger in _BINARY[1:]:
        if size < 1024:
            break
        size, unit = size / 1024, larger
    return f"{count} B" if unit == "B" else f"{size:.{digits}g} {unit}" if size < 1000 else f"{size:.0f} {unit}"


def parse_bytes(text: str | int, name: str = "budget") -> int:
    """Read a budget: ``"24GiB"``, ``"80 GB"`` (a thousand million each), ``"512MiB"``; or an int of bytes.

    Args:
        text: What was given.
        name: Whose value it is, for the error.

    Raises:
        ValueError: It is not a positive number with a unit, or more than 8 EiB.
    """
    if isinstance(text, int) and not isinstance(text, bool):
        count = text
    else:
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]+)\s*", str(text))
        factor = _FACTORS.get(match[2].lower()) if match else None
        if match is None or factor is None:
            raise ValueError(
                f"{name}={shown(text)} is not a number with a unit; write for example 24GiB, 80GB or 512MiB"
            )
        # what has more digits is too large in any unit
        count = int(min(float(match[1]), 2.0**63) * factor)
    if not 0 < count < 2**63:
        raise ValueError(f"{name}={shown(text)} must be more than nothing and less than 8 EiB; write for example 24GiB")
    return count


def default_reserve(budget: int) -> int:
    """Return what a budget keeps free for what a plan does not count: a tenth of it, at least 1 GiB."""
    return max(budget // 10, 1024**3)


def parse_reserve(text: str | int | None, budget: int) -> int:
    """Read the part of a budget that is to stay free; ``"0"`` keeps nothing, None the default.

    Raises:
        ValueError: It is not a number with a unit, or leaves nothing of the budget.
    """
    if text is None:
        reserve = default_reserve(budget)
    else:
        reserve = 0 if str(text).strip() == "0" else parse_bytes(text, "reserve")
    if reserve >= budget:
        raise ValueError(
            f"reserve={format_bytes(reserve)} leaves nothing of the budget of {format_bytes(budget)}; by default it is "
            "10 % of the budget, at least 1 GiB. Give a smaller one, 0 for none"
        )
    return reserve
