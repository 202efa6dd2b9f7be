"""That the operations on one tensor are about the same blocks."""

from __future__ import annotations

from torch import Tensor

from hf_lowmem_optim.kernels.block_topk import TopK
from hf_lowmem_optim.kernels.sparse_window import SparseWindow

__all__ = ["check_blocks", "check_rows"]


def check_blocks(grad: Tensor, block_size: int, topk: TopK, rows: SparseWindow) -> None:
    """Raise ValueError if a call is not about this gradient, or its two parts about different blocks."""
    said = (grad.numel(), block_size)
    for name, found in (
        ("the selection", (topk.grad.numel(), topk.block_size)),
        ("the window", (rows.numel, rows.block_size)),
    ):
        if found != said:
            raise ValueError(
                f"a gradient has {said[0]} entries in blocks of {said[1]}, {name} {found[0]} in blocks of {found[1]}"
            )


def check_rows(rows: SparseWindow, window: int) -> None:
    """Raise ValueError if a window has not as many rows as it is to have."""
    if rows.window != window:
        raise ValueError(f"a window has {rows.window} rows, not {window}")
