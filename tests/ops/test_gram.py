"""M-FAC's and GGT's weights and the system behind them: against their definitions, and on what could break them."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from hf_lowmem_optim.ops import gram as module
from hf_lowmem_optim.ops.gram import (
    damped_inverse_column,
    filtered_inverse_column,
    ggt_weights,
    mfac_weights,
    update_systems_,
)

DAMPINGS = [1e-8, 1e-5, 1e-2, 1.0]
SOLVERS = {"mfac": mfac_weights, "ggt": ggt_weights}


def gram_of(size: int, seed: int = 0) -> torch.Tensor:
    """Rows of very different sizes."""
    generator = np.random.default_rng(seed)
    rows = generator.normal(size=(size, 2 * size + 3)) * 10.0 ** generator.integers(-6, 6, size=(size, 1))
    return torch.tensor(rows @ rows.T)


@given(
    size=st.integers(1, 40) | st.sampled_from([128, 129]),
    shift=st.sampled_from([0.0, 1e-9, 1e-3, 1e3]),
    zero=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_it_is_a_column_of_the_inverse(size: int, shift: float, zero: bool, seed: int) -> None:
    gram, column = gram_of(size, seed), seed % size
    if zero:  # a row that was not written yet
        gram[0] = gram[:, 0] = 0
    before = gram.clone()
    found, pivot = damped_inverse_column(gram, column, shift)
    assert torch.equal(gram, before)
    alive = gram.diagonal() > 0
    assert not found[~alive].any()
    # scaled to a diagonal of ones, or the definition itself would lose digits
    scale = torch.where(alive, gram.diagonal(), 1.0).rsqrt()
    unit = gram * scale * scale[:, None] + torch.diag(torch.where(alive, shift * scale**2, 1.0))
    expected = scale * torch.linalg.inv(unit)[:, column] * scale[column] * alive * alive[column]
    # in units of the scaled system, whose entries are of size 1
    inside, wanted = (torch.where(alive, each / scale / scale[column], 0.0) for each in (found, expected))
    torch.testing.assert_close(inside, wanted, rtol=1e-6, atol=1e-6 * float(wanted.abs().max()))
    unit = gram * scale * scale[:, None] + torch.diag((~alive).double())
    assert float(pivot) == pytest.approx(float(torch.linalg.cholesky(unit).diagonal().min()), rel=1e-6)


@pytest.mark.parametrize("size", [2, 20])
def test_rows_that_depend_on_each_other_show(size: int) -> None:
    rows = torch.randn(size, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    rows[1] = -3 * rows[0]
    _, pivot = damped_inverse_column(rows @ rows.T, 0, 1e-5)
    assert math.isnan(pivot) or pivot < 1e-6


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_comes_out_as_nan(bad: float) -> None:
    """Also where the other rows have nothing in common with the one that is not."""
    for size in (1, 5):
        gram = torch.eye(size, dtype=torch.float64)
        gram[-1, -1] = bad
        assert math.isnan(damped_inverse_column(gram, 0, 1.0)[1])
    gram[3] = gram[:, 3] = bad
    for weights in SOLVERS.values():
        assert weights(gram, 3, damping=1e-3).isnan().all()


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match=r"contiguous, float64 \[..., m, m\], got torch.float32 \[2, 2\]"):
        damped_inverse_column(torch.eye(2), 0, 0.0)
    with pytest.raises(ValueError, match=r"got torch.float64 \[2, 3\]"):
        damped_inverse_column(torch.zeros(2, 3, dtype=torch.float64), 0, 0.0)
    with pytest.raises(ValueError, match="column 2 is not one of 2"):
        damped_inverse_column(torch.eye(2, dtype=torch.float64), 2, 0.0)


def by_definition(solver: str, G: np.ndarray, newest: int, damping: float) -> np.ndarray:
    """u through the singular value decomposition of G: exact for repeated rows too."""
    U, S, Vt = np.linalg.svd(G, full_matrices=False)
    S = np.where(1e-13 * S.max() > S, 0, S)
    scale = S / (damping + S**2 / G.shape[0]) if solver.startswith("mfac") else S / (damping + S)
    return Vt.T @ (scale * U[newest])


def mfac_weights_where_rows_depend(gram: torch.Tensor, newest: int, *, damping: float) -> torch.Tensor:
    """As if these did, which a GPU does not know before it has computed both."""
    return filtered_inverse_column(gram, newest, damping * len(gram)).mul_(len(gram))


def combine(solver: str, G: np.ndarray, newest: int, damping: float) -> np.ndarray:
    """u = Gᵀw as the optimizers form it: float64 weights, float32 sum."""
    weights = (SOLVERS | {"mfac filtered": mfac_weights_where_rows_depend})[solver](
        torch.tensor(G @ G.T), newest, damping=damping
    )
    assert weights.dtype == torch.float64 and weights.shape == (G.shape[0],)
    return (torch.tensor(G, dtype=torch.float32).T @ weights.float()).double().numpy()


def random_rows(scale: float, rows: int = 16) -> np.ndarray:
    return (scale * np.random.default_rng(0).normal(size=(rows, 200))).astype(np.float32).astype(np.float64)


WINDOWS: dict[str, Callable[[float], np.ndarray]] = {
    "full": lambda s: random_rows(s),
    "one row": lambda s: np.concatenate([np.zeros((5, 200)), random_rows(s, 1), np.zeros((10, 200))]),
    "partly filled": lambda s: np.concatenate([random_rows(s, 6), np.zeros((10, 200))]),
    "one gradient repeated": lambda s: np.repeat(random_rows(s, 1), 16, axis=0),
    "three gradients repeated": lambda s: np.concatenate([np.repeat(random_rows(s, 3), 4, axis=0), np.zeros((4, 200))]),
    "repeated with other signs and sizes": lambda s: (
        random_rows(s, 2)[np.arange(16) % 2] * (2.0 ** -(np.arange(16) % 5) * (-1.0) ** np.arange(16))[:, None]
    ),
    "strongly correlated": lambda s: np.float32(random_rows(s, 1) + 1e-2 * random_rows(s)).astype(np.float64),
    "nearly the same": lambda s: np.float32(random_rows(s, 17)[:1] + 1e-4 * random_rows(s, 17)[1:]).astype(np.float64),
}


@pytest.mark.parametrize("solver", [*SOLVERS, "mfac filtered"])
@pytest.mark.parametrize("damping", DAMPINGS)
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("name", list(WINDOWS))
def test_against_the_definition(solver: str, damping: float, scale: float, name: str) -> None:
    G = WINDOWS[name](scale)
    expected = by_definition(solver, G, 5, damping)
    error = np.linalg.norm(combine(solver, G, 5, damping) - expected) / np.linalg.norm(expected)
    # where gradients repeat, cancelling weights leave float32 rounding
    assert error <= (1e-5 if name in ("full", "one row", "partly filled") else 1e-3), error


@pytest.mark.parametrize("damping", DAMPINGS)
def test_gradients_of_very_different_sizes(damping: float) -> None:
    """A spike in the window must not blur the small gradients after it."""
    G = random_rows(1.0) * 10.0 ** -np.arange(16)[:, None]
    for newest in (0, 8, 12):
        expected = by_definition("mfac", G, newest, damping)
        # every direction is known to float32; the definition itself, by SVD, to 1e-16 of the largest
        error = np.linalg.norm(combine("mfac", G, newest, damping) - expected)
        assert error <= 1e-2 * np.linalg.norm(expected), (newest, error)


@given(
    solver=st.sampled_from(list(SOLVERS)),
    damping=st.sampled_from([1e-30, *DAMPINGS, 1e3]),
    sources=st.lists(st.integers(-1, 5), min_size=1, max_size=12),
    log_scales=st.lists(st.integers(-38, 37), min_size=6, max_size=6),
    newest=st.integers(0, 11),
)
@example("mfac", 1e-5, [-1] * 8, [0] * 6, 3)
@example("ggt", 1e-5, [-1] * 8, [0] * 6, 3)
def test_never_nan(solver: str, damping: float, sources: list[int], log_scales: list[int], newest: int) -> None:
    """Rows that repeat, vanish, or differ by 75 orders of magnitude; -1 is a row of zeros."""
    rows = torch.randn(6, 40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rows = (rows * 10.0 ** torch.tensor(log_scales, dtype=torch.float64)[:, None]).float().double()
    G = torch.stack([rows[i] if i >= 0 else torch.zeros(40, dtype=torch.float64) for i in sources])
    weights = SOLVERS[solver](G @ G.T, newest % len(sources), damping=damping)
    assert torch.isfinite(weights).all()
    assert not weights[[i for i, source in enumerate(sources) if source < 0]].any()


@given(
    solver=st.sampled_from(list(SOLVERS)),
    order=st.permutations(range(10)),
    newest=st.integers(0, 9),
    filled=st.integers(1, 10),
    damping=st.sampled_from(DAMPINGS),
)
def test_the_order_of_rows_does_not_matter(solver: str, order: Any, newest: int, filled: int, damping: float) -> None:
    G = torch.randn(10, 60, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    G[filled:] = 0
    gram = G @ G.T
    weights = SOLVERS[solver](gram, newest, damping=damping)
    permuted = SOLVERS[solver](gram[order][:, order], order.index(newest), damping=damping)
    torch.testing.assert_close(permuted, weights[order], rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("solver", list(SOLVERS))
def test_a_device_is_not_waited_for(solver: str) -> None:
    """Tensors on no device have no numbers to ask for."""
    gram = torch.empty(8, 8, dtype=torch.float64, device="meta")
    assert SOLVERS[solver](gram, 3, damping=1e-3).shape == (8,)


@pytest.mark.parametrize("on_gpu", [False, True])
@pytest.mark.parametrize("solver", list(SOLVERS))
@pytest.mark.parametrize("window", [4, 6, 32])
def test_a_batch_is_each_system_by_itself(
    window: int, solver: str, on_gpu: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the bit on a CPU, and on a GPU, which solves all of them both ways, but for its rounding."""
    solve = functools.partial(SOLVERS[solver], damping=1e-5)
    rows = torch.tensor(np.stack([random_rows(10.0**seed, window) for seed in range(5)]))
    rows[1, 1] = -2 * rows[1, 0]  # depend on each other
    rows[2] = 0
    rows[3, 2, 5] = math.nan
    before, products = rows @ rows.mT, (rows @ rows[:, 1, :, None])[..., 0]
    before[:, 1] = before[:, :, 1] = 7  # the oldest row, which the newest takes the place of
    alone = [gram.clone() for gram in before]
    expected = [update_systems_([gram], 1, [own[None]], None, solve) for gram, own in zip(alone, products, strict=True)]
    if on_gpu:
        monkeypatch.setattr(module, "_READABLE", ())
    monkeypatch.setattr(module, "_CPU_BYTES", 2 * before[0].nbytes)
    solved: list[int] = []

    def noted(batch: torch.Tensor, row: int) -> torch.Tensor:
        solved.append(len(batch))
        return solve(batch, row)

    together = list(before)
    found = update_systems_(together, 1, [products[:2], products[2:]], None, noted)
    assert solved == ([2, 2, 1] if on_gpu or window % 4 == 0 else [1] * 5)
    assert found.dtype == torch.float32
    for mine, own, gram, was, product in zip(found, expected, together, alone, products, strict=True):
        torch.testing.assert_close(gram, was, rtol=0, atol=0, equal_nan=True)
        torch.testing.assert_close(gram[1], product, rtol=0, atol=0, equal_nan=True)
        scale = own.nan_to_num().abs().max().item() if on_gpu else 0.0
        torch.testing.assert_close(mine, own, rtol=0, atol=1e-6 * scale, equal_nan=True)
    assert found[3].isnan().all() and not found[2].any() and found[[0, 1, 4]].isfinite().all()


def test_one_system_adds_up_its_tensors() -> None:
    gram, products = torch.zeros(3, 3, dtype=torch.float64), torch.eye(3, dtype=torch.float64)
    found = update_systems_([gram], 1, [products[:1], products[1:]], lambda shares: 2 * shares, lambda g, _: g[:, 1])
    assert found.tolist() == [2.0] * 3 == gram[1].tolist() == gram[:, 1].tolist()
