"""Top-K of the gradients of several tensors, and what follows from their windows, in one pass.

To the bit what ``block_topk`` and ``sparse_window`` do for one tensor after the other, but for the order in which
products are added:

- :func:`topk_update_` — MicroAdam's step: ``block_topk_``, then ``window_update_``;
- :func:`topk_gram_row_` — M-FAC's: ``block_topk_``, then ``window_gram_row``, summed over the tensors.

With numba on a CPU each thread does both for a block, and then takes the next one of any tensor; elsewhere these are
the operations themselves, tensor by tensor.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from hf_lowmem_optim.kernels.backend import choose_backend, implementation
from hf_lowmem_optim.kernels.block_topk import TopK, foreach_block_topk_
from hf_lowmem_optim.kernels.sparse_steps.checks import check_blocks, check_rows
from hf_lowmem_optim.kernels.sparse_window import (
    SparseWindow,
    WindowStep,
    foreach_window_update_,
    window_gram_row,
)

__all__ = ["topk_gram_row_", "topk_update_"]


def topk_update_(grads: Sequence[Tensor], block_sizes: Sequence[int], calls: Iterable[tuple[TopK, WindowStep]]) -> None:
    """Do ``block_topk_`` and then ``window_update_`` for each of several tensors of one device.

    Args:
        grads: The gradients, at least one.
        block_sizes: The size of the blocks of each tensor.
        calls: The arguments of both operations for each tensor, in the order of the gradients. May be a generator: work
            on the first tensors begins before it has come to the last one.

    Raises:
        TypeError: As the two operations. Earlier tensors may have been updated then, and likewise below.
        ValueError: As the two operations, or there are more or fewer calls than gradients, or a call is about other
            blocks than its gradient.
        ImportError: If the requested backend is not installed.
    """
    backend = choose_backend("topk_update_", grads[0].device)
    if backend == "cpu":
        implementation("sparse_steps", backend).topk_update_(grads, block_sizes, calls)
        return
    for grad, block_size, (topk, step) in zip(grads, block_sizes, calls, strict=True):
        check_blocks(grad, block_size, topk, step.rows)
        foreach_block_topk_([topk])
        foreach_window_update_([step])


def topk_gram_row_(
    grads: Sequence[Tensor], block_sizes: Sequence[int], calls: Iterable[tuple[TopK, SparseWindow]], window: int
) -> Tensor:
    """Do ``block_topk_`` and then ``window_gram_row`` with the row just written, for several tensors of one device.

    Args:
        grads: The gradients, at least one.
        block_sizes: The size of the blocks of each tensor.
        calls: For each tensor the arguments of ``block_topk_``, and the window of whose tensors it writes a row; as in
            :func:`topk_update_`.
        window: Rows of every window.

    Returns:
        float64 ``[window]``: the inner products of all rows with the newest one, over all tensors.

    Raises:
        ValueError: As :func:`topk_update_`, or a window has another number of rows.
        ImportError: If the requested backend is not installed.
    """
    device = grads[0].device
    backend = choose_backend("topk_gram_row_", device)
    if backend == "cpu":
        products: Tensor = implementation("sparse_steps", backend).topk_gram_row_(grads, block_sizes, calls, window)
        return products
    total = torch.zeros(window, dtype=torch.float64, device=device)
    for grad, block_size, (topk, rows) in zip(grads, block_sizes, calls, strict=True):
        check_blocks(grad, block_size, topk, rows)
        check_rows(rows, window)
        foreach_block_topk_([topk])
        total += window_gram_row(rows, topk.row)
    return total
