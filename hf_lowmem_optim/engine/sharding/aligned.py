"""Updates of a process's own part of a tensor: AdamW's entries, and blocks that end where parts do.

Blocks, codes and windows of a part are then the part of the state that lies there, so that the unchanged update of the
part is, bit for bit, that part of the whole's: ``paths.py`` says where that is so.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor

from hf_lowmem_optim.engine.buckets import TensorUpdate
from hf_lowmem_optim.engine.method import Method
from hf_lowmem_optim.engine.sharding.layout import as_indices, local_of
from hf_lowmem_optim.engine.state import fault_of_values

__all__ = ["part_of_update"]


def part_of_update(optimizer: Any, update: TensorUpdate, *, compressed: bool = True) -> TensorUpdate:
    """Return the update of this process's part of a tensor; its state tensors are those of the optimizer.

    Args:
        optimizer: The optimizer.
        update: That of the whole.
        compressed: Whether the tensor takes the compressed rule.

    Raises:
        ValueError: The state was loaded, and is not what a kernel can be handed.
    """
    method: Method = optimizer.method
    param, options = local_of(update.param), update.options
    state = {key: local_of(value) if isinstance(value, Tensor) else value for key, value in update.state.items()}
    if compressed:
        for key, spec in method.specs(param.shape, param.dtype, options).items():
            state[key] = as_indices(state[key], spec)
        if id(update.state) in optimizer.unchecked:
            if (fault := fault_of_values(state, param.shape, method, options)) is not None:
                shape = tuple(update.param.shape)
                raise ValueError(f"the state that was loaded for a tensor of shape {shape} is damaged: {fault}")
            optimizer.unchecked.discard(id(update.state))
    return replace(update, param=param, grad=local_of(update.grad), state=state)
