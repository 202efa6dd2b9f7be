"""Sums over a window of sparse rows: MicroAdam's statistics and update, and the products that M-FAC needs.

A :class:`SparseWindow` holds the last ``window`` block-Top-K compressed gradients of one tensor. These operations read
it, none of them changes it:

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

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from hf_lowmem_optim.ops.block_quant import FLOAT_DTYPES
from hf_lowmem_optim.ops.block_topk import MAX_BLOCK_SIZE, check_stored, kept_per_block, value_dtype_of
from hf_lowmem_optim.ops.dispatch import Op
from hf_lowmem_optim.ops.window_values import MAX_PACKED_BLOCK, Grids, ValueDtype, decode, unpack

__all__ = [
    "SparseWindow",
    "WindowStep",
    "foreach_window_descend_",
    "foreach_window_gram_rows",
    "foreach_window_update_",
    "window_combine_",
    "windows_of",
]

#: Entries of the tensor, and of the window's rows, that the torch version works on at a time.
CHUNK_ENTRIES = 3 << 16


@dataclass(eq=False, slots=True)
class SparseWindow:
    """The last compressed gradients of one tensor of ``numel`` entries, one per row.

    The tensor is cut into blocks of ``block_size`` entries, the last one shorter. Block ``b`` owns the columns from
    ``b * kept_per_block`` on; the last block owns what is left, at most ``kept_per_block``. Within a row the indices of
    a block ascend strictly. A row that was not written yet may hold anything that is in range (zeros, for example):
    the operations skip a row whose weights are all zero.

    Values are floats, or codes of 8 bits, or of 4 in the upper bits of their indices: see ``window_values``.

    Attributes:
        indices: int16 ``[window, kept]``, contiguous; positions relative to the start of the block.
        values: bfloat16, float32 or (with grids) uint8 ``[window, kept]``, contiguous; None for codes of 4 bits.
        numel: Number of entries of the tensor.
        block_size: Entries per block, 1 to 32768.
        kept_per_block: Kept entries of a full block, 1 to ``block_size``.
        grids: Those of the codes; None for floats.
        memo: What was found out about these tensors before, as long as they stay where they are.

    Raises:
        TypeError: For a dtype that is not listed above.
        ValueError: For shapes that contradict each other, or tensors that are not contiguous or not on one device.
    """

    indices: Tensor
    values: Tensor | None
    numel: int
    block_size: int
    kept_per_block: int
    grids: Grids | None = None
    memo: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        """Check everything that can be checked without reading the tensors, if it was not."""
        layout = self.numel, self.block_size, self.kept_per_block
        if self.memo is None or self.memo.get("window") != layout:
            self._check()
            if self.memo is not None:
                self.memo["window"] = layout

    def _check(self) -> None:
        indices, values = self.indices, self.values
        if indices.dtype != torch.int16:
            raise TypeError(f"indices must be int16, got {indices.dtype}")
        if indices.ndim != 2 or not indices.is_contiguous():
            raise ValueError(f"indices must be contiguous and [window, kept], got {[*indices.shape]}")
        most = MAX_PACKED_BLOCK if values is None else MAX_BLOCK_SIZE
        if not 1 <= self.block_size <= most:
            raise ValueError(f"block_size must be in [1, {most}] (int16), got {self.block_size!r}")
        check_stored(indices, values, self.grids, -(-self.numel // self.block_size))
        if not 1 <= self.kept_per_block <= self.block_size:
            raise ValueError(f"kept_per_block must be between 1 and block_size, got {self.kept_per_block}")
        before = (self.numel - 1) // self.block_size  # blocks before the last one
        last = self.numel - before * self.block_size
        if not 1 <= indices.shape[1] - before * self.kept_per_block <= min(self.kept_per_block, last):
            raise ValueError(
                f"{self.numel} entries in blocks of {self.block_size} with {self.kept_per_block} kept per block "
                f"cannot give rows of {self.kept} entries"
            )

    #: The device of the tensors.
    device = property(attrgetter("indices.device"))

    @property
    def window(self) -> int:
        """Number of rows."""
        return self.indices.shape[0]

    @property
    def kept(self) -> int:
        """Number of entries of a row."""
        return self.indices.shape[1]

    @property
    def num_blocks(self) -> int:
        """Number of blocks, the short one included."""
        return -(-self.numel // self.block_size)

    @property
    def value_dtype(self) -> ValueDtype:
        """How the values are stored."""
        return value_dtype_of(self.values, self.grids)

    def read(self, columns: slice, rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return indices, int64, and values, float32, at columns that begin with a block: of all rows, or of some."""
        k = self.kept_per_block
        blocks = slice(columns.start // k, -(-columns.stop // k))
        parts = [part[:, columns] for part in (self.indices, self.values) if part is not None]
        parts += [part[:, blocks] for part in self.grids or ()]
        if rows is not None:
            parts = [part.index_select(0, rows) for part in parts]
        if self.grids is None:
            indices, values = parts
            return indices.long(), values.float()
        *stored, lo, step = parts
        lo, step = (grid.repeat_interleave(k, 1)[:, : stored[0].shape[1]] for grid in (lo, step))
        if self.values is not None:
            indices, codes = stored
            return indices.long(), decode(codes.int(), lo, step, 8)
        indices, codes = unpack(stored[0])
        return indices, decode(codes, lo, step, 4)


def windows_of(
    state: Mapping[str, Sequence[Any]], numels: Iterable[int], block_size: int, density: float
) -> list[SparseWindow]:
    """Return the windows in the states of some tensors, by key a list of each tensor's own; with ``"memos"`` or not."""
    kept, indices = kept_per_block(block_size, density), state["indices"]
    values: Sequence[Tensor | None] = state.get("values") or [None] * len(indices)
    grids: Sequence[Grids | None] = [None] * len(indices)
    if "value_lo" in state:
        grids = [Grids(lo, step) for lo, step in zip(state["value_lo"], state["value_step"], strict=True)]
    memos: Sequence[dict[str, Any] | None] = state.get("memos") or [None] * len(indices)
    parts = zip(indices, values, numels, grids, memos, strict=True)
    return [SparseWindow(i, value, numel, block_size, kept, grid, memo) for i, value, numel, grid, memo in parts]


class WindowStep(NamedTuple):
    """One tensor of :func:`foreach_window_update_` or :func:`foreach_window_descend_`, and its arguments.

    Attributes:
        param: float32, bfloat16 or float16, contiguous, ``rows.numel`` entries in any shape; changed in place.
        rows: The compressed gradients.
        weights: float32, contiguous, on the device of ``param``: ``[2, window]`` for the update, ``[window]`` for the
            descent. A row of weight zero is skipped.
        lr: Learning rate.
        weight_decay: Decoupled weight decay.
        eps: Added to the root of z2; for the update only.
    """

    param: Tensor
    rows: SparseWindow
    weights: Tensor
    lr: float
    weight_decay: float = 0.0
    eps: float = 0.0

    @property
    def device(self) -> torch.device:
        """The device of the tensors."""
        return self.param.device


def foreach_window_update_(steps: Sequence[WindowStep]) -> None:
    """Take MicroAdam's step from the statistics of windows (arXiv 2405.15593, algorithm 1).

    With V a window's rows scattered to the size of its tensor::

        z1 ← Σ_rows weights[0, row]·V_row
        z2 ← Σ_rows weights[1, row]·(V_row·V_row)
        W  ← W·(1 − lr·weight_decay) − lr·(z1/(√z2 + eps))      the second term at touched entries only

    An entry is touched if it occurs in a row that counts; a row counts if one of its two weights is not zero. Without
    weight decay the untouched entries are left as they are, bit for bit. Everything is computed in float32 and each
    new entry is rounded once to the dtype of the parameter.

    Args:
        steps: The tensors, all on one device. Their weights are not negative, one for each moment and row with the
            bias correction in it, and zero for a row that was not written yet.

    Raises:
        TypeError: For a dtype that is not listed. Nothing has been written then.
        ValueError: For shapes or devices that contradict each other, or a tensor that is not contiguous. Likewise.
    """
    _check(steps, 2)
    if steps:
        _update_all(steps)


def foreach_window_descend_(steps: Sequence[WindowStep]) -> None:
    """Descend along combinations of the windows' rows: W ← W·(1 − lr·weight_decay) − lr·(Gᵀ·weights).

    Gᵀ·weights and the new entries are computed in float32; each entry is rounded once to the dtype of the parameter.

    Args:
        steps: The tensors, all on one device.

    Raises:
        TypeError: As :func:`foreach_window_update_`.
        ValueError: Likewise.
    """
    _check(steps, None)
    if steps:
        _descend_all(steps)


def window_combine_(out: Tensor, window: SparseWindow, weights: Tensor) -> None:
    """Add a linear combination of the window's rows: out ← out + Gᵀ·weights (M-FAC, arXiv 2107.03356).

    Args:
        out: float32, contiguous, ``window.numel`` entries in any shape; changed in place.
        window: The compressed gradients, as rows of G.
        weights: float32 ``[window]`` on the device of ``out``. A row of weight zero is skipped.

    Raises:
        TypeError: If ``out`` is not float32.
        ValueError: For shapes or devices that contradict each other, or a tensor that is not contiguous.
    """
    if out.dtype != torch.float32:
        raise TypeError(f"out must be float32, got {out.dtype}")
    _check([WindowStep(out, window, weights, 0.0)], None)
    _combine(out.detach().view(-1), window, weights)


def foreach_window_gram_rows(windows: Sequence[SparseWindow], row: int) -> Tensor:
    """Return the inner products of all rows of each window with one of them.

    Args:
        windows: At least one window, all of as many rows.
        row: Which row, the same for all.

    Returns:
        float64 ``[num_tensors, window]``; its sum over the tensors is the row of the Gram matrix of all of them.

    Raises:
        IndexError: There is no such row.
        ValueError: The windows have different numbers of rows or are on several devices, or there is none.
    """
    if not windows:
        raise ValueError("windows must be at least one window, got none")
    length, device = windows[0].window, windows[0].device
    for window in windows:
        if window.indices.device != device:
            raise ValueError(f"window: on {window.device}, but another tensor is on {device}")
        if len(window.indices) != length:
            raise ValueError(f"a window has {window.window} rows, another one {length}")
    if not 0 <= row < length:
        raise IndexError(f"row {row} is not one of the window's {length}")
    return _gram_rows(windows, row)


def _check(steps: Sequence[WindowStep], sums: int | None) -> None:
    """Check the arguments; the weights are [window], or [sums, window]."""
    known: tuple[Tensor, int] | None = None
    for param, rows, weights, *_ in steps:
        device, length = steps[0].param.device, len(rows.indices)
        if param.dtype not in FLOAT_DTYPES:
            raise TypeError(f"param must be float32, bfloat16 or float16, got {param.dtype}")
        if param.device != device:
            raise ValueError(f"param: on {param.device}, but another tensor is on {device}")
        if param.numel() != rows.numel:
            raise ValueError(f"param has {param.numel()} entries, the window is of {rows.numel}")
        if not param.is_contiguous():
            raise ValueError("param must be contiguous")
        if rows.indices.device != device:
            raise ValueError(f"param: on {device}, but the window is on {rows.device}")
        # most tensors have the same
        if known is None or weights is not known[0] or length != known[1]:
            _check_weights(weights, (length,) if sums is None else (sums, length), device)
            known = weights, length


def _check_weights(weights: Tensor, shape: tuple[int, ...], device: torch.device) -> None:
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
def _update_all(steps: Sequence[WindowStep]) -> None:
    """Take MicroAdam's step for each tensor; the arguments are checked."""
    for weight, window, weights, lr, weight_decay, eps in steps:
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
def _descend_all(steps: Sequence[WindowStep]) -> None:
    """Descend for each tensor; the arguments are checked."""
    for weight, window, weights, lr, weight_decay, _ in steps:
        param = weight.detach().view(-1)
        for entries, columns, starts in _chunks(window):
            piece = param[entries]
            direction = torch.zeros(piece.shape, dtype=torch.float32, device=piece.device)
            _add_rows(direction, *_weighted(window, weights, columns, starts))
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
def _gram_rows(windows: Sequence[SparseWindow], row: int) -> Tensor:
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
