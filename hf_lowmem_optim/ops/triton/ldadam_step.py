# mypy: disable-error-code="no-untyped-def, untyped-decorator, misc"
# ruff: noqa: RET505 (a branch of a constexpr that is not taken is not compiled: else must be written)
"""A later step of LDAdam in Triton: a = g + ξ is formed in registers wherever it is needed, and never written.

Per batch of equal matrices, and beside products of r × r and orthonormalization: the sketch V, the sketch Y and the
projection p̃ are a launch each of ``residual.py``, the moments one of ``ldadam.py``; the last one writes ξ and W.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_lowmem_optim.ops.block_quant import rounding_keys
from hf_lowmem_optim.ops.dispatch import register
from hf_lowmem_optim.ops.low_rank import (
    MOST_FACTOR_BYTES,
    Coefficients,
    Products,
    precision_of_products,
    projection_noise,
)
from hf_lowmem_optim.ops.triton.device import address_table, aligned, on_device
from hf_lowmem_optim.ops.triton.ldadam import MAX_RANK, update_moments_
from hf_lowmem_optim.ops.triton.low_rank import orthonormal_columns
from hf_lowmem_optim.ops.triton.residual import (
    POINTEE,
    Residual,
    add_error,
    apply_tile,
    batch_pointers,
    load_factor,
    load_parts,
    product,
    store_error,
    why_not_residual,
)

__all__ = ["later_step_"]

#: What a matrix allocates for a moment, at most, in float32 copies of its state: as ``LDAdam.method`` says.
_FACTOR_COPIES = 6


@triton.jit(do_not_specialize=["key0", "key1"])
def _apply_kernel(
    table_ptr,  # [batch]: addresses of gradients [n, c]
    error_ptr,
    lo_ptr,
    hi_ptr,
    magic,
    weights_ptr,  # [batch]: addresses of weights
    old_ptr,  # [batch], r terms of p entries each
    new_ptr,
    factors_ptr,  # [batch, 2r, q]
    direction_ptr,  # [batch, r, q]
    n,
    c,
    r,
    error_batch,
    stats_batch,
    old_batch,
    old_along,
    old_term,
    new_batch,
    new_along,
    new_term,
    decay,
    step_size,
    key0,
    key1,
    GRAD: tl.constexpr,
    WEIGHT: tl.constexpr,
    STORAGE: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    TALL: tl.constexpr,
    PRODUCTS: tl.constexpr,
    MORE_TERMS: tl.constexpr,  # whether r > TERMS
    TERMS: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    ALIGNED: tl.constexpr,
    ALIGNED_WEIGHTS: tl.constexpr,
    EVEN: tl.constexpr,
):
    b = tl.program_id(1).to(tl.int64)
    across = tl.cdiv(c, COLS)
    row0, col0 = tl.program_id(0) // across * ROWS, tl.program_id(0) % across * COLS
    if TALL:
        p, p0, q, q0 = c, col0, n, row0
    else:
        p, p0, q, q0 = n, row0, c, col0
    SHORT: tl.constexpr = COLS if TALL else ROWS
    LONG: tl.constexpr = ROWS if TALL else COLS
    old_ptr += b * old_batch
    new_ptr += b * new_batch
    direction_ptr += b * r * q
    factors_ptr += 2 * b * r * q

    # 6. ξ ← a − U(p̃ + c·m̃) + c·U₋m
    if STORAGE != "none":
        g_ptr, error_ptr, lo_ptr, hi_ptr = batch_pointers(
            table_ptr, error_ptr, lo_ptr, hi_ptr, b, error_batch, stats_batch, GRAD, STORAGE
        )
        g, error, lo, hi = load_parts(
            g_ptr, error_ptr, lo_ptr, hi_ptr, row0, col0, n, c, STORAGE, ROWS, COLS, ALIGNED, EVEN
        )
        change = add_lifted(
            tl.zeros([ROWS, COLS], tl.float32), old_ptr, p0, p, old_along, old_term, factors_ptr, q0, q, r,
            TALL, PRODUCTS, MORE_TERMS, TERMS, SHORT, LONG, EVEN,
        )  # fmt: skip
        change = add_lifted(
            change, new_ptr, p0, p, new_along, new_term, factors_ptr + r * q.to(tl.int64), q0, q, r,
            TALL, PRODUCTS, MORE_TERMS, TERMS, SHORT, LONG, EVEN,
        )  # fmt: skip
        store_error(
            add_error(g, error, lo, hi, magic, STORAGE, ROWS, COLS) + change,
            g_ptr, error_ptr, lo_ptr, hi_ptr, row0, col0, n, c, key0, key1,
            STORAGE, STOCHASTIC, ROWS, COLS, ALIGNED, EVEN,
        )  # fmt: skip
    # 9. W ← decay·W − step_size·U d
    weight_ptr = tl.load(weights_ptr + b).to(tl.pointer_type(WEIGHT))
    row, col = tl.arange(0, ROWS), tl.arange(0, COLS)
    at = weight_ptr + (row0.to(tl.int64) * c + col0) + (row * c)[:, None] + col[None, :]
    if ALIGNED_WEIGHTS:
        at = tl.multiple_of(at, (1, 16))
    inside = (row < n - row0)[:, None] & (col < c - col0)[None, :]
    weight = tl.load(at) if EVEN else tl.load(at, mask=inside, other=0.0)
    update = add_lifted(
        tl.zeros([ROWS, COLS], tl.float32), new_ptr, p0, p, new_along, new_term, direction_ptr, q0, q, r,
        TALL, PRODUCTS, MORE_TERMS, TERMS, SHORT, LONG, EVEN,
    )  # fmt: skip
    weight = (decay * weight.to(tl.float32) - step_size * update).to(WEIGHT)
    if EVEN:
        tl.store(at, weight)
    else:
        tl.store(at, weight, mask=inside)


@triton.jit
def add_lifted(
    acc, basis_ptr, p0, p, basis_along, basis_term, moment_ptr, q0, q, r, TALL: tl.constexpr, PRODUCTS: tl.constexpr,
    MORE_TERMS: tl.constexpr, TERMS: tl.constexpr, SHORT: tl.constexpr, LONG: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Return acc + basis·moment for a tile of a matrix, or its transpose: [p, r]·[r, q]."""
    if MORE_TERMS:
        for term0 in range(TERMS, r, TERMS):
            left = load_factor(basis_ptr, p0, p, basis_along, term0, r, basis_term, TERMS, SHORT, EVEN)
            right = load_factor(moment_ptr, q0, q, 1, term0, r, q, TERMS, LONG, EVEN)
            acc = lifted(left, right, acc, TALL, PRODUCTS)
    left = load_factor(basis_ptr, p0, p, basis_along, 0, r, basis_term, TERMS, SHORT, EVEN)
    right = load_factor(moment_ptr, q0, q, 1, 0, r, q, TERMS, LONG, EVEN)
    return lifted(left, right, acc, TALL, PRODUCTS)


@triton.jit
def lifted(left, right, acc, TALL: tl.constexpr, PRODUCTS: tl.constexpr):
    """Return acc + leftᵀ·right, or its transpose: left [terms, p], right [terms, q]."""
    if TALL:
        return product(tl.trans(right), left, acc, PRODUCTS)
    else:
        return product(tl.trans(left), right, acc, PRODUCTS)


def _why_not(W: Sequence[Tensor], g: Sequence[Tensor], state: Mapping[str, Tensor], t: int, o: Any) -> str | None:
    if t == 1:
        return "the first step takes a singular value decomposition"
    if o.rank > MAX_RANK:
        return f"rank {o.rank} does not fit into a program's shared memory (at most {MAX_RANK})"
    if len({weight.dtype for weight in W}) > 1 or len({grad.dtype for grad in g}) > 1:
        return "weights or gradients differ in their dtypes"
    return why_not_residual(g, state)


@register("ldadam_update_", "triton", why_not=_why_not, composed=True)
def later_step_(W: Sequence[Tensor], g: Sequence[Tensor], state: Mapping[str, Tensor], t: int, o: Any) -> None:
    """See :func:`hf_lowmem_optim.optimizers.ldadam.ldadam_update_`."""
    entries = 2 * state["exp_avg"][0].numel() + state["basis"][0].numel()
    most = max(1, MOST_FACTOR_BYTES // (4 * _FACTOR_COPIES * entries))
    for start in range(0, len(W), most):
        part = slice(start, start + most)
        _step_(W[part], g[part], {key: stacked[part] for key, stacked in state.items()}, t, o)


def _step_(W: Sequence[Tensor], g: Sequence[Tensor], state: Mapping[str, Tensor], t: int, o: Any) -> None:
    numbers = Coefficients.of_step(t, o)
    m, v, old = (state[key].float().contiguous() for key in ("exp_avg", "exp_avg_sq", "basis"))  # [n, r, q], [n, p, r]
    tall, products = W[0].shape[0] > W[0].shape[1], _products(o)
    # of factors, which every stripe reads again, half the bytes where products round them anyhow
    kind = torch.bfloat16 if products == "bf16" else torch.float32
    # 1. a ← g + ξ
    a = Residual(g, state, o.error_feedback, products)
    # 3. V ← bᵀU₋;  Y ← bV;  U ← orthonormalize(Y), with b = s·U₋m + (1 − ρ)·a
    s, rest = numbers.momentum_weight, numbers.gradient_weight
    old_factor = old.to(kind)
    V = torch.empty_like(m, dtype=kind).mT
    a.multiply(old_factor, V, over_rows=not tall, weight=rest, onto=m.mT, onto_weight=s)
    Y = a.multiply(V, torch.empty_like(old), over_rows=tall, weight=rest)
    U = orthonormal_columns(Y.baddbmm_(old, m @ V.float(), alpha=s))
    # 4. p̃ ← Uᵀa
    factor = U.to(kind)
    p = a.multiply(factor, torch.empty_like(m).mT, over_rows=not tall).mT
    # 5. to 8. m̃, v, m, the direction of line 9; the factors are c·m over −(p̃ + c·m̃)
    right = torch.empty(len(m), 2 * m.shape[1], m.shape[2], dtype=kind, device=m.device)
    direction = torch.empty_like(p, dtype=kind)
    noise = projection_noise(products, old.shape[1])
    update_moments_(U.mT @ old, m, v, p, right, numbers, direction=direction, noise=noise)
    # 6. ξ ← a − U(p̃ + c·m̃) + c·U₋m;  9. W ← W·(1 − lr·weight_decay) − lr·U[m̂ / (√v̂ + eps)]
    seed = t if o.stochastic_rounding else None
    _apply_(W, a, (old_factor, factor, right, direction), numbers, seed)
    for key, value in (("basis", U), ("exp_avg", m), ("exp_avg_sq", v)):
        if state[key] is not value:
            state[key].copy_(value)


def _products(o: Any) -> Products:
    """Return the precision of this step's products."""
    products = precision_of_products(o.error_feedback, o.rank)
    # three products do not compile for AMD's
    return "ieee" if products == "tf32x3" and torch.version.hip else products


def _apply_(
    W: Sequence[Tensor], a: Residual, factors: tuple[Tensor, ...], numbers: Coefficients, seed: int | None
) -> None:
    """Write error and weights, in one launch.

    Args:
        W: The weights.
        a: Gradients and errors.
        factors: U₋ and U [n, p, r], the right factors of the error's change [n, 2r, q], the direction [n, r, q].
        numbers: The numbers of this step.
        seed: Rounds a quantized error stochastically; None rounds to nearest.
    """
    old, new, right, direction = factors
    r = direction.shape[1]
    tile = apply_tile(a, r)
    rows, columns = tile["ROWS"], tile["COLS"]
    key0, key1 = rounding_keys(seed) if seed is not None else (0, 0)
    with on_device(direction):
        _apply_kernel[(triton.cdiv(a.rows, rows) * triton.cdiv(a.columns, columns), a.count)](
            *a.pointers,
            address_table(W),
            old,
            new,
            right,
            direction,
            a.rows,
            a.columns,
            r,
            *a.strides,
            *old.stride(),
            *new.stride(),
            float(numbers.decay),
            float(numbers.step_size),
            key0,
            key1,
            WEIGHT=POINTEE[W[0].dtype],
            STOCHASTIC=seed is not None,
            TALL=a.rows > a.columns,
            MORE_TERMS=r > tile["TERMS"],
            ALIGNED=a.aligned,
            ALIGNED_WEIGHTS=aligned(W) and a.columns * W[0].itemsize % 16 == 0,
            EVEN=a.rows % rows == 0 and a.columns % columns == 0 and r % tile["TERMS"] == 0,
            enable_fp_fusion=True,
            **a.constants,
            **tile,
        )
