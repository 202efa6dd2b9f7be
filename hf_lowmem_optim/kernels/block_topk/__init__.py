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

import torch
from torch import Tensor

from hf_lowmem_optim.kernels.backend import Backend, choose_backend, flat, implementation
from hf_lowmem_optim.kernels.block_quant.checks import check_dense
from hf_lowmem_optim.kernels.block_quant.layout import Quantized
from hf_lowmem_optim.kernels.block_topk.layout import MAX_BLOCK_SIZE, Selection, kept_per_block, num_kept

__all__ = ["MAX_BLOCK_SIZE", "TRITON_MAX_BLOCK_SIZE", "block_topk_", "kept_per_block", "num_kept"]

TRITON_MAX_BLOCK_SIZE = 8192
"""The kernel takes 8 bytes of shared memory per entry, and some GPUs have 64 KiB; larger blocks go to the reference."""


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
    numel = grad.numel()
    grad = check_dense(grad, "grad", numel=numel, device=grad.device)
    kept = num_kept(numel, block_size, density)
    indices = check_dense(indices, "indices", numel=kept, device=grad.device, dtypes=(torch.int16,))
    values = check_dense(values, "values", numel=kept, device=grad.device, dtypes=(torch.bfloat16, torch.float32))
    error = _checked_error(error, grad, block_size)
    backend = choose_backend("block_topk_", grad.device, unsupported=_unsupported(error, block_size))
    if numel == 0:
        return
    rest = numel % block_size or block_size
    k, k_last = kept_per_block(block_size, density), kept_per_block(rest, density)
    rows = flat(indices, backend), flat(values, backend)
    out = Selection(*rows, block_size, k, k_last, float(error_scale), seed)
    dense = flat(error, backend) if isinstance(error, Tensor) else error
    implementation("block_topk", backend).select_into(out, flat(grad, backend), dense)


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
