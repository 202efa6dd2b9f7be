"""Window statistics: reference against a float64 transcription, numba and Triton bit for bit against the reference."""

from __future__ import annotations

import importlib.util
import math
import os
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_lowmem_optim.kernels.sparse_window import SparseWindow, window_combine_, window_dots, window_update_
from tests.reference import sparse_window as paper

INTERPRETED = os.environ["TRITON_INTERPRET"] == "1"
DEVICE = "cpu" if INTERPRETED or not torch.cuda.is_available() else "cuda"
ON_GPU = [pytest.mark.gpu, pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")]
FAST = [pytest.param("triton", marks=[] if INTERPRETED else ON_GPU), pytest.param("cpu")]


@dataclass(frozen=True)
class Case:
    numel: int
    block_size: int
    kept_per_block: int
    kept_in_last_block: int
    window: int
    step: int
    values: torch.dtype = torch.bfloat16
    param: torch.dtype = torch.float32
    weight_decay: float = 0.0
    eps: float = 1e-8


CASES = [
    Case(numel=4096 * 2 + 1000, block_size=4096, kept_per_block=41, kept_in_last_block=10, window=10, step=7),
    Case(numel=4096 + 4096, block_size=4096, kept_per_block=41, kept_in_last_block=41, window=10, step=33),
    Case(1, 4096, 41, 1, window=10, step=1),
    Case(37, 16, 16, 5, window=3, step=11, weight_decay=0.1, eps=0.0),  # density 1
    Case(96, 32, 16, 16, window=8, step=9),  # no padding among the sorted keys
    Case(1030, 256, 13, 1, window=15, step=40, param=torch.bfloat16, weight_decay=0.1),
    Case(777, 100, 7, 6, window=4, step=2, param=torch.float16, weight_decay=0.1),
    # what the sorted layout cannot hold: float32 values, many rows, large blocks, more slots than one program sorts
    Case(1030, 256, 13, 1, window=15, step=40, values=torch.float32),
    Case(777, 100, 7, 6, window=20, step=57, weight_decay=0.1),
    Case(32768 + 900, 32768, 300, 9, window=3, step=2, param=torch.bfloat16),
    Case(900, 512, 400, 300, window=8, step=6, param=torch.float16, values=torch.float32, weight_decay=0.1),
]


def make_window(case: Case, seed: int = 0) -> SparseWindow:
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
    values[case.step :] = math.nan
    return SparseWindow(
        indices.to(DEVICE), values.to(case.values).to(DEVICE), case.numel, case.block_size, case.kept_per_block
    )


def make_weights(case: Case) -> torch.Tensor:
    pair = [paper.adam_weights(case.step, case.window, beta) for beta in (0.9, 0.999)]
    return torch.from_numpy(np.stack(pair)).float().to(DEVICE)


def make_param(case: Case, seed: int = 1) -> torch.Tensor:
    return torch.randn(case.numel, generator=torch.Generator().manual_seed(seed)).to(case.param).to(DEVICE)


def update(monkeypatch, backend, param, window, weights, **options):
    monkeypatch.setenv("HF_LOWMEM_OPTIM_BACKEND", backend)
    result = param.clone()
    options = {"lr": 0.01, "eps": 1e-8} | options
    window_update_(result, window, weights, **options)
    return result


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Bit for bit, all NaNs being one."""
    bits = {2: torch.int16, 4: torch.int32}[a.itemsize]
    return torch.equal(a.isnan(), b.isnan()) and torch.equal(
        a.view(bits).masked_fill(a.isnan(), 0), b.view(bits).masked_fill(b.isnan(), 0)
    )


def agrees(backend: str, fast: torch.Tensor, reference: torch.Tensor, step_size: float) -> bool:
    """numba and the interpreter: bit for bit. A GPU: one unit in the last place of an update of ``step_size``."""
    if DEVICE == "cpu" or reference.dtype != torch.float32:
        return same(fast, reference)
    return torch.allclose(fast, reference, rtol=2**-23, atol=step_size * 2**-23, equal_nan=True)


@pytest.fixture(autouse=True)
def _poisoned_scratch(monkeypatch):
    """Memory that a kernel asks for comes full of NaN."""
    real = torch.empty

    def empty(*args, **kwargs):
        tensor = real(*args, **kwargs)
        return tensor.fill_(math.nan) if tensor.is_floating_point() else tensor.fill_(77)

    monkeypatch.setattr(torch, "empty", empty)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_reference_is_the_paper(case, monkeypatch):
    window, weights, param = make_window(case), make_weights(case), make_param(case)
    result = update(monkeypatch, "reference", param, window, weights, eps=case.eps, weight_decay=case.weight_decay)
    rows = paper.rows_of_window(window.indices.cpu(), window.values.cpu(), case.block_size, case.kept_per_block)
    w1, w2 = weights.double().cpu().numpy()
    expected = torch.from_numpy(paper.step(param.double().cpu(), rows, w1, w2, 0.01, case.eps, case.weight_decay))
    tolerance = {torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}[case.param]
    torch.testing.assert_close(result.cpu().double(), expected, rtol=tolerance, atol=1e-7)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_backends_agree_bit_for_bit(case, backend, monkeypatch):
    pytest.importorskip({"cpu": "numba"}.get(backend, backend))
    window, weights, param = make_window(case), make_weights(case), make_param(case)
    options = {"eps": case.eps, "weight_decay": case.weight_decay}
    reference = update(monkeypatch, "reference", param, window, weights, **options)
    if backend == "cpu":
        param, weights = param.cpu(), weights.cpu()
        window = replace(window, indices=window.indices.cpu(), values=window.values.cpu())
        reference = reference.cpu()
    assert agrees(backend, update(monkeypatch, backend, param, window, weights, **options), reference, 0.1)


@pytest.mark.parametrize("backend", [pytest.param("reference"), *FAST])
@pytest.mark.parametrize("values_dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("param_dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_awkward_numbers(param_dtype, values_dtype, backend, monkeypatch):
    """±0, subnormals, the largest, infinite and NaN values and parameters: the same in all backends, and no further."""
    awkward = [0.0, -0.0, 1e-40, -9.2e-41, 1e-20, 3e38, -3e38, math.inf, -math.inf, math.nan, 6e-8, 65519.0, 1.0, -2.5]
    length = len(awkward)
    indices = torch.arange(length, dtype=torch.int16).expand(2, -1).contiguous()
    values = torch.tensor([awkward, awkward[::-1]]).to(values_dtype)
    window = SparseWindow(indices, values, 2 * length, 2 * length, length)
    weights = torch.tensor([[0.3, 0.7], [0.0, 1e-3]])
    param = torch.tensor([*awkward[3:], *awkward[:3], *awkward]).to(param_dtype)
    for weight_decay in (0.0, 0.5):
        results = []
        for name in ("reference", backend):
            if name != "reference":
                pytest.importorskip({"cpu": "numba"}.get(name, name))
            here = DEVICE if name == "triton" else "cpu"
            moved = replace(window, indices=indices.to(here), values=values.to(here))
            options = {"weight_decay": weight_decay, "lr": 1.0, "eps": 0.0}
            results.append(update(monkeypatch, name, param.to(here), moved, weights.to(here), **options).cpu())
        assert same(results[1], results[0])
        visible = torch.tensor([not math.isfinite(a) or not math.isfinite(b) for a, b in values.T.tolist()])
        assert results[1][:length][visible].isnan().all()
        if weight_decay == 0:
            assert torch.equal(results[1][length:].view(torch.uint8), param[length:].view(torch.uint8))


@settings(max_examples=40, deadline=None)
@given(
    block_size=st.integers(1, 40),
    numel=st.integers(1, 120),
    window=st.integers(1, 6),
    step=st.integers(1, 20),
    share=st.floats(0.01, 1.0),
    seed=st.integers(0, 99),
)
def test_properties(block_size, numel, window, step, share, seed):
    """Untouched entries stay bit for bit, the order of the rows changes nothing beyond rounding, numba agrees."""
    kept = math.ceil(share * block_size)
    last = numel - (numel - 1) // block_size * block_size
    case = Case(numel, block_size, kept, min(last, math.ceil(share * last)), window, step)
    rows, weights, param = make_window(case, seed), make_weights(case), make_param(case, seed)
    with pytest.MonkeyPatch.context() as monkeypatch:
        result = update(monkeypatch, "reference", param, rows, weights)
        touched = torch.zeros(numel, dtype=torch.bool, device=DEVICE)
        for row in rows.indices[weights[0] != 0].long():
            starts = torch.arange(rows.kept, device=DEVICE) // kept * block_size
            touched[starts + row] = True
        assert same(result[~touched], param[~touched])

        order = torch.randperm(window, generator=torch.Generator().manual_seed(seed)).to(DEVICE)
        mixed = replace(rows, indices=rows.indices[order], values=rows.values[order])
        torch.testing.assert_close(
            update(monkeypatch, "reference", param, mixed, weights[:, order]), result, rtol=1e-6, atol=1e-6
        )
        if DEVICE == "cpu" and _has("numba"):
            assert same(update(monkeypatch, "cpu", param, rows, weights), result)


def _has(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


@pytest.mark.parametrize("backend", ["reference", *FAST])
@pytest.mark.parametrize("case", [CASES[0], CASES[3], CASES[7]], ids=str)
def test_dots_and_combination(case, backend, monkeypatch):
    here = DEVICE if backend != "cpu" else "cpu"
    if backend != "reference":
        pytest.importorskip({"cpu": "numba"}.get(backend, backend))
    case = replace(case, step=case.window)
    window = make_window(case)
    window = replace(window, indices=window.indices.to(here), values=window.values.to(here))
    dense = make_param(case).float().to(here)
    weights = torch.randn(case.window, generator=torch.Generator().manual_seed(2)).to(here)
    weights[-1] = 0
    rows = paper.rows_of_window(window.indices.cpu(), window.values.cpu(), case.block_size, case.kept_per_block)

    monkeypatch.setenv("HF_LOWMEM_OPTIM_BACKEND", backend)
    expected = torch.from_numpy(paper.dots(rows, dense.cpu()))
    torch.testing.assert_close(window_dots(window, dense).cpu(), expected, rtol=1e-9, atol=1e-9)
    out = dense.clone()
    window_combine_(out, window, weights)
    expected = dense.double().cpu() + torch.from_numpy(paper.combine(rows, weights.cpu().tolist(), case.numel))
    torch.testing.assert_close(out.cpu().double(), expected, rtol=1e-5, atol=1e-4)
    monkeypatch.setenv("HF_LOWMEM_OPTIM_BACKEND", "reference")
    reference = dense.clone()
    window_combine_(reference, window, weights)
    assert agrees(backend, out, reference, 100.0)


def test_contradictions_are_refused():
    case = CASES[0]
    window, weights, param = make_window(case), make_weights(case), make_param(case)
    step = {"lr": 0.1, "eps": 1e-8}
    with pytest.raises(TypeError, match="int16"):
        replace(window, indices=window.indices.int())
    with pytest.raises(TypeError, match="bfloat16 or float32"):
        replace(window, values=window.values.half())
    with pytest.raises(ValueError, match="block_size must be"):
        replace(window, block_size=40000)
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
    with pytest.raises(TypeError, match="dense must be float32"):
        window_dots(window, param.bfloat16())
