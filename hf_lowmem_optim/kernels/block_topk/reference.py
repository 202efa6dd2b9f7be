"""Error-feedback Top-K in plain torch: the specification of the other backends, which agree with it bit for bit.

Works on slices of blocks, so that its temporaries do not grow with the tensor.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hf_lowmem_optim.kernels.block_quant.layout import Quantized
from hf_lowmem_optim.kernels.block_quant.reference import dequantize_slice, quantize_slice_, slices
from hf_lowmem_optim.kernels.block_topk.layout import Selection

__all__ = ["select_all"]

# magnitudes are compared as the bits of |a|; every NaN counts as one magnitude, above infinity
_MAGNITUDE_MASK, _NAN_MAGNITUDE = 0x7FFFFFFF, 0x7F800001


def select_all(selections: Sequence[Selection]) -> None:
    """Reference of :func:`~hf_lowmem_optim.kernels.block_topk.foreach_block_topk_`; all tensors are flat."""
    for each in selections:
        _select_into(each, each.grad, each.error)


def _select_into(out: Selection, grad: Tensor, error: Quantized | Tensor | None) -> None:
    indices, values = out.indices[out.row], out.values[out.row]
    for start, stop in slices(grad.numel(), out.block_size, grad.device):
        # a ← g + s·Q⁻¹(e)
        a = _accumulate(grad[start:stop], error, start, stop, out.error_scale)
        rows = a.view(-1, min(out.block_size, stop - start))  # [blocks, entries]
        k = out.k if rows.shape[1] == out.block_size else out.k_last
        # I ← the k entries of largest |a| per block;  V ← a[I], rounded to the storage of the values
        index = _largest(rows, k)
        kept = rows.gather(1, index)
        value = kept.to(values.dtype)
        first = start // out.block_size * out.k
        indices[first : first + index.numel()] = index.reshape(-1)
        values[first : first + index.numel()] = value.view(-1)
        if error is None:
            continue
        # e ← Q(a with a[I] ← a[I] − V):  what rounding cuts off the values belongs to the error
        wide = value.float()
        rows.scatter_(1, index, torch.where(wide.isfinite(), kept - wide, 0.0))
        if isinstance(error, Quantized):
            quantize_slice_(error, a, start, seed=out.seed)
        else:
            error[start:stop] = a


def _accumulate(grad: Tensor, error: Quantized | Tensor | None, start: int, stop: int, scale: float) -> Tensor:
    """Return g + s·e of one slice as a new float32 tensor."""
    if error is None:
        return grad.to(torch.float32, copy=True)
    if isinstance(error, Quantized):
        e = dequantize_slice(error, start, stop)
    else:
        e = error[start:stop].to(torch.float32, copy=True)
    return e.mul_(scale).add_(grad)


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
