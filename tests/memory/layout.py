"""The layout of a JSON document: kinds instead of values."""

from __future__ import annotations

from typing import Any


def layout(value: Any) -> Any:
    """Return ``value`` with kinds in place of numbers and strings, and one element of each list.

    A dict of nothing but ints has names that are free (components, dtypes): it becomes ``{"*": "int"}``.
    """
    if isinstance(value, dict):
        free = value and all(type(count) is int for count in value.values())
        return {"*": "int"} if free else {key: layout(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [layout(value[0])] if value else []
    return type(value).__name__
