"""Operations on a sparse window: torch against a float64 transcription, the other backends against torch to the bit."""

from __future__ import annotations

import importlib
import importlib.util
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from hf_lowmem_optim.ops.block_topk import kept_per_block, window_specs
from hf_lowmem_optim.ops.sparse_window import (
    SparseWindow,
    foreach_window_gram_rows,
    window_combine_,
)
from tests.ops.backends import BACKENDS, BF16, FAST, FP16, FP32, QUIET, device_of, same
from tests.ops.singles import block_topk_, window_descend_, window_gram_row, window_update_
from tests.reference import sparse_window as paper

pytestmark = QUIET

Use = Callable[[str], str]


@dataclass(frozen=True)
class Case:
    numel: int
    block_size: int
    kept_per_block: int
    kept_in_last_block: int
    window: int
    step: int
    values: torch.dtype = BF16
    param: torch.dtype = FP32
    weight_decay: float = 0.0
    eps: float = 1e-8


CASES = [
    Case(numel=4096 * 2 + 1000, block_size=4096, kept_per_block=41, kept_in_last_block=10, window=10, step=7),
    Case(numel=4096 + 4096, block_size=4096, kept_per_block=41, kept_in_last_block=41, window=10, step=33),
    Case(1, 4096, 41, 1, window=10, step=1),
    Case(37, 16, 16, 5, window=3, step=11, weight_decay=0.1, eps=0.0),  # density 1
    Case(96, 32, 16, 16, window=8, step=9),  # no padding among the sorted keys
    Case(1030, 256, 13, 1, window=15, step=40, param=BF16, weight_decay=0.1),
    Case(777, 100, 7, 6, window=4, step=2, param=FP16, weight_decay=0.1),
    # what the sorted layout cannot hold: float32 values, many rows, large blocks, more slots than one program sorts
    Case(1030, 256, 13, 1, window=15, step=40, values=FP32),
    Case(777, 100, 7, 6, window=20, step=57, weight_decay=0.1),
    Case(32768 + 900, 32768, 300, 9, window=3, step=2, param=BF16),
    Case(900, 512, 400, 300, window=8, step=6, param=FP16, values=FP32, weight_decay=0.1),
]
ROUNDING = {FP32: 1e-6, BF16: 2**-8, FP16: 2**-11}


def make_window(case: Case, seed: int = 0, device: str = "cpu", *, unwritten: float = math.nan) -> SparseWindow:
    """Random ascending indices, concentrated so that rows overlap; rows not yet written hold index 0 and NaN."""
    rng = np.random.default_rng(seed)
    rows = []
    for row in range(case.window):
        parts = []
        for block_start in range(0, case.numel, case.block_size):
            length = min(case.block_size, case.numel - block_start)
            last = block_start + case.block_size >= case.numel
            kept = case.kept_in_last_block if last else case.kept_per_block
            pool = rng.permutation(length) if row % 2 else np.arange(min(length, 2 * kept))
            parts.append(np.sort(rng.choice(pool, kept, replace=False)))
            if row % 2:
                parts[-1][-1] = length - 1
        rows.append(np.concatenate(parts) * (row < case.step))
    indices = torch.from_numpy(np.stack(rows).astype(np.int16))
    values = torch.from_numpy(rng.standard_normal(indices.shape) * 10.0 ** rng.integers(-9, 3, indices.shape))
    values[case.step :] = unwritten
    return SparseWindow(
        indices.to(device), values.to(case.values).to(device), case.numel, case.block_size, case.kept_per_block
    )


def moment_weights(case: Case, device: str = "cpu") -> Tensor:
    pair = [paper.adam_weights(case.step, case.window, beta) for beta in (0.9, 0.999)]
    return torch.from_numpy(np.stack(pair)).float().to(device)


def row_weights(case: Case, device: str = "cpu") -> Tensor:
    """None for rows that were not written, and for the first."""
    weights = torch.randn(case.window, generator=torch.Generator().manual_seed(2))
    weights[case.step :] = 0
    weights[0] = 0
    return weights.to(device)


def make_param(case: Case, seed: int = 1, device: str = "cpu") -> Tensor:
    return torch.randn(case.numel, generator=torch.Generator().manual_seed(seed)).to(case.param).to(device)


def rows_of(window: SparseWindow) -> list[paper.Row]:
    return paper.rows_of_window(
        window.indices.cpu().numpy(), window.values.float().cpu().numpy(), window.block_size, window.kept_per_block
    )


def updated(param: Tensor, window: SparseWindow, weights: Tensor, **options: float) -> Tensor:
    result = param.clone()
    window_update_(result, window, weights, **({"lr": 0.01, "eps": 1e-8} | options))
    return result


def agrees(fast: Tensor, reference: Tensor, step_size: float) -> bool:
    """numba and the interpreter: bit for bit. A GPU: one unit in the last place of an update of ``step_size``."""
    if fast.device.type == "cpu" or reference.dtype != FP32:
        return same(fast, reference)
    return torch.allclose(fast, reference, rtol=2**-23, atol=step_size * 2**-23, equal_nan=True)


@pytest.fixture(autouse=True)
def _poisoned_scratch(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Memory that a kernel asks for comes full of NaN."""
    real = torch.empty

    def empty(*args: Any, **kwargs: Any) -> Tensor:
        tensor = real(*args, **kwargs)
        return tensor.fill_(math.nan) if tensor.is_floating_point() else tensor.fill_(77)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", empty)
        yield


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_torch_version_is_the_paper(case: Case, use: Use) -> None:
    use("reference")
    window, weights, param = make_window(case), moment_weights(case), make_param(case)
    result = updated(param, window, weights, eps=case.eps, weight_decay=case.weight_decay)
    w1, w2 = weights.double().numpy()
    expected = paper.step(param.double(), rows_of(window), w1, w2, 0.01, case.eps, case.weight_decay)
    np.testing.assert_allclose(result.double().numpy(), expected, rtol=ROUNDING[case.param], atol=1e-7)

    window, weights = make_window(case, unwritten=0.0), row_weights(case)
    direction = paper.combine(rows_of(window), weights.double().numpy(), case.numel)
    expected = param.double().numpy() * (1 - 0.1 * case.weight_decay) - 0.1 * direction
    window_descend_(param, window, weights, lr=0.1, weight_decay=case.weight_decay)
    np.testing.assert_allclose(param.double().numpy(), expected, rtol=ROUNDING[case.param], atol=1e-5)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_backends_agree_bit_for_bit(case: Case, backend: str, use: Use) -> None:
    here = device_of(backend)
    window, zeroed = make_window(case, device=here), make_window(case, device=here, unwritten=0.0)
    moments, weights, param = moment_weights(case, here), row_weights(case, here), make_param(case, device=here)
    found = []
    for each in ("reference", backend):
        use(each)
        descended, combined = param.clone(), param.float().clone()
        window_descend_(descended, zeroed, weights, lr=0.1, weight_decay=case.weight_decay)
        window_descend_(descended, zeroed, torch.zeros_like(weights), lr=0.1)
        window_combine_(combined, zeroed, weights)
        update = updated(param, window, moments, eps=case.eps, weight_decay=case.weight_decay)
        found.append((update, descended, combined))
    assert agrees(found[1][0], found[0][0], 0.1)
    assert same(found[1][1], found[0][1])
    assert agrees(found[1][2], found[0][2], 100.0)
    expected = paper.combine(rows_of(zeroed), weights.double().cpu().numpy(), case.numel)
    expected += param.double().cpu().numpy()
    np.testing.assert_allclose(found[1][2].double().cpu().numpy(), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("values_dtype", [BF16, FP32])
@pytest.mark.parametrize("param_dtype", [FP32, BF16, FP16])
def test_awkward_numbers(param_dtype: torch.dtype, values_dtype: torch.dtype, backend: str, use: Use) -> None:
    """±0, subnormals, the largest, infinite and NaN values and parameters: the same in all backends, and no further."""
    awkward = [0.0, -0.0, 1e-40, -9.2e-41, 1e-20, 3e38, -3e38, math.inf, -math.inf, math.nan, 6e-8, 65519.0, 1.0, -2.5]
    length, here = len(awkward), device_of(backend)
    indices = torch.arange(length, dtype=torch.int16).expand(2, -1).contiguous().to(here)
    values = torch.tensor([awkward, awkward[::-1]]).to(values_dtype).to(here)
    window = SparseWindow(indices, values, 2 * length, 2 * length, length)
    weights = torch.tensor([[0.3, 0.7], [0.0, 1e-3]], device=here)
    param = torch.tensor([*awkward[3:], *awkward[:3], *awkward]).to(param_dtype).to(here)
    for weight_decay in (0.0, 0.5):
        results = []
        for each in ("reference", backend):
            use(each)
            results.append(updated(param, window, weights, weight_decay=weight_decay, lr=1.0, eps=0.0))
        assert same(results[1], results[0])
        visible = torch.tensor([not math.isfinite(a) or not math.isfinite(b) for a, b in values.T.tolist()])
        assert results[1][:length].cpu()[visible].isnan().all()
        if weight_decay == 0:
            assert torch.equal(results[1][length:].view(torch.uint8), param[length:].view(torch.uint8))


@given(
    block_size=st.integers(1, 40),
    numel=st.integers(1, 120),
    window=st.integers(1, 6),
    step=st.integers(1, 20),
    share=st.floats(0.01, 1.0),
    seed=st.integers(0, 99),
)
def test_properties(block_size: int, numel: int, window: int, step: int, share: float, seed: int) -> None:
    """Untouched entries stay bit for bit, the order of the rows changes nothing beyond rounding, numba agrees."""
    kept = math.ceil(share * block_size)
    last = numel - (numel - 1) // block_size * block_size
    case = Case(numel, block_size, kept, min(last, math.ceil(share * last)), window, step)
    rows, weights, param = make_window(case, seed), moment_weights(case), make_param(case, seed)
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("HF_LOWMEM_OPTIM_BACKEND", "reference")
        result = updated(param, rows, weights)
        touched = torch.zeros(numel, dtype=torch.bool)
        for row in rows.indices[weights[0] != 0].long():
            touched[torch.arange(rows.kept) // kept * block_size + row] = True
        assert same(result[~touched], param[~touched])

        order = torch.randperm(window, generator=torch.Generator().manual_seed(seed))
        mixed = replace(rows, indices=rows.indices[order], values=rows.values[order])
        torch.testing.assert_close(updated(param, mixed, weights[:, order]), result, rtol=1e-6, atol=1e-6)
        if importlib.util.find_spec("numba"):
            monkeypatch.setenv("HF_LOWMEM_OPTIM_BACKEND", "cpu")
            assert same(updated(param, rows, weights), result)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_gram_row(case: Case, backend: str, use: Use) -> None:
    window = make_window(case, device=use(backend), unwritten=0.0)
    G = np.array([paper.combine([row], [1.0], case.numel) for row in rows_of(window)])
    for row in {0, min(case.step, case.window) - 1}:
        found = window_gram_row(window, row)
        assert found.dtype == torch.float64 and found.device.type == window.device.type
        np.testing.assert_allclose(found.cpu().numpy(), G @ G[row], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("window", [1, 33, 70])
@pytest.mark.parametrize("programs", [1, 3])
def test_many_rows_and_several_blocks_a_program(
    window: int, programs: int, backend: str, use: Use, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU rows go in groups, and a program has several blocks in its scratch memory, one after the other."""
    case = Case(numel=64 * 4 + 7, block_size=64, kept_per_block=5, kept_in_last_block=2, window=window, step=window)
    if backend == "triton":
        kernels = importlib.import_module("hf_lowmem_optim.ops.triton.window_products")
        scratch = 4 * case.block_size * programs * -(-window // kernels.GRAM_ROWS)
        monkeypatch.setattr(kernels, "_SCRATCH_BYTES", scratch)
    here = device_of(backend)
    one, weights = make_window(case, device=here), torch.linspace(-1, 1, window, device=here)
    found = []
    for each in ("reference", backend):
        use(each)
        param, moved = make_param(case, device=here), make_param(case, device=here)
        window_descend_(param, one, weights, lr=0.1, weight_decay=0.1)
        window_update_(moved, one, torch.stack([weights.abs(), weights.abs()]), lr=0.1, eps=1e-8, weight_decay=0.1)
        found.append((window_gram_row(one, window - 1), param, moved))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-12, atol=1e-12)
    assert same(found[0][1], found[1][1]) and same(found[0][2], found[1][2])


@pytest.mark.parametrize("backend", BACKENDS)
def test_descent_leaves_untouched_entries_alone(backend: str, use: Use) -> None:
    """Also −0 and NaN; what is not finite in the window reaches only its own entries."""
    case, here = CASES[4], use(backend)
    window, param = make_window(case, device=here, unwritten=0.0), make_param(case, device=here)
    window.values[1, 0] = math.inf
    touched = torch.zeros(case.numel, dtype=torch.bool)
    for row in rows_of(window):
        touched[[position for position, _ in row]] = True
    param[~touched] = torch.where(torch.arange(case.numel)[~touched] % 2 == 0, -0.0, math.nan).to(param)
    before = param.clone()
    window_descend_(param, window, torch.ones(case.window, device=here), lr=0.1)
    assert same(param[~touched], before[~touched])
    assert int((~param[touched].isfinite()).sum()) == 1


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_window_of_selections_is_its_matrix(backend: str, use: Use) -> None:
    """What Top-K wrote is what was taken from the gradients."""
    numel, block_size, density, here = 360, 64, 0.1, use(backend)
    specs = window_specs(numel, window=5, density=density, block_size=block_size)
    indices, values = (specs[key].allocate(here) for key in ("indices", "values"))
    G = torch.zeros(5, numel, dtype=torch.float64)
    for row in range(5):
        gradient = torch.randn(numel, generator=torch.Generator().manual_seed(row)).to(here)
        error = torch.zeros(numel, device=here)
        block_topk_(indices[row], values[row], gradient, error, block_size=block_size, density=density)
        G[row] = gradient - error
    window = SparseWindow(indices, values, numel, block_size, kept_per_block(block_size, density))
    for row in range(5):
        torch.testing.assert_close(window_gram_row(window, row).cpu(), G @ G[row], rtol=1e-12, atol=1e-12)
    weights, out = torch.randn(5, device=here), torch.randn(numel, device=here)
    expected = out.double().cpu() + G.T @ weights.double().cpu()
    window_combine_(out, window, weights)
    torch.testing.assert_close(out.double().cpu(), expected, rtol=1e-5, atol=1e-5)


def test_contradictions_are_refused() -> None:
    case = CASES[0]
    window, weights, param = make_window(case), moment_weights(case), make_param(case)
    step = {"lr": 0.1, "eps": 1e-8}
    with pytest.raises(TypeError, match="int16"):
        replace(window, indices=window.indices.int())
    with pytest.raises(TypeError, match="bfloat16 or float32"):
        replace(window, values=window.values.half())
    with pytest.raises(ValueError, match="block_size must be"):
        replace(window, block_size=40000)
    with pytest.raises(ValueError, match="kept_per_block must be between 1 and block_size, got 5000"):
        replace(window, kept_per_block=5000)
    with pytest.raises(ValueError, match="cannot give rows of"):
        replace(window, numel=case.numel + 4096)
    with pytest.raises(ValueError, match="contiguous"):
        replace(window, indices=window.indices.T.contiguous().T)
    with pytest.raises(ValueError, match="entries, the window is of"):
        window_update_(param[1:], window, weights, **step)
    with pytest.raises(TypeError, match="param must be"):
        window_update_(param.double(), window, weights, **step)
    with pytest.raises(ValueError, match="of shape"):
        window_update_(param, window, weights[:1], **step)
    with pytest.raises(TypeError, match="float64"):
        window_descend_(param.double(), window, weights[0], lr=0.1)
    with pytest.raises(ValueError, match=r"weights must be contiguous and of shape \[10\], got \[9\]"):
        window_descend_(param, window, weights[0, 1:], lr=0.1)
    with pytest.raises(TypeError, match="out must be float32"):
        window_combine_(param.half(), window, weights[0])
    with pytest.raises(IndexError, match="row 10 is not one of the window's 10"):
        window_gram_row(window, case.window)
    with pytest.raises(ValueError, match="a window has 3 rows, another one 10"):
        foreach_window_gram_rows([window, make_window(CASES[3])], 0)
