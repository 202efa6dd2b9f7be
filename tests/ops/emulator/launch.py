"""A launch as triton's: compile what the arguments ask for, then run it."""

from __future__ import annotations

import os
import re
import struct
from collections.abc import Callable
from typing import Any

import numpy as np
from triton.runtime.jit import JITFunction

from benchmarks.ahead_of_time import TARGETS, compile_kernel

from .instructions import decode
from .machine import Machine
from .memory import Global, remember_addresses
from .parse import Program, parse

_MAX_LANES = 1 << 16
#: By kernel and specialization.
_compiled: dict[Any, Compiled] = {}


class Compiled:
    """A kernel's program for one specialization."""

    def __init__(self, ptx: str, shared_bytes: int) -> None:
        self.program: Program = parse(ptx)
        self.steps = decode(self.program)
        self.shared_bytes = shared_bytes
        self.granules = {space: _narrowest(ptx, space) for space in ("global", "shared")}

    def run(self, grid: tuple[int, int, int], parameters: list[int], order: str) -> None:
        """Run every CTA, many side by side."""
        memory, epoch = Global(self.granules["global"]), 1
        count, at_once = grid[0] * grid[1] * grid[2], max(1, _MAX_LANES // self.program.num_threads)
        with np.errstate(all="ignore"):
            for first in range(0, count, at_once):
                ctas = range(first, min(count, first + at_once))
                machine = Machine(self.program, self.steps, parameters, grid, ctas)
                epoch = machine.run(memory, self.shared_bytes, self.granules["shared"], epoch, order)


def _narrowest(ptx: str, space: str) -> int:
    """Return the bytes of the narrowest access to a space."""
    widths = re.findall(rf"\b(?:ld|st|atom)\b[.\w:]*\.{space}\b[.\w:]*?(?:\.v(\d))?\.[bfsu](\d+)\b", ptx)
    sizes = [int(count or 1) * int(bits) // 8 for count, bits in widths]
    sizes += [int(size, 16) for size in re.findall(r"cp\.async\.c[ag]\.shared\.global[^;]*\], (0x\w+)", ptx)]
    sizes += [int(kind) // 8 for kind in re.findall(r"wgmma\.mma_async\S*\.b?t?f(\d+)\s", ptx)] if space == "shared" else []
    return min([*sizes, 16])


def install(target: str, order: str) -> None:
    """Replace what triton does to launch a kernel."""
    def run(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        values = dict(zip(self.arg_names, args, strict=False)) | kwargs
        sizes = (*(grid(values) if isinstance(grid, Callable) else grid), 1, 1)[:3]
        if 0 in sizes:
            return
        key = (self, tuple((name, _specialized(self, name, value)) for name, value in values.items()))
        if key not in _compiled:
            os.environ["TRITON_INTERPRET"] = "0"
            try:
                compiled = compile_kernel(self, values, TARGETS[target])
            finally:
                os.environ["TRITON_INTERPRET"] = "1"
            _compiled[key] = Compiled(compiled.asm["ptx"], compiled.metadata.shared)
        parameters = [_bits(values[each.name]) for each in self.params if not _constant(each, values[each.name])]
        _compiled[key].run(sizes, [*parameters, 0, 0], order)  # the last are scratch memory, which no kernel has

    JITFunction.run = run
    remember_addresses()


def _constant(parameter: Any, value: Any) -> bool:
    one = type(value) is int and value == 1 and not parameter.do_not_specialize
    return bool(parameter.is_constexpr) or value is None or one


def _specialized(kernel: JITFunction, name: str, value: Any) -> Any:
    """Return all that a compiled kernel depends on."""
    if name not in kernel.arg_names or _constant(kernel.params[kernel.arg_names.index(name)], value):
        return str(value)
    if hasattr(value, "data_ptr"):
        return value.dtype, value.data_ptr() % 16 == 0
    return type(value), type(value) is int and (value % 16 == 0, -(2**31) <= value < 2**31)


def _bits(value: Any) -> int:
    if hasattr(value, "data_ptr"):
        return value.data_ptr()
    return struct.unpack("<I", struct.pack("<f", value))[0] if isinstance(value, float) else int(value)
