"""Sums over a window of sparse rows: MicroAdam's statistics and update, and the products that M-FAC needs.

A window (``window.py``) holds the last block-Top-K compressed gradients of one tensor. These operations read it; none
changes it:

- :func:`foreach_window_update_` — Adam's statistics from the window, and the step at the entries that it touches;
- :func:`foreach_window_gram_rows` — G·g for a row g of G;
- :func:`window_combine_` — out ← out + Gᵀ·w;
- :func:`foreach_window_descend_` — W ← W·(1 − lr·wd) − lr·Gᵀ·w.

``foreach_…`` takes several tensors in one call. The torch version is the specification. Rows are added in float32 in
the order of their storage, so that all backends agree bit for bit; where a device's division or square root is not
correctly rounded, the update (not the parameter) may differ in its last place. The Gram matrix's rows are added up in
float64, in an order that depends on the backend.

NaN and infinity propagate as in AdamW: an infinite value gives z1/√z2 = Inf/Inf = NaN, and a NaN value gives NaN, at
the entry that it touches and nowhere else.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from hf_lowmem_optim.ops.dispatch import Op
from hf_lowmem_optim.ops.weight_correction import join_weights, split_weights_
from hf_lowmem_optim.ops.window import CHECKED, Memo, SparseWindow, check_alike, check_tensors

__all__ = ["Rates", "foreach_window_descend_", "foreach_window_gram_rows", "foreach_window_update_", "window_combine_"]

#: Entries of the tensor, and of the window's rows, that the torch version works on at a time.
CHUNK_ENTRIES = 3 << 16


class Rates(NamedTuple):
    """How far parameters move: see :func:`foreach_window_update_`."""

    lr: float
    weight_decay: float = 0.0
    eps: float = 0.0


def foreach_window_update_(
    params: Sequence[Tensor],
    windows: Sequence[SparseWindow],
    weights: Tensor,
    *,
    lr: float,
    weight_decay: float = 0.0,
    eps: float = 0.0,
    memo: Memo | None = None,
    corrections: Sequence[Tensor] | None = None,
) -> None:
    """Take MicroAdam's step from the statistics of windows (arXiv 2405.15593, algorithm 1).

    With V a window's rows scattered to the size of its tensor::

        z1 ← Σ_rows weights[0, row]·V_row
        z2 ← Σ_rows weights[1, row]·(V_row·V_row)
        W  ← W·(1 − lr·weight_decay) − lr·(z1/(√z2 + eps))      the second term at touched entries only

    An entry is touched if it occurs in a row that counts; a row counts if one of its two weights is not zero. Without
    weight decay the untouched entries are left as they are, bit for bit. Everything is computed in float32 and each
    new entry is rounded once to the dtype of the parameter.

    Args:
        params: float32, bfloat16 or float16, all alike, contiguous, of any shapes; changed in place.
        windows: The compressed gradients of each, all alike.
        weights: float32 ``[2, window]``, contiguous, on the device of the parameters: one for each moment and row, not
            negative, with the bias correction in it, and zero for a row that was not written yet.
        lr: Learning rate.
        weight_decay: Decoupled weight decay.
        eps: Added to the root of z2.
        memo: As for :func:`~hf_lowmem_optim.ops.block_topk.foreach_block_topk_`.
        corrections: Those of compensated parameters (``weight_correction.py``), contiguous int8; changed in place.
            They stay where they are as long as the memo is the same.

    Raises:
        TypeError: For a dtype of a window that is not listed. Nothing has been written then.
        ValueError: For shapes, dtypes or devices that contradict each other, or a tensor that is not contiguous.
            Likewise.
    """
    if windows:
        _check(params, "param", windows, weights, 2, memo)
        _update_all(params, windows, weights, Rates(lr, weight_decay, eps), {} if memo is None else memo, corrections)


def foreach_window_descend_(
    params: Sequence[Tensor],
    windows: Sequence[SparseWindow],
    weights: Tensor,
    *,
    lr: float,
    weight_decay: float = 0.0,
    memo: Memo | None = None,
    corrections: Sequence[Tensor] | None = None,
) -> None:
    """Descend along combinations of the windows' rows: W ← W·(1 − lr·weight_decay) − lr·(Gᵀ·weights).

    Gᵀ·weights and the new entries are computed in float32; each entry is rounded once to the dtype of the parameter.

    Args:
        params: As for :func:`foreach_window_update_`.
        windows: Likewise.
        weights: float32 ``[window]`` for all, or ``[tensors, window]``. A row of weight zero is skipped.
        lr: Learning rate.
        weight_decay: Decoupled weight decay.
        memo: As for :func:`~hf_lowmem_optim.ops.block_topk.foreach_block_topk_`.
        corrections: As for :func:`foreach_window_update_`.

    Raises:
        TypeError: As :func:`foreach_window_update_`.
        ValueError: Likewise.
    """
    if windows:
        _check(params, "param", windows, weights, len(params) if weights.dim() == 2 else None, memo)
        _descend_all(params, windows, weights, Rates(lr, weight_decay), {} if memo is None else memo, corrections)


def window_combine_(out: Tensor, window: SparseWindow, weights: Tensor) -> None:
    """Add a linear combination of the window's rows: out ← out + Gᵀ·weights (M-FAC, arXiv 2107.03356).

    Args:
        out: float32, contiguous, ``window.numel`` entries in any shape; changed in place.
        window: The compressed gradients, as rows of G.
        weights: float32 ``[window]`` on the device of ``out``. A row of weight zero is skipped.

    Raises:
        TypeError: If ``out`` is not float32, or for a dtype of the window.
        ValueError: For shapes or devices that contradict each other, or a tensor that is not contiguous.
    """
    if out.dtype != torch.float32:
        raise TypeError(f"out must be float32, got {out.dtype}")
    _check([out], "out", [window], weights, None, None)
    _combine(out.detach().view(-1), window, weights)


def foreach_window_gram_rows(windows: Sequence[SparseWindow], row: int, *, memo: Memo | None = None) -> Tensor:
    """Return the inner products of all rows of each window with one of them.

    Args:
        windows: At least one window, all alike.
        row: Which row, the same for all.
        memo: As for :func:`~hf_lowmem_optim.ops.block_topk.foreach_block_topk_`.

    Returns:
        float64 ``[num_tensors, window]``; its sum over the tensors is the row of the Gram matrix of all of them.

    Raises:
        IndexError: There is no such row.
        ValueError: The windows are not alike or are on several devices, or there is none.
    """
    if not windows:
        raise ValueError("windows must be at least one window, got none")
    if memo is None or CHECKED not in memo:
        check_alike(windows, memo)
    length = len(windows[0].indices)
    if not 0 <= row < length:
        raise IndexError(f"row {row} is not one of the window's {length}")
    return _gram_rows(windows, row, {} if memo is None else memo)


def _check(
    tensors: Sequence[Tensor],
    name: str,
    windows: Sequence[SparseWindow],
    weights: Tensor,
    sums: int | None,
    memo: Memo | None,
) -> None:
    """Check the arguments; the weights are [window], or [sums, window]."""
    check_tensors(tensors, name, windows, memo)
    length, device = len(windows[0].indices), windows[0].device
    shape = (length,) if sums is None else (sums, length)
    if weights.dtype != torch.float32:
        raise TypeError(f"weights must be float32, got {weights.dtype}")
    if weights.shape != shape or not weights.is_contiguous():
        raise ValueError(f"weights must be contiguous and of shape {[*shape]}, got {[*weights.shape]}")
    if weights.device != device:
        raise ValueError(f"weights: on {weights.device}, but the window is on {device}")


# ---- torch version: the specification --------------------------------------------------------------------------------
# Rows are scattered into a dense piece of at most CHUNK_ENTRIES entries (or one block), so that the temporaries stay
# bounded. They are added in the order of their storage, which fixes the result to the last bit.


def _chunks(window: SparseWindow) -> list[tuple[slice, slice, Tensor]]:
    """Cut a window into chunks of neighbouring blocks.

    Returns:
        Of each chunk its entries of the tensor; its columns of the rows; and where each column's block starts, relative
        to the chunk, int64 [columns]: with the column's index that is the place of its entry.
    """
    indices, block_size, kept_per_block = window.indices, window.block_size, window.kept_per_block
    kept, num_blocks = indices.shape[1], -(-window.numel // block_size)
    blocks = max(1, CHUNK_ENTRIES // max(block_size, len(indices) * kept_per_block))
    column = torch.arange(min(blocks * kept_per_block, kept), device=indices.device)
    starts = column // kept_per_block * block_size
    chunks = []
    for first in range(0, num_blocks, blocks):
        columns = slice(first * kept_per_block, min((first + blocks) * kept_per_block, kept))
        entries = slice(first * block_size, min((first + blocks) * block_size, window.numel))
        chunks.append((entries, columns, starts[: columns.stop - columns.start]))
    return chunks


@Op
def _update_all(
    params: Sequence[Tensor], windows: Sequence[SparseWindow], weights: Tensor, rates: Rates, memo: Memo,
    corrections: Sequence[Tensor] | None,
) -> None:  # fmt: skip
    """Take MicroAdam's step for each tensor; the arguments are checked."""
    if corrections is not None:
        for param, window, correction in zip(params, windows, corrections, strict=True):
            joined = join_weights([param], [correction])
            _update_all.torch_version(joined, [window], weights, rates, memo, None)
            split_weights_([param], [correction], joined)
        return
    lr, weight_decay, eps = rates
    for weight, window in zip(params, windows, strict=True):
        param = weight.detach().view(-1)
        rows = weights.any(0).nonzero().view(-1)
        if not len(rows) and weight_decay == 0:
            continue
        w1, w2 = weights[:, rows, None].unbind()
        for entries, columns, starts in _chunks(window):
            piece = param[entries]
            stepped = piece if piece.dtype == torch.float32 else piece.float()
            if weight_decay != 0:
                stepped.mul_(1 - lr * weight_decay)
            indices, values = window.read(columns, rows)
            places = indices.add_(starts)
            z1, z2 = _sum(w1 * values, places, piece), _sum(w2 * (values * values), places, piece)
            # an entry that several rows touch gets the same value as often
            touched = places.view(-1)
            root = _square_root(z2.index_select(0, touched))
            update = z1.index_select(0, touched).div_(root.add_(eps)).mul_(lr)
            stepped.scatter_(0, touched, stepped.index_select(0, touched).sub_(update))
            if stepped is not piece:
                piece.copy_(stepped)


def _sum(values: Tensor, places: Tensor, piece: Tensor) -> Tensor:
    """Return the sum of rows, scattered to a dense piece, float32."""
    total = torch.zeros(piece.shape, dtype=torch.float32, device=piece.device)
    _add_rows(total, places, values)
    return total


def _add_rows(piece: Tensor, places: Tensor, values: Tensor) -> None:
    """Add rows to a dense piece, one after the other."""
    for row, value in zip(places.unbind(), values.unbind(), strict=True):
        piece.scatter_add_(0, row, value)


def _square_root(x: Tensor) -> Tensor:
    """Return the square roots, correctly rounded, as torch's of a CPU are not; without float64, which MPS has not."""
    return torch.from_numpy(np.sqrt(x.numpy())) if x.device.type == "cpu" else x.sqrt()


@Op
def _descend_all(
    params: Sequence[Tensor], windows: Sequence[SparseWindow], weights: Tensor, rates: Rates, memo: Memo,
    corrections: Sequence[Tensor] | None,
) -> None:  # fmt: skip
    """Descend for each tensor; the arguments are checked."""
    rows = weights.expand(len(params), -1)
    if corrections is not None:
        for param, window, each, correction in zip(params, windows, rows, corrections, strict=True):
            joined = join_weights([param], [correction])
            _descend_all.torch_version(joined, [window], each, rates, memo, None)
            split_weights_([param], [correction], joined)
        return
    lr, weight_decay, _ = rates
    for weight, window, each in zip(params, windows, rows, strict=True):
        param = weight.detach().view(-1)
        for entries, columns, starts in _chunks(window):
            piece = param[entries]
            direction = torch.zeros(piece.shape, dtype=torch.float32, device=piece.device)
            _add_rows(direction, *_weighted(window, each, columns, starts))
            decayed = piece.float()
            if weight_decay != 0:
                decayed = decayed * (1 - lr * weight_decay)
            piece.copy_(decayed - direction.mul_(lr))


@Op
def _combine(out: Tensor, window: SparseWindow, weights: Tensor) -> None:
    """Add the combination to the flat ``out``."""
    for entries, columns, starts in _chunks(window):
        _add_rows(out[entries], *_weighted(window, weights, columns, starts))


def _weighted(window: SparseWindow, weights: Tensor, columns: slice, starts: Tensor) -> tuple[Tensor, Tensor]:
    """Return places in a chunk and weighted values of the rows whose weight is not zero."""
    rows = weights.nonzero().view(-1)
    indices, values = window.read(columns, rows)
    return indices.add_(starts), values.mul_(weights[rows, None])


@Op
def _gram_rows(windows: Sequence[SparseWindow], row: int, memo: Memo) -> Tensor:
    """Return the products of every window's rows with its row ``row``, float64 [num_tensors, window]."""
    first = windows[0].indices
    products = torch.zeros(len(windows), len(first), dtype=torch.float64, device=first.device)
    for dots, window in zip(products, windows, strict=True):
        for entries, columns, starts in _chunks(window):
            piece = torch.zeros(entries.stop - entries.start, dtype=torch.float64, device=first.device)
            indices, values = window.read(columns)
            places, values = indices.add_(starts), values.double()
            piece[places[row]] = values[row]
            dots += values.mul_(piece.index_select(0, places.view(-1)).view(places.shape)).sum(1)
    return products
