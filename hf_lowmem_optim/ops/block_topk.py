"""Error-feedback Top-K in one pass: accumulate, select, compact, and put what is left back into the error.

Per block of ``block_size`` consecutive entries (the last one of n shorter), all arithmetic in float32:

    a ← g + s·Q⁻¹(e)                 s = error_scale; Q of ``block_quant``, or the identity for a dense buffer
    I ← the ⌈density·n⌉ entries of largest |a|, exactly; ties go to the lowest index
    V ← a[I] rounded to the values' dtype
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
from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

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
from hf_lowmem_optim.spec import TensorSpec

__all__ = [
    "MAX_BLOCK_SIZE",
    "VALUE_DTYPES",
    "TopK",
    "check_block_size",
    "counts",
    "fault_of_indices",
    "foreach_block_topk_",
    "kept_per_block",
    "num_kept",
    "window_specs",
]

MAX_BLOCK_SIZE = 32768  # int16 indices hold 0 … 32767
VALUE_DTYPES = (torch.bfloat16, torch.float32)

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


def fault_of_indices(indices: Tensor, numel: int, block_size: int, density: float) -> str | None:
    """Return why a window's loaded indices cannot be used, as a clause; None if each is of an entry of its block.

    Args:
        indices: int16 [window, kept], as :func:`window_specs` describes them.
        numel: Entries of the tensor.
        block_size: Entries of a block.
        density: Fraction of each block's entries that is kept.
    """
    in_full_blocks = numel // block_size * kept_per_block(block_size, density)
    for part, entries in ((indices[:, :in_full_blocks], block_size), (indices[:, in_full_blocks:], numel % block_size)):
        if part.numel() and not 0 <= int(part.amin()) <= int(part.amax()) < entries:
            return f"'indices' holds {int(part.amin())} … {int(part.amax())} for blocks of {entries} entries"
    return None


def window_specs(
    numel: int, *, window: int, density: float, block_size: int, value_dtype: torch.dtype = torch.bfloat16
) -> dict[str, TensorSpec]:
    """Describe the window of the last ``window`` selections of a tensor of ``numel`` entries.

    Args:
        numel: Entries of the tensor.
        window: Number of rows; row (t − 1) mod window is written at step t.
        density: Fraction of each block's entries that one step keeps, rounded up.
        block_size: Entries of a block, at most 32768.
        value_dtype: Storage of the values.

    Returns:
        ``"indices"``: int16 [window, kept]; ``"values"``: ``value_dtype`` [window, kept].

    Raises:
        ValueError: An argument is out of range.
    """
    if window < 1:
        raise ValueError(f"window must be at least 1, got {window!r}")
    shape = (window, num_kept(numel, block_size, density))
    return {"indices": TensorSpec(shape, torch.int16, "indices"), "values": TensorSpec(shape, value_dtype, "values")}


class TopK(NamedTuple):
    """One tensor of :func:`foreach_block_topk_`.

    MicroAdam's ``alpha``: the caller adds alpha·Q⁻¹(e) to the update (``dequantize_add_``), then selects with
    ``error_scale = 1 − alpha``.

    Attributes:
        indices: int16 [window, kept], contiguous.
        values: bfloat16 or float32 [window, kept], contiguous.
        row: The row of both that is written, (t − 1) mod window at step t.
        grad: Contiguous float32, bfloat16 or float16 tensor (any shape; taken flat). Left as it is.
        error: Block-quantized buffer whose block size divides ``block_size``, or a contiguous dense buffer of
            ``grad``'s size, or None for plain Top-K. Read and written.
        block_size: Entries of a block, at most 32768.
        density: Fraction of each block's entries to keep, rounded up.
        error_scale: Factor s, rounded to float32.
        seed: None rounds a quantized error to nearest; an integer rounds it stochastically with that seed.
    """

    indices: Tensor
    values: Tensor
    row: int
    grad: Tensor
    error: Quantized | Tensor | None
    block_size: int
    density: float
    error_scale: float = 1.0
    seed: int | None = None


def foreach_block_topk_(calls: Sequence[TopK]) -> None:
    """Move the largest entries of ``grad + error_scale · error`` into a row of a window, and the rest into ``error``.

    Args:
        calls: The tensors, all on one device, none written for two of them, and how each is treated.

    Raises:
        ValueError: An argument is out of range, or a tensor has the wrong dtype, shape or device or is not contiguous.
            Nothing has been written then.
    """
    for call in calls:
        device, first = call.grad.device, calls[0].grad.device
        if device != first:
            raise ValueError(f"grad is on {device}, that of another tensor on {first}")
        if call.grad.numel():
            _check(call)
    if filled := [call for call in calls if call.grad.numel()]:
        _select_all(filled)


def _check(call: TopK) -> None:
    """Check the arguments for one tensor."""
    block_size, numel, device = call.block_size, call.grad.numel(), call.grad.device
    kept, _, _ = counts(numel, block_size, call.density)
    if call.grad.dtype not in FLOAT_DTYPES or not call.grad.is_contiguous():
        check_dense(call.grad, "grad", numel=numel, device=device)  # says what is wrong
    shape = (len(call.indices), kept)
    for name, tensor, dtypes in (("indices", call.indices, (torch.int16,)), ("values", call.values, VALUE_DTYPES)):
        if tensor.shape != shape or not tensor.is_contiguous():
            raise ValueError(f"{name} must be contiguous, [window, kept] = {[*shape]}, got {[*tensor.shape]}")
        if tensor.dtype not in dtypes:
            raise ValueError(f"{name} must be one of {', '.join(map(str, dtypes))}; got {tensor.dtype}")
        if tensor.device != device:
            raise ValueError(f"{name} is on {tensor.device}, the other tensors on {device}")
    if not 0 <= call.row < shape[0]:
        raise ValueError(f"row {call.row} is not one of the window's {shape[0]}")
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
        grad, error, stored = call.grad.detach().view(-1), call.error, call.values.dtype
        indices, values = call.indices[call.row], call.values[call.row]
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
            # I ← the k entries of largest |a| per block;  V ← a[I], rounded to the storage of the values
            index = _largest(rows, k)
            kept = rows.gather(1, index)
            value = kept.to(stored)
            first = start // call.block_size * k_full
            indices[first : first + index.numel()] = index.reshape(-1)
            values[first : first + index.numel()] = value.view(-1)
            # e ← Q(a with a[I] ← a[I] − V):  what rounding cuts off the values belongs to the error
            wide = value.float()
            rows.scatter_(1, index, torch.where(wide.isfinite(), kept - wide, 0.0))
            if isinstance(error, Quantized):
                quantize_slice_(error, a, start, seed=call.seed)
            elif dense is not None:
                dense[start:stop] = a


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
