"""How a large matrix is cut for several threads."""

from __future__ import annotations

__all__ = ["PIECE"]

#: Columns, rows or entries of a piece are a multiple: so the same ones are left over after whole vectors, and no block
#: of a quantized error is in two pieces.
PIECE = 256
