"""The step with numba: the loops of ``block_topk`` and ``sparse_window``, block by block.

What a record has of a tensor's state is a function of where its tensors lie and of how they are made. It is kept for
the next step: to find it takes a few microseconds, to check everything and to make it anew some twenty.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, misc"
from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from hf_lowmem_optim.kernels.block_topk import check_topk
from hf_lowmem_optim.kernels.block_topk.cpu import topk_block, topk_layout, topk_scratch
from hf_lowmem_optim.kernels.cpu_calls import Record, Sizes, claimed_blocks, enters, run_calls
from hf_lowmem_optim.kernels.sparse_records import (
    FORM,
    LAYOUT,
    RULE,
    loop_arguments,
    rule_fields,
    sparse_loop,
    sparse_record,
)
from hf_lowmem_optim.kernels.sparse_steps.composed import check_rows, moment_weights, rows_of, selection
from hf_lowmem_optim.kernels.sparse_steps.layout import SparseSteps, SparseTensor, StepRule
from hf_lowmem_optim.kernels.sparse_window import check_param, check_weights
from hf_lowmem_optim.kernels.sparse_window.cpu import (
    descend_blocks,
    gram_block,
    gram_scratch,
    update_block,
    update_scratch,
)

__all__ = ["CompiledSteps"]

_CPU = torch.device("cpu")
#: Tensors whose layouts are kept, some two kilobytes each; in a step of more they are made anew.
_MOST_LAYOUTS = 1 << 13


@sparse_loop
def _topk_update(arguments):
    calls, queue, threads, group, largest, _ = loop_arguments(arguments)
    if not enters(queue, threads):
        return
    topk, update = topk_scratch(largest), update_scratch(largest)
    for number, begin, end, _ in claimed_blocks(calls, queue, group):
        for block in range(begin, end):
            topk_block(calls[number], block, topk)
        for block in range(begin, end):
            update_block(calls[number], block, update)


@sparse_loop
def _topk_gram_row(arguments):
    calls, queue, threads, group, largest, sums = loop_arguments(arguments)
    if not enters(queue, threads):
        return
    topk, gram = topk_scratch(largest), gram_scratch(largest)
    for number, begin, end, place in claimed_blocks(calls, queue, group):
        for block in range(begin, end):
            topk_block(calls[number], block, topk)
        for block in range(begin, end):
            gram_block(calls[number], block, gram, sums[place])


class CompiledSteps(SparseSteps):
    """See :class:`~hf_lowmem_optim.kernels.sparse_steps.layout.SparseSteps`."""

    def __init__(self, calls: Sequence[tuple[SparseTensor, StepRule]]) -> None:
        super().__init__(calls)
        self._sizes = Sizes.of([tensor.grad.numel() for tensor, _ in calls], [tensor.block_size for tensor, _ in calls])
        self._table = np.zeros(len(calls), FORM)

    def topk_update_(self) -> None:
        """See the base class."""
        run_calls(_topk_update, self._table, self._sizes, self._records())

    def topk_gram_row_(self, window: int) -> Tensor:
        """See the base class."""
        products = run_calls(_topk_gram_row, self._table, self._sizes, self._records(window), window)
        self._has_row = True
        return torch.from_numpy(products)

    def descend_(self, weights: Tensor) -> None:
        """See the base class."""
        self._check_order()
        check_weights(weights, (self._calls[0][0].indices.shape[0],), _CPU)
        self._table["rule"]["weights"] = weights.data_ptr()
        run_calls(descend_blocks, self._table, self._sizes)

    def _records(self, window: int | None = None) -> Iterator[Record]:
        """Check and describe the tensors one by one, for products of so many rows, or with MicroAdam's weights."""
        rules: dict[tuple[int, int], Any] = {}
        for tensor, rule in self._calls:
            known = _known(tensor)
            if window is not None:
                check_rows(known.window, window)
            key = (id(rule), known.window)
            if key not in rules:
                rules[key] = _rule_record(rule, known.window, moments=window is None)
            yield sparse_record(known.layout, rules[key], known.num_blocks, tensor.grad, tensor.param)


def _rule_record(rule: StepRule, size: int, *, moments: bool) -> Any:
    """A record of :data:`RULE` for windows of ``size`` rows."""
    if not 0 <= rule.row < size:
        raise ValueError(f"row {rule.row} is not one of the window's {size}")
    if moments:
        check_weights(moment_weights(rule), (2, size), _CPU)
    return np.array(
        rule_fields(
            row=rule.row,
            seed=rule.seed,
            weights=rule.weights,
            error_scale=rule.error_scale,
            lr=rule.lr,
            eps=rule.eps,
            weight_decay=rule.weight_decay,
        ),
        RULE,
    )[()]


class _Known(NamedTuple):
    """What is known of a tensor: its record of :data:`LAYOUT`, the rows of its window, and its blocks."""

    layout: Any
    window: int
    num_blocks: int


_layouts: dict[Hashable, _Known] = {}


def _known(tensor: SparseTensor) -> _Known:
    """Find or make a tensor's layout."""
    key = _facts(tensor)
    known = _layouts.get(key)
    if known is None:
        if len(_layouts) >= _MOST_LAYOUTS:
            _layouts.clear()
        known = _layouts[key] = _describe(tensor)
    return known


def _facts(tensor: SparseTensor) -> Hashable:
    """All that checks and layout depend on."""
    param, grad, indices, values, error, fmt, block_size, density = tensor
    facts: list[Hashable] = [fmt, block_size, density, param.dtype, param.numel(), param.is_contiguous(), param.is_cpu]
    facts += grad.dtype, grad.numel(), grad.is_contiguous(), grad.is_cpu
    for kept in (indices, values, *error):
        facts += kept.data_ptr(), kept.dtype, kept.shape, kept.is_contiguous(), kept.is_cpu
    return tuple(facts)


def _describe(tensor: SparseTensor) -> _Known:
    """Check a tensor, and make its layout."""
    rows = rows_of(tensor)
    param = check_param(tensor.param, rows, _CPU)
    selected = check_topk(selection(tensor, StepRule(row=0, lr=0.0)), _CPU, "cpu")
    return _Known(np.array(topk_layout(selected, param), LAYOUT)[()], rows.window, rows.num_blocks)
