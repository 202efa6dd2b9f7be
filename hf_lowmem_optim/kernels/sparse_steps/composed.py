"""The step by the operations of ``block_topk`` and ``sparse_window``; and what these take for a tensor."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_lowmem_optim.kernels.block_quant.layout import Quantized
from hf_lowmem_optim.kernels.block_topk import TopK, foreach_block_topk_, kept_per_block
from hf_lowmem_optim.kernels.sparse_steps.layout import SparseSteps, SparseTensor, StepRule
from hf_lowmem_optim.kernels.sparse_window import (
    SparseWindow,
    WindowStep,
    foreach_window_descend_,
    foreach_window_update_,
    window_gram_row,
)

__all__ = ["ComposedSteps", "check_rows", "moment_weights", "rows_of", "selection"]


class ComposedSteps(SparseSteps):
    """See :class:`~hf_lowmem_optim.kernels.sparse_steps.layout.SparseSteps`."""

    def topk_update_(self) -> None:
        """See the base class."""
        foreach_block_topk_([selection(tensor, rule) for tensor, rule in self._calls])
        foreach_window_update_([_step(tensor, rule, moment_weights(rule)) for tensor, rule in self._calls])

    def topk_gram_row_(self, window: int) -> Tensor:
        """See the base class."""
        for tensor, _ in self._calls:
            check_rows(tensor.indices.shape[0], window)
        foreach_block_topk_([selection(tensor, rule) for tensor, rule in self._calls])
        products = [window_gram_row(rows_of(tensor), rule.row) for tensor, rule in self._calls]
        self._has_row = True
        return torch.stack(products).sum(dim=0)

    def descend_(self, weights: Tensor) -> None:
        """See the base class."""
        self._check_order()
        foreach_window_descend_([_step(tensor, rule, weights) for tensor, rule in self._calls])


def selection(tensor: SparseTensor, rule: StepRule) -> TopK:
    """What ``block_topk_`` takes."""
    error: Tensor | Quantized = tensor.error[0]
    if tensor.error_format is not None:
        codes, lo, hi = tensor.error
        error = Quantized(codes, lo, hi, tensor.grad.numel(), tensor.error_format)
    how = (tensor.block_size, tensor.density, rule.error_scale, rule.seed)
    return TopK(tensor.indices, tensor.values, rule.row, tensor.grad, error, *how)


def rows_of(tensor: SparseTensor) -> SparseWindow:
    """What the operations on the window take."""
    kept = kept_per_block(tensor.block_size, tensor.density)
    return SparseWindow(tensor.indices, tensor.values, tensor.grad.numel(), tensor.block_size, kept)


def _step(tensor: SparseTensor, rule: StepRule, weights: Tensor) -> WindowStep:
    return WindowStep(tensor.param, rows_of(tensor), weights, rule.lr, rule.weight_decay, rule.eps)


def moment_weights(rule: StepRule) -> Tensor:
    """The weights in both moments, which MicroAdam's step needs."""
    if rule.weights is None:
        raise ValueError("weights=None; they must be float32 of shape [2, window] for MicroAdam's step")
    return rule.weights


def check_rows(rows: int, window: int) -> None:
    """Raise ValueError if a window has not as many rows as it is to have."""
    if rows != window:
        raise ValueError(f"a window has {rows} rows, not {window}")
