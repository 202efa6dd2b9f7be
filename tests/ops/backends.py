"""The backends that the tests of operations run on, operations on one tensor, and what it means that two agree."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_lowmem_optim.ops import sparse_window as many
from hf_lowmem_optim.ops.block_quant import Quantized
from hf_lowmem_optim.ops.block_topk import foreach_block_topk_
from hf_lowmem_optim.ops.window import SparseWindow, kept_per_block
from hf_lowmem_optim.spec import QuantFormat, quantized_specs

#: Triton serves CPU tensors: in its interpreter, or compiled, on an emulated GPU.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
EMULATED = "EMULATE" in os.environ
DEVICE = "cpu" if INTERPRETED or not torch.cuda.is_available() else "cuda"
ON_GPU = [pytest.mark.gpu, pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")]
FAST = [pytest.param("triton", marks=[] if INTERPRETED else ON_GPU), pytest.param("cpu")]
BACKENDS = [pytest.param("reference"), *FAST]
BF16, FP32, FP16 = torch.bfloat16, torch.float32, torch.float16

#: Operations that wait for a GPU: they read from it, or their results' sizes are numbers on it.
WAITING = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "_unique2", "_linalg_")

#: The fixture ``use``.
Use = Callable[[str], str]

#: The interpreter computes in numpy, which warns of what some cases are made for.
QUIET = pytest.mark.filterwarnings("ignore:(overflow|invalid value|divide by zero) encountered:RuntimeWarning")


def device_of(backend: str) -> str:
    """Where a backend's tensors are in these tests."""
    return DEVICE if backend == "triton" else "cpu"


def empty_quantized(numel: int, fmt: QuantFormat, device: str = "cpu") -> Quantized:
    """A buffer of zeros, as an optimizer allocates it."""
    state = {name: spec.allocate(device) for name, spec in quantized_specs(numel, fmt).items()}
    return Quantized(*state.values(), numel, fmt)


def new_error(numel: int, kind: QuantFormat | torch.dtype | None, device: str = "cpu") -> Quantized | Tensor | None:
    """An error of zero, as it is kept."""
    if isinstance(kind, QuantFormat):
        return empty_quantized(numel, kind, device)
    return None if kind is None else torch.zeros(numel, dtype=kind, device=device)


def parts(error: Quantized | Tensor | None) -> list[Tensor]:
    """The tensors that it is kept in."""
    if isinstance(error, Quantized):
        return [error.codes, error.lo, error.hi]
    return [] if error is None else [error]


def block_topk_(
    indices: Tensor,
    values: Tensor,
    grad: Tensor,
    error: Quantized | Tensor | None,
    block_size: int,
    density: float,
    **how: Any,
) -> None:
    """Write one row, given as such."""
    kept = kept_per_block(block_size, density)
    window = SparseWindow(indices.unsqueeze(0), values.unsqueeze(0), grad.numel(), block_size, kept)
    foreach_block_topk_([grad], [window], [error], row=0, density=density, **how)


def window_update_(param: Tensor, window: SparseWindow, weights: Tensor, **how: Any) -> None:
    many.foreach_window_update_([param], [window], weights, **how)


def window_descend_(param: Tensor, window: SparseWindow, weights: Tensor, **how: Any) -> None:
    many.foreach_window_descend_([param], [window], weights, **how)


def window_gram_row(window: SparseWindow, row: int) -> Tensor:
    return many.foreach_window_gram_rows([window], row)[0]


def normal(*shape: int, seed: int = 0) -> Tensor:
    """Normal numbers where Triton's tensors are."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def python(*arguments: str, **environment: str | None) -> subprocess.CompletedProcess[str]:
    """Run another interpreter in the repository; a variable of None is taken away."""
    given = {name: value for name, value in (os.environ | environment).items() if value is not None}
    command, root = [sys.executable, *arguments], Path(__file__).parents[2]
    return subprocess.run(command, cwd=root, env=given, capture_output=True, text=True, timeout=600)


def same(a: Tensor, b: Tensor) -> bool:
    """Bit for bit, all NaNs being one."""
    a, b = a.cpu(), b.cpu()
    if not a.is_floating_point():
        return torch.equal(a, b)
    if a.dtype != b.dtype or not torch.equal(a.isnan(), b.isnan()):
        return False
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.itemsize]
    return torch.equal(*(t.view(bits).masked_fill(a.isnan(), 0) for t in (a, b)))
