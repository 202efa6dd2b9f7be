"""Tables for the terminal."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["align"]


def align(rows: Sequence[Sequence[str]], *, left: int = 1) -> list[str]:
    """Return rows of cells as lines with aligned columns: the first ``left`` to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    styles = ["<" if column < left else ">" for column in range(len(widths))]
    padded = ([f"{c:{s}{w}}" for c, s, w in zip(row, styles, widths, strict=True)] for row in rows)
    return ["  ".join(cells).rstrip() for cells in padded]
