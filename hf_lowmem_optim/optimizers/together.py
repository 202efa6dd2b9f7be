"""Tensors that a step takes together, in one call of compiled loops (``kernels/sparse_steps``).

On a CPU with numba what a sparse rule does is the same short loop over every block of every tensor. One call for all of
them spares what it costs to begin a call, and shares the blocks among the threads whatever the tensors' sizes are.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from hf_lowmem_optim.kernels.backend import choose_backend
from hf_lowmem_optim.optimizers.pending import PendingUpdate

__all__ = ["split_together"]


def split_together(updates: Sequence[PendingUpdate]) -> tuple[list[int], list[int]]:
    """Find out which tensors a sparse rule can take together.

    Args:
        updates: The tensors of a step.

    Returns:
        Indices of those that go together: plain contiguous tensors of a CPU, with numba, whose weights are rounded to
        nearest. And of all others.
    """
    together: list[int] = []
    others: list[int] = []
    for index, update in enumerate(updates):
        param = update.param
        # a subclass (a sharded DTensor, a FakeTensor) may do more than arithmetic
        plain = type(param) in (Tensor, nn.Parameter) and param.device.type == "cpu" and update.seed is None
        fits = plain and param.is_contiguous() and update.grad.is_contiguous()
        (together if fits else others).append(index)
    # asked only where there is a tensor of a CPU: a backend that was demanded for a GPU's would be refused
    if together and choose_backend("step", updates[together[0]].param.device) != "cpu":
        return [], list(range(len(updates)))
    return together, others
