"""Operations on several tensors at once: to the bit what one tensor after the other gives, on any number of threads."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_lowmem_optim.kernels.block_quant import QuantFormat, Quantized
from hf_lowmem_optim.kernels.block_topk import TopK, block_topk_, foreach_block_topk_, kept_per_block, num_kept
from hf_lowmem_optim.kernels.sparse_steps import topk_gram_row_, topk_update_
from hf_lowmem_optim.kernels.sparse_window import (
    SparseWindow,
    WindowStep,
    foreach_window_descend_,
    foreach_window_update_,
    window_descend_,
    window_gram_row,
    window_update_,
)
from tests.kernels.test_block_quant import BF16, DEVICE, FAST, FP16, FP32

pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")

WINDOW, DENSITY = 3, 0.1
#: Entries, size of the blocks, dtype: from less than a block to many groups of blocks.
TENSORS = [(1000, 64, FP32), (5, 64, BF16), (64, 64, FP32), (130, 128, FP16), (3000, 64, BF16), (1, 64, FP32)]


@dataclass
class Tensors:
    """One tensor and what MicroAdam keeps for it."""

    param: Tensor
    grad: Tensor
    error: Quantized
    indices: Tensor
    values: Tensor
    block_size: int

    @property
    def rows(self) -> SparseWindow:
        kept = kept_per_block(self.block_size, DENSITY)
        return SparseWindow(self.indices, self.values, self.grad.numel(), self.block_size, kept)

    def topk(self, row: int) -> TopK:
        return TopK(self.indices, self.values, row, self.grad, self.error, self.block_size, DENSITY, seed=row)

    def step(self, weights: Tensor) -> WindowStep:
        return WindowStep(self.param, self.rows, weights, 1e-2, 0.1, 1e-8)

    def copy(self) -> Tensors:
        """With a state of its own."""
        e = self.error
        error = Quantized(e.codes.clone(), e.lo.clone(), e.hi.clone(), e.numel, e.format)
        return replace(self, error=error, indices=self.indices.clone(), values=self.values.clone())

    def written(self) -> list[Tensor]:
        return [self.param, self.indices, self.values, self.error.codes, self.error.lo, self.error.hi]


def make(numel: int, block_size: int, dtype: torch.dtype, seed: int, device: str) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    param, grad = (torch.randn(numel, generator=generator).to(device, dtype) for _ in range(2))
    fmt = QuantFormat(4, 16)
    lo, hi = (torch.zeros(fmt.num_blocks(numel), dtype=BF16, device=device) for _ in range(2))
    codes = torch.zeros(fmt.num_code_bytes(numel), dtype=torch.uint8, device=device)
    kept = num_kept(numel, block_size, DENSITY)
    indices = torch.zeros(WINDOW, kept, dtype=torch.int16, device=device)
    values = torch.zeros(WINDOW, kept, dtype=BF16, device=device)
    return Tensors(param, grad, Quantized(codes, lo, hi, numel, fmt), indices, values, block_size)


def make_all(device: str = "cpu") -> list[Tensors]:
    return [make(*spec, seed, device) for seed, spec in enumerate(TENSORS)]


def weights_on(device: str) -> Tensor:
    return torch.tensor([[0.5, 0.25, 0.125], [0.1, 0.2, 0.3]], device=device)


def one_by_one(tensors: list[Tensors], row: int) -> Tensor:
    """Both operations with the single calls; the inner products of the new row."""
    total = torch.zeros(WINDOW, dtype=torch.float64, device=tensors[0].param.device)
    for t in tensors:
        call = t.topk(row)
        block_topk_(t.indices[row], t.values[row], t.grad, t.error, block_size=t.block_size, density=DENSITY, seed=row)
        window_update_(t.param, t.rows, weights_on(t.param.device.type), lr=1e-2, eps=1e-8, weight_decay=0.1)
        total += window_gram_row(t.rows, call.row)
    return total


def together(tensors: list[Tensors], row: int) -> Tensor:
    """MicroAdam's operation; and M-FAC's on copies, for the inner products."""
    grads, sizes = [t.grad for t in tensors], [t.block_size for t in tensors]
    copies = [t.copy() for t in tensors]
    products = topk_gram_row_(grads, sizes, ((t.topk(row), t.rows) for t in copies), WINDOW)
    topk_update_(grads, sizes, ((t.topk(row), t.step(weights_on(t.param.device.type))) for t in tensors))
    for copy, original in zip(copies, tensors, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(copy.written(), original.written(), strict=True))
    return products


def cpu_calls() -> ModuleType:
    """Imported where it is needed: it needs numba."""
    return importlib.import_module("hf_lowmem_optim.kernels.cpu_calls")


@pytest.fixture(params=[1, 2, 3])
def threads(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """Small tensors are to go to several threads here, in small groups of blocks."""
    if importlib.util.find_spec("numba"):
        monkeypatch.setattr(cpu_calls(), "_LEAST_ENTRIES", 1)
        monkeypatch.setattr(cpu_calls(), "_GROUP_ENTRIES", 192)
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def check(device: str) -> list[Any]:
    expected, found = make_all(device), make_all(device)
    products = []
    for row in (0, 1, 2, 0):
        one, all_ = one_by_one(expected, row), together(found, row)
        torch.testing.assert_close(one, all_, rtol=1e-13, atol=1e-13)
        products.append(all_)
        for a, b in zip(expected, found, strict=True):
            assert all(torch.equal(x, y) for x, y in zip(a.written(), b.written(), strict=True))
    return products


@pytest.mark.parametrize("backend", ["reference", *FAST])
def test_together_is_one_by_one(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_LOWMEM_OPTIM_BACKEND", backend)
    check(DEVICE if backend == "triton" else "cpu")


@pytest.mark.parametrize("backend", ["reference", *FAST])
def test_each_operation_for_several_tensors_is_that_for_each(
    backend: str, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_LOWMEM_OPTIM_BACKEND", backend)
    device = DEVICE if backend == "triton" else "cpu"
    expected, found, weights = make_all(device), make_all(device), weights_on(device)
    # a row counts when it has been written: until then its indices do not ascend
    for tensors in (expected, found):
        for row in range(WINDOW):
            for t in tensors:
                foreach_block_topk_([t.topk(row)])
    for row in (0, 1):
        one_by_one(expected, row)
        for t in expected:
            window_descend_(t.param, t.rows, weights[0], lr=0.1, weight_decay=0.2)
        foreach_block_topk_([t.topk(row) for t in found])
        foreach_window_update_([t.step(weights) for t in found])
        foreach_window_descend_([WindowStep(t.param, t.rows, weights[0], 0.1, 0.2) for t in found])
        for a, b in zip(expected, found, strict=True):
            assert all(torch.equal(x, y) for x, y in zip(a.written(), b.written(), strict=True))


@pytest.mark.parametrize("operation", [foreach_block_topk_, foreach_window_update_, foreach_window_descend_])
def test_tensors_of_several_devices_are_refused(operation: Callable[..., None]) -> None:
    here, there = make(*TENSORS[0], 0, "cpu"), make(*TENSORS[0], 0, "meta")
    if operation is foreach_block_topk_:
        calls: list[Any] = [here.topk(0), there.topk(0)]
    else:
        weights = weights_on("cpu") if operation is foreach_window_update_ else weights_on("cpu")[0]
        calls = [here.step(weights), there.step(weights)]
    with pytest.raises(ValueError, match="is on meta, that of another tensor on cpu"):
        operation(calls)
    operation([])


@pytest.mark.parametrize("backend", ["cpu"])
def test_the_number_of_threads_changes_nothing(backend: str, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    several = [check("cpu") for _ in range(10)]
    torch.set_num_threads(1)
    expected = check("cpu")
    for products in several:
        assert all(torch.equal(a, b) for a, b in zip(products, expected, strict=True))


def raising(tensors: list[Tensors], at: int) -> Iterator[tuple[TopK, WindowStep]]:
    for number, t in enumerate(tensors):
        if number == at:
            raise ArithmeticError("on purpose")
        yield t.topk(0), t.step(weights_on("cpu"))


@pytest.mark.parametrize("backend", ["cpu"])
def test_a_failure_comes_out_and_ends_all_threads(backend: str, threads: int) -> None:
    for at in range(len(TENSORS)):
        tensors = make_all()
        with pytest.raises(ArithmeticError, match="on purpose"):
            topk_update_([t.grad for t in tensors], [t.block_size for t in tensors], raising(tensors, at))


def fewer(tensors: list[Tensors]) -> list[Tensors]:
    return tensors[:-1]


def more(tensors: list[Tensors]) -> list[Tensors]:
    return [*tensors, tensors[0]]


def other(tensors: list[Tensors]) -> list[Tensors]:
    return [tensors[1], *tensors[1:]]


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize(("change", "said"), [(fewer, "shorter"), (more, "longer"), (other, "the selection 5 in")])
def test_other_calls_than_gradients_are_refused(
    backend: str, change: Callable[..., Any], said: str, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_LOWMEM_OPTIM_BACKEND", backend)
    tensors = make_all()
    grads, sizes, calls = [t.grad for t in tensors], [t.block_size for t in tensors], change(tensors)
    with pytest.raises(ValueError, match=said):
        topk_update_(grads, sizes, ((t.topk(0), t.step(weights_on("cpu"))) for t in calls))
    with pytest.raises(ValueError, match=said):
        topk_gram_row_(grads, sizes, ((t.topk(0), t.rows) for t in calls), WINDOW)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_contradictions_are_refused(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_LOWMEM_OPTIM_BACKEND", backend)
    one, two = make(*TENSORS[0], 0, "cpu"), make(*TENSORS[4], 1, "cpu")
    with pytest.raises(ValueError, match="the window 3000 in blocks of 64"):
        topk_update_([one.grad], [64], [(one.topk(0), two.step(weights_on("cpu")))])
    with pytest.raises(ValueError, match="3 rows, not 4"):
        topk_gram_row_([one.grad], [64], [(one.topk(0), one.rows)], 4)
    with pytest.raises(ValueError, match="row 3 is not one of the window's 3"):
        topk_update_([one.grad], [64], [(one.topk(3), one.step(weights_on("cpu")))])


@pytest.mark.parametrize("backend", ["cpu"])
def test_other_threads_wait_for_tensors_that_are_not_there_yet(
    backend: str, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The calling thread must not take a group that only it can make: every group of the others' may come first."""
    done: list[int] = []
    tell = cpu_calls()._tell

    def slowly(queue: Any, tensors: int) -> None:
        tell(queue, tensors)
        if threads > 1 and tensors > 0:
            # until the others have taken all that is there, and wait for more
            for _ in range(50):
                torch.zeros(1)  # lets go of Python's lock
        done.append(tensors)

    monkeypatch.setattr(cpu_calls(), "_tell", slowly)
    check("cpu")
    assert done
