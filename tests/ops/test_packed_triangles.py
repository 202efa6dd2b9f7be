"""Packed triangles: numba's loops against the torch version, and symmetric products by halves."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hf_lowmem_optim.ops.block_grid import Piece, grid
from hf_lowmem_optim.ops.packed_triangles import Semidefinite, _fill_squares, _take_triangles
from tests.ops.backends import Use


@pytest.mark.parametrize("n", [1, 2, 16, 37])
def test_loops_agree_with_torch(n: int, use: Use) -> None:
    """To the bit: matrices stored by rows and by columns, triangles with and without what fills their last block."""
    width = n * (n - 1) // 2
    square, padded = torch.randn(3, n, n), torch.randn(3, width + 5)
    found: list[list[torch.Tensor]] = []
    for backend in ("reference", "cpu"):
        use(backend)
        results = []
        for source in (square, square.mT.contiguous().mT):
            results.append(torch.full((3, width), torch.nan))
            _take_triangles(source, results[-1])
        for mirrored in (False, True):
            for lower in (padded[:, :width], padded[:, :width].contiguous()):
                results.append(torch.full((3, n, n), torch.nan))
                _fill_squares(results[-1], square.diagonal(dim1=1, dim2=2), lower, mirrored)
        found.append(results)
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)
    row, column = torch.tril_indices(n, n, -1)
    assert torch.equal(found[0][0], square[:, row, column]) and torch.equal(found[0][1], found[0][0])


@pytest.mark.parametrize("storage", ["fp32", "8bit"])
def test_symmetric_products_by_halves(storage: Any) -> None:
    """Close to float64, symmetric to the bit, and a matrix in a stack is as if alone."""
    n, b = 320, 64
    regions = grid(n, b, n)
    stored = Semidefinite("left", "statistics", lambda a, b: a, storage)
    A = torch.randn(3, n, b, generator=torch.Generator().manual_seed(0))

    def update(first: int, stop: int) -> torch.Tensor:
        count = stop - first
        state = {k: torch.stack([s.allocate("cpu")] * count) for k, s in stored.specs(regions).items()}
        piece = Piece((), regions[0], range(count), range(1), range(1))
        for _ in range(2):
            old = stored.read(state, piece).double()
            S = stored.update_(state, piece, A[first:stop], 0.75, 0.25)
            exact = 0.75 * old + 0.25 * A[first:stop].double() @ A[first:stop].double().mT
            assert torch.equal(S, S.mT)
            torch.testing.assert_close(S.double(), exact, rtol=0, atol=1e-4)
            off = torch.linalg.norm(stored.read(state, piece).double() - exact) / torch.linalg.norm(exact)
            assert off <= (1e-6 if storage == "fp32" else 1e-2)
        return S

    together = update(0, 3)
    for i in range(3):
        assert torch.equal(update(i, i + 1)[0], together[i])
