"""Asymmetric block quantization to 4 or 8 bits.

Per block of ``block_size`` consecutive entries (the last one shorter), with levels = 2^bits − 1 and all arithmetic in
float32, one rounding per operation:

    lo, hi ← least and greatest entry, rounded outwards to ``stat_dtype``
    u      ← (hi − lo) / levels
    code   ← clamp(⌊(x − lo)/u + r⌋, 0, levels)      r = ½, or with a seed uniform in [0, 1)
    x̂      ← code · u + lo

Nothing is clamped, as the range is rounded outwards, so |x − x̂| ≤ u/2 up to float32 rounding. u = 0 (a constant block
whose value ``stat_dtype`` holds, or a range so small that u underflows) gives code 0 and x̂ = lo; an all-zero block
comes back as +0.

*Not finite*: a block that holds NaN or ±Inf, or whose range hi − lo overflows float32 (with bfloat16 statistics also an
entry beyond bfloat16's greatest value), stores lo = hi = NaN and codes 0, and all of its entries come back as NaN.
Other blocks are untouched. A NaN or Inf is thus never turned into a finite number.

*Stochastic rounding* is unbiased to 2^-16 of u, and a pure function of (seed, entry's index): two calls with one seed
give the same codes on every backend.

All backends agree bit for bit. Source: MicroAdam, arXiv 2405.15593, section 3 (its procedures Q and Q⁻¹).
"""

from __future__ import annotations

from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from hf_lowmem_optim.ops.dispatch import Op
from hf_lowmem_optim.ops.step_numbers import Number
from hf_lowmem_optim.spec import QuantFormat

__all__ = [
    "FLOAT_DTYPES",
    "Quantized",
    "check_dense",
    "dequantize_",
    "dequantize_add_",
    "dequantize_slice",
    "quantize_",
    "quantize_slice_",
    "rounding_keys",
    "slices",
]

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_MASK32 = 0xFFFFFFFF


@dataclass(eq=False, slots=True)
class Quantized:
    """A block-quantized buffer of ``numel`` entries: entry i is ``code[i]·u + lo`` with u = (hi − lo)/levels.

    Attributes:
        codes: uint8 [⌈numel·bits/8⌉]. 4-bit: the entry of even index is the high nibble, the odd one the low nibble.
        lo: ``format.stat_dtype`` [blocks], at most the least entry of the block.
        hi: ``format.stat_dtype`` [blocks], at least the greatest entry of the block.
        numel: Number of entries.
        format: Bits, block size and storage of the statistics.
    """

    codes: Tensor
    lo: Tensor
    hi: Tensor
    numel: int
    format: QuantFormat

    #: The device of the tensors.
    device = property(attrgetter("codes.device"))

    def check(self) -> None:
        """Raise if a tensor has not the dtype, shape, device and contiguity that the format demands."""
        fmt, device = self.format, self.codes.device
        blocks = -(-self.numel // fmt.block_size)
        for name, tensor, dtype, length in (
            ("codes", self.codes, torch.uint8, -(-self.numel * fmt.bits // 8)),
            ("lo", self.lo, fmt.stat_dtype, blocks),
            ("hi", self.hi, fmt.stat_dtype, blocks),
        ):
            if tensor.dtype != dtype or tensor.shape != (length,) or not tensor.is_contiguous():
                raise ValueError(
                    f"{name} of {self.numel} entries at {fmt} must be contiguous, {dtype}, of shape ({length},); "
                    f"got {tensor.dtype} and {tuple(tensor.shape)}"
                )
            if tensor.device != device:
                raise ValueError(f"{name} is on {tensor.device}, codes on {device}")


def quantize_(out: Quantized, source: Tensor, *, seed: int | None = None) -> None:
    """Write Q(source) into ``out``.

    Args:
        out: The buffer to write; all of its tensors are overwritten.
        source: Contiguous float32, bfloat16 or float16 tensor of ``out.numel`` entries. Left as it is.
        seed: None rounds to nearest; an integer rounds stochastically with that seed.

    Raises:
        ValueError: A tensor has the wrong dtype, size or device, or is not contiguous.
    """
    out.check()
    source = check_dense(source, "source", numel=out.numel, device=out.codes.device)
    if out.numel:
        _quantize_into(out, source.view(-1), seed)


def dequantize_(out: Tensor, quantized: Quantized, *, scale: float = 1.0) -> None:
    """Write ``out ← scale · Q⁻¹(quantized)``, rounded to the dtype of ``out``.

    Args:
        out: Contiguous float32, bfloat16 or float16 tensor of ``quantized.numel`` entries.
        quantized: The buffer to read.
        scale: Factor, rounded to float32.

    Raises:
        ValueError: A tensor has the wrong dtype, size or device, or is not contiguous.
    """
    quantized.check()
    out = check_dense(out, "out", numel=quantized.numel, device=quantized.codes.device)
    if quantized.numel:
        _dequantize_into(out.view(-1), quantized, float(scale), None)


def dequantize_add_(out: Tensor, quantized: Quantized, *, scale: Any = 1.0, onto: Tensor | None = None) -> None:
    """Write ``out ← onto + scale · Q⁻¹(quantized)``, computed in float32 and rounded to the dtype of ``out``.

    Args:
        out: As for :func:`dequantize_`.
        quantized: The buffer to read.
        scale: Factor, rounded to float32.
        onto: What is added to, like ``out`` but for its dtype, which may be another; only read. None for ``out``.

    Raises:
        ValueError: A tensor has the wrong dtype, size or device, or is not contiguous.
    """
    quantized.check()
    out = check_dense(out, "out", numel=quantized.numel, device=quantized.codes.device)
    base = out if onto is None else check_dense(onto, "onto", numel=quantized.numel, device=out.device)
    if quantized.numel:
        scale = scale.place() if isinstance(scale, Number) else float(scale)
        _dequantize_into(out.view(-1), quantized, scale, base.view(-1))


def check_dense(
    tensor: Tensor, name: str, *, numel: int, device: torch.device, dtypes: tuple[torch.dtype, ...] = FLOAT_DTYPES
) -> Tensor:
    """Return the dense argument of an operation, detached.

    Raises:
        ValueError: Its dtype, size or device is not as demanded, or it is not contiguous.
    """
    if tensor.dtype not in dtypes:
        raise ValueError(f"{name} must be one of {', '.join(map(str, dtypes))}; got {tensor.dtype}")
    if tensor.numel() != numel:
        raise ValueError(f"{name} must have {numel} entries, got {tensor.numel()}")
    if tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device}, the other tensors on {device}")
    if not tensor.is_contiguous():
        raise ValueError(f"{name} must be contiguous: pass {name}.contiguous() (for a result, copy it back)")
    return tensor.detach() if tensor.requires_grad else tensor


# ---- torch version: the specification --------------------------------------------------------------------------------
# Works on slices of blocks, so that its temporaries do not grow with the buffer. All arithmetic is float32 with one
# rounding per written operation: no fused multiply-add (``torch.add(alpha=...)`` and ``addcmul`` may fuse).


@Op
def _quantize_into(out: Quantized, source: Tensor, seed: int | None) -> None:
    """Quantize the flat ``source``, which is not empty."""
    for start, stop in slices(out.numel, out.format.block_size, source.device):
        quantize_slice_(out, source[start:stop].float(), start, seed=seed)


@Op
def _dequantize_into(out: Tensor, quantized: Quantized, scale: float, onto: Tensor | None) -> None:
    """Write scale · x̂, or onto + scale · x̂; ``out`` and ``onto`` are flat and not empty."""
    for start, stop in slices(quantized.numel, quantized.format.block_size, out.device):
        scaled = dequantize_slice(quantized, start, stop).mul_(scale)
        # out ← onto + (scale · x̂), in float32
        out[start:stop] = scaled if onto is None else scaled.add_(onto[start:stop])


def slices(numel: int, block_size: int, device: torch.device) -> list[tuple[int, int]]:
    """Cut ``numel`` entries into (start, stop) of whole blocks; a shorter last block comes alone."""
    # few calls, and temporaries of a megabyte that a CPU's cache holds
    entries = 1 << 18 if device.type == "cpu" else 1 << 22
    length = max(1, entries // block_size) * block_size
    whole = numel // block_size * block_size
    bounds = [(start, min(start + length, whole)) for start in range(0, whole, length)]
    return bounds if whole == numel else [*bounds, (whole, numel)]


def dequantize_slice(quantized: Quantized, start: int, stop: int) -> Tensor:
    """Return entries ``start`` … ``stop`` as float32; both are bounds of blocks (or the end of the buffer)."""
    fmt = quantized.format
    whole = start + (stop - start) // fmt.block_size * fmt.block_size
    if start < whole < stop:  # whole blocks, and a shorter one
        return torch.cat([dequantize_slice(quantized, start, whole), dequantize_slice(quantized, whole, stop)])
    codes = _unpack(quantized.codes[start * fmt.bits // 8 : -(-stop * fmt.bits // 8)], fmt.bits)[: stop - start]
    blocks = slice(start // fmt.block_size, -(-stop // fmt.block_size))
    lo, hi = quantized.lo[blocks].float(), quantized.hi[blocks].float()
    # by a true division: on CUDA torch turns a division by a number into a product
    unit = (hi - lo).div_(torch.full_like(lo, (1 << fmt.bits) - 1))
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
    levels = (1 << fmt.bits) - 1
    unit = (hi - lo).div_(torch.full_like(lo, levels))
    # code ← clamp(⌊(x − lo)/u + r⌋, 0, levels), r = ½ or uniform in [0, 1);  u = 0 ⇒ 0;  a NaN range ⇒ 0
    t = (rows - lo[:, None]).div_(torch.where(unit > 0, unit, torch.inf)[:, None]).nan_to_num_(nan=0.0)
    if seed is None:
        t.add_(0.5)
    else:
        t.view(-1).add_(_uniform(seed, start, x.numel(), x.device))
    codes = t.floor_().clamp_(0, levels).to(torch.uint8).view(-1)
    packed = _pack(codes, fmt.bits)
    first_byte, first_block = start * fmt.bits // 8, start // fmt.block_size
    out.codes[first_byte : first_byte + len(packed)] = packed
    out.lo[first_block : first_block + len(lo)] = lo
    out.hi[first_block : first_block + len(hi)] = hi


def _stored_range(lo: Tensor, hi: Tensor, fmt: QuantFormat) -> tuple[Tensor, Tensor]:
    """Round the range outwards to what is stored, as float32; NaN where it is not finite; −0 becomes +0."""
    finite = (hi - lo) < torch.inf
    if fmt.stat_dtype == torch.bfloat16:
        # away from zero by adding to the bits that are cut off, towards zero by cutting them off; NaN becomes junk
        low, high = lo.view(torch.int32), hi.view(torch.int32)
        lo = (torch.where(low < 0, low + 0xFFFF, low) & -0x10000).view(torch.float32)
        hi = (torch.where(high >= 0, high + 0xFFFF, high) & -0x10000).view(torch.float32)
        finite &= (hi - lo) < torch.inf
    nan = lo.new_tensor(torch.nan)
    return torch.where(finite, lo + 0.0, nan), torch.where(finite, hi + 0.0, nan)


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


def rounding_keys(seed: int) -> tuple[int, int]:
    """Return the two 32-bit keys (as int32 values) of the counter-based generator that all backends share.

    splitmix64 of the seed, so that neighbouring seeds give unrelated bits.
    """
    mask = (1 << 64) - 1
    z = (seed + 0x9E3779B97F4A7C15) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    z ^= z >> 31
    low, high = z & _MASK32, z >> 32
    return low - ((low >> 31) << 32), high - ((high >> 31) << 32)


def _mix(x: Tensor) -> Tensor:
    """Hash with nearly ideal avalanche (``lowbias32``) int64 that hold 32-bit values."""
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & _MASK32
    x = ((x ^ (x >> 15)) * 0x846CA68B) & _MASK32
    return x ^ (x >> 16)


def _uniform(seed: int, start: int, length: int, device: torch.device) -> Tensor:
    """Return uniform multiples of 2^-16 in [0, 1), a function of the seed and the entry's index alone.

    16 bits and no more: a code plus them is exact in float32, so that data on the quantizer's grid stays exact.
    """
    key0, key1 = (key & _MASK32 for key in rounding_keys(seed))
    index = torch.arange(start, start + length, dtype=torch.int64, device=device)
    bits = _mix((index & _MASK32) ^ key0)
    bits = _mix((bits + (index >> 32) + key1) & _MASK32)
    return (bits >> 16).float().mul_(2.0**-16)
