"""Whether a first step is one of training: a question that all processes must answer alike."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

__all__ = ["without_gradient"]


def without_gradient(params: Sequence[Any]) -> set[int]:
    """Return the ids of the parameters whose gradient is zero, on every process that has a part of it.

    Args:
        params: Parameters with gradients; sharded ones are the same, in the same order, on all processes of their mesh.
    """
    meshes: dict[Any, list[Any]] = {}
    zero = set()
    for param in params:
        if hasattr(param, "placements"):
            meshes.setdefault(param.device_mesh, []).append(param)
        elif not param.grad.any():
            zero.add(id(param))
    for mesh, sharded in meshes.items():
        # one answer a tensor, exchanged together; a DTensor's own any() is that of this process alone
        parts = [param.grad.to_local() for param in sharded]
        found = torch.stack([part.any() for part in parts]).to(torch.int32)
        for dim in range(mesh.ndim):
            torch.distributed.all_reduce(found, torch.distributed.ReduceOp.MAX, group=mesh.get_group(dim))
        zero |= {id(param) for param, there in zip(sharded, found.tolist(), strict=True) if not there}
    return zero
