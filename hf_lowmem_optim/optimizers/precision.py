"""The precision in which the optimizers compute, whatever training runs with."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

__all__ = ["full_precision"]


@contextmanager
def full_precision() -> Iterator[None]:
    """Compute float32 products in float32, whatever TF32, bfloat16 or autocast setting training runs with."""
    with ExitStack() as stack:
        for device_type in ("cuda", "cpu"):
            if torch.is_autocast_enabled(device_type):
                stack.enter_context(torch.autocast(device_type, enabled=False))
        for backend in (torch.backends.cuda.matmul, torch.backends.mkldnn):
            stack.enter_context(_ieee_products(backend))
        yield


@contextmanager
def _ieee_products(backend: Any) -> Iterator[None]:
    """Set one backend's float32 products to full precision for a while."""
    owner = getattr(backend, "matmul", backend)
    name, full = ("fp32_precision", "ieee") if hasattr(owner, "fp32_precision") else ("allow_tf32", False)
    before = getattr(owner, name, None)
    if before not in ("tf32", "bf16", True):
        yield
        return
    setattr(owner, name, full)
    try:
        yield
    finally:
        setattr(owner, name, before)
