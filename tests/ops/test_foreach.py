"""Operations on several tensors at once: to the bit what one tensor after the other gives."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_lowmem_optim.ops import sparse_window as ops
from hf_lowmem_optim.ops.block_quant import Quantized, dequantize_add_, quantize_
from hf_lowmem_optim.ops.block_topk import TopK, foreach_block_topk_, window_specs
from hf_lowmem_optim.ops.sparse_window import SparseWindow, WindowStep, windows_of
from hf_lowmem_optim.spec import QuantFormat
from tests.ops.backends import BACKENDS, BF16, DEVICE, FP16, FP32, QUIET, Use, empty_quantized, new_error, parts, same

pytestmark = QUIET

WINDOW, DENSITY = 4, 0.05
FOUR = QuantFormat(4, 16)
#: Entries, size of the blocks, dtypes of parameter and gradient, storage of values and error.
TENSORS = [
    (130, 64, FP32, FP32, "bf16", FOUR),
    (5, 64, BF16, BF16, "bf16", FOUR),
    (64, 64, FP32, BF16, "fp32", QuantFormat(8, 32, FP32)),
    (130, 128, FP16, FP16, "bf16", FOUR),
    (300, 256, BF16, FP32, "bf16", FOUR),
    (1, 64, FP32, FP32, "fp32", FOUR),
    (384, 96, BF16, FP16, "bf16", BF16),
    (1000, 96, FP32, BF16, "bf16", FP16),
    (777, 96, FP16, FP32, "fp32", FP32),
    (5, 96, BF16, BF16, "fp32", None),
    (200, 128, FP32, FP32, "4bit", FOUR),
    (300, 256, BF16, BF16, "8bit", QuantFormat(8, 32, FP32)),
    (100, 256, BF16, BF16, "4bit", BF16),
]
#: What Triton does not serve: error in blocks whose size is no power of two.
ODD = [(95, 96, FP16, BF16, "fp32", QuantFormat(8, 3, FP32)), (96, 96, FP32, FP32, "bf16", QuantFormat(4, 96, FP32))]


def random_numbers(numel: int, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Numbers of many magnitudes, few of them NaN or infinite."""
    x = torch.randn(numel, generator=generator) * 10.0 ** torch.randint(-6, 4, (numel,), generator=generator)
    place = torch.randint(0, 400, (numel,), generator=generator)
    return x.masked_fill(place == 0, torch.nan).masked_fill(place == 1, -torch.inf).to(dtype)


@dataclass
class SparseState:
    """One tensor, and what MicroAdam keeps for it."""

    param: Tensor
    grad: Tensor
    error: Quantized | Tensor | None
    rows: SparseWindow

    @staticmethod
    def make(spec: tuple[Any, ...], device: str) -> SparseState:
        numel, block_size, param_dtype, grad_dtype, value_dtype, error = spec
        param = torch.randn(numel, generator=torch.Generator().manual_seed(numel)).to(device, param_dtype)
        specs = window_specs(numel, window=WINDOW, density=DENSITY, block_size=block_size, value_dtype=value_dtype)
        state = {name: spec.allocate(device) for name, spec in specs.items()}
        (rows,) = windows_of({name: [part] for name, part in state.items()}, [numel], block_size, DENSITY)
        return SparseState(param, torch.ones_like(param, dtype=grad_dtype), new_error(numel, error, device), rows)

    def topk(self, step: int) -> TopK:
        rows, seed = self.rows, step if self.rows.numel % 2 else None
        row = rows.indices, rows.values, step % WINDOW
        return TopK(*row, self.grad, self.error, rows.block_size, DENSITY, 0.9, seed, rows.grids)

    def step(self, weights: Tensor) -> WindowStep:
        return WindowStep(self.param, self.rows, weights, lr=1e-2, weight_decay=0.1, eps=1e-8)

    def tensors(self) -> list[Tensor]:
        stored = [self.rows.indices, self.rows.values, *(self.rows.grids or ())]
        return [self.param, *(part for part in stored if part is not None), *parts(self.error)]


def make_all(device: str, specs: Sequence[tuple[Any, ...]] = TENSORS) -> list[SparseState]:
    return [SparseState.make(spec, device) for spec in specs]


def run(groups: list[list[SparseState]], steps: int, *, others: bool = False) -> list[Tensor]:
    """Steps of MicroAdam, one call for each group, and of the operations on one tensor; returns all that came out."""
    generator = torch.Generator().manual_seed(3)
    everyone = [one for group in groups for one in group]
    device, results = everyone[0].param.device, []
    for step in range(steps):
        for one in everyone:
            one.grad = random_numbers(one.rows.numel, one.grad.dtype, generator).to(device)
        for group in groups:
            foreach_block_topk_([one.topk(step) for one in group])
        # a row counts when it has been written: until then its indices do not ascend
        weights = (torch.rand(2, WINDOW, generator=generator) * (torch.arange(WINDOW) <= step)).to(device)
        for group in groups:
            ops.foreach_window_update_([one.step(weights) for one in group])
        results.append(
            torch.cat([ops.foreach_window_gram_rows([one.rows for one in g], step % WINDOW) for g in groups])
        )
        for group in groups:
            ops.foreach_window_descend_([one.step(weights[0].contiguous()) for one in group])
        for one in everyone if others else ():
            out = torch.ones(one.rows.numel, device=device)
            ops.window_combine_(out, one.rows, weights[1].contiguous())
            buffer = empty_quantized(one.rows.numel, QuantFormat(4, 8), device)
            quantize_(buffer, out, seed=step)
            dequantize_add_(out, buffer, scale=0.7)
            results += [out, buffer.codes, buffer.lo, buffer.hi]
    return [*results, *(tensor for one in everyone for tensor in one.tensors())]


@pytest.mark.parametrize("backend", BACKENDS)
def test_together_is_one_by_one(backend: str, use: Use) -> None:
    device, threads = use(backend), torch.get_num_threads()
    specs = TENSORS if backend == "triton" else [*TENSORS, *ODD]
    # the second step has an error; the last rows of the window stay unwritten
    together = run([make_all(device, specs)], 2)
    alone = run([[one] for one in make_all(device, specs)], 2)
    assert len(together) > 2 + 3 * len(specs)
    finite = torch.cat([each.view(-1).isfinite() for each in together])
    assert 0.7 < finite.double().mean() < 0.99
    assert all(map(same, together, alone))
    assert torch.get_num_threads() == threads


def test_tables_are_made_anew_when_an_address_or_a_size_changes() -> None:
    tables = pytest.importorskip("hf_lowmem_optim.ops.triton.tables", exc_type=ImportError)
    device = torch.device(DEVICE)
    table, owners = tables.block_tables([(16, 5), (32, 6)], [2, 3], device)
    assert table.tolist() == [[0, 16, 5], [2, 32, 6]] and owners.tolist() == [0, 0, 1, 1, 1]
    again = tables.block_tables([(16, 5), (32, 6)], [2, 3], device)
    assert again[0] is table and again[1] is owners
    moved = tables.block_tables([(16, 5), (48, 6)], [2, 3], device)
    assert moved[0].tolist() == [[0, 16, 5], [2, 48, 6]] and moved[1] is owners
    assert tables.block_tables([(16, 5), (32, 6)], [1, 3], device)[1].tolist() == [0, 1, 1, 1]


WEIGHTS = torch.tensor([[0.5, 0.25, 0.0, 0.0], [0.1, 0.2, 0.0, 0.0]])
OPERATIONS: dict[str, Callable[[list[SparseState]], Any]] = {
    "top-k": lambda all_: foreach_block_topk_([one.topk(0) for one in all_]),
    "update": lambda all_: ops.foreach_window_update_([one.step(WEIGHTS.to(one.param.device)) for one in all_]),
    "descend": lambda all_: ops.foreach_window_descend_([one.step(WEIGHTS[0]) for one in all_]),
    "gram rows": lambda all_: ops.foreach_window_gram_rows([one.rows for one in all_], 0),
}


@pytest.mark.parametrize("operation", OPERATIONS)
def test_tensors_of_several_devices_are_refused(operation: str) -> None:
    here, there = (SparseState.make(TENSORS[0], device) for device in ("cpu", "meta"))
    with pytest.raises(ValueError, match=r"on meta, (but another tensor is|that of another tensor) on cpu"):
        OPERATIONS[operation]([here, there])
    with pytest.raises(ValueError, match="least one") if operation == "gram rows" else nullcontext():
        OPERATIONS[operation]([])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("operation", ["top-k", "update", "descend"])
@pytest.mark.parametrize("at", [0, 3, 5])
def test_one_bad_tensor_leaves_all_as_they_are(operation: str, at: int, backend: str, use: Use) -> None:
    use(backend)
    states, untouched = make_all("cpu"), make_all("cpu")
    which = "grad" if operation == "top-k" else "param"
    setattr(states[at], which, getattr(states[at], which).double())
    with pytest.raises((TypeError, ValueError), match=r"(grad|param) must be (one of )?.*float64"):
        OPERATIONS[operation](states)
    for number, (one, other) in enumerate(zip(states, untouched, strict=True)):
        if number != at:
            assert all(map(torch.equal, one.tensors(), other.tensors()))
