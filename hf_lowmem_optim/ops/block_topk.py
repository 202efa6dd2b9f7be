"""Error-feedback Top-K in one pass: accumulate, select, compact, and put what is left back into the error.

Per block of ``block_size`` consecutive entries (the last one of n shorter), all arithmetic in float32:

    a ← g + s·Q⁻¹(e)                 s = error_scale; Q of ``block_quant``, or the identity for a dense buffer
    I ← the ⌈density·n⌉ entries of largest |a|, exactly; ties go to the lowest index
    V ← a[I] as it is stored: as a float, or on the block's geometric grid (``window.py``)
    a[I] ← a[I] − V                  what rounding cuts off belongs to the error
    e ← Q(a)

The gradient is read once and left intact; the error is read and written once; nothing of the gradient's size is
allocated (the torch version works on slices). All backends agree bit for bit.

One selection is one row of a window: block b's entries start at ``b * kept_per_block(...)``, in ascending order of
their index, which is relative to the block so that int16 holds it.

*Not finite*: |NaN| ranks above Inf, so both are selected first and reach the values, as they reach AdamW's moments.
The error keeps 0 at an entry whose value is not finite (also one that bfloat16 rounds to Inf): it does not stay there
for good. Entries that are not finite beyond the ⌈density·n⌉ selected ones remain in the error, where a quantized error
loses their whole quantization block to NaN (see ``block_quant``).

Source: MicroAdam, arXiv 2405.15593, Algorithm 1, lines 5-9. The released code drops the values' rounding residual.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from hf_lowmem_optim.ops.block_quant import (
    Quantized,
    check_dense,
    dequantize_slice,
    quantize_slice_,
    slices,
)
from hf_lowmem_optim.ops.dispatch import Op
from hf_lowmem_optim.ops.window import (
    FLOATS,
    INDEX_BITS,
    MAX_BLOCK_SIZE,
    Grids,
    Memo,
    SparseWindow,
    ValueDtype,
    check_block_and_values,
    check_tensors,
    decode,
    encode,
    fault_of_grids,
    kept_per_block,
    unpack,
)
from hf_lowmem_optim.spec import QuantFormat, TensorSpec

__all__ = [
    "Errors",
    "Selection",
    "check_block_size",
    "counts",
    "fault_of_window",
    "foreach_block_topk_",
    "num_kept",
    "window_specs",
]

Errors = Sequence[Quantized | Tensor | None]
"""The errors of several tensors."""

# magnitudes are compared as the bits of |a|; every NaN counts as one magnitude, above infinity
_MAGNITUDE_MASK, _NAN_MAGNITUDE = 0x7FFFFFFF, 0x7F800001


def num_kept(numel: int, block_size: int, density: float) -> int:
    """Return how many entries one step keeps of a tensor of ``numel`` entries, over all of its blocks.

    Raises:
        ValueError: The block size is not in [1, 32768], or the density not in (0, 1].
    """
    check_block_size(block_size)
    num_full, rest = divmod(numel, block_size)
    kept = num_full * kept_per_block(block_size, density)
    return kept + (kept_per_block(rest, density) if rest else 0)


@functools.lru_cache(maxsize=4096)
def counts(numel: int, block_size: int, density: float) -> tuple[int, int, int]:
    """Return how many entries are kept of a tensor, of a full block, and of the last one."""
    kept, last = num_kept(numel, block_size, density), (numel - 1) % block_size + 1
    return kept, kept_per_block(block_size, density), kept_per_block(last, density)


def check_block_size(block_size: int) -> None:
    """Raise ValueError if int16 indices cannot address a block of this size."""
    if not 1 <= block_size <= MAX_BLOCK_SIZE:
        raise ValueError(f"block_size must be in [1, {MAX_BLOCK_SIZE}] (indices are int16), got {block_size!r}")


def fault_of_window(state: Mapping[str, Tensor], numel: int, block_size: int, density: float) -> str | None:
    """Return why a loaded window cannot be used, as a clause; None if each index is of an entry of its block.

    Args:
        state: The tensors that :func:`window_specs` describes, by key.
        numel: Entries of the tensor.
        block_size: Entries of a block.
        density: Fraction of each block's entries that is kept.
    """
    indices = state["indices"]
    if "value_lo" in state:
        if (fault := fault_of_grids(Grids(state["value_lo"], state["value_step"]))) is not None:
            return fault
        indices = indices if "values" in state else unpack(indices)[0]
    in_full_blocks = numel // block_size * kept_per_block(block_size, density)
    for part, entries in ((indices[:, :in_full_blocks], block_size), (indices[:, in_full_blocks:], numel % block_size)):
        if part.numel() and not 0 <= int(part.amin()) <= int(part.amax()) < entries:
            return f"'indices' holds {int(part.amin())} … {int(part.amax())} for blocks of {entries} entries"
    return None


def window_specs(
    numel: int, *, window: int, density: float, block_size: int, value_dtype: ValueDtype = "bf16"
) -> dict[str, TensorSpec]:
    """Describe the window of the last ``window`` selections of a tensor of ``numel`` entries.

    Args:
        numel: Entries of the tensor.
        window: Number of rows; row (t − 1) mod window is written at step t.
        density: Fraction of each block's entries that one step keeps, rounded up.
        block_size: Entries of a block, at most 32768.
        value_dtype: Storage of the values.

    Returns:
        ``"indices"``: int16 [window, kept]; ``"values"``: floats or uint8 [window, kept], but for ``"4bit"``, whose
        codes are in the indices; and of ``"8bit"`` and ``"4bit"`` ``"value_lo"`` and ``"value_step"``: float32
        [window, blocks].

    Raises:
        ValueError: An argument is out of range, or the block too large for 4 bits.
    """
    if window < 1:
        raise ValueError(f"window must be at least 1, got {window!r}")
    check_block_and_values(block_size, value_dtype)
    shape = (window, num_kept(numel, block_size, density))
    specs = {"indices": TensorSpec(shape, torch.int16, "indices")}
    if value_dtype != "4bit":
        specs["values"] = TensorSpec(shape, FLOATS.get(value_dtype, torch.uint8), "values")
    if value_dtype not in FLOATS:
        grid = TensorSpec((window, -(-numel // block_size)), torch.float32, "value grids")
        specs |= {"value_lo": grid, "value_step": grid}
    return specs


class Selection(NamedTuple):
    """How a row of windows is selected: see :func:`foreach_block_topk_`."""

    row: int
    density: float
    error_scale: float = 1.0
    seed: int | None = None


def foreach_block_topk_(
    grads: Sequence[Tensor],
    windows: Sequence[SparseWindow],
    errors: Errors,
    *,
    row: int,
    density: float,
    error_scale: float = 1.0,
    seed: int | None = None,
    memo: Memo | None = None,
) -> None:
    """Move the largest entries of ``grad + error_scale · error`` into a row of a window, and the rest into ``error``.

    MicroAdam's ``alpha``: the caller adds alpha·Q⁻¹(e) to the update (``dequantize_add_``), then selects with
    ``error_scale = 1 − alpha``.

    Args:
        grads: Contiguous float32, bfloat16 or float16 tensors of any shapes, taken flat; left as they are. All of one
            dtype, and on one device.
        windows: One for each of them, all alike.
        errors: Likewise: block-quantized buffers whose block size divides that of the windows, or contiguous dense
            buffers of the gradients' sizes, or None for plain Top-K. Read and written.
        row: The row of all that is written, (t − 1) mod window at step t.
        density: Fraction of each block's entries to keep, rounded up.
        error_scale: Factor s, rounded to float32.
        seed: None rounds a quantized error to nearest; an integer rounds it stochastically with that seed.
        memo: Where is noted what was found out about windows and errors, for a caller who passes it again as long as
            these stay where they are.

    Raises:
        TypeError: A tensor of a window has the wrong dtype. Nothing has been written then.
        ValueError: An argument is out of range, or a tensor has the wrong dtype, shape or device or is not contiguous.
            Likewise.
    """
    if not windows:
        return
    check_tensors(grads, "grad", windows, memo)
    if memo is None or memo.get("checked errors") != density:
        for window, error in zip(windows, errors, strict=True):
            _check(window, error, density)
            if _storage(error) != _storage(errors[0]):
                raise ValueError(f"errors of one call must be stored alike, got {error} beside {errors[0]}")
        if memo is not None:
            memo["checked errors"] = density
    if not 0 <= row < len(windows[0].indices):
        raise ValueError(f"row {row} is not one of the window's {len(windows[0].indices)}")
    how = Selection(row, density, error_scale, seed)
    _select_all(grads, windows, errors, how, {} if memo is None else memo)


def _check(window: SparseWindow, error: Quantized | Tensor | None, density: float) -> None:
    """Check what a tensor's selection reads and writes beside its gradient."""
    numel, device, block_size = window.numel, window.device, window.block_size
    kept = counts(numel, block_size, density)[:2]
    if (window.kept, window.kept_per_block) != kept:
        raise ValueError(
            f"a window of {window.kept} entries in a row, {window.kept_per_block} of a block, does not fit "
            f"density={density!r} of {numel} entries in blocks of {block_size}, which keeps {kept[0]} and {kept[1]}"
        )
    if isinstance(error, Tensor):
        check_dense(error, "error", numel=numel, device=device)
    elif error is not None:
        error.check()
        if error.numel != numel or error.codes.device != device:
            raise ValueError(f"error has {error.numel} entries on {error.codes.device}, its window {numel} on {device}")
        if block_size % error.format.block_size:
            raise ValueError(
                f"block_size ({block_size}) must be a multiple of the error's quantization block size "
                f"({error.format.block_size})"
            )


def _storage(error: Quantized | Tensor | None) -> QuantFormat | torch.dtype | None:
    """Return how an error is stored."""
    if isinstance(error, Quantized):
        return error.format
    return None if error is None else error.dtype


# ---- torch version: the specification --------------------------------------------------------------------------------
# Works on slices of blocks, so that its temporaries do not grow with the tensor.


@Op
def _select_all(
    grads: Sequence[Tensor], windows: Sequence[SparseWindow], errors: Errors, how: Selection, memo: Memo
) -> None:
    """Select from every tensor; the arguments are checked."""
    row, density, error_scale, seed = how
    for tensor, window, error in zip(grads, windows, errors, strict=True):
        grad, block_size = tensor.detach().view(-1), window.block_size
        dense = error.detach().view(-1) if isinstance(error, Tensor) else None
        _, k_full, k_last = counts(len(grad), block_size, density)
        for start, stop in slices(len(grad), block_size, grad.device):
            # a ← g + s·Q⁻¹(e)
            if isinstance(error, Quantized):
                a = dequantize_slice(error, start, stop).mul_(error_scale).add_(grad[start:stop])
            elif dense is not None:
                a = dense[start:stop].to(torch.float32, copy=True).mul_(error_scale).add_(grad[start:stop])
            else:
                a = grad[start:stop].to(torch.float32, copy=True)
            rows = a.view(-1, min(block_size, stop - start))  # [blocks, entries]
            k = k_full if rows.shape[1] == block_size else k_last
            # I ← the k entries of largest |a| per block;  V ← a[I], as it is stored
            index = _largest(rows, k)
            kept = rows.gather(1, index)
            value = _store(window, row, index, kept, start // block_size)
            # e ← Q(a with a[I] ← a[I] − V):  what rounding cuts off the values belongs to the error
            rows.scatter_(1, index, torch.where(value.isfinite(), kept - value, 0.0))
            if isinstance(error, Quantized):
                quantize_slice_(error, a, start, seed=seed)
            elif dense is not None:
                dense[start:stop] = a


def _store(window: SparseWindow, row: int, index: Tensor, kept: Tensor, block: int) -> Tensor:
    """Store the selected entries [blocks, k] of some blocks from ``block`` on; return them as stored, float32."""
    first, blocks = block * window.kept_per_block, slice(block, block + len(index))
    columns = slice(first, first + index.numel())
    indices, values, grids = window.indices[row, columns], window.values, window.grids
    if grids is None:
        assert values is not None
        value = kept.to(values.dtype)
        indices.copy_(index.reshape(-1))
        values[row, columns] = value.view(-1)
        return value.float()
    bits = 4 if values is None else 8
    codes, lo, step = encode(kept, bits)
    grids.lo[row, blocks], grids.step[row, blocks] = lo, step
    if values is None:
        indices.copy_((index | (codes << INDEX_BITS)).view(-1))
    else:
        indices.copy_(index.reshape(-1))
        values[row, columns] = codes.view(-1).to(torch.uint8)
    return decode(codes, lo[:, None], step[:, None], bits)


def _largest(rows: Tensor, k: int) -> Tensor:
    """Return the ascending indices (int64 [blocks, k]) of the k largest |entries| per row, ties to the lowest index."""
    n = rows.shape[1]
    if k == n:
        return torch.arange(n, device=rows.device).expand(rows.shape)
    magnitude = (rows.view(torch.int32) & _MAGNITUDE_MASK).clamp_(max=_NAN_MAGNITUDE)
    # one more than wanted, to see where the last one wanted is tied with one left out: topk breaks ties anyhow
    top, index = magnitude.topk(k + 1, dim=1)
    index = index[:, :k]
    tied = (top[:, k - 1] == top[:, k]).nonzero().view(-1)
    if tied.numel():
        magnitude, threshold = magnitude[tied], top[tied, k - 1 : k]
        above, equal = magnitude > threshold, magnitude == threshold
        room = k - above.sum(1, keepdim=True)
        chosen = above | (equal & (equal.cumsum(1, dtype=torch.int32) <= room))
        index[tied] = chosen.nonzero()[:, 1].view(-1, k)
    return index.sort(1).values
