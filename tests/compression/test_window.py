"""The dense and the low-rank windows against the matrix G that they stand for."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hf_lowmem_optim.compression import window as window_module
from hf_lowmem_optim.compression.window import DenseRows, LowRankRows, Window

NUM_ROWS, ROWS, COLUMNS = 5, 12, 30


def dense() -> tuple[Window, Tensor]:
    rows = torch.randn(NUM_ROWS, ROWS * COLUMNS)
    return DenseRows(rows), rows.clone()


def lowrank() -> tuple[Window, Tensor]:
    left, right = torch.randn(NUM_ROWS, 3, ROWS), torch.randn(NUM_ROWS, 3, COLUMNS)
    return LowRankRows(left, right), torch.einsum("mrp,mrq->mpq", left.double(), right.double()).flatten(1)


@pytest.mark.parametrize("build", [dense, lowrank])
def test_a_window_is_its_matrix(build, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    torch.manual_seed(0)
    window, full = build()
    G = full.double()
    for chunk_entries in (1 << 22, 1):
        monkeypatch.setattr(window_module, "_CHUNK_ENTRIES", chunk_entries)
        for row in range(NUM_ROWS):
            found = window.gram_row(row)
            assert found.dtype == torch.float64
            torch.testing.assert_close(found, G @ G[row], rtol=1e-12, atol=1e-12)
    weights, out = torch.randn(NUM_ROWS), torch.randn(ROWS * COLUMNS)
    expected = out.double() + G.T @ weights.double()
    window.combine_(out, weights)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
    window.clear_(2)
    G[2] = 0
    torch.testing.assert_close(window.gram_row(3), G @ G[3], rtol=1e-12, atol=1e-12)
    assert not window.gram_row(2).any()


def test_a_cleared_lowrank_row_hands_the_right_factor_on() -> None:
    """The next compression starts from the row before it."""
    left, right = torch.randn(4, 2, 6), torch.randn(4, 2, 7)
    before = right.clone()
    LowRankRows(left, right).clear_(0)
    assert not left[0].any() and torch.equal(right[0], before[3])
    assert torch.equal(right[1:], before[1:])
