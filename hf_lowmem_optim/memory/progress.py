"""Progress of what takes a while, on a terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence

__all__ = ["shown_on_terminal"]


def shown_on_terminal(names: Sequence[str], verb: str) -> Iterator[str]:
    """Yield names, and say on a terminal which one is being worked on; the line is gone at the end.

    Standard error that is a file, a pipe or a notebook gets nothing.
    """
    terminal, width = sys.stderr.isatty(), 0
    try:
        for number, name in enumerate(names, 1):
            if terminal:
                text = f"{verb} {name} ({number} of {len(names)})"
                print(f"\r{text:<{width}}", end="", file=sys.stderr, flush=True)
                width = len(text)
            yield name
    finally:
        if width:
            print(f"\r{'':<{width}}\r", end="", file=sys.stderr, flush=True)
