"""Operations on several tensors at once: to the bit what one tensor after the other gives."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_lowmem_optim.ops import sparse_window as ops
from hf_lowmem_optim.ops.block_quant import Quantized, dequantize_add_, quantize_
from hf_lowmem_optim.ops.block_topk import foreach_block_topk_, window_specs
from hf_lowmem_optim.ops.window import SparseWindow, windows_of
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
    (192, 96, BF16, FP16, "bf16", BF16),
    (200, 96, FP32, BF16, "bf16", FP16),
    (201, 96, FP16, FP32, "fp32", FP32),
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

    def tensors(self) -> list[Tensor]:
        stored = [self.rows.indices, self.rows.values, *(self.rows.grids or ())]
        return [self.param, *(part for part in stored if part is not None), *parts(self.error)]


def make_all(device: str, spec: tuple[Any, ...] = TENSORS[0]) -> list[SparseState]:
    """Tensors that are treated alike, of several sizes."""
    numel, block_size, *_ = spec
    return [SparseState.make((size, *spec[1:]), device) for size in (numel, 2 * numel + 3, 2 * block_size)]


def topk_(group: list[SparseState], step: int, memo: dict[str, Any] | None = None) -> None:
    errors, seed = [one.error for one in group], step if group[0].rows.block_size > 64 else None
    how = {"row": step % WINDOW, "density": DENSITY, "error_scale": 0.9, "seed": seed, "memo": memo}
    foreach_block_topk_([one.grad for one in group], [one.rows for one in group], errors, **how)


def update_(group: list[SparseState], weights: Tensor, memo: dict[str, Any] | None = None) -> None:
    params, windows = [one.param for one in group], [one.rows for one in group]
    ops.foreach_window_update_(params, windows, weights, lr=1e-2, weight_decay=0.1, eps=1e-8, memo=memo)


def descend_(group: list[SparseState], weights: Tensor, memo: dict[str, Any] | None = None) -> None:
    params, windows = [one.param for one in group], [one.rows for one in group]
    ops.foreach_window_descend_(params, windows, weights, lr=1e-2, weight_decay=0.1, memo=memo)


def run(groups: list[list[SparseState]], steps: int) -> list[Tensor]:
    """Steps of MicroAdam, one call for each group, and of the operations on one tensor; returns all that came out."""
    generator = torch.Generator().manual_seed(3)
    everyone = [one for group in groups for one in group]
    device, results = everyone[0].param.device, []
    memos: list[dict[str, Any]] = [{} for _ in groups]
    for step in range(steps):
        for one in everyone:
            one.grad = random_numbers(one.rows.numel, one.grad.dtype, generator).to(device)
        # a row counts when it has been written: until then its indices do not ascend
        weights = (torch.rand(2, WINDOW, generator=generator) * (torch.arange(WINDOW) <= step)).to(device)
        # for all, or of each its own
        own = weights[0].expand(len(everyone), -1) * (1 + step * torch.arange(len(everyone), device=device)[:, None])
        products = []
        for group, memo, rows in zip(groups, memos, own.split([len(group) for group in groups]), strict=True):
            topk_(group, step, memo)
            update_(group, weights, memo)
            products.append(ops.foreach_window_gram_rows([one.rows for one in group], step % WINDOW, memo=memo))
            descend_(group, rows.contiguous() if step else weights[0].contiguous(), memo)
        results.append(torch.cat(products))
        for one in everyone:
            out = torch.ones(one.rows.numel, device=device)
            ops.window_combine_(out, one.rows, weights[1].contiguous())
            buffer = empty_quantized(one.rows.numel, QuantFormat(4, 8), device)
            quantize_(buffer, out, seed=step)
            dequantize_add_(out, buffer, scale=0.7)
            results += [out, buffer.codes, buffer.lo, buffer.hi]
    return [*results, *(tensor for one in everyone for tensor in one.tensors())]


@pytest.mark.parametrize("backend", BACKENDS)
def test_together_is_one_by_one(backend: str, use: Use) -> None:
    device, threads, finite = use(backend), torch.get_num_threads(), []
    for spec in TENSORS if backend == "triton" else [*TENSORS, *ODD]:
        # the second step has an error; the last rows of the window stay unwritten
        together = run([make_all(device, spec)], 2)
        alone = run([[one] for one in make_all(device, spec)], 2)
        assert all(map(same, together, alone))
        finite.append(torch.cat([each.view(-1).isfinite() for each in together]).double().mean())
    assert 0.7 < torch.stack(finite).mean() < 0.99
    assert torch.get_num_threads() == threads


def test_tables_are_made_anew_when_an_address_changes() -> None:
    tables = pytest.importorskip("hf_lowmem_optim.ops.triton.tables", exc_type=ImportError)
    memory, memo = torch.zeros(4, 32, device=DEVICE), {}

    def launches(*tensors: Tensor) -> list[tuple[list[int], bool, Tensor, list[int]]]:
        found, places = tables.launches(tensors, lambda i: (i, 5), lambda i: i + 1, memo, "these")
        return [(each.which, each.is_aligned, each.table(places), each.owners.tolist()) for each in found]

    (first,) = launches(memory[0], memory[1])
    zero, one, two = (row.data_ptr() for row in memory[:3])
    assert first[:2] == ([0, 1], True) and first[3] == [0, 1, 1]
    assert first[2].tolist() == [[0, zero, 0, 5], [1, one, 1, 5]]
    assert launches(memory[0], memory[1])[0][2] is first[2], "nothing is copied"
    assert launches(memory[0], memory[2])[0][2].tolist() == [[0, zero, 0, 5], [1, two, 1, 5]]
    # no multiple of 16 bytes: a launch of its own
    odd = memory.view(-1)[33:65]
    both = launches(memory[0], odd)
    assert [each[:2] for each in both] == [([0], True), ([1], False)]
    assert both[1][2].tolist() == [[0, odd.data_ptr(), 1, 5]] and both[1][3] == [0, 0]
    assert launches(memory[0], memory[1])[0][2] is first[2]


WEIGHTS = torch.tensor([[0.5, 0.25, 0.0, 0.0], [0.1, 0.2, 0.0, 0.0]])
OPERATIONS: dict[str, Callable[[list[SparseState]], Any]] = {
    "top-k": lambda all_: topk_(all_, 0),
    "update": lambda all_: update_(all_, WEIGHTS.to(all_[0].param.device)),
    "descend": lambda all_: descend_(all_, WEIGHTS[0].contiguous()),
    "gram rows": lambda all_: ops.foreach_window_gram_rows([one.rows for one in all_], 0),
}


@pytest.mark.parametrize("operation", OPERATIONS)
def test_tensors_that_one_call_cannot_serve_are_refused(operation: str) -> None:
    here, there = (SparseState.make(TENSORS[0], device) for device in ("cpu", "meta"))
    with pytest.raises(ValueError, match=r"on meta, (but another tensor is|the other tensors) on cpu"):
        OPERATIONS[operation]([here, there])
    with pytest.raises(ValueError, match="windows of one call must be alike"):
        OPERATIONS[operation]([here, SparseState.make((130, 128, FP32, FP32, "bf16", FOUR), "cpu")])
    if operation == "gram rows":
        with pytest.raises(ValueError, match="least one"):
            ops.foreach_window_gram_rows([], 0)
    if operation == "top-k":
        with pytest.raises(ValueError, match="errors of one call must be stored alike"):
            topk_([here, SparseState.make((130, 64, FP32, FP32, "bf16", None), "cpu")], 0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("operation", ["top-k", "update", "descend"])
@pytest.mark.parametrize("at", [0, 2])
def test_one_bad_tensor_leaves_all_as_they_are(operation: str, at: int, backend: str, use: Use) -> None:
    use(backend)
    states, untouched = make_all("cpu"), make_all("cpu")
    which = "grad" if operation == "top-k" else "param"
    setattr(states[at], which, getattr(states[at], which).double())
    with pytest.raises(ValueError, match=r"(grad|param) must be one of .*float(32|64)"):
        OPERATIONS[operation](states)
    for number, (one, other) in enumerate(zip(states, untouched, strict=True)):
        if number != at:
            assert all(map(torch.equal, one.tensors(), other.tensors()))
