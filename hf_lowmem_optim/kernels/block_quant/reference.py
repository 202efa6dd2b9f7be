"""Block quantization in plain torch: the specification of the other backends, which agree with it bit for bit.

Works on slices of blocks, so that its temporaries do not grow with the buffer. All arithmetic is float32 with one
rounding per written operation: no fused multiply-add (``torch.add(alpha=...)`` and ``addcmul`` may fuse).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from hf_lowmem_optim.kernels.block_quant.layout import QuantFormat, Quantized, rounding_keys

__all__ = [
    "dequantize_into",
    "dequantize_slice",
    "quantize_into",
    "quantize_slice_",
]

_MASK32 = 0xFFFFFFFF


def slice_length(block_size: int, device: torch.device) -> int:
    """Entries to process at a time: whole blocks, few enough that a CPU's cache holds the temporaries."""
    entries = 1 << 17 if device.type == "cpu" else 1 << 22
    return max(1, entries // block_size) * block_size


def slices(numel: int, block_size: int, device: torch.device) -> Iterator[tuple[int, int]]:
    """Cut ``numel`` entries into (start, stop) of whole blocks; a shorter last block comes alone."""
    length = slice_length(block_size, device)
    whole = numel // block_size * block_size
    for start in range(0, whole, length):
        yield start, min(start + length, whole)
    if whole < numel:
        yield whole, numel


def quantize_into(out: Quantized, source: Tensor, *, seed: int | None) -> None:
    """Reference of :func:`~hf_lowmem_optim.kernels.block_quant.quantize_`."""
    for start, stop in slices(out.numel, out.format.block_size, source.device):
        quantize_slice_(out, source[start:stop].float(), start, seed=seed)


def dequantize_into(out: Tensor, quantized: Quantized, *, scale: float, onto: Tensor | None) -> None:
    """Reference of ``dequantize_`` and, with ``onto``, of ``dequantize_add_``; all tensors are flat."""
    for start, stop in slices(quantized.numel, quantized.format.block_size, out.device):
        scaled = dequantize_slice(quantized, start, stop).mul_(scale)
        # out ← onto + (scale · x̂), in float32
        out[start:stop] = scaled if onto is None else scaled.add_(onto[start:stop])


def dequantize_slice(quantized: Quantized, start: int, stop: int) -> Tensor:
    """Return entries ``start`` … ``stop`` as float32; both are bounds of blocks (or the end of the buffer)."""
    fmt = quantized.format
    whole = start + (stop - start) // fmt.block_size * fmt.block_size
    if start < whole < stop:  # whole blocks, and a shorter one
        return torch.cat([dequantize_slice(quantized, start, whole), dequantize_slice(quantized, whole, stop)])
    codes = _unpack(quantized.codes[start * fmt.bits // 8 : -(-stop * fmt.bits // 8)], fmt.bits)[: stop - start]
    blocks = slice(start // fmt.block_size, -(-stop // fmt.block_size))
    lo, hi = quantized.lo[blocks].float(), quantized.hi[blocks].float()
    unit = _unit(lo, hi, fmt)
    rows = codes.view(len(lo), -1)
    # x̂ ← code · u + lo
    return rows.mul_(unit[:, None]).add_(lo[:, None]).view(-1)


def quantize_slice_(out: Quantized, x: Tensor, start: int, *, seed: int | None) -> None:
    """Quantize the float32 entries ``x`` into ``out`` from entry ``start``, the begin of a block, on."""
    fmt = out.format
    whole = x.numel() // fmt.block_size * fmt.block_size
    if 0 < whole < x.numel():  # whole blocks, and a shorter one
        quantize_slice_(out, x[:whole], start, seed=seed)
        quantize_slice_(out, x[whole:], start + whole, seed=seed)
        return
    rows = x.view(-1, min(fmt.block_size, x.numel()))  # [blocks, entries]
    # lo, hi ← min, max as stored;  u ← (hi − lo) / levels
    lo, hi = _stored_range(rows.amin(1), rows.amax(1), fmt)
    unit = _unit(lo, hi, fmt)
    # code ← clamp(⌊(x − lo)/u + r⌋, 0, levels), r = ½ or uniform in [0, 1);  u = 0 ⇒ 0;  a NaN range ⇒ 0
    t = (rows - lo[:, None]).div_(torch.where(unit > 0, unit, torch.inf)[:, None]).nan_to_num_(nan=0.0)
    if seed is None:
        t.add_(0.5)
    else:
        t.view(-1).add_(_uniform(seed, start, x.numel(), x.device))
    codes = t.floor_().clamp_(0, fmt.levels).to(torch.uint8).view(-1)
    packed = _pack(codes, fmt.bits)
    first_byte, first_block = start * fmt.bits // 8, start // fmt.block_size
    out.codes[first_byte : first_byte + len(packed)] = packed
    out.lo[first_block : first_block + len(lo)] = lo
    out.hi[first_block : first_block + len(hi)] = hi


def _unit(lo: Tensor, hi: Tensor, fmt: QuantFormat) -> Tensor:
    """Return u = (hi − lo) / levels, by a true division: on CUDA torch turns a division by a number into a product."""
    return (hi - lo).div_(torch.full_like(lo, fmt.levels))


def _stored_range(lo: Tensor, hi: Tensor, fmt: QuantFormat) -> tuple[Tensor, Tensor]:
    """Round the range outwards to what is stored, as float32; NaN where it is not finite; −0 becomes +0."""
    finite = (hi - lo) < torch.inf
    if fmt.stat_dtype == torch.bfloat16:
        lo, hi = _round_to_bfloat16(lo, up=False), _round_to_bfloat16(hi, up=True)
        finite &= (hi - lo) < torch.inf
    nan = lo.new_tensor(torch.nan)
    return torch.where(finite, lo + 0.0, nan), torch.where(finite, hi + 0.0, nan)


def _round_to_bfloat16(x: Tensor, *, up: bool) -> Tensor:
    """Round to a bfloat16 value that is not less (``up``) or not greater than x; undefined for NaN."""
    bits = x.view(torch.int32)
    away_from_zero = bits >= 0 if up else bits < 0
    return (torch.where(away_from_zero, bits + 0xFFFF, bits) & -0x10000).view(torch.float32)


def _pack(codes: Tensor, bits: int) -> Tensor:
    """Pack uint8 codes into bytes: for 4 bits, even index in the high nibble; an odd end is padded with code 0."""
    if bits == 8:
        return codes
    if codes.numel() % 2:
        codes = torch.cat([codes, codes.new_zeros(1)])
    pairs = codes.view(-1, 2)
    return (pairs[:, 0] << 4) | pairs[:, 1]


def _unpack(codes: Tensor, bits: int) -> Tensor:
    """Return the codes of packed bytes as float32."""
    if bits == 8:
        return codes.float()
    pairs = torch.empty(codes.numel(), 2, dtype=torch.float32, device=codes.device)
    pairs[:, 0] = codes >> 4
    pairs[:, 1] = codes & 15
    return pairs.view(-1)


def _mix(x: Tensor) -> Tensor:
    """A 32-bit integer hash with nearly ideal avalanche (``lowbias32``), on int64 that hold 32-bit values."""
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & _MASK32
    x = ((x ^ (x >> 15)) * 0x846CA68B) & _MASK32
    return x ^ (x >> 16)


def _uniform(seed: int, start: int, length: int, device: torch.device) -> Tensor:
    """Uniform multiples of 2^-16 in [0, 1), a function of the seed and the entry's index alone.

    16 bits and no more: a code plus them is exact in float32, so that data on the quantizer's grid stays exact.
    """
    key0, key1 = (key & _MASK32 for key in rounding_keys(seed))
    index = torch.arange(start, start + length, dtype=torch.int64, device=device)
    bits = _mix((index & _MASK32) ^ key0)
    bits = _mix((bits + (index >> 32) + key1) & _MASK32)
    return (bits >> 16).float().mul_(2.0**-16)
