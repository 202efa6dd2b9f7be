"""Check of the dense argument of a kernel: an error names the argument and what it should have been."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["FLOAT_DTYPES", "check_dense"]

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def check_dense(
    tensor: Tensor,
    name: str,
    *,
    numel: int,
    device: torch.device,
    dtypes: tuple[torch.dtype, ...] = FLOAT_DTYPES,
    any_layout: bool = False,
) -> Tensor:
    """Return ``tensor``, detached.

    Raises:
        ValueError: Its dtype, size or device is not as demanded, or it is not contiguous and not to have any layout.
    """
    if tensor.dtype not in dtypes:
        raise ValueError(f"{name} must be one of {', '.join(map(str, dtypes))}; got {tensor.dtype}")
    if tensor.numel() != numel:
        raise ValueError(f"{name} must have {numel} entries, got {tensor.numel()}")
    if tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device}, the other tensors on {device}")
    if not any_layout and not tensor.is_contiguous():
        raise ValueError(f"{name} must be contiguous: pass {name}.contiguous() (for a result, copy it back)")
    return tensor.detach() if tensor.requires_grad else tensor
