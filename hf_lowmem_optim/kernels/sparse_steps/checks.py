"""That the operations on one tensor are about the same blocks."""

from __future__ import annotations

from torch import Tensor

from hf_lowmem_optim.kernels.block_topk import TopK
from hf_lowmem_optim.kernels.sparse_window import SparseWindow

__all__ = ["check_blocks", "check_rows"]


def check_blocks(grad: Tensor, block_size: int, topk: TopK, rows: SparseWindow) -> None:
    """Raise ValueError if a call is not about this gradient, or its two parts about different blocks."""
    numel = grad.numel()
    if topk.block_size == rows.block_size == block_size and topk.grad.numel() == rows.numel == numel:
        return
    raise ValueError(
        f"a gradient has {numel} entries in blocks of {block_size}, the selection {topk.grad.numel()} in blocks of "
        f"{topk.block_size}, the window {rows.numel} in blocks of {rows.block_size}"
    )


def check_rows(rows: SparseWindow, window: int) -> None:
    """Raise ValueError if a window has not as many rows as it is to have."""
    if rows.window != window:
        raise ValueError(f"a window has {rows.window} rows, not {window}")
