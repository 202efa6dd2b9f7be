"""Error-feedback Top-K in one pass: accumulate, select, compact, and put what is left back into the error.

Per block of ``block_size`` consecutive entries (the last one of n shorter), all arithmetic in float32:

    a ← g + s·Q⁻¹(e)                 s = error_scale; Q of ``block_quant``, or the identity for a dense buffer
    I ← the ⌈density·n⌉ entries of largest |a|, exactly; ties go to the lowest index
    V ← a[I] rounded to the values' dtype
    a[I] ← a[I] − V                  what rounding cuts off belongs to the error
    e ← Q(a)

The gradient is read once and left intact; the error is read and written once; nothing of the gradient's size is
allocated (the reference works on slices). All backends agree bit for bit.

*Not finite*: |NaN| ranks above Inf, so both are selected first and reach the values, as they reach AdamW's moments.
The error keeps 0 at an entry whose value is not finite (also one that bfloat16 rounds to Inf): it does not stay there
for good. Entries that are not finite beyond the ⌈density·n⌉ selected ones remain in the error, where a quantized error
loses their whole quantization block to NaN (see ``block_quant``).

Source: MicroAdam, arXiv 2405.15593, Algorithm 1, lines 5-9. The released code drops the values' rounding residual.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from hf_lowmem_optim.kernels.backend import Backend, choose_backend, flat, implementation
from hf_lowmem_optim.kernels.block_quant.checks import check_dense
from hf_lowmem_optim.kernels.block_quant.layout import Quantized
from hf_lowmem_optim.kernels.block_topk.layout import (
    MAX_BLOCK_SIZE,
    Selection,
    check_block_size,
    kept_per_block,
    num_kept,
)

__all__ = [
    "MAX_BLOCK_SIZE",
    "TRITON_MAX_BLOCK_SIZE",
    "TopK",
    "block_topk_",
    "check_topk",
    "foreach_block_topk_",
    "kept_per_block",
    "num_kept",
]

TRITON_MAX_BLOCK_SIZE = 8192
"""The kernel takes 8 bytes of shared memory per entry, and some GPUs have 64 KiB; larger blocks go to the reference."""

_INDEX_DTYPES, _VALUE_DTYPES = (torch.int16,), (torch.bfloat16, torch.float32)


def block_topk_(
    indices: Tensor,
    values: Tensor,
    grad: Tensor,
    error: Quantized | Tensor | None,
    *,
    block_size: int,
    density: float,
    error_scale: float = 1.0,
    seed: int | None = None,
) -> None:
    """Move the largest entries of ``grad + error_scale · error`` into a row of a window, and the rest into ``error``.

    MicroAdam's ``alpha``: the caller adds alpha·Q⁻¹(e) to the update (``dequantize_add_``), then calls this with
    ``error_scale = 1 − alpha``.

    Args:
        indices: int16 [kept], contiguous: row (t − 1) mod window of the window. Written.
        values: bfloat16 or float32 [kept], likewise. Written.
        grad: Contiguous float32, bfloat16 or float16 tensor (any shape; taken flat). Left as it is.
        error: Block-quantized buffer whose block size divides ``block_size``, or a contiguous dense buffer of
            ``grad``'s size, or None for plain Top-K. Read and written.
        block_size: Entries of a block, at most 32768.
        density: Fraction of each block's entries to keep, rounded up.
        error_scale: Factor s, rounded to float32.
        seed: None rounds a quantized error to nearest; an integer rounds it stochastically with that seed.

    Raises:
        ValueError: An argument is out of range, or a tensor has the wrong dtype, size or device or is not contiguous.
    """
    call = TopK(indices.unsqueeze(0), values.unsqueeze(0), 0, grad, error, block_size, density, error_scale, seed)
    foreach_block_topk_([call])


class TopK(NamedTuple):
    """One tensor of :func:`foreach_block_topk_`.

    Attributes:
        indices: int16 [window, kept], contiguous.
        values: bfloat16 or float32 [window, kept], contiguous.
        row: The row of both that is written.
        grad: This and all others: the arguments of :func:`block_topk_`.
        error: Likewise.
        block_size: Likewise.
        density: Likewise.
        error_scale: Likewise.
        seed: Likewise.
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
    """Do :func:`block_topk_` for several tensors, to the bit what it does for each.

    Args:
        calls: The tensors, all on one device, none written for two of them, and how each is treated.

    Raises:
        ValueError: As :func:`block_topk_`, or there is no such row, or the tensors are on several devices. Nothing has
            been written then.
    """
    if not calls:
        return
    device = calls[0].grad.device
    unsupported: dict[Backend, str] = {}
    for call in calls:
        if call.grad.device != device:
            raise ValueError(f"grad is on {call.grad.device}, that of another tensor on {device}")
        unsupported |= _unsupported(call.error, call.block_size)
    backend = choose_backend("block_topk_", device, unsupported=unsupported)
    selections = [check_topk(call, device, backend) for call in calls if call.grad.numel()]
    if selections:
        implementation("block_topk", backend).select_all(selections)


def check_topk(call: TopK, device: torch.device, backend: Backend) -> Selection:
    """Check the arguments for one tensor, and return them as the backend takes them."""
    block_size, density, numel = call.block_size, call.density, call.grad.numel()
    check_block_size(block_size)
    full, rest = divmod(numel, block_size)
    k = kept_per_block(block_size, density)
    k_last = kept_per_block(rest, density) if rest else k
    kept = full * k + (k_last if rest else 0)
    grad = check_dense(call.grad, "grad", numel=numel, device=device)
    length = call.indices.shape[0]
    if call.indices.dim() != 2 or call.values.dim() != 2:
        shapes = f"{[*call.indices.shape]} and {[*call.values.shape]}"
        raise ValueError(f"indices and values must be [window, kept], got {shapes}")
    if not 0 <= call.row < length:
        raise ValueError(f"row {call.row} is not one of the window's {length}")
    indices = check_dense(call.indices, "indices", numel=length * kept, device=device, dtypes=_INDEX_DTYPES)
    values = check_dense(call.values, "values", numel=length * kept, device=device, dtypes=_VALUE_DTYPES)
    error = _checked_error(call.error, grad, block_size)
    return Selection(
        indices,
        values,
        call.row,
        kept,
        flat(grad, backend),
        flat(error, backend) if isinstance(error, Tensor) else error,
        block_size,
        k,
        k_last,
        float(call.error_scale),
        call.seed,
    )


def _checked_error(error: Quantized | Tensor | None, grad: Tensor, block_size: int) -> Quantized | Tensor | None:
    """Check the error against the gradient."""
    if error is None:
        return None
    if isinstance(error, Tensor):
        return check_dense(error, "error", numel=grad.numel(), device=grad.device)
    error.check()
    if error.numel != grad.numel() or error.codes.device != grad.device:
        raise ValueError(
            f"error has {error.numel} entries on {error.codes.device}, grad {grad.numel()} on {grad.device}"
        )
    if block_size % error.format.block_size:
        raise ValueError(
            f"block_size ({block_size}) must be a multiple of the error's quantization block size "
            f"({error.format.block_size})"
        )
    return error


def _unsupported(error: Quantized | Tensor | None, block_size: int) -> dict[Backend, str]:
    if block_size > TRITON_MAX_BLOCK_SIZE:
        return {"triton": f"a block of {block_size} entries does not fit on a GPU (at most {TRITON_MAX_BLOCK_SIZE})"}
    if isinstance(error, Quantized) and error.format.block_size & (error.format.block_size - 1):
        return {"triton": f"quantization block size {error.format.block_size} is not a power of two"}
    return {}
