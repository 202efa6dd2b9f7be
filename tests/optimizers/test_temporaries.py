"""What a step allocates besides its state, counted from the allocator's own events."""

from __future__ import annotations

import pytest
import torch
from temporaries import peak_bytes
from torch import nn

from hf_lowmem_optim.optimizers import LDAdam, LowMemoryOptimizer, MicroAdam

SHAPE = (1024, 2048)
FP32_BYTES = 4 * 1024 * 2048


def third_step(optimizer_class: type[LowMemoryOptimizer], dtype: torch.dtype, **hyper: object) -> int:
    weight = nn.Parameter(torch.zeros(SHAPE, dtype=dtype))
    optimizer = optimizer_class([weight], **hyper)  # type: ignore[arg-type]
    weight.grad = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)).to(dtype)
    for _ in range(2):
        optimizer.step()
    return peak_bytes(optimizer.step)


def test_the_count_sees_a_temporary_of_the_size_of_the_gradient() -> None:
    gradient = torch.randn(SHAPE)
    assert FP32_BYTES <= peak_bytes(lambda: (gradient * 2).sum()) < 1.1 * FP32_BYTES


@pytest.mark.parametrize("error_feedback", ["param", "fp32", "bf16", "8bit", "4bit", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ldadam_allocates_at_most_the_accumulated_gradient(error_feedback: str, dtype: torch.dtype) -> None:
    """Besides it four matrices of r × q, some of p × r and slices of constant size."""
    rank = 8
    small = 4 * (4 * rank * SHAPE[1] + 12 * rank * SHAPE[0])
    in_place = dtype == torch.float32 and error_feedback in ("param", "fp32", "none")
    peak = third_step(LDAdam, dtype, rank=rank, error_feedback=error_feedback)
    slices = 2**20
    assert peak <= small + (0 if in_place else FP32_BYTES) + slices < 2 * FP32_BYTES


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_microadam_allocates_less_than_the_gradient(
    backend: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    if backend == "cpu":
        pytest.importorskip("numba")
    monkeypatch.setenv("HF_LOWMEM_OPTIM_BACKEND", backend)
    assert third_step(MicroAdam, dtype) <= SHAPE[0] * SHAPE[1] * dtype.itemsize
