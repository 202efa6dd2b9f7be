"""What a step of a whole model launches: as much for many layers as for few."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from hf_lowmem_optim import OPTIMIZERS
from tests.ops.backends import INTERPRETED, QUIET, Use

pytestmark = QUIET
triton = pytest.importorskip("triton")
if not INTERPRETED:
    pytest.skip("counts in the interpreter", allow_module_level=True)

from triton.runtime.interpreter import GridExecutor  # noqa: E402

SPARSE: dict[str, Any] = {"window": 3, "block_size": 64, "density": 0.1}
#: Options, and the kernels of a step at most.
METHODS: dict[str, tuple[dict[str, Any], int]] = {
    "microadam": ({**SPARSE, "min_compress_size": 100}, 6),
    "sparse_mfac": (SPARSE, 10),
    "sparse_ggt": (SPARSE, 10),
}


class Operations(TorchDispatchMode):
    """Counts torch's operations that compute or copy something."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view and func.namespace != "prim":
            self.found[str(func)] += 1
        return func(*args, **(kwargs or {}))


@contextmanager
def kernels() -> Iterator[list[str]]:
    """Note the name of every kernel that is launched, instead of running it."""
    found: list[str] = []

    def call(self: Any, *args: Any, **kwargs: Any) -> None:
        found.append(self.fn.__name__)
        if found[-1] == "_sum_kernel":  # what it writes decides how the system is solved
            args[2].fill_(1.0)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GridExecutor, "__call__", call)
        yield found


def llama(layers: int, dtype: torch.dtype) -> list[nn.Parameter]:
    """The parameters of a tiny one: keys of fewer heads, norms, embedding and head."""
    layer = [(16, 16), (8, 16), (8, 16), (16, 16), (24, 16), (24, 16), (16, 24), (16,), (16,)]
    return [nn.Parameter(torch.randn(shape).to(dtype)) for shape in [(40, 16), *layer * layers, (16,), (40, 16)]]


def step(optimizer: Any, weights: Sequence[Tensor], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for weight in weights:
        weight.grad = torch.randn(weight.shape, generator=generator).to(weight.dtype)
    optimizer.step()


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_step_launches_as_much_for_many_layers_as_for_few(name: str, dtype: torch.dtype, use: Use) -> None:
    use("triton")
    options, most = METHODS[name]
    counts = []
    for layers in (2, 8, 32):
        weights = llama(layers, dtype)
        optimizer = OPTIMIZERS[name].optimizer_class(weights, **options)
        with kernels():
            step(optimizer, weights, 0)
            step(optimizer, weights, 1)
        with Operations() as operations, kernels() as launched:
            optimizer.step()
        assert 0 < len(launched) <= most
        counts.append((launched, operations.found))
    assert counts[0] == counts[1] == counts[2]
