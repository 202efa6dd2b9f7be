"""Every Triton kernel of the package as the package launches it, at realistic sizes.

Two users, in processes of their own: ``ahead_of_time.py`` records the launches and compiles them for GPUs that are not
there; ``kernel_report.py`` runs them in the interpreter and counts the bytes that they load and store, and the lines.
Nothing is written down twice: signatures, constants and launch parameters are those of the package's own launchers.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hf_lowmem_optim.ops import dispatch
from hf_lowmem_optim.ops.block_quant import Quantized, dequantize_, dequantize_add_, quantize_
from hf_lowmem_optim.ops.block_topk import foreach_block_topk_, num_kept
from hf_lowmem_optim.ops.low_rank import Coefficients
from hf_lowmem_optim.ops.sparse_window import window_combine_
from hf_lowmem_optim.ops.weight_correction import join_weights, split_weights_
from hf_lowmem_optim.ops.window import FLOATS, INDEX_BITS, Grids, SparseWindow, ValueDtype, encode
from hf_lowmem_optim.spec import QuantFormat
from tests.ops.backends import BF16, FP16, FP32, window_descend_, window_gram_row, window_update_

#: Of a step of LDAdam.
NUMBERS = Coefficients(0.8, 0.3, 0.9, 0.99, 0.7, 1e-4, 0.9, 0.4)

#: The call, and the tensors that the algorithm has to read or write: scratch memory is not among them.
Prepared = tuple[Callable[[], object], list[Tensor]]


@dataclass(frozen=True)
class Launch:
    """One call that launches one kernel."""

    name: str
    numel: int  # entries of the tensor that the call works on
    prepare: Callable[[], Prepared]
    #: Bytes that one thread must be able to load at once from global memory; less than 16 only where the kernel gathers
    #: single entries or packed codes.
    widest_load: int


def force_triton() -> None:
    """Have every operation of this process served by its Triton kernel, also on CPU tensors."""
    from hf_lowmem_optim.ops.triton import block_topk, window_products

    os.environ[dispatch.ENVIRONMENT_VARIABLE] = "triton"
    dispatch._triton_interprets = lambda: True
    # as of a large tensor, a program has several blocks, so that what it does once does not count for each of them
    window_products._SCRATCH_BYTES = 1
    block_topk._persistent_programs = lambda device: 1


def _window(numel: int, block_size: int, kept: int, window: int, values: ValueDtype) -> SparseWindow:
    """Random indices, uniform in each block, as from gradients without structure."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(window, numel // block_size, block_size, generator=generator)
    indices = scores.topk(kept).indices.sort().values.view(window, -1)
    chosen = torch.randn(indices.shape, generator=generator)
    if values in FLOATS:
        return SparseWindow(indices.to(torch.int16), chosen.to(FLOATS[values]), numel, block_size, kept)
    bits = 4 if values == "4bit" else 8
    codes, lo, step = encode(chosen.view(-1, kept), bits)
    grids, codes = Grids(lo.view(window, -1), step.view(window, -1)), codes.view(window, -1)
    words = (indices | codes << INDEX_BITS) if bits == 4 else indices
    stored = None if bits == 4 else codes.to(torch.uint8)
    return SparseWindow(words.to(torch.int16), stored, numel, block_size, kept, grids)


def _parts(rows: SparseWindow) -> list[Tensor]:
    return [part for part in (rows.indices, rows.values, *(rows.grids or ())) if part is not None]


def _quantized(numel: int, fmt: QuantFormat) -> Quantized:
    blocks = fmt.num_blocks(numel)
    lo, hi = -torch.rand(blocks), torch.rand(blocks)
    codes = torch.randint(0, 256, (fmt.num_code_bytes(numel),), dtype=torch.uint8)
    return Quantized(codes, lo.to(fmt.stat_dtype), hi.to(fmt.stat_dtype), numel, fmt)


def _correction(weight: Tensor, compensated: bool) -> list[Tensor] | None:
    return [torch.zeros(weight.shape, dtype=torch.int8)] if compensated else None


def update(
    numel, *, block_size=4096, kept=41, window=10, values="bf16", param=FP32, weight_decay=0.0, compensated=False
) -> Prepared:
    rows, weights = _window(numel, block_size, kept, window, values), torch.rand(2, window)
    weight = torch.randn(numel).to(param)
    own = _correction(weight, compensated)
    how = {"lr": 1e-3, "eps": 1e-8, "weight_decay": weight_decay, "corrections": own}
    return partial(window_update_, weight, rows, weights, **how), [weight, *_parts(rows), weights, *(own or ())]


def combine(numel: int, *, values: ValueDtype = "bf16") -> Prepared:
    rows, weights, out = _window(numel, 4096, 41, 32, values), torch.rand(32), torch.randn(numel)
    return partial(window_combine_, out, rows, weights), [out, *_parts(rows), weights]


def gram_row(numel: int, *, values: ValueDtype = "bf16") -> Prepared:
    rows = _window(numel, 4096, 41, 32, values)
    return partial(window_gram_row, rows, 5), _parts(rows)


def descend(
    numel: int, *, weight_decay: float = 0.0, values: ValueDtype = "bf16", compensated: bool = False
) -> Prepared:
    rows, weights, weight = _window(numel, 4096, 41, 32, values), torch.rand(32), torch.randn(numel).bfloat16()
    own = _correction(weight, compensated)
    call = partial(window_descend_, weight, rows, weights, lr=0.1, weight_decay=weight_decay, corrections=own)
    return call, [*[weight, *(own or ())] * 2, *_parts(rows), weights]


def quantization(numel: int, operation: str, fmt: QuantFormat, dtype: torch.dtype, **options: Any) -> Prepared:
    buffer, dense = _quantized(numel, fmt), torch.randn(numel).to(dtype)
    calls = {
        "quantize": partial(quantize_, buffer, dense, **options),
        "dequantize": partial(dequantize_, dense, buffer),
        "dequantize_add": partial(dequantize_add_, dense, buffer, scale=0.5),
    }
    return calls[operation], [dense, buffer.codes, buffer.lo, buffer.hi]


def topk(numel, *, error=None, grad=FP32, values="bf16", block_size=4096, seed=None) -> Prepared:
    rows = _window(numel, block_size, num_kept(block_size, block_size, 0.01), 1, values)
    gradient, parts = torch.randn(numel).to(grad), []
    buffer: Quantized | Tensor | None = None
    if isinstance(error, QuantFormat):
        buffer = _quantized(numel, error)
        parts = [buffer.codes, buffer.lo, buffer.hi]
    elif error is not None:
        buffer = torch.randn(numel).to(error)
        parts = [buffer]
    call = partial(foreach_block_topk_, [gradient], [rows], [buffer], row=0, density=0.01, seed=seed)
    return call, [gradient, *_parts(rows), *parts]


def reflections(numel: int, rank: int) -> Prepared:
    from hf_lowmem_optim.ops.triton.low_rank import reflect_where_wrong_

    matrix, rows = torch.randn(1, numel // rank, rank), torch.zeros(1, rank, numel // rank)
    gram = torch.zeros(1, rank, rank, dtype=torch.float64)
    return partial(reflect_where_wrong_, rows, matrix, gram), [rows, matrix, gram]


def inverse_factors(numel: int, rank: int) -> Prepared:
    from hf_lowmem_optim.ops.triton.low_rank import inverse_factor

    gram = torch.eye(rank, dtype=torch.float64).repeat(numel // rank**2, 1, 1)
    return partial(inverse_factor, gram), [gram]


def moments(numel: int, rank: int) -> Prepared:
    from hf_lowmem_optim.ops.triton.ldadam import update_moments_

    columns = numel // rank
    m, v, projected = (torch.rand(1, rank, columns) for _ in range(3))
    R, right = torch.rand(1, rank, rank), torch.empty(1, 2 * rank, columns)
    return partial(update_moments_, R, m, v, projected, right, NUMBERS), [R, m, m, v, v, projected, projected, right]


def low_rank_descent(numel: int, rows: int, rank: int, dtype: torch.dtype) -> Prepared:
    from hf_lowmem_optim.ops.triton.ldadam import descend_

    columns = numel // rows
    weight = torch.randn(rows, columns).to(dtype)
    # as LDAdam has them: the basis is [short, rank], the direction [rank, long]
    left, right = torch.rand(1, min(rows, columns), rank), torch.rand(1, rank, max(rows, columns))
    factors = (left, right) if rows <= columns else (right.mT, left.mT)
    return partial(descend_, [weight], *factors, 0.9, 0.4), [weight, weight, left, right]


def correction(numel: int, operation: Callable[..., Any], dtype: torch.dtype) -> Prepared:
    weight, corrections, value = torch.randn(numel).to(dtype), torch.zeros(numel, dtype=torch.int8), torch.randn(numel)
    values = () if operation is join_weights else ([value],)
    return partial(operation, [weight], [corrections], *values), [weight, corrections, value]


def residual(
    numel: int, rows: int, rank: int, error: str, grad: torch.dtype, products: str
) -> tuple[Any, dict[str, Tensor], Tensor]:
    """a = g + ξ of a batch of one, state and gradient."""
    from hf_lowmem_optim.ops.triton.residual import Residual

    shape, state = (rows, numel // rows), {}
    if error in FORMATS:
        buffer = _quantized(numel, FORMATS[error])
        state = {"error_codes": buffer.codes[None], "error_lo": buffer.lo[None], "error_hi": buffer.hi[None]}
    elif error != "none":
        state = {"error": torch.randn(1, *shape).to({"bf16": BF16, "fp32": FP32}[error])}
    if products == "tf32x3" and torch.version.hip:  # as LDAdam does
        products = "ieee"
    gradient = torch.randn(shape).to(grad)
    return Residual([gradient], state, error, products), state, gradient


def residual_product(
    numel: int, rows: int, rank: int, error: str, grad: torch.dtype, products: str, over_rows: bool
) -> Prepared:
    a, state, gradient = residual(numel, rows, rank, error, grad, products)
    summed, other = (rows, numel // rows) if over_rows else (numel // rows, rows)
    factor, out = torch.rand(1, rank, summed).mT, torch.rand(1, rank, other).mT
    factor = factor.bfloat16() if products == "bf16" else factor
    call = partial(a.multiply, factor, out, over_rows=over_rows, weight=0.1, onto=out, onto_weight=0.5)
    return call, [gradient, *state.values(), factor, out, out]


def low_rank_step(
    numel: int, rows: int, rank: int, error: str, grad: torch.dtype, products: str, compensated: bool = False
) -> Prepared:
    from hf_lowmem_optim.ops.triton.residual_update import Descent, update_

    a, state, gradient = residual(numel, rows, rank, error, grad, products)
    weight, (p, q) = torch.randn(rows, numel // rows).to(grad), sorted((rows, numel // rows))
    kind = BF16 if products == "bf16" else FP32
    old, new = torch.rand(1, p, rank).to(kind), torch.rand(1, rank, p).to(kind).mT
    factors, direction = torch.rand(1, 2 * rank, q).to(kind), torch.rand(1, rank, q).to(kind)
    pairs = [(old, factors[:, :rank]), (new, factors[:, rank:]), (new, direction)]
    *change, descent = pairs if rows == p else [(right.mT, left.mT) for left, right in pairs]
    own = _correction(weight, compensated)
    call = partial(update_, a, change, Descent([weight], descent, 0.9, 0.4, own))
    written = [] if error == "none" else [gradient, *state.values(), *state.values(), old, factors]
    return call, [*[weight, *(own or ())] * 2, *written, new, direction]


def low_rank_residual(numel: int, rows: int, rank: int, error: str, grad: torch.dtype, products: str) -> Prepared:
    from hf_lowmem_optim.ops.triton.residual_update import update_

    a, state, gradient = residual(numel, rows, rank, error, grad, products)
    left, right = torch.rand(1, rank, rows).mT, torch.rand(1, rank, numel // rows)
    return partial(update_, a, [(left, right)], None), [gradient, *state.values(), *state.values(), left, right]


def low_rank_finish(
    numel: int, rows: int, rank: int, error: str, grad: torch.dtype, products: str, compensated: bool = False
) -> Prepared:
    from hf_lowmem_optim.ops.triton.finish import Moments, finish_

    a, state, gradient = residual(numel, rows, rank, error, grad, products)
    weight, (p, q) = torch.randn(rows, numel // rows).to(grad), sorted((rows, numel // rows))
    U, old = torch.rand(1, p, rank), torch.rand(1, p, rank)
    moments = Moments(U, old, torch.rand(1, rank, rank), torch.rand(1, rank, q), torch.rand(1, rank, q))
    own = _correction(weight, compensated)
    call = partial(finish_, a, moments, [weight], NUMBERS, 1e-3, corrections=own)
    twice = [weight, *(own or ()), *state.values(), moments.m, moments.v]
    return call, [gradient, *twice, *twice, U, old, moments.R]


def low_rank_range(numel: int, rows: int, rank: int, error: str, grad: torch.dtype, products: str) -> Prepared:
    from hf_lowmem_optim.ops.triton.sketch import orthonormal_range_

    a, state, gradient = residual(numel, rows, rank, error, grad, products)
    V, U = torch.randn(1, rank, numel // rows), torch.empty(1, rank, rows).mT
    return partial(orthonormal_range_, a, V, U), [gradient, *state.values(), V, U]


def low_rank_basis(numel: int, rows: int, rank: int, error: str, grad: torch.dtype, products: str) -> Prepared:
    from hf_lowmem_optim.ops.triton.sketch import move_basis_

    a, state, gradient = residual(numel, rows, rank, error, grad, products)
    p, q = sorted((rows, numel // rows))
    basis, m = torch.linalg.qr(torch.randn(1, p, rank))[0].contiguous(), torch.randn(1, rank, q)
    return partial(move_basis_, a, basis, m, NUMBERS), [gradient, *state.values(), basis, basis, m]


FORMATS = {"4bit": QuantFormat(), "8bit": QuantFormat(bits=8)}
FOUR, EIGHT, FOUR_FP32 = QuantFormat(), QuantFormat(bits=8), QuantFormat(stat_dtype=FP32)


def launch(name: str, widest_load: int, prepare: Callable[..., Prepared], *given: Any, numel=4 * 4096, **options: Any):
    return Launch(name, numel, partial(prepare, numel, *given, **options), widest_load)


def on_matrix(
    name: str, prepare: Callable[..., Prepared], rows: int, columns: int, rank: int, error: str, grad: torch.dtype,
    products: str, widest_load: int, *rest: Any, **options: Any,
) -> Launch:  # fmt: skip
    """Return a launch for a matrix, named after its settings."""
    kind = ("compensated " if options.get("compensated") else "") + str(grad).removeprefix("torch.")
    title = f"{name} of {rows} × {columns}, rank {rank}, {error} error, {kind}, {products}"
    given = rows, rank, error, grad, products, *rest
    return launch(title, widest_load, prepare, *given, numel=rows * columns, **options)


def stages(rank: int, products: str) -> list[Launch]:
    """Return what LDAdam launches for a matrix besides moments: a few long stripes, since the interpreter is slow."""
    how, error = (rank, "4bit", BF16, products), f"rank {rank}, 4bit error"
    return [
        launch(f"aᵀ·factor of 512 × 128, {error}", 16, residual_product, 512, *how, True, numel=512 * 128),
        launch(f"a·factor of 128 × 768, {error}", 16, residual_product, 128, *how, False, numel=128 * 768),
        launch(f"error and weights of 128 × 256, {error}", 16, low_rank_step, 128, *how, numel=128 * 256),
    ]


#: The first of a kernel is compiled for every target also where its variants take turns.
LAUNCHES: list[Launch] = [
    launch("block_topk 4-bit error and values, bf16 gradient", 16, topk, error=FOUR, grad=BF16, values="4bit"),
    launch("block_topk 4-bit error", 16, topk, error=FOUR),
    launch("block_topk 4-bit error, bf16 gradient", 16, topk, error=FOUR, grad=BF16),
    launch("block_topk 4-bit error, fp32 statistics and values", 16, topk, error=FOUR_FP32, values="fp32"),
    launch("block_topk 4-bit error, stochastic", 16, topk, error=FOUR, seed=1),
    launch("block_topk 8-bit error", 16, topk, error=EIGHT),
    launch("block_topk 8-bit error, bf16 gradient", 16, topk, error=EIGHT, grad=BF16),
    launch("block_topk dense bf16 error, fp16 gradient", 8, topk, error=BF16, grad=FP16),  # AMD: 4 entries a lane
    launch("block_topk no error", 16, topk),
    launch("block_topk 8-bit error and values", 16, topk, error=EIGHT, values="8bit"),
    launch("block_topk 4-bit error, block of 8192", 16, topk, error=FOUR, block_size=8192, numel=4 * 8192),
    launch("block_topk 4-bit error, block of 512", 16, topk, error=FOUR, block_size=512, numel=4 * 512),
    launch("window_update 4-bit values, weight decay, bf16", 16, update, values="4bit", weight_decay=0.1, param=BF16),
    launch("window_update defaults", 0, update),
    launch("window_update weight decay", 16, update, weight_decay=0.1),
    launch("window_update weight decay, bf16 parameter", 16, update, weight_decay=0.1, param=BF16),
    launch("window_update fp16 parameter", 0, update, param=FP16),
    launch("window_update 15 rows of 3%", 16, update, window=15, kept=123, weight_decay=0.1),
    launch("window_update 16 rows of 6%", 0, update, window=16, kept=246),
    launch("window_update fp32 values, weight decay", 16, update, values="fp32", weight_decay=0.1),
    launch("window_update 32 rows (looped)", 0, update, window=32),
    launch("window_update 32 rows (looped), weight decay", 16, update, window=32, weight_decay=0.1),
    launch(
        "window_update block of 32768 (looped), bf16 parameter",
        0,
        update,
        block_size=32768,
        kept=328,
        param=BF16,
        numel=4 * 32768,
    ),
    launch("window_update 8-bit values", 0, update, values="8bit"),
    launch("window_update 32 rows (looped) of 4-bit values", 0, update, values="4bit", window=32),
    launch(
        "window_update 4-bit values, weight decay, compensated bf16",
        16,
        update,
        weight_decay=0.1,
        param=BF16,
        values="4bit",
        compensated=True,
    ),
    launch("window_update compensated fp16", 0, update, param=FP16, compensated=True),
    launch(
        "window_update 32 rows (looped), weight decay, compensated bf16",
        16,
        update,
        window=32,
        weight_decay=0.1,
        param=BF16,
        compensated=True,
    ),
    launch("window_combine 32 rows of 4-bit values", 0, combine, values="4bit"),
    launch("window_combine 32 rows of 8-bit values", 0, combine, values="8bit"),
    launch("window_combine 32 rows", 0, combine),
    launch("window_gram_row 32 rows of 4-bit values", 0, gram_row, values="4bit"),
    launch("window_gram_row 32 rows of 8-bit values", 0, gram_row, values="8bit"),
    launch("window_gram_row 32 rows", 0, gram_row),
    launch("window_descend 32 rows of 8-bit values", 0, descend, values="8bit"),
    launch("window_descend 32 rows of 4-bit values", 0, descend, values="4bit"),
    launch("window_descend 32 rows", 0, descend),
    launch("window_descend, weight decay 32 rows", 0, descend, weight_decay=0.1),
    launch("window_descend, weight decay 32 rows, compensated", 0, descend, weight_decay=0.1, compensated=True),
    launch("quantize 4-bit", 16, quantization, "quantize", FOUR, FP32),
    launch("quantize 4-bit bf16, stochastic", 16, quantization, "quantize", FOUR, BF16, seed=1),
    launch("quantize 8-bit, fp32 statistics", 16, quantization, "quantize", QuantFormat(8, stat_dtype=FP32), FP32),
    launch("dequantize 4-bit to fp32", 2, quantization, "dequantize", FOUR, FP32),  # loads codes, half a byte an entry
    launch("dequantize_add 4-bit to bf16", 16, quantization, "dequantize_add", FOUR, BF16),
    launch("dequantize_add 8-bit to fp32", 16, quantization, "dequantize_add", EIGHT, FP32),
    launch("join bf16 weights with corrections", 16, correction, join_weights, BF16),
    launch("join fp16 weights with corrections", 16, correction, join_weights, FP16),
    launch("split into bf16 weights and corrections", 16, correction, split_weights_, BF16),
    launch("split into fp16 weights and corrections", 16, correction, split_weights_, FP16),
    launch("inverse factor, rank 16", 8, inverse_factors, 16, numel=4 * 16**2),
    launch("inverse factor, rank 50", 8, inverse_factors, 50, numel=50**2),
    launch("inverse factor, rank 64", 8, inverse_factors, 64, numel=64**2),
    launch("inverse factor, rank 320", 8, inverse_factors, 320, numel=320**2),
    launch("householder 1024 × 128", 16, reflections, 128, numel=1024 * 128),
    launch("householder 40000 × 16", 16, reflections, 16, numel=40000 * 16),
    launch("householder 1024 × 512", 16, reflections, 512, numel=1024 * 512),
    launch("moments, rank 16", 4, moments, 16, numel=16 * 512),
    launch("moments, rank 20", 4, moments, 20, numel=20 * 500),
    launch("moments, rank 128", 4, moments, 128, numel=128 * 128),
    launch("moments, rank 256", 4, moments, 256, numel=256 * 512),
    launch("moments, rank 512", 4, moments, 512, numel=512 * 512),
    launch("descend 256 × 512, rank 16, bf16", 16, low_rank_descent, 256, 16, BF16, numel=256 * 512),
    launch("descend 512 × 256, rank 32, fp16", 16, low_rank_descent, 512, 32, FP16, numel=512 * 256),
    launch("descend 256 × 512, rank 16, fp32", 16, low_rank_descent, 256, 16, FP32, numel=256 * 512),
    launch("descend 256 × 512, rank 128, bf16", 16, low_rank_descent, 256, 128, BF16, numel=256 * 512),
    launch("descend 500 × 1000, rank 20, bf16", 4, low_rank_descent, 500, 20, BF16, numel=500 * 1000),
    launch("descend 500 × 1000, rank 50, bf16", 4, low_rank_descent, 500, 50, BF16, numel=500 * 1000),
    *stages(16, "tf32"),
    *stages(128, "bf16"),
    *(
        on_matrix(name, prepare, rows, columns, rank, error, grad, products, widest, *rest)
        for rows, columns, rank, error, grad, products, widest in (
            (768, 512, 16, "4bit", BF16, "tf32", 16),
            (768, 512, 128, "4bit", BF16, "bf16", 16),
            (512, 768, 64, "8bit", FP16, "tf32", 16),
            (768, 512, 128, "fp32", FP32, "tf32x3", 16),
            (512, 768, 16, "bf16", BF16, "tf32x3", 16),
            (768, 512, 16, "none", BF16, "tf32x3", 16),
            (500, 1000, 20, "fp32", FP32, "tf32x3", 4),
            (1000, 500, 100, "bf16", BF16, "tf32x3", 4),
            # blocks of the error go on in the next row
            (500, 147, 16, "4bit", BF16, "tf32", 2),
            (500, 1000, 128, "8bit", FP32, "tf32", 2),
        )
        for name, prepare, *rest in (
            ("aᵀ·factor", residual_product, True),
            ("a·factor", residual_product, False),
            ("error and weights", low_rank_step),
        )
    ),
    launch(
        "error of 128 × 256, rank 4, 8bit error", 16, low_rank_residual, 128, 4, "8bit", BF16, "tf32", numel=1 << 15
    ),
    launch(
        "a·factor of 128 × 768, rank 4, 8bit error",
        16,
        residual_product,
        128,
        4,
        "8bit",
        BF16,
        "tf32",
        False,
        numel=128 * 768,
    ),
    # with enough columns for the tile of large matrices
    launch(
        "aᵀ·factor of 64 × 32768, rank 16, 4bit error",
        16,
        residual_product,
        64,
        16,
        "4bit",
        BF16,
        "tf32",
        True,
        numel=64 * 32768,
    ),
    launch(
        "error and weights of 512 × 768, rank 128, no error",
        16,
        low_rank_step,
        512,
        128,
        "none",
        BF16,
        "tf32x3",
        numel=512 * 768,
    ),
    *(
        on_matrix(*each, compensated=True)
        for each in (
            ("finish", low_rank_finish, 128, 256, 16, "4bit", BF16, "tf32", 16),
            ("finish", low_rank_finish, 512, 128, 32, "8bit", FP16, "tf32", 16),
            ("finish", low_rank_finish, 128, 512, 32, "4bit", BF16, "ieee", 16),
            ("finish", low_rank_finish, 512, 128, 32, "bf16", BF16, "tf32x3", 16),
            ("error and weights", low_rank_step, 128, 256, 16, "4bit", BF16, "tf32", 16),
            ("error and weights", low_rank_step, 768, 512, 128, "4bit", BF16, "bf16", 16),
            ("error and weights", low_rank_step, 512, 768, 64, "8bit", FP16, "tf32", 16),
            ("error and weights", low_rank_step, 512, 768, 16, "bf16", BF16, "tf32x3", 16),
            ("error and weights", low_rank_step, 500, 147, 16, "4bit", BF16, "tf32", 1),
        )
    ),
    *(
        on_matrix(*each)
        for each in (
            ("basis", low_rank_basis, 128, 256, 16, "4bit", BF16, "tf32", 16),
            ("basis", low_rank_basis, 512, 128, 16, "4bit", BF16, "tf32", 16),
            ("basis", low_rank_basis, 128, 512, 4, "fp32", FP32, "tf32x3", 16),
            ("basis", low_rank_basis, 512, 128, 16, "8bit", FP16, "ieee", 16),
            ("basis", low_rank_basis, 500, 1000, 10, "bf16", BF16, "tf32x3", 4),
            ("range", low_rank_range, 128, 256, 4, "8bit", BF16, "tf32", 16),
            ("range", low_rank_range, 512, 128, 16, "bf16", BF16, "tf32x3", 16),
            ("finish", low_rank_finish, 128, 256, 16, "4bit", BF16, "tf32", 16),
            ("finish", low_rank_finish, 512, 128, 16, "4bit", BF16, "tf32", 16),
            ("finish", low_rank_finish, 512, 128, 32, "8bit", FP16, "tf32", 16),
            ("finish", low_rank_finish, 128, 512, 32, "8bit", FP16, "bf16", 16),
            ("finish", low_rank_finish, 128, 512, 32, "4bit", BF16, "ieee", 16),
            ("finish", low_rank_finish, 512, 128, 32, "fp32", FP32, "tf32x3", 16),
            ("finish", low_rank_finish, 128, 512, 16, "bf16", BF16, "tf32x3", 16),
            ("finish", low_rank_finish, 500, 96, 20, "none", BF16, "tf32x3", 8),  # 4 entries a thread
        )
    ),
]

#: What a step of the methods launches most, per parameter: what ``kernel_report.py --record`` records and a test holds
#: them to. MicroAdam's; LDAdam's at rank 16 and 128; the sparse preconditioners'; LowRankMFAC's; the first steps'.
MAIN = (
    "block_topk 4-bit error, bf16 gradient",
    "window_update weight decay, bf16 parameter",
    "aᵀ·factor of 512 × 128, rank 16, 4bit error",
    "a·factor of 128 × 768, rank 16, 4bit error",
    "moments, rank 16",
    "error and weights of 128 × 256, rank 16, 4bit error",
    "basis of 128 × 256, rank 16, 4bit error, bfloat16, tf32",
    "finish of 128 × 256, rank 16, 4bit error, bfloat16, tf32",
    "aᵀ·factor of 512 × 128, rank 128, 4bit error",
    "a·factor of 128 × 768, rank 128, 4bit error",
    "moments, rank 128",
    "error and weights of 128 × 256, rank 128, 4bit error",
    "block_topk 8-bit error, bf16 gradient",
    "window_gram_row 32 rows",
    "window_descend 32 rows",
    "a·factor of 128 × 768, rank 4, 8bit error",
    "range of 128 × 256, rank 4, 8bit error, bfloat16, tf32",
    "error of 128 × 256, rank 4, 8bit error",
    "window_update 4-bit values, weight decay, bf16",
    "window_update 4-bit values, weight decay, compensated bf16",
    "window_descend, weight decay 32 rows",
    "window_descend, weight decay 32 rows, compensated",
    "finish of 128 × 256, rank 16, 4bit error, compensated bfloat16, tf32",
    "error and weights of 128 × 256, rank 16, 4bit error, compensated bfloat16, tf32",
    "quantize 4-bit",
    "dequantize 4-bit to fp32",
)

#: Further variants that are compiled for every target.
EVERYWHERE = (
    "block_topk 8-bit error and values",
    "window_update 8-bit values",
)
