"""Every Triton kernel of the package as the package launches it, at realistic sizes.

Two users, in processes of their own: ``ahead_of_time`` records the launches and compiles them for GPUs that are not
there; ``benchmarks/kernel_report.py`` runs them in the interpreter and counts the bytes that they load and store.
Nothing is written down twice: signatures, constants and launch parameters are those of the package's own launchers.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from hf_lowmem_optim.ops import dispatch
from hf_lowmem_optim.ops.block_quant import Quantized, dequantize_, dequantize_add_, quantize_
from hf_lowmem_optim.ops.block_topk import num_kept
from hf_lowmem_optim.ops.low_rank import Coefficients, orthonormalize
from hf_lowmem_optim.ops.sparse_window import (
    SparseWindow,
    window_combine_,
)
from hf_lowmem_optim.spec import QuantFormat
from tests.ops.singles import block_topk_, window_descend_, window_gram_row, window_update_

__all__ = ["LAUNCHES", "Launch", "force_triton"]

#: Of a step of LDAdam.
NUMBERS = Coefficients(0.8, 0.3, 0.9, 0.99, 0.7, 1e-4, 0.9, 0.4)

NUM_BLOCKS = 4
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16


@dataclass(frozen=True)
class Launch:
    """One call that launches one kernel.

    Attributes:
        name: What is launched, with its options.
        numel: Entries of the tensor that the call works on.
        prepare: Makes the arguments; returns the call, and the tensors that the algorithm has to read or write (scratch
            memory is not among them).
        widest_load: Bytes that one thread must be able to load at once from global memory; less than 16 only where the
            kernel gathers single entries or packed codes.
    """

    name: str
    numel: int
    prepare: Callable[[], tuple[Callable[[], object], list[Tensor]]]
    widest_load: int


def force_triton() -> None:
    """Have every operation of this process served by its Triton kernel, also on CPU tensors."""
    os.environ[dispatch.ENVIRONMENT_VARIABLE] = "triton"
    dispatch._triton_interprets = lambda: True


def _window(numel: int, block_size: int, kept: int, window: int, values: torch.dtype) -> SparseWindow:
    """Random indices, uniform in each block, as from gradients without structure."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(window, numel // block_size, block_size, generator=generator)
    indices = scores.topk(kept).indices.sort().values.view(window, -1)
    return SparseWindow(
        indices.to(torch.int16), torch.randn(indices.shape, generator=generator).to(values), numel, block_size, kept
    )


def _window_update(
    name: str,
    *,
    block_size: int = 4096,
    kept: int = 41,
    window: int = 10,
    values: torch.dtype = BF16,
    param: torch.dtype = FP32,
    weight_decay: float = 0.0,
) -> Launch:
    numel = NUM_BLOCKS * block_size

    def prepare() -> tuple[Callable[[], object], list[Tensor]]:
        rows, weights = _window(numel, block_size, kept, window, values), torch.rand(2, window)
        weight = torch.randn(numel).to(param)
        return (
            lambda: window_update_(weight, rows, weights, lr=1e-3, eps=1e-8, weight_decay=weight_decay),
            [weight, rows.indices, rows.values, weights],
        )

    return Launch(f"window_update {name}", numel, prepare, 16 if weight_decay else 0)


def _window_product(name: str) -> Launch:
    numel = NUM_BLOCKS * 4096

    def prepare() -> tuple[Callable[[], object], list[Tensor]]:
        rows, weights = _window(numel, 4096, 41, 32, BF16), torch.rand(32)
        dense = torch.randn(numel)
        if name == "window_gram_row":
            return lambda: window_gram_row(rows, 5), [rows.indices, rows.values]
        if name.startswith("window_descend"):
            weight = dense.bfloat16()
            decay = 0.1 if name.endswith("decay") else 0.0
            call = partial(window_descend_, weight, rows, weights, lr=0.1, weight_decay=decay)
            return call, [weight, weight, rows.indices, rows.values, weights]
        return lambda: window_combine_(dense, rows, weights), [dense, rows.indices, rows.values, weights]

    return Launch(f"{name} 32 rows", numel, prepare, 0)


def _quantized(numel: int, fmt: QuantFormat) -> Quantized:
    blocks = fmt.num_blocks(numel)
    lo, hi = -torch.rand(blocks), torch.rand(blocks)
    codes = torch.randint(0, 256, (fmt.num_code_bytes(numel),), dtype=torch.uint8)
    return Quantized(codes, lo.to(fmt.stat_dtype), hi.to(fmt.stat_dtype), numel, fmt)


def _quantization(
    name: str, operation: str, fmt: QuantFormat, dense_dtype: torch.dtype, widest_load: int, seed: int | None = None
) -> Launch:
    numel = 16384

    def prepare() -> tuple[Callable[[], object], list[Tensor]]:
        buffer, dense = _quantized(numel, fmt), torch.randn(numel).to(dense_dtype)
        call = {
            "quantize": lambda: quantize_(buffer, dense, seed=seed),
            "dequantize": lambda: dequantize_(dense, buffer),
            "dequantize_add": lambda: dequantize_add_(dense, buffer, scale=0.5),
        }[operation]
        return call, [dense, buffer.codes, buffer.lo, buffer.hi]

    return Launch(f"{operation} {name}", numel, prepare, widest_load)


def _topk(
    name: str,
    *,
    error: QuantFormat | torch.dtype | None = None,
    grad: torch.dtype = FP32,
    values: torch.dtype = BF16,
    block_size: int = 4096,
    density: float = 0.01,
    seed: int | None = None,
) -> Launch:
    numel = NUM_BLOCKS * block_size

    def prepare() -> tuple[Callable[[], object], list[Tensor]]:
        kept = num_kept(numel, block_size, density)
        indices, chosen = torch.zeros(kept, dtype=torch.int16), torch.zeros(kept, dtype=values)
        gradient = torch.randn(numel).to(grad)
        if isinstance(error, QuantFormat):
            buffer: Quantized | Tensor | None = _quantized(numel, error)
            parts = [buffer.codes, buffer.lo, buffer.hi]
        else:
            buffer = None if error is None else torch.randn(numel).to(error)
            parts = [] if buffer is None else [buffer]
        return (
            lambda: block_topk_(indices, chosen, gradient, buffer, block_size=block_size, density=density, seed=seed),
            [gradient, indices, chosen, *parts],
        )

    return Launch(f"block_topk {name}", numel, prepare, 16)


def _reflections(rows: int, rank: int) -> Launch:
    def prepare() -> tuple[Callable[[], object], list[Tensor]]:
        matrix = torch.randn(rows, rank)
        matrix[:, -1] = matrix[:, 0]  # else there would be nothing to do
        return lambda: orthonormalize(matrix), [matrix, matrix]

    return Launch(f"householder {rows} × {rank}", rows * rank, prepare, 16)


def _moments(rank: int, columns: int = 512) -> Launch:
    def prepare() -> tuple[Callable[[], object], list[Tensor]]:
        from hf_lowmem_optim.ops.triton.ldadam import update_moments_

        m, v, projected = (torch.rand(1, rank, columns) for _ in range(3))
        R, right = torch.rand(1, rank, rank), torch.empty(1, 2 * rank, columns)
        call = partial(update_moments_, R, m, v, projected, right, NUMBERS)
        return call, [R, m, m, v, v, projected, projected, right]

    return Launch(f"moments, rank {rank}", rank * columns, prepare, 4)


def _low_rank_descent(rows: int, columns: int, rank: int, dtype: torch.dtype) -> Launch:
    def prepare() -> tuple[Callable[[], object], list[Tensor]]:
        from hf_lowmem_optim.ops.triton.ldadam import descend_

        weight = torch.randn(rows, columns).to(dtype)
        # as LDAdam has them: the basis is [short, rank], the direction [rank, long]
        left, right = torch.rand(1, min(rows, columns), rank), torch.rand(1, rank, max(rows, columns))
        factors = (left, right) if rows <= columns else (right.mT, left.mT)
        return partial(descend_, [weight], *factors, 0.9, 0.4), [weight, weight, left, right]

    return Launch(
        f"descend {rows} × {columns}, rank {rank}, {dtype}", rows * columns, prepare, 16 if columns % 16 == 0 else 4
    )


FOUR, EIGHT, FOUR_FP32 = QuantFormat(), QuantFormat(bits=8), QuantFormat(stat_dtype=FP32)

LAUNCHES: list[Launch] = [
    _topk("4-bit error", error=FOUR),
    _topk("4-bit error, bf16 gradient", error=FOUR, grad=BF16),
    _topk("4-bit error, fp32 statistics and values", error=FOUR_FP32, values=FP32),
    _topk("4-bit error, stochastic", error=FOUR, seed=1),
    _topk("8-bit error", error=EIGHT),
    _topk("dense bf16 error, fp16 gradient", error=BF16, grad=FP16),
    _topk("no error", error=None),
    _topk("4-bit error, block of 8192", error=FOUR, block_size=8192),
    _topk("4-bit error, block of 512", error=FOUR, block_size=512),
    _window_update("defaults"),
    _window_update("weight decay", weight_decay=0.1),
    _window_update("weight decay, bf16 parameter", weight_decay=0.1, param=BF16),
    _window_update("fp16 parameter", param=FP16),
    _window_update("15 rows of 3%", window=15, kept=123, weight_decay=0.1),
    _window_update("32 rows (scratch)", window=32),
    _window_update("fp32 values (scratch), weight decay", values=FP32, weight_decay=0.1),
    _window_update("block of 32768 (scratch), bf16 parameter", block_size=32768, kept=328, param=BF16),
    _window_product("window_combine"),
    _window_product("window_gram_row"),
    _window_product("window_descend"),
    _window_product("window_descend, weight decay"),
    _quantization("4-bit", "quantize", FOUR, FP32, 16),
    _quantization("4-bit bf16, stochastic", "quantize", FOUR, BF16, 16, seed=1),
    _quantization("8-bit, fp32 statistics", "quantize", QuantFormat(bits=8, stat_dtype=FP32), FP32, 16),
    _quantization("4-bit to fp32", "dequantize", FOUR, FP32, 2),  # loads codes only, half a byte an entry
    _quantization("4-bit to bf16", "dequantize_add", FOUR, BF16, 16),
    _quantization("8-bit to fp32", "dequantize_add", EIGHT, FP32, 16),
    _reflections(1024, 128),
    _reflections(40000, 16),
    _moments(16),
    _moments(20, 500),
    _moments(128),
    _moments(256),
    _low_rank_descent(256, 512, 16, BF16),
    _low_rank_descent(512, 256, 32, FP16),
    _low_rank_descent(256, 512, 16, FP32),
    _low_rank_descent(256, 512, 128, BF16),
    _low_rank_descent(500, 1000, 20, BF16),
    _low_rank_descent(500, 1000, 50, BF16),
]
