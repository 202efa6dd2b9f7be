"""A step of a sparse rule for several tensors: Top-K of the gradients, and what follows from their windows.

To the bit what ``block_topk`` and ``sparse_window`` do for one tensor after the other, but for the order in which
products are added. With numba on a CPU all tensors are one compiled loop over their blocks, which the threads share;
elsewhere these are the operations themselves.
"""

from __future__ import annotations

from collections.abc import Sequence

from hf_lowmem_optim.kernels.backend import choose_backend, implementation
from hf_lowmem_optim.kernels.sparse_steps.composed import ComposedSteps
from hf_lowmem_optim.kernels.sparse_steps.layout import SparseSteps, SparseTensor, StepRule

__all__ = ["SparseSteps", "SparseTensor", "StepRule", "sparse_steps"]


def sparse_steps(calls: Sequence[tuple[SparseTensor, StepRule]]) -> SparseSteps:
    """Prepare a step.

    Args:
        calls: At least one tensor, all of one device, and the rule for each.

    Returns:
        The step, to be done once.

    Raises:
        ImportError: If the requested backend is not installed.
    """
    backend = choose_backend("sparse_steps", calls[0][0].grad.device)
    if backend == "cpu":
        steps: SparseSteps = implementation("sparse_steps", backend).CompiledSteps(calls)
        return steps
    return ComposedSteps(calls)
