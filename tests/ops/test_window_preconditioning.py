"""What M-FAC and GGT need of a sparse window: a row of its Gram matrix, and descent along a combination of its rows."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hf_lowmem_optim.kernels.sparse_window import (
    SparseWindow,
    layout,
    window_descend_,
    window_gram_row,
    window_update_,
)
from tests.ops.test_sparse_window import CASES, DEVICE, FAST, Case, make_param, make_window, same
from tests.reference import sparse_window as paper


def filled(case: Case) -> SparseWindow:
    """Rows that were not written hold zeros, as these operations demand."""
    window = make_window(case)
    window.values.nan_to_num_(0.0)
    return window


def rows_of(window):  # type: ignore[no-untyped-def]
    return paper.rows_of_window(
        window.indices.cpu().numpy(), window.values.float().cpu().numpy(), window.block_size, window.kept_per_block
    )


@pytest.mark.parametrize("backend", ["reference", *FAST])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_gram_row(case: Case, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_LOWMEM_OPTIM_BACKEND", backend)
    window = filled(case)
    rows = rows_of(window)
    G = np.array([paper.combine(rows, np.eye(len(rows))[i], case.numel) for i in range(len(rows))])
    for row in {0, min(case.step, case.window) - 1}:
        found = window_gram_row(window, row)
        assert found.dtype == torch.float64 and found.device.type == DEVICE
        np.testing.assert_allclose(found.cpu().numpy(), G @ G[row], rtol=1e-10, atol=1e-10)
    with pytest.raises(IndexError, match="is not one of the window's"):
        window_gram_row(window, case.window)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("window", [1, 33, 70])
@pytest.mark.parametrize("programs", [1, 3])
def test_many_rows_and_several_blocks_a_program(
    window: int, programs: int, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU rows go in groups, and a program has several blocks in its scratch memory, one after the other."""
    case = Case(numel=64 * 4 + 7, block_size=64, kept_per_block=5, kept_in_last_block=2, window=window, step=window)
    monkeypatch.setattr(layout, "_SCRATCH_BYTES", 4 * case.block_size * programs * -(-window // layout.GRAM_ROWS))
    one, weights = filled(case), torch.linspace(-1, 1, window, device=DEVICE)
    found = []
    for each in ("reference", backend):
        monkeypatch.setenv("HF_LOWMEM_OPTIM_BACKEND", each)
        param, moved = make_param(case), make_param(case)
        window_descend_(param, one, weights, lr=0.1, weight_decay=0.1)
        window_update_(moved, one, torch.stack([weights.abs(), weights.abs()]), lr=0.1, eps=1e-8, weight_decay=0.1)
        found.append((window_gram_row(one, window - 1), param, moved))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-12, atol=1e-12)
    assert same(found[0][1], found[1][1]) and same(found[0][2], found[1][2])


@pytest.mark.parametrize("case", CASES, ids=str)
def test_descent_is_the_formula(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_LOWMEM_OPTIM_BACKEND", "reference")
    window, param = filled(case), make_param(case)
    weights = torch.randn(case.window, generator=torch.Generator().manual_seed(2)).to(DEVICE)
    weights[case.step :] = 0
    direction = paper.combine(rows_of(window), weights.double().cpu().numpy(), case.numel)
    expected = param.double().cpu().numpy() * (1 - 0.1 * case.weight_decay) - 0.1 * direction
    window_descend_(param, window, weights, lr=0.1, weight_decay=case.weight_decay)
    step = {torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}[case.param]
    np.testing.assert_allclose(param.double().cpu().numpy(), expected, rtol=step, atol=1e-5)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_descent_is_the_same_on_every_backend(case: Case, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    window = filled(case)
    weights = torch.randn(case.window, generator=torch.Generator().manual_seed(2)).to(DEVICE)
    weights[case.step :] = 0
    weights[0] = 0
    results = []
    for each in ("reference", backend):
        monkeypatch.setenv("HF_LOWMEM_OPTIM_BACKEND", each)
        param = make_param(case)
        window_descend_(param, window, weights, lr=0.1, weight_decay=case.weight_decay)
        window_descend_(param, window, torch.zeros_like(weights), lr=0.1)
        results.append(param)
    assert same(*results)


@pytest.mark.parametrize("backend", ["reference", *FAST])
def test_descent_leaves_untouched_entries_alone(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also −0 and NaN; what is not finite in the window reaches only its own entries."""
    monkeypatch.setenv("HF_LOWMEM_OPTIM_BACKEND", backend)
    case = CASES[4]
    window, param = filled(case), make_param(case)
    window.values[1, 0] = float("inf")
    touched = torch.zeros(case.numel, dtype=torch.bool)
    for row in rows_of(window):
        touched[[position for position, _ in row]] = True
    param[~touched] = torch.where(torch.arange(case.numel)[~touched] % 2 == 0, -0.0, float("nan")).to(param)
    before = param.clone()
    window_descend_(param, window, torch.ones(case.window, device=param.device), lr=0.1)
    assert same(param[~touched], before[~touched])
    assert int((~param[touched].isfinite()).sum()) == 1


def test_descent_refuses_contradictions() -> None:
    window, param = filled(CASES[0]), make_param(CASES[0])
    weights = torch.ones(CASES[0].window, device=param.device)
    with pytest.raises(TypeError, match="float64"):
        window_descend_(param.double(), window, weights, lr=0.1)
    with pytest.raises(ValueError, match="entries"):
        window_descend_(param[1:], window, weights, lr=0.1)
    with pytest.raises(ValueError, match="weights"):
        window_descend_(param, window, weights[1:], lr=0.1)
