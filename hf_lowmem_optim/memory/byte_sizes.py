"""Numbers of bytes, written and read."""

from __future__ import annotations

import re

from hf_lowmem_optim.engine.options import shown

__all__ = ["format_bytes", "parse_bytes"]

_BINARY = ("B", "KiB", "MiB", "GiB", "TiB")
_FACTORS = {unit.lower(): 1024**power for power, unit in enumerate(_BINARY)}
_FACTORS.update((unit, 1000**power) for power, unit in enumerate(("b", "kb", "mb", "gb", "tb")))


def format_bytes(count: int) -> str:
    """Write a number of bytes with three digits and a binary unit."""
    size, unit = float(count), "B"
    for larger in _BINARY[1:]:
        if size < 1024:
            break
        size, unit = size / 1024, larger
    return f"{count} B" if unit == "B" else f"{size:.3g} {unit}" if size < 1000 else f"{size:.0f} {unit}"


def parse_bytes(text: str | int) -> int:
    """Read a budget: ``"24GiB"``, ``"80 GB"`` (a thousand million each), ``"512MiB"``; or an int of bytes.

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
                f"budget={shown(text)} is not a number with a unit; write for example 24GiB, 80GB or 512MiB"
            )
        # what has more digits is too large in any unit
        count = int(min(float(match[1]), 2.0**63) * factor)
    if not 0 < count < 2**63:
        raise ValueError(f"budget={shown(text)} must be more than nothing and less than 8 EiB; write for example 24GiB")
    return count
