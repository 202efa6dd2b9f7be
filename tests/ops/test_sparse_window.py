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

from hf_lowmem_optim.ops.sparse_window import foreach_window_gram_rows, window_combine_
from hf_lowmem_optim.ops.window import FLOATS, INDEX_BITS, Grids, SparseWindow, ValueDtype, encode
from tests.ops.backends import (
    BACKENDS,
    BF16,
    FAST,
    FP16,
    FP32,
    QUIET,
    Use,
    device_of,
    same,
    window_descend_,
    window_gram_row,
    window_update_,
)
from tests.reference import sparse_window as paper

pytestmark = QUIET


@dataclass(frozen=True)
class Case:
    numel: int
    block_size: int
    kept_per_block: int
    kept_in_last_block: int
    window: int
    step: int
    values: ValueDtype = "bf16"
    param: torch.dtype = FP32
    weight_decay: float = 0.0
    eps: float = 1e-8


CASES = [
    Case(numel=4096 * 2 + 1000, block_size=4096, kept_per_block=41, kept_in_last_block=10, window=10, step=7),
    Case(numel=4096 + 4096, block_size=4096, kept_per_block=41, kept_in_last_block=41, window=10, step=33),
    Case(1, 4096, 41, 1, window=10, step=1),
    Case(37, 16, 16, 5, window=3, step=11, weight_decay=0.1, eps=0.0),  # density 1
    Case(96, 32, 16, 16, window=8, step=9),
    Case(1030, 256, 13, 1, window=15, step=40, param=BF16, weight_decay=0.1),
    Case(777, 100, 7, 6, window=4, step=2, param=FP16, weight_decay=0.1),
    Case(1030, 256, 13, 1, window=15, step=40, values="fp32"),
    Case(1500, 500, 250, 250, window=16, step=15, weight_decay=0.1),
    # what registers do not hold: more rows, more kept entries
    Case(777, 100, 7, 6, window=20, step=57, weight_decay=0.1),
    Case(32768 + 900, 32768, 300, 9, window=3, step=2, param=BF16),
    Case(900, 512, 400, 300, window=8, step=6, param=FP16, values="fp32", weight_decay=0.1),
    # codes on grids
    Case(4096 + 1000, 4096, 41, 10, window=10, step=7, values="4bit"),
    Case(1030, 256, 13, 1, window=15, step=40, values="8bit", param=BF16, weight_decay=0.1),
    Case(777, 100, 7, 6, window=20, step=57, values="4bit", weight_decay=0.1),
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
    layout = case.numel, case.block_size, case.kept_per_block
    if case.values in FLOATS:
        return SparseWindow(indices.to(device), values.to(FLOATS[case.values]).to(device), *layout)
    coded = [encode(block, int(case.values[0])) for block in values.float().split(case.kept_per_block, 1)]
    codes = torch.cat([each for each, _, _ in coded], 1)
    lo, step = (torch.stack([each[part] for each in coded], 1).to(device) for part in (1, 2))
    if case.values == "4bit":
        return SparseWindow((indices | codes << INDEX_BITS).to(torch.int16).to(device), None, *layout, Grids(lo, step))
    return SparseWindow(indices.to(device), codes.to(torch.uint8).to(device), *layout, Grids(lo, step))


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
    indices, values = (part.cpu().numpy() for part in window.read(slice(0, window.kept)))
    return paper.rows_of_window(indices, values, window.block_size, window.kept_per_block)


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


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_torch_is_the_paper_and_the_other_backends_are_torch_to_the_bit(case: Case, backend: str, use: Use) -> None:
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

    before = param.double().cpu().numpy()
    update, descended, combined = (each.double().cpu().numpy() for each in found[1])
    w1, w2 = moments.double().cpu().numpy()
    expected = paper.step(before, rows_of(window), w1, w2, 0.01, case.eps, case.weight_decay)
    np.testing.assert_allclose(update, expected, rtol=ROUNDING[case.param], atol=1e-7)
    direction = paper.combine(rows_of(zeroed), weights.double().cpu().numpy(), case.numel)
    expected = before * (1 - 0.1 * case.weight_decay) - 0.1 * direction
    np.testing.assert_allclose(descended, expected, rtol=ROUNDING[case.param], atol=1e-5)
    np.testing.assert_allclose(combined, direction + before, rtol=1e-5, atol=1e-4)
    G = np.array([paper.combine([row], [1.0], case.numel) for row in rows_of(zeroed)])
    for row in {0, min(case.step, case.window) - 1}:
        products = window_gram_row(zeroed, row)
        assert products.dtype == torch.float64 and products.device == zeroed.device
        np.testing.assert_allclose(products.cpu().numpy(), G @ G[row], rtol=1e-10, atol=1e-10)


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
    visible = torch.tensor([not math.isfinite(a) or not math.isfinite(b) for a, b in values.T.tolist()])
    for weight_decay in (0.0, 0.5):
        results = []
        for each in ("reference", backend):
            use(each)
            descended = param.clone()
            window_descend_(descended, window, weights[0], lr=0.1, weight_decay=weight_decay)
            results.append((updated(param, window, weights, weight_decay=weight_decay, lr=1.0, eps=0.0), descended))
        assert all(map(same, *results))
        assert results[1][0][:length].cpu()[visible].isnan().all()
        assert not results[1][1][:length].cpu()[visible].isfinite().any()
        if weight_decay == 0:
            assert torch.equal(results[1][0][length:].view(torch.uint8), param[length:].view(torch.uint8))
            assert same(results[1][1][length:], param[length:])


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


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize(("window", "programs"), [(1, 3), (9, 1), (33, 3), (70, 1)])
def test_many_rows_and_blocks_in_a_program(
    window: int, programs: int, backend: str, use: Use, monkeypatch: Any
) -> None:
    """On a GPU rows go in groups, and a program has several blocks in its scratch memory, one after the other."""
    case = Case(numel=64 * 4 + 7, block_size=64, kept_per_block=5, kept_in_last_block=2, window=window, step=window)
    if backend == "triton":
        kernels = importlib.import_module("hf_lowmem_optim.ops.triton.window_products")
        scratch = 4 * case.block_size * programs * -(-window // kernels.GRAM_ROWS)
        monkeypatch.setattr(kernels, "_SCRATCH_BYTES", scratch)
        monkeypatch.setattr(kernels, "_GRAM_PROGRAMS", programs)
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


def test_contradictions_are_refused() -> None:
    case = CASES[0]
    window, weights, param = make_window(case), moment_weights(case), make_param(case)
    step, other = {"lr": 0.1, "eps": 1e-8}, make_window(CASES[3])
    refusals: list[tuple[type[Exception], str, Callable[[], object]]] = [
        (TypeError, "int16", replace(window, indices=window.indices.int()).check),
        (TypeError, "bfloat16 or float32", replace(window, values=window.values.half()).check),
        (ValueError, "block_size must be", replace(window, block_size=40000).check),
        (ValueError, "between 1 and block_size, got 5000", replace(window, kept_per_block=5000).check),
        (ValueError, "cannot give rows of", replace(window, numel=case.numel + 4096).check),
        (ValueError, "contiguous", replace(window, indices=window.indices.T.contiguous().T).check),
        (
            ValueError,
            "param must have 9192 entries",
            lambda: window_update_(param[1:], window, weights, **step),
        ),
        (ValueError, "param must be one of", lambda: window_update_(param.double(), window, weights, **step)),
        (ValueError, "of shape", lambda: window_update_(param, window, weights[:1], **step)),
        (ValueError, "float64", lambda: window_descend_(param.double(), window, weights[0], lr=0.1)),
        (ValueError, r"shape \[10\], got \[9\]", lambda: window_descend_(param, window, weights[0, 1:], lr=0.1)),
        (TypeError, "out must be float32", lambda: window_combine_(param.half(), window, weights[0])),
        (IndexError, "row 10 is not one of the window's 10", lambda: window_gram_row(window, case.window)),
        (ValueError, "windows of one call must be alike", lambda: foreach_window_gram_rows([window, other], 0)),
    ]
    for error, says, call in refusals:
        with pytest.raises(error, match=says):
            call()
