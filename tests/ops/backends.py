"""The backends that the tests of operations run on, and what it means that two of them agree."""

from __future__ import annotations

import os

import pytest
import torch
from torch import Tensor

from hf_lowmem_optim.ops.block_quant import Quantized
from hf_lowmem_optim.spec import QuantFormat, quantized_specs

INTERPRETED = os.environ["TRITON_INTERPRET"] == "1"
DEVICE = "cpu" if INTERPRETED or not torch.cuda.is_available() else "cuda"
ON_GPU = [pytest.mark.gpu, pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")]
FAST = [pytest.param("triton", marks=[] if INTERPRETED else ON_GPU), pytest.param("cpu")]
BACKENDS = [pytest.param("reference"), *FAST]
BF16, FP32, FP16 = torch.bfloat16, torch.float32, torch.float16

#: The interpreter computes in numpy, which warns of what some cases are made for.
QUIET = pytest.mark.filterwarnings("ignore:(overflow|invalid value|divide by zero) encountered:RuntimeWarning")


def device_of(backend: str) -> str:
    """Where a backend's tensors are in these tests."""
    return DEVICE if backend == "triton" else "cpu"


def empty_quantized(numel: int, fmt: QuantFormat, device: str = "cpu") -> Quantized:
    """A buffer of zeros, as an optimizer allocates it."""
    state = {name: spec.allocate(device) for name, spec in quantized_specs(numel, fmt).items()}
    return Quantized(*state.values(), numel, fmt)


def same(a: Tensor, b: Tensor) -> bool:
    """Bit for bit, all NaNs being one."""
    a, b = a.cpu(), b.cpu()
    if not a.is_floating_point():
        return torch.equal(a, b)
    if a.dtype != b.dtype or not torch.equal(a.isnan(), b.isnan()):
        return False
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.itemsize]
    return torch.equal(*(t.view(bits).masked_fill(a.isnan(), 0) for t in (a, b)))
