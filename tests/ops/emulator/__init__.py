"""Runs kernels as compiled for a GPU, on CPU tensors: an interpreter of PTX in numpy.

Triton's interpreter runs a kernel's source. What the compiler makes of it, layouts, barriers, shared memory, vector
accesses and tensor core instructions, it never sees. Here Triton compiles a launch for its target, and all threads of
many CTAs execute the PTX side by side. Registers start as garbage, and shared memory as NaNs. A :class:`machine.Fault`
names the PTX and the source where threads race, within or between CTAs, or miss a barrier; where they access a
misaligned address, or none of a tensor; and where lanes of one instruction store different values to one address.

``EMULATE=sm80 pytest tests/ops/test_block_topk.py`` runs tests on it; so does ``EMULATE=sm90``. All warps run in lock
step; with ``EMULATE=sm80,descending`` or ``ascending`` one of a CTA after the other runs to its barrier.

Not modelled: ptxas, which may fuse ``mul`` and ``add`` without ``.rn``; approximate instructions (they are exact here);
the order in which tensor cores sum (float64 here); when an asynchronous product reads its operands; memory fences.
"""

from __future__ import annotations

import importlib
import os
import pkgutil
import sys

ORDERS = ("lock step", "ascending", "descending")


def enable(target: str, order: str = "lock step") -> None:
    """Have this process's launches emulated on the target, ``sm80`` or ``sm90``, warps taking turns in the order.

    Raises:
        ValueError: there is no such order.
        RuntimeError: triton was imported before; its kernels may be interpreted ones.
    """
    if order not in ORDERS:
        raise ValueError(f"order must be one of {ORDERS}; got {order!r}")
    if "triton" in sys.modules:
        raise RuntimeError("enable the emulator before triton is imported")
    os.environ["TRITON_INTERPRET"] = "0"
    package = importlib.import_module("hf_lowmem_optim.ops.triton")
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"{package.__name__}.{module.name}")
    importlib.import_module(f"{__name__}.launch").install(target, order)
    os.environ["TRITON_INTERPRET"] = "1"  # so that dispatch lets Triton serve CPU tensors
