"""JSON files that anybody may have written: read with a limit, and checked before they are used."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hf_lowmem_optim.words import shown

__all__ = ["check_shape", "read_json"]

MAX_BYTES = 64 * 1024**2
MAX_COUNT = 2**63 - 1


def read_json(path: Path) -> Any:
    """Return what a JSON file holds.

    Raises:
        ValueError: It is not JSON in UTF-8, longer than 64 MiB, or nested too deep.
    """
    with path.open("rb") as file:
        content = file.read(MAX_BYTES + 1)
    if len(content) > MAX_BYTES:
        raise ValueError(f"{shown(str(path))} has more than {MAX_BYTES // 1024**2} MiB; such files are much smaller")
    try:
        return json.loads(content.decode())
    except RecursionError:
        raise ValueError(f"{shown(str(path))} is nested too deep to be read") from None
    except ValueError as error:  # JSON, UTF-8, or a number of thousands of digits
        raise ValueError(f"{shown(str(path))} is not valid JSON: {error}") from error


def check_shape(value: Any, shape: Any, where: str) -> None:
    """Check that a JSON value is like ``shape``.

    Args:
        value: The value.
        shape: A type or a tuple of types; ``[shape]`` for a list; ``{str: shape}`` for a dict of any keys, or a dict
            with the shape of each key, in which one that ends in ``?`` may be missing or None.
        where: What the value is called in the error.

    Raises:
        ValueError: It is not. Numbers of type ``int`` are counts, and a string must be a line of text.
    """
    kind: Any = type(shape) if isinstance(shape, (list, dict)) else shape
    if not isinstance(value, kind) or (kind is int and (isinstance(value, bool) or not 0 <= value <= MAX_COUNT)):
        words = {int: "a count", str: "a text", list: "a list", dict: "an object"}
        raise ValueError(f"{where}: {shown(value)} is not {words.get(kind, 'a plain value')}")
    if isinstance(value, str) and not (value.isprintable() and len(value) <= 1000):
        raise ValueError(f"{where}: {shown(value)} is not a line of text")
    if isinstance(shape, list):
        for index, item in enumerate(value):
            check_shape(item, shape[0], f"{where}[{index}]")
    elif isinstance(shape, dict) and str in shape:
        for key, item in value.items():
            check_shape(key, str, where)
            check_shape(item, shape[str], f"{where}[{key!r}]")
    elif isinstance(shape, dict):
        for name, part in shape.items():
            key = name.removesuffix("?")
            if key == name or value.get(key) is not None:
                check_shape(value.get(key), part, f"{where}[{key!r}]")
