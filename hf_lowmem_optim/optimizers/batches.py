"""Matrices of one shape, updated together: a call costs as much as the arithmetic of a few thousand entries.

Parameters, gradients and states are stacked, updated as one three-dimensional tensor, and copied back. On the CPU the
result is bit for bit that of updating each by itself (``kernels/subspace_adam``), so it does not depend on which
tensors are there; on a GPU, where a call is a launch, larger matrices are stacked, and a product of several may round
otherwise than one by itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from hf_lowmem_optim.compression.workspace import Workspace
from hf_lowmem_optim.optimizers.base import update_arguments
from hf_lowmem_optim.optimizers.pending import PendingUpdate

__all__ = ["batch_entries", "chunks_by_key", "is_aligned", "matrix_entries", "update_stacked_"]

_ALIGNMENT = 16
#: Tensors of a batch at most: a dimension of a GPU's grid has room for 65535.
_MOST_TENSORS = 1 << 12
_T = TypeVar("_T")


def matrix_entries(device: torch.device) -> int:
    """Entries of the largest matrix updated with others (``benchmarks/step_time.py``, small; on a GPU, llama)."""
    return 1 << 16 if device.type == "cpu" else 1 << 22


def batch_entries(device: torch.device) -> int:
    """Entries of a batch at most, which bounds what is allocated for it."""
    return 1 << 18 if device.type == "cpu" else 1 << 23


def is_aligned(*shapes: Sequence[int]) -> bool:
    """Whether each matrix of a batch lies at a multiple of 64 bytes in float32, as a tensor by itself does.

    CPU routines may choose their instructions, and with them the rounding, by the address.
    """
    return all(math.prod(shape) % _ALIGNMENT == 0 for shape in shapes)


def chunks_by_key(
    items: Iterable[_T], key: Callable[[_T], Hashable], entries: Callable[[_T], int], limit: Callable[[_T], int]
) -> list[list[_T]]:
    """Put items of one key together, some thousand at most.

    Args:
        items: The items.
        key: What must be equal in a chunk; None for an item that stays alone.
        entries: Size of an item.
        limit: Sum of the sizes in the chunk of an item, at most.

    Returns:
        The chunks, in the order of their first items.
    """
    chunks: list[list[_T]] = []
    open_chunks: dict[Hashable, list[_T]] = {}
    for item in items:
        of_item = key(item)
        chunk = None if of_item is None else open_chunks.get(of_item)
        if chunk is None or len(chunk) == _MOST_TENSORS or (len(chunk) + 1) * entries(item) > limit(item):
            chunk = []
            chunks.append(chunk)
            if of_item is not None:
                open_chunks[of_item] = chunk
        chunk.append(item)
    return chunks


def update_stacked_(
    update_: Callable[..., None], updates: Sequence[PendingUpdate], shape: Sequence[int], workspace: Workspace
) -> None:
    """One step on tensors of one group, shape and step.

    Args:
        update_: The update function of an optimizer, which takes several tensors as one with a batch in front.
        updates: The tensors.
        shape: The shape as which the update takes each of them.
        workspace: Temporary buffers.
    """
    one = updates[0]
    params = _stack([u.param for u in updates], shape)
    keys = [key for key in one.state if key != "step"]
    state = {key: _stack([u.state[key] for u in updates], one.state[key].shape) for key in keys}
    # what is quantized is one flat buffer: no block reaches over two tensors
    state = {key: tensor.flatten() if tensor.dim() == 2 else tensor for key, tensor in state.items()}
    if "error" in one.state and one.state["error"].data_ptr() == one.grad.data_ptr():
        grads = state["error"]
    else:  # where the error is added to them
        grads = workspace.take("accumulated", params.shape, params.device)
        torch._foreach_copy_(list(grads.view(len(updates), *one.grad.shape).unbind()), [u.grad for u in updates])
    hyper = {key: one.group[key] for key in update_arguments(update_)}
    weights = params if one.seed is None else params.float()
    update_(weights, grads, state, step=one.state["step"], workspace=workspace, **hyper)
    if one.seed is None:
        _scatter_([u.param for u in updates], weights)
    for update, weight in zip(updates, weights, strict=True):
        if (rounding := update.rounding) is not None:
            rounding.round_(update.param, weight.view(update.param.shape))
    for key in keys:
        _scatter_([u.state[key] for u in updates], state[key])


def _stack(tensors: Sequence[Tensor], shape: Sequence[int]) -> Tensor:
    """Return the tensors as one of shape (number of tensors, ...), each viewed as ``shape``."""
    if tensors[0].shape != tuple(shape):
        tensors = [tensor.reshape(tuple(shape)) for tensor in tensors]
    return torch.stack(list(tensors))


def _scatter_(targets: Sequence[Tensor], stacked: Tensor) -> None:
    """Copy each part of ``stacked`` into its target."""
    parts: Sequence[Tensor] = stacked.view(len(targets), *targets[0].shape).unbind()
    torch._foreach_copy_(list(targets), list(parts))
