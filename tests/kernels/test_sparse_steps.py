"""Operations on several tensors at once: to the bit what one tensor after the other gives, on any number of threads."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor

from hf_lowmem_optim.kernels.block_quant import QuantFormat, Quantized
from hf_lowmem_optim.kernels.block_topk import TopK, block_topk_, foreach_block_topk_, kept_per_block, num_kept
from hf_lowmem_optim.kernels.sparse_steps import SparseSteps, SparseTensor, StepRule, sparse_steps
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

    def sparse(self) -> SparseTensor:
        e = self.error
        return SparseTensor(
            self.param, self.grad, self.indices, self.values, (e.codes, e.lo, e.hi), e.format, self.block_size, DENSITY
        )

    def copy(self) -> Tensors:
        """With a weight and a state of its own."""
        e = self.error
        error = Quantized(e.codes.clone(), e.lo.clone(), e.hi.clone(), e.numel, e.format)
        indices, values, param = self.indices.clone(), self.values.clone(), self.param.clone()
        return replace(self, param=param, error=error, indices=indices, values=values)

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


def steps(tensors: list[Tensors], row: int) -> SparseSteps:
    rule = StepRule(row, 1e-2, 0.1, 1e-8, weights_on(tensors[0].param.device.type), seed=row)
    return sparse_steps([(t.sparse(), rule) for t in tensors])


def together(tensors: list[Tensors], row: int) -> Tensor:
    """MicroAdam's operation; and M-FAC's two on copies, for the inner products."""
    copies = [t.copy() for t in tensors]
    mfac = steps(copies, row)
    products = mfac.topk_gram_row_(WINDOW)
    # rows that were not written yet have no weight
    weights = weights_on(tensors[0].param.device.type)[0] * copies[0].values.any(dim=1)
    expected = [copy.param.clone() for copy in copies]
    for param, copy in zip(expected, copies, strict=True):
        window_descend_(param, copy.rows, weights, lr=1e-2, weight_decay=0.1)
    mfac.descend_(weights)
    assert all(torch.equal(copy.param, param) for copy, param in zip(copies, expected, strict=True))
    steps(tensors, row).topk_update_()
    for copy, original in zip(copies, tensors, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(copy.written()[1:], original.written()[1:], strict=True))
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


def breaking(tensors: list[Tensors], at: int) -> list[tuple[SparseTensor, StepRule]]:
    """Good tensors, but for one."""
    rule = StepRule(0, 1e-2, weights=weights_on("cpu"))
    calls = [(t.sparse(), rule) for t in tensors]
    calls[at] = (calls[at][0]._replace(grad=tensors[at].grad.double()), rule)
    return calls


@pytest.mark.parametrize("backend", ["cpu"])
def test_a_failure_comes_out_and_ends_all_threads(backend: str, threads: int) -> None:
    for at in range(len(TENSORS)):
        with pytest.raises(ValueError, match="grad must be one of"):
            sparse_steps(breaking(make_all(), at)).topk_update_()
        with pytest.raises(ValueError, match="grad must be one of"):
            sparse_steps(breaking(make_all(), at)).topk_gram_row_(WINDOW)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_contradictions_are_refused(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_LOWMEM_OPTIM_BACKEND", backend)
    one, two = make(*TENSORS[0], 0, "cpu").sparse(), make(*TENSORS[4], 1, "cpu").sparse()
    rule = StepRule(0, 1e-2, weights=weights_on("cpu"))

    def update(*calls: tuple[SparseTensor, StepRule]) -> None:
        sparse_steps(calls).topk_update_()

    def gram_row(*calls: tuple[SparseTensor, StepRule]) -> None:
        sparse_steps(calls).topk_gram_row_(WINDOW)

    def refused(said: str, operation: Callable[..., None], *calls: tuple[SparseTensor, StepRule]) -> None:
        with pytest.raises((TypeError, ValueError), match=said):
            operation(*calls)

    for operation in (update, gram_row):
        refused("row 3 is not one of the window's 3", operation, (one, rule._replace(row=3)))
        refused("is on meta", operation, (one, rule), (one._replace(grad=one.grad.to("meta")), rule))
        refused("indices must", operation, (one._replace(indices=one.indices.int()), rule))
        flat = one._replace(indices=one.indices[..., None], values=one.values[..., None])
        refused(r"must( both)? be \[window, kept\], got", operation, (flat, rule))
    refused("param has 3000 entries, the window is of 1000", update, (one._replace(param=two.param), rule))
    refused("weights=None", update, (one, rule._replace(weights=None)))
    refused("weights must be", update, (one, rule._replace(weights=weights_on("cpu")[0])))
    short = two._replace(indices=two.indices[:2].clone(), values=two.values[:2].clone())
    refused("a window has 2 rows, not 3", gram_row, (one, rule), (short, rule))
    steps = sparse_steps([(one, rule)])
    with pytest.raises(RuntimeError, match=r"descend_\(\) before topk_gram_row_\(\)"):
        steps.descend_(weights_on("cpu")[0])
    steps.topk_gram_row_(WINDOW)
    with pytest.raises(ValueError, match=r"weights must be contiguous and of shape \[3\]"):
        steps.descend_(weights_on("cpu"))


@pytest.mark.parametrize("backend", ["cpu"])
def test_what_is_kept_of_a_tensor_is_dropped_when_it_changes(backend: str) -> None:
    """State that is replaced, or moved in place, between two steps; other dtypes; and what is wrong only then."""
    rule = StepRule(0, 1e-2, 0.1, 1e-8, weights_on("cpu"), seed=0)
    found, expected = make(*TENSORS[4], 0, "cpu"), make(*TENSORS[4], 0, "cpu")

    def step_both() -> None:
        sparse_steps([(found.sparse(), rule)]).topk_update_()
        one_by_one([expected], 0)
        assert all(torch.equal(a, b) for a, b in zip(found.written(), expected.written(), strict=True))

    for number in range(3):
        step_both()
        e = found.error
        if number == 0:
            found = found.copy()
        for tensor in (found.param, found.grad, found.indices, found.values, e.codes, e.lo, e.hi):
            tensor.data = tensor.clone()
    for tensors in (found, expected):
        tensors.values.data = tensors.values.float()
    step_both()
    for tensors in (found, expected):
        tensors.grad.data, tensors.param.data = tensors.grad.float(), tensors.param.float()
    step_both()
    assert found.values.dtype == found.param.dtype == FP32

    def refused(said: str) -> None:
        with pytest.raises((TypeError, ValueError), match=said):
            sparse_steps([(found.sparse(), rule)]).topk_update_()

    indices, codes, param = found.indices.data, found.error.codes.data, found.param.data
    found.indices.data = indices.int()
    refused("indices must")
    found.indices.data, found.error.codes.data = indices, codes[:-1]
    refused("codes of 3000 entries")
    found.error.codes.data, found.param.data = codes, param.as_strided((1500, 2), (1, 1500))
    refused("param must be contiguous")
    found.param.data = param
    step_both()


@pytest.mark.parametrize("backend", ["cpu"])
def test_only_so_much_is_kept(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = importlib.import_module("hf_lowmem_optim.kernels.sparse_steps.cpu")
    monkeypatch.setattr(cpu, "_MOST_LAYOUTS", 4)
    for _ in range(3):
        check("cpu")
        assert 0 < len(cpu._layouts) <= 4


@pytest.mark.parametrize("backend", ["cpu"])
def test_other_threads_wait_for_tensors_that_are_not_there_yet(
    backend: str, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other threads may be done with all that is there before the calling one has described the next tensor."""
    tell = cpu_calls()._tell

    def slowly(queue: Any, tensors: int) -> None:
        tell(queue, tensors)
        if threads > 1 and tensors > 0:
            time.sleep(1e-3)

    monkeypatch.setattr(cpu_calls(), "_tell", slowly)
    check("cpu")


@pytest.mark.parametrize("backend", ["cpu"])
def test_a_loop_that_did_not_run_is_an_error(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What numba raises in it, without memory, cannot come out."""
    monkeypatch.setattr(cpu_calls(), "run_native", lambda loop, arguments, threads, prepare, stop: prepare())
    tensors = make(*TENSORS[0], 0, "cpu")
    with pytest.raises(MemoryError, match="no thread had the memory"):
        steps([tensors], 0).topk_update_()


@pytest.mark.parametrize("backend", ["cpu"])
@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_a_forked_process_does_not_wait_for_threads_of_its_parent(backend: str) -> None:
    script = """
import os, torch
from hf_lowmem_optim import MicroAdam
torch.set_num_threads(2)
weight = torch.nn.Parameter(torch.zeros(1 << 20))
weight.grad = torch.ones(1 << 20)
optimizer = MicroAdam([weight])
optimizer.step()
child = os.fork()
if child == 0:
    optimizer.step()
    os._exit(0)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout.strip() == "0", done.stderr


@pytest.mark.parametrize("backend", ["cpu"])
def test_the_records_are_part_of_the_key_of_compiled_loops(backend: str) -> None:
    """Numba's cache on disk looks at the file of a loop only, and the records are in another one."""
    records = importlib.import_module("hf_lowmem_optim.kernels.sparse_records")
    numba = importlib.import_module("numba")
    fields = records.sparse_loop(lambda pointer: None)._signature.args[0].dtype.fields
    found = {name: field.type for name, field in fields.items()}
    assert found == {
        "arguments": numba.from_dtype(cpu_calls().ARGUMENTS),
        "record": numba.from_dtype(records.FORM),
    }
    # numba knows records by names, types and places
    other = numpy.dtype([*[(name, records.FORM[name]) for name in records.FORM.names], ("one_more", numpy.int64)])
    assert found["record"] != numba.from_dtype(other)
