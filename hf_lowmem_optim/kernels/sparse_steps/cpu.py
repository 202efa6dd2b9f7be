"""Both operations with numba: the loops of ``block_topk`` and ``sparse_window``, block by block."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, misc"
from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numba
import torch
from torch import Tensor

from hf_lowmem_optim.kernels.block_topk import TopK, check_topk
from hf_lowmem_optim.kernels.block_topk.cpu import TOPK_FORM, topk_block, topk_record, topk_scratch
from hf_lowmem_optim.kernels.cpu_calls import Record, Sizes, claimed_blocks, record, run_calls
from hf_lowmem_optim.kernels.sparse_steps.checks import check_blocks, check_rows
from hf_lowmem_optim.kernels.sparse_window import SparseWindow, WindowStep, check_step
from hf_lowmem_optim.kernels.sparse_window.cpu import (
    WINDOW_FORM,
    gram_block,
    gram_scratch,
    step_record,
    update_block,
    update_scratch,
    window_record,
)

__all__ = ["topk_gram_row_", "topk_update_"]

_FORM = record(topk=TOPK_FORM, window=WINDOW_FORM)
_loop = numba.njit(cache=True, nogil=True, error_model="numpy")


@_loop
def _topk_update(calls, queue, group, own, largest, _):
    topk, update = topk_scratch(largest), update_scratch(largest)
    for number, begin, end, _ in claimed_blocks(calls, queue, group, own):
        for block in range(begin, end):
            topk_block(calls[number].topk, block, topk)
        for block in range(begin, end):
            update_block(calls[number].window, block, update)


@_loop
def _topk_gram_row(calls, queue, group, own, largest, sums):
    topk, gram = topk_scratch(largest), gram_scratch(largest)
    for number, begin, end, place in claimed_blocks(calls, queue, group, own):
        for block in range(begin, end):
            topk_block(calls[number].topk, block, topk)
        for block in range(begin, end):
            gram_block(calls[number].window, block, gram, sums[place])


def topk_update_(grads: Sequence[Tensor], block_sizes: Sequence[int], calls: Iterable[tuple[TopK, WindowStep]]) -> None:
    """See :func:`hf_lowmem_optim.kernels.sparse_steps.topk_update_`."""
    device, sizes = grads[0].device, _sizes(grads, block_sizes)
    held = []  # a record has only addresses, and the caller may make tensors for a call

    def records() -> Iterator[Record]:
        for grad, block_size, (topk, step) in zip(grads, block_sizes, calls, strict=True):
            check_blocks(grad, block_size, topk, step.rows)
            selection, checked = check_topk(topk, device, "cpu"), check_step(step, (2,), device, "cpu")
            held.append((selection, checked))
            yield topk_record(selection), step_record(checked), selection.num_blocks

    run_calls(_topk_update, _FORM, records(), sizes)


def topk_gram_row_(
    grads: Sequence[Tensor], block_sizes: Sequence[int], calls: Iterable[tuple[TopK, SparseWindow]], window: int
) -> Tensor:
    """See :func:`hf_lowmem_optim.kernels.sparse_steps.topk_gram_row_`."""
    device, sizes = grads[0].device, _sizes(grads, block_sizes)
    held = []  # as above

    def records() -> Iterator[Record]:
        for grad, block_size, (topk, rows) in zip(grads, block_sizes, calls, strict=True):
            check_blocks(grad, block_size, topk, rows)
            check_rows(rows, window)
            selection = check_topk(topk, device, "cpu")
            held.append((selection, rows))
            yield topk_record(selection), window_record(rows, newest=topk.row), selection.num_blocks

    return torch.from_numpy(run_calls(_topk_gram_row, _FORM, records(), sizes, window))


def _sizes(grads: Sequence[Tensor], block_sizes: Sequence[int]) -> Sizes:
    return Sizes.of([grad.numel() for grad in grads], block_sizes)
