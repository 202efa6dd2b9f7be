"""Constants as compilers have them: for that of triton 3.6 a literal −0.0 is the zero of its type, +0."""

from __future__ import annotations

import functools
from typing import Any

from triton.runtime.interpreter import InterpreterBuilder, TensorHandle


def _without_sign_of_zero(stock: Any) -> Any:
    @functools.wraps(stock)
    def constant(self: InterpreterBuilder, value: float) -> TensorHandle:
        return stock(self, value if value != 0 else 0.0)

    return constant


def enable() -> None:
    """Replace the constants of the interpreter's builder."""
    for name in ("get_fp32", "get_fp64", "get_fp16"):
        setattr(InterpreterBuilder, name, _without_sign_of_zero(getattr(InterpreterBuilder, name)))
