# mypy: disable-error-code="no-untyped-def, untyped-decorator, attr-defined"
"""Weights with corrections in Triton: all tensors of one dtype in one launch."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_lowmem_optim.ops.dispatch import register
from hf_lowmem_optim.ops.triton.device import on_device
from hf_lowmem_optim.ops.triton.tables import TYPES, block_tables, owner_and_block, pointer, size, vectorizes
from hf_lowmem_optim.ops.weight_correction import join_weights, split_weights_

__all__ = ["join", "split_"]

_BLOCK = 2048


@triton.jit
def _nearest(bits, DROPPED: tl.constexpr):
    """Bits without the last ones, rounded to nearest, ties to even."""
    return (bits + ((1 << (DROPPED - 1)) - 1) + ((bits >> DROPPED) & 1)) >> DROPPED


@triton.jit
def _join_kernel(table_ptr, owners_ptr, BLOCK: tl.constexpr, WEIGHT: tl.constexpr, ALIGNED: tl.constexpr):
    INFINITE: tl.constexpr = 0x7F80 if WEIGHT == tl.bfloat16 else 0x7C00  # noqa: SIM300 (WEIGHT is the argument)
    record, block = owner_and_block(owners_ptr, table_ptr, tl.program_id(0), 5)
    numel = size(record, 4, ALIGNED)
    at = block * BLOCK + tl.arange(0, BLOCK)
    valid = at < numel
    weight = tl.load(pointer(record, 1, WEIGHT, ALIGNED) + at, mask=valid, other=0.0)
    correction = tl.load(pointer(record, 2, tl.int8, ALIGNED) + at, mask=valid, other=0).to(tl.int32)
    bits = weight.to(tl.int16, bitcast=True).to(tl.int32)
    magnitude = bits & 0x7FFF
    p = tl.maximum((magnitude << 8) + correction, 0)
    if WEIGHT == tl.bfloat16:  # noqa: SIM300 (WEIGHT is the argument)
        value = p << 8
    else:
        small = (p.to(tl.float32) * 2.3283064365386963e-10).to(tl.int32, bitcast=True)  # 2^-32
        value = tl.where(p < 1 << 18, small, (p << 5) + (112 << 23))
    value = value | (bits & -0x80000000)
    value = tl.where(magnitude < INFINITE, value, weight.to(tl.float32).to(tl.int32, bitcast=True))
    tl.store(pointer(record, 3, tl.float32, ALIGNED) + at, value.to(tl.float32, bitcast=True), mask=valid)


@triton.jit
def _split_kernel(table_ptr, owners_ptr, BLOCK: tl.constexpr, WEIGHT: tl.constexpr, ALIGNED: tl.constexpr):
    INFINITE: tl.constexpr = 0x7F80 if WEIGHT == tl.bfloat16 else 0x7C00  # noqa: SIM300 (WEIGHT is the argument)
    record, block = owner_and_block(owners_ptr, table_ptr, tl.program_id(0), 5)
    numel = size(record, 4, ALIGNED)
    at = block * BLOCK + tl.arange(0, BLOCK)
    valid = at < numel
    x = tl.load(pointer(record, 3, tl.float32, ALIGNED) + at, mask=valid, other=0.0)
    bits = x.to(tl.int32, bitcast=True)
    magnitude = tl.minimum(bits & 0x7FFFFFFF, 0x7F800000)
    if WEIGHT == tl.bfloat16:  # noqa: SIM300 (WEIGHT is the argument)
        p = _nearest(magnitude, 8)
    else:
        # adding 2^23 rounds to a whole number, ties to even, and leaves it in the last bits
        whole = tl.minimum(tl.abs(x), 6.103515625e-05) * 4294967296.0 + 8388608.0
        small = whole.to(tl.int32, bitcast=True) - 0x4B000000
        p = tl.where(magnitude < 113 << 23, small, _nearest(magnitude - (112 << 23), 5))
    high = tl.minimum((p + 128) >> 8, INFINITE)
    correction = tl.where(high < INFINITE, p - (high << 8), 0)
    narrow = (high | ((bits >> 31) << 15)).to(tl.int16)
    narrow = tl.where(x == x, narrow, x.to(WEIGHT).to(tl.int16, bitcast=True))
    tl.store(pointer(record, 1, WEIGHT, ALIGNED) + at, narrow.to(WEIGHT, bitcast=True), mask=valid)
    tl.store(pointer(record, 2, tl.int8, ALIGNED) + at, correction.to(tl.int8), mask=valid)


#: Nothing is copied to the device as long as the addresses are those of an earlier step.
_tables = functools.lru_cache(maxsize=16)(block_tables)


@register(join_weights, "triton")
def join(weights: Sequence[Tensor], corrections: Sequence[Tensor]) -> list[Tensor]:
    """Join all tensors of a dtype by one launch, those with an odd address or size by another."""
    joined = [torch.empty(weight.shape, dtype=torch.float32, device=weight.device) for weight in weights]
    _launch(_join_kernel, [weight.contiguous() for weight in weights], corrections, joined)
    return joined


@register(split_weights_, "triton")
def split_(weights: Sequence[Tensor], corrections: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """Split all tensors of a dtype by one launch, those with an odd address or size by another."""
    flat = [weight if weight.is_contiguous() else weight.contiguous() for weight in weights]
    _launch(_split_kernel, flat, corrections, values)
    for weight, written in zip(weights, flat, strict=True):
        if written is not weight:
            weight.copy_(written)


def _launch(kernel: Any, weights: Sequence[Tensor], corrections: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    groups: dict[tuple[torch.dtype, bool], list[tuple[Tensor, Tensor, Tensor]]] = {}
    for call in zip(weights, corrections, values, strict=True):
        if call[0].numel():
            groups.setdefault((call[0].dtype, vectorizes(*call)), []).append(call)
    for calls in groups.values():
        counts = tuple([-(-weight.numel() // _BLOCK) for weight, _, _ in calls])
        records = tuple([(w.data_ptr(), c.data_ptr(), x.data_ptr(), w.numel()) for w, c, x in calls])
        weight = calls[0][0]
        with on_device(weight):
            kernel[(sum(counts),)](
                *_tables(records, counts, weight.device),
                BLOCK=_BLOCK,
                WEIGHT=TYPES[weight.dtype],
                ALIGNED=vectorizes(*calls[0]),
            )
