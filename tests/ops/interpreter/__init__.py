"""Repairs Triton's interpreter, so that a kernel that passes in it computes what a GPU would.

The stock interpreter (triton 3.9) truncates fp32 → bf16, misreads bf16 subnormals, takes seconds for a custom scan or a
sort, rounds fused multiply-adds twice, takes TF32 for float32, hides races and accesses outside the tensors, and knows
a literal −0.0 that older compilers do not. ``enable()`` replaces those parts; the process must have been started, or
triton first imported, with ``TRITON_INTERPRET=1``.
"""

from __future__ import annotations

import os
import sys


def enable() -> None:
    """Apply every repair to this process. Calling it again changes nothing.

    Raises:
        RuntimeError: TRITON_INTERPRET is not 1, or triton was imported before it was set.
    """
    if os.environ.get("TRITON_INTERPRET") != "1":
        raise RuntimeError("set TRITON_INTERPRET=1 before triton is imported")
    imported_before = "triton" in sys.modules

    import triton.language as tl
    from triton.runtime.interpreter import InterpretedFunction

    if not isinstance(tl.standard.zeros, InterpretedFunction):
        when = "before" if imported_before else "although"
        raise RuntimeError(
            f"triton was imported {when} TRITON_INTERPRET=1 was set: its own functions are compiled ones"
        )

    from . import casts, constants, fast_ops, fma, language, products, races

    casts.enable()
    constants.enable()
    fast_ops.enable()
    fma.enable()
    language.enable()
    products.enable()
    races.enable()
