"""Error-feedback Top-K in one pass: accumulate, select, compact, and put what is left back into the error.

Per block of ``block_size`` consecutive entries (the last one of n shorter), all arithmetic in float32:

    a ← g + s·Q⁻¹(e)                 s = error_scale; Q of ``block_quant``, or the identity for a dense buffer
    I ← the ⌈density·n⌉ entries of largest |a|, exactly; ties go to the lowest index
    V ← a[I] as it is stored: as a float, or on the block's geometric grid (``window_values``)
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
import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hf_lowmem_optim.ops.block_quant import (
    FLOAT_DTYPES,
    Quantized,
    check_dense,
    dequantize_slice,
    quantize_slice_,
    slices,
)
from hf_lowmem_optim.ops.dispatch import Op
from hf_lowmem_optim.ops.window_values import (
    FLOATS,
    INDEX_BITS,
    Grids,
    ValueDtype,
    check_block_and_values,
    decode,
    encode,
    fault_of_grids,
    unpack,
)
from hf_lowmem_optim.spec import TensorSpec

__all__ = [
    "MAX_BLOCK_SIZE",
    "TopK",
    "check_block_size",
    "check_stored",
    "counts",
    "fault_of_window",
    "foreach_block_topk_",
    "kept_per_block",
    "num_kept",
    "value_dtype_of",
    "window_specs",
]

MAX_BLOCK_SIZE = 32768  # int16 indices hold 0 … 32767

# magnitudes are compared as the bits of |a|; every NaN counts as one magnitude, above infinity
_MAGNITUDE_MASK, _NAN_MAGNITUDE = 0x7FFFFFFF, 0x7F800001


@functools.lru_cache(maxsize=4096)
def kept_per_block(num_entries: int, density: float) -> int:
    """Return ⌈density·num_entries⌉, the entries kept of a block of ``num_entries``.

    ``density`` counts as the decimal that it prints as: 7% of 100 entries are 7, although 0.07 * 100 > 7 in float64.

    Raises:
        ValueError: The density is not in (0, 1].
    """
    if not 0.0 < density <= 1.0:
        raise ValueError(f"density must be in (0, 1], got {density!r}")
    return math.ceil(Fraction(repr(float(density))) * num_entries)


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


def check_stored(indices: Tensor, values: Tensor | None, grids: Grids | None, blocks: int) -> None:
    """Check the tensors of a window beside its indices.

    Args:
        indices: [window, kept].
        values: As :class:`~hf_lowmem_optim.ops.sparse_window.SparseWindow` has them.
        grids: Likewise.
        blocks: Blocks of a row.

    Raises:
        TypeError: For a wrong dtype.
        ValueError: For a wrong shape or device, or a tensor that is not contiguous.
    """
    wanted = (torch.uint8,) if grids is not None else tuple(FLOATS.values())
    parts = [] if grids is None else [("lo", grids.lo, (torch.float32,)), ("step", grids.step, (torch.float32,))]
    for name, tensor, dtypes in [("values", values, wanted), *parts]:
        if tensor is None and grids is not None:  # codes that are beside the indices
            continue
        if tensor is None or tensor.dtype not in dtypes:
            said = "bfloat16 or float32, or uint8 with grids" if name == "values" else "float32"
            raise TypeError(f"{name} must be {said}; got {None if tensor is None else tensor.dtype}")
        shape = tuple(indices.shape) if name == "values" else (len(indices), blocks)
        if tensor.shape != shape or not tensor.is_contiguous():
            raise ValueError(f"{name} must be contiguous and of shape {[*shape]}, got {[*tensor.shape]}")
        if tensor.device != indices.device:
            raise ValueError(f"{name}: on {tensor.device}, but indices is on {indices.device}")


def value_dtype_of(values: Tensor | None, grids: Grids | None) -> ValueDtype:
    """Return how values are stored: without grids they are floats, without a tensor of their own beside the indices."""
    if grids is not None:
        return "4bit" if values is None else "8bit"
    return "fp32" if values is not None and values.dtype == torch.float32 else "bf16"


class TopK(NamedTuple):
    """One tensor of :func:`foreach_block_topk_`.

    MicroAdam's ``alpha``: the caller adds alpha·Q⁻¹(e) to the update (``dequantize_add_``), then selects with
    ``error_scale = 1 − alpha``.

    Attributes:
        indices: int16 [window, kept], contiguous.
        values: bfloat16, float32 or (with grids) uint8 [window, kept], contiguous; None for codes of 4 bits.
        row: The row of all that is written, (t − 1) mod window at step t.
        grad: Contiguous float32, bfloat16 or float16 tensor (any shape; taken flat). Left as it is.
        error: Block-quantized buffer whose block size divides ``block_size``, or a contiguous dense buffer of
            ``grad``'s size, or None for plain Top-K. Read and written.
        block_size: Entries of a block, at most 32768.
        density: Fraction of each block's entries to keep, rounded up.
        error_scale: Factor s, rounded to float32.
        seed: None rounds a quantized error to nearest; an integer rounds it stochastically with that seed.
        grids: float32 [window, blocks] each; None for floats.
        memo: What was found out about the window and the error before, as long as they stay where they are.
    """

    indices: Tensor
    values: Tensor | None
    row: int
    grad: Tensor
    error: Quantized | Tensor | None
    block_size: int
    density: float
    error_scale: float = 1.0
    seed: int | None = None
    grids: Grids | None = None
    memo: dict[str, Any] | None = None


def foreach_block_topk_(calls: Sequence[TopK]) -> None:
    """Move the largest entries of ``grad + error_scale · error`` into a row of a window, and the rest into ``error``.

    Args:
        calls: The tensors, all on one device, none written for two of them, and how each is treated.

    Raises:
        TypeError: A tensor of a window has the wrong dtype. Nothing has been written then.
        ValueError: An argument is out of range, or a tensor has the wrong dtype, shape or device or is not contiguous.
            Likewise.
    """
    filled = []
    for call in calls:
        grad, first = call.grad, calls[0].grad.device
        numel, device = grad.numel(), grad.device
        if device != first:
            raise ValueError(f"grad is on {device}, that of another tensor on {first}")
        if not numel:
            continue
        if grad.dtype not in FLOAT_DTYPES or not grad.is_contiguous():
            check_dense(grad, "grad", numel=numel, device=device)  # says what is wrong
        stored = numel, device, call.block_size, call.density
        if call.memo is None or call.memo.get("selection") != stored:
            _check(call, numel, device)
            if call.memo is not None:
                call.memo["selection"] = stored
        if not 0 <= call.row < len(call.indices):
            raise ValueError(f"row {call.row} is not one of the window's {len(call.indices)}")
        filled.append(call)
    if filled:
        _select_all(filled)


def _check(call: TopK, numel: int, device: torch.device) -> None:
    """Check what a tensor's selection reads and writes beside its gradient."""
    block_size = call.block_size
    kept, _, _ = counts(numel, block_size, call.density)
    shape = (len(call.indices), kept)
    if call.indices.shape != shape or not call.indices.is_contiguous():
        raise ValueError(f"indices must be contiguous, [window, kept] = {[*shape]}, got {[*call.indices.shape]}")
    if call.indices.dtype != torch.int16:
        raise ValueError(f"indices must be int16; got {call.indices.dtype}")
    if call.indices.device != device:
        raise ValueError(f"indices is on {call.indices.device}, the other tensors on {device}")
    check_stored(call.indices, call.values, call.grids, -(-numel // block_size))
    error = call.error
    if isinstance(error, Tensor):
        check_dense(error, "error", numel=numel, device=device)
    elif error is not None:
        error.check()
        if error.numel != numel or error.codes.device != device:
            raise ValueError(f"error has {error.numel} entries on {error.codes.device}, grad {numel} on {device}")
        if block_size % error.format.block_size:
            raise ValueError(
                f"block_size ({block_size}) must be a multiple of the error's quantization block size "
                f"({error.format.block_size})"
            )


# ---- torch version: the specification --------------------------------------------------------------------------------
# Works on slices of blocks, so that its temporaries do not grow with the tensor.


@Op
def _select_all(calls: Sequence[TopK]) -> None:
    """Select from every tensor; the arguments are checked, and no tensor is empty."""
    for call in calls:
        grad, error = call.grad.detach().view(-1), call.error
        dense = error.detach().view(-1) if isinstance(error, Tensor) else None
        _, k_full, k_last = counts(len(grad), call.block_size, call.density)
        for start, stop in slices(len(grad), call.block_size, grad.device):
            # a ← g + s·Q⁻¹(e)
            if isinstance(error, Quantized):
                a = dequantize_slice(error, start, stop).mul_(call.error_scale).add_(grad[start:stop])
            elif dense is not None:
                a = dense[start:stop].to(torch.float32, copy=True).mul_(call.error_scale).add_(grad[start:stop])
            else:
                a = grad[start:stop].to(torch.float32, copy=True)
            rows = a.view(-1, min(call.block_size, stop - start))  # [blocks, entries]
            k = k_full if rows.shape[1] == call.block_size else k_last
            # I ← the k entries of largest |a| per block;  V ← a[I], as it is stored
            index = _largest(rows, k)
            kept = rows.gather(1, index)
            value = _store(call, index, kept, start // call.block_size, k_full)
            # e ← Q(a with a[I] ← a[I] − V):  what rounding cuts off the values belongs to the error
            rows.scatter_(1, index, torch.where(value.isfinite(), kept - value, 0.0))
            if isinstance(error, Quantized):
                quantize_slice_(error, a, start, seed=call.seed)
            elif dense is not None:
                dense[start:stop] = a


def _store(call: TopK, index: Tensor, kept: Tensor, block: int, k: int) -> Tensor:
    """Store the selected entries [blocks, k] of some blocks from ``block`` on; return them as stored, float32."""
    columns, blocks = slice(block * k, block * k + index.numel()), slice(block, block + len(index))
    indices = call.indices[call.row, columns]
    if call.grids is None:
        assert call.values is not None
        value = kept.to(call.values.dtype)
        indices.copy_(index.reshape(-1))
        call.values[call.row, columns] = value.view(-1)
        return value.float()
    bits = 4 if call.values is None else 8
    codes, lo, step = encode(kept, bits)
    call.grids.lo[call.row, blocks], call.grids.step[call.row, blocks] = lo, step
    if call.values is None:
        indices.copy_((index | (codes << INDEX_BITS)).view(-1))
    else:
        indices.copy_(index.reshape(-1))
        call.values[call.row, columns] = codes.view(-1).to(torch.uint8)
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
