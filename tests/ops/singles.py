"""The operations on several tensors, for one: what most tests call."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from hf_lowmem_optim.ops.block_quant import Quantized
from hf_lowmem_optim.ops.block_topk import TopK, foreach_block_topk_
from hf_lowmem_optim.ops.sparse_window import (
    SparseWindow,
    WindowStep,
    foreach_window_descend_,
    foreach_window_gram_rows,
    foreach_window_update_,
)

__all__ = ["block_topk_", "window_descend_", "window_gram_row", "window_update_"]


def block_topk_(indices: Tensor, values: Tensor, grad: Tensor, error: Quantized | Tensor | None, **how: Any) -> None:
    """Write one row, given as such."""
    foreach_block_topk_([TopK(indices.unsqueeze(0), values.unsqueeze(0), 0, grad, error, **how)])


def window_update_(param: Tensor, window: SparseWindow, weights: Tensor, **how: Any) -> None:
    foreach_window_update_([WindowStep(param, window, weights, **how)])


def window_descend_(param: Tensor, window: SparseWindow, weights: Tensor, **how: Any) -> None:
    foreach_window_descend_([WindowStep(param, window, weights, **how)])


def window_gram_row(window: SparseWindow, row: int) -> Tensor:
    return foreach_window_gram_rows([window], row)[0]
