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

from torch import Tensor

from hf_lowmem_optim.kernels.backend import choose_backend, flat, implementation
from hf_lowmem_optim.kernels.block_quant.checks import check_dense
from hf_lowmem_optim.kernels.block_quant.layout import QuantFormat, Quantized

__all__ = ["QuantFormat", "Quantized", "dequantize_", "dequantize_add_", "quantize_"]


def quantize_(out: Quantized, source: Tensor, *, seed: int | None = None) -> None:
    """Write Q(source) into ``out``.

    Args:
        out: The buffer to write; all of its tensors are overwritten.
        source: Contiguous float32, bfloat16 or float16 tensor of ``out.numel`` entries. Left as it is.
        seed: None rounds to nearest; an integer rounds stochastically with that seed.

    Raises:
        ValueError: A tensor has the wrong dtype, size or device, or is not contiguous.
    """
    source = _checked(source, out, "source")
    backend = choose_backend("quantize_", source.device)
    if source.numel() > 0:
        implementation("block_quant", backend).quantize_into(out, flat(source, backend), seed=seed)


def dequantize_(out: Tensor, quantized: Quantized, *, scale: float = 1.0) -> None:
    """Write ``out ← scale · Q⁻¹(quantized)``, rounded to the dtype of ``out``.

    Args:
        out: Contiguous float32, bfloat16 or float16 tensor of ``quantized.numel`` entries.
        quantized: The buffer to read.
        scale: Factor, rounded to float32.

    Raises:
        ValueError: A tensor has the wrong dtype, size or device, or is not contiguous.
    """
    _dequantize(out, quantized, scale, None)


def dequantize_add_(out: Tensor, quantized: Quantized, *, scale: float = 1.0, onto: Tensor | None = None) -> None:
    """Write ``out ← onto + scale · Q⁻¹(quantized)``, computed in float32 and rounded to the dtype of ``out``.

    Args:
        out: As for :func:`dequantize_`.
        quantized: The buffer to read.
        scale: Factor, rounded to float32.
        onto: What is added to, like ``out`` but for its dtype, which may be another; only read. None for ``out``.

    Raises:
        ValueError: A tensor has the wrong dtype, size or device, or is not contiguous.
    """
    _dequantize(out, quantized, scale, out if onto is None else onto)


def _dequantize(out: Tensor, quantized: Quantized, scale: float, onto: Tensor | None) -> None:
    out = _checked(out, quantized, "out")
    if onto is not None:
        onto = check_dense(onto, "onto", numel=quantized.numel, device=out.device)
    backend = choose_backend("dequantize_" if onto is None else "dequantize_add_", out.device)
    if out.numel() > 0:
        base = None if onto is None else flat(onto, backend)
        implementation("block_quant", backend).dequantize_into(flat(out, backend), quantized, scale=scale, onto=base)


def _checked(dense: Tensor, quantized: Quantized, name: str) -> Tensor:
    """Check both sides and return the dense one."""
    quantized.check()
    return check_dense(dense, name, numel=quantized.numel, device=quantized.codes.device)
