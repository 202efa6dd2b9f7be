# mypy: disable-error-code="no-untyped-def, untyped-decorator, attr-defined"
"""Weights with corrections in Triton: within the kernel of an update, or all tensors of one dtype in one launch."""

# ruff: noqa: SIM300 (an argument in capitals is taken for the constant)
from __future__ import annotations

import functools
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_lowmem_optim.ops.constants import kept
from hf_lowmem_optim.ops.dispatch import register
from hf_lowmem_optim.ops.triton.device import on_device
from hf_lowmem_optim.ops.triton.tables import TYPES, block_tables, owner_and_block, pointer, size, vectorizes
from hf_lowmem_optim.ops.weight_correction import join_weights, split_weights_

__all__ = ["join", "load_weight", "split_", "store_weight"]

_BLOCK = 2048
#: Values of each weight begin at a multiple of it.
_EVEN = 16


@triton.jit
def join_values(weight, correction):
    """The float32 values of weights and int8 corrections."""
    WEIGHT: tl.constexpr = weight.dtype
    INFINITE: tl.constexpr = 0x7F80 if WEIGHT == tl.bfloat16 else 0x7C00
    bits = weight.to(tl.int16, bitcast=True).to(tl.int32)
    magnitude = bits & 0x7FFF
    p = tl.maximum((magnitude << 8) + correction.to(tl.int32), 0)
    if WEIGHT == tl.bfloat16:
        value = p << 8
    else:
        small = (p.to(tl.float32) * 2.3283064365386963e-10).to(tl.int32, bitcast=True)  # 2^-32
        value = tl.where(p < 1 << 18, small, (p << 5) + (112 << 23))
    value = value | (bits & -0x80000000)
    value = tl.where(magnitude < INFINITE, value, weight.to(tl.float32).to(tl.int32, bitcast=True))
    return value.to(tl.float32, bitcast=True)


@triton.jit
def split_values(x, WEIGHT: tl.constexpr):
    """Weights and int8 corrections of float32 values."""
    INFINITE: tl.constexpr = 0x7F80 if WEIGHT == tl.bfloat16 else 0x7C00
    NAN: tl.constexpr = 0x7FC0 if WEIGHT == tl.bfloat16 else 0x7E00
    bits = x.to(tl.int32, bitcast=True)
    if WEIGHT == tl.bfloat16:
        # p with the sign before it, and 8 bits after it
        bits = bits + 127 + ((bits >> 8) & 1)
        p, narrow = bits >> 8, (bits + 0x8000) >> 16
    else:
        magnitude = tl.minimum(bits & 0x7FFFFFFF, 0x7F800000)
        # adding 2^23 rounds to a whole number, ties to even, and leaves it in the last bits
        whole = tl.minimum(tl.abs(x), 6.103515625e-05) * 4294967296.0 + 8388608.0
        small = whole.to(tl.int32, bitcast=True) - 0x4B000000
        normal = magnitude - (112 << 23)
        p = tl.where(magnitude < 113 << 23, small, (normal + 15 + ((normal >> 5) & 1)) >> 5)
        narrow = tl.minimum((p + 128) >> 8, INFINITE) | (bits >> 31 << 15)
    number = x == x
    finite = number & ((narrow & 0x7FFF) < INFINITE)
    narrow = tl.where(number, narrow, NAN).to(tl.int16)
    # p − 256·w is the last byte of p
    return narrow.to(WEIGHT, bitcast=True), tl.where(finite, p, 0).to(tl.int8)


@triton.jit
def load_weight(weight_ptr, correction_ptr, at, mask):
    """Weights, as they are stored if they have no corrections, else float32; pointer and mask are None for none."""
    if mask is None:
        weight = tl.load(weight_ptr + at)
        if correction_ptr is not None:
            weight = join_values(weight, tl.load(correction_ptr + at))
    else:
        weight = tl.load(weight_ptr + at, mask=mask, other=0.0)
        if correction_ptr is not None:
            weight = join_values(weight, tl.load(correction_ptr + at, mask=mask, other=0))
    return weight


@triton.jit
def store_weight(weight_ptr, correction_ptr, at, x, mask):
    """Round float32 values to weights, and to their corrections if they have any."""
    WEIGHT: tl.constexpr = weight_ptr.dtype.element_ty
    if correction_ptr is None:
        tl.store(weight_ptr + at, x.to(WEIGHT), mask=mask)
    else:
        weight, correction = split_values(x, WEIGHT)
        tl.store(weight_ptr + at, weight, mask=mask)
        tl.store(correction_ptr + at, correction, mask=mask)


@triton.jit
def _join_kernel(table_ptr, owners_ptr, values_ptr, BLOCK: tl.constexpr, WEIGHT: tl.constexpr, ALIGNED: tl.constexpr):
    record, at, valid = block_of(table_ptr, owners_ptr, BLOCK, ALIGNED)
    value = load_weight(pointer(record, 1, WEIGHT, ALIGNED), pointer(record, 2, tl.int8, ALIGNED), at, valid)
    tl.store(values_of(values_ptr, record, ALIGNED) + at, value, mask=valid)


@triton.jit
def _split_kernel(table_ptr, owners_ptr, values_ptr, BLOCK: tl.constexpr, WEIGHT: tl.constexpr, ALIGNED: tl.constexpr):
    record, at, valid = block_of(table_ptr, owners_ptr, BLOCK, ALIGNED)
    value = tl.load(values_of(values_ptr, record, ALIGNED) + at, mask=valid, other=0.0)
    store_weight(pointer(record, 1, WEIGHT, ALIGNED), pointer(record, 2, tl.int8, ALIGNED), at, value, valid)


@triton.jit
def block_of(table_ptr, owners_ptr, BLOCK: tl.constexpr, ALIGNED: tl.constexpr):
    """A program's record, the entries that it has of the tensor, and which of these there are."""
    record, block = owner_and_block(owners_ptr, table_ptr, tl.program_id(0), 5)
    at = block * BLOCK + tl.arange(0, BLOCK)
    return record, at, at < size(record, 4, ALIGNED)


@triton.jit
def values_of(values_ptr, record, ALIGNED: tl.constexpr):
    """Where the float32 values of a tensor begin."""
    values_ptr += tl.load(record + 3)
    return tl.multiple_of(values_ptr, 16) if ALIGNED else values_ptr


#: Nothing is copied to the device as long as weights and corrections are where they were in an earlier step.
_tables = functools.lru_cache(maxsize=1 << 8)(block_tables)


@register(join_weights, "triton")
def join(weights: Sequence[Tensor], corrections: Sequence[Tensor]) -> list[Tensor]:
    """Join all tensors of a dtype by one launch, those with an odd address or size by another."""
    # in one piece, so that their places in it are the same in each step
    places = list(accumulate([-(-weight.numel() // _EVEN) * _EVEN for weight in weights], initial=0))
    whole = torch.empty(places.pop(), dtype=torch.float32, device=weights[0].device)
    joined = [
        whole[start : start + weight.numel()].view(weight.shape) for start, weight in zip(places, weights, strict=True)
    ]
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
    groups: dict[tuple[torch.dtype, bool, int], list[tuple[Tensor, Tensor, Tensor]]] = {}
    for weight, correction, x in zip(weights, corrections, values, strict=True):
        if weight.numel():
            key = weight.dtype, vectorizes(weight, correction, x), x.untyped_storage().data_ptr()
            groups.setdefault(key, []).append((weight, correction, x))
    for (dtype, is_aligned, _), calls in groups.items():
        counts = tuple([-(-weight.numel() // _BLOCK) for weight, _, _ in calls])
        records = tuple([(w.data_ptr(), c.data_ptr(), x.storage_offset(), w.numel()) for w, c, x in calls])
        x = calls[0][2]
        whole = x.as_strided((x.untyped_storage().nbytes() // x.itemsize,), (1,), 0)
        with on_device(x):
            table, owners = map(kept, _tables(records, counts, x.device))
            kernel[(sum(counts),)](table, owners, whole, BLOCK=_BLOCK, WEIGHT=TYPES[dtype], ALIGNED=is_aligned)
