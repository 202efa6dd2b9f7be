"""The projection and the choice of entries, against brute force, and over runs of the optimizers in float64."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from hf_lowmem_optim.optimizers import LowRankMFAC, SparseMFAC
from hf_lowmem_optim.pruning.projection import Member, move_, saliency_of, sums_of, weights_of_rows
from hf_lowmem_optim.pruning.pruner import IOBSPruner
from hf_lowmem_optim.pruning.rows import DenseRows
from hf_lowmem_optim.pruning.support import Bits, lowest_of_all, lowest_of_each
from tests.optimizers.test_preconditioned import (
    EXACT_SPARSE,
    Parity,
    as_parameters,
    deviation,
    drifting_gradients,
    feed,
    sparse,
    start,
)
from tests.reference import iobs
from tests.reference.mfac import ReferenceMFAC


def test_the_small_form_is_the_minimizer() -> None:
    """20 quadratics × 126 supports, and the loss that each form predicts."""
    for seed in range(20):
        rng = np.random.default_rng(seed)
        G, theta, damping = rng.normal(size=(4, 9)), rng.normal(size=9), 10 ** rng.uniform(-3, 0)
        F = iobs.fisher(G, damping)
        for chosen in itertools.combinations(range(9), 4):
            pruned = np.isin(np.arange(9), chosen)
            x, loss = iobs.by_window(theta, G, damping, pruned)
            best = iobs.minimizer(theta, F, pruned)
            assert np.abs(x - best).max() < 1e-9 and np.abs(iobs.textbook(theta, F, pruned) - best).max() < 1e-9
            assert abs(loss - iobs.increase(best, theta, F)) < 1e-9
            # a minimum on its support: no gradient is left there
            assert np.abs((F @ (best - theta))[~pruned]).max() < 1e-9


@pytest.mark.parametrize("damping", [1e-9, 1e-3, 10.0])
def test_the_products_projection_is_the_minimizer(damping: float) -> None:
    """Also with rows that repeat, which leave (mλI + K) without an inverse but for λ."""
    rng = np.random.default_rng(3)
    for _ in range(30):
        G, theta = rng.normal(size=(3, 12)).astype(np.float32), rng.normal(size=12).astype(np.float32)
        G = np.concatenate([G, G[:1]])
        pruned = iobs.lowest(rng.normal(size=12), 6)
        param = torch.tensor(theta)
        member, mask = Member("", param, DenseRows(torch.tensor(G)), None, True), torch.tensor(pruned)
        sums = sums_of([member], [mask], 4)
        w = weights_of_rows(sums, damping)
        move_([member], [mask], w)
        expected = iobs.minimizer(theta.astype(np.float64), iobs.fisher(G.astype(np.float64), damping), pruned)
        assert np.abs(param.numpy() - expected).max() < 1e-5 * max(1.0, np.abs(expected).max())
        assert (param.numpy()[pruned] == 0).all() and (param.numpy()[~pruned] != 0).all()


@given(
    st.lists(st.lists(st.sampled_from([0.0, -0.0, 1e-45, 1.0, -1.0, 1.0000001, 3e38]), min_size=1), min_size=1),
    st.floats(0, 1),
)
def test_exactly_so_many_are_lowest_and_ties_go_to_the_first(tensors: list[list[float]], share: float) -> None:
    parts = [torch.tensor(each, dtype=torch.float32).abs() for each in tensors]
    count = int(share * sum(map(len, parts)))
    chosen = torch.cat(lowest_of_all([lambda part=part: part for part in parts], count)).numpy()
    assert np.array_equal(chosen, iobs.lowest(torch.cat(parts).numpy(), count))
    packed = Bits.pack(torch.tensor(chosen))
    assert packed.packed.nbytes == -(-chosen.size // 8) and np.array_equal(packed.unpack().numpy(), chosen)


def test_of_each_neighbours_so_many_are_lowest() -> None:
    saliency = torch.tensor([3.0, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0])
    assert lowest_of_each(saliency, 2, 4).tolist() == [False, True, True, False, True, True, False, False]


def test_saliency_is_that_of_optimal_brain_surgery() -> None:
    rng = np.random.default_rng(5)
    G, theta = rng.normal(size=(5, 40)).astype(np.float32), rng.normal(size=40).astype(np.float32)
    G[:, :7] = 0
    member = Member("", torch.tensor(theta), DenseRows(torch.tensor(G)), None, True)
    factor = torch.linalg.cholesky(torch.tensor(G @ G.T + 5 * 0.1 * np.eye(5)).double())
    ours = saliency_of(member, factor).double().numpy()
    theirs = iobs.saliency(theta.astype(np.float64), iobs.fisher(G.astype(np.float64), 0.1))
    # but for a common factor
    assert np.abs(ours**2 * 0.1 / theirs - 1).max() < 1e-5
    # a column of zeros is judged by its magnitude, to the bit
    assert np.array_equal(saliency_of(member, factor)[:7].numpy(), np.abs(theta[:7]))


class ReferencePruner:
    """Projects the vector of all tensors of a :class:`ReferenceMFAC` after its steps."""

    def __init__(self, reference: ReferenceMFAC, saliency: str, schedule: tuple[int, int, int], final: float) -> None:
        self.reference, self.saliency, self.schedule, self.final = reference, saliency, schedule, final
        self.prunable = np.concatenate([np.full(W.size, W.ndim >= 2) for W in reference.W.values()])
        self.mask = np.zeros(self.prunable.size, dtype=bool)
        self.n = 0

    def step(self) -> None:
        self.n += 1
        begin, end, every = self.schedule
        theta = np.concatenate([W.reshape(-1) for W in self.reference.W.values()])
        if begin <= self.n <= end and (self.n - begin) % every == 0:
            G = self.reference.G
            F = iobs.fisher(G, (G**2).sum() / G.size)
            count = int(iobs.cubic(self.n, begin, end, 0.2, self.final) * self.prunable.sum())
            saliency = iobs.saliency(theta, F if self.saliency == "obs" else None)
            self.mask[self.prunable] = iobs.lowest(saliency[self.prunable], count)
            theta = iobs.minimizer(theta, F, self.mask)
        theta[self.mask] = 0.0
        begins = np.cumsum([0, *(W.size for W in self.reference.W.values())])
        for (key, W), first in zip(self.reference.W.items(), begins[:-1], strict=True):
            self.reference.W[key] = theta[first : first + W.size].reshape(W.shape)


RUNS = [
    (Parity(SparseMFAC, EXACT_SPARSE, weight_decay=0.1), "magnitude"),
    (Parity(SparseMFAC, sparse(0.5, "bf16")), "magnitude"),
    (Parity(SparseMFAC, EXACT_SPARSE), "obs"),
    (Parity(LowRankMFAC, {"rank": 1, "error_feedback": "fp32"}), "magnitude"),
    (Parity(LowRankMFAC, {"rank": 3, "error_feedback": "fp32"}, gradient_rank=2), "obs"),
]


@pytest.mark.parametrize(("case", "saliency"), RUNS, ids=str)
def test_a_run_with_projections_is_that_of_the_float64_definition(case: Parity, saliency: Any) -> None:
    """No wrong zero, and the weights within 1e-3 of the way travelled; sparse, low-rank and dense windows."""
    rules = {"damping": case.damping, "weight_decay": case.weight_decay}
    params = as_parameters(start())
    optimizer = case.optimizer(params.values(), window=case.window, **rules, **case.hyper)
    pruner = IOBSPruner(
        optimizer, sparsity=0.7, initial_sparsity=0.2, begin=4, end=24, every=5, saliency=saliency, damping="auto"
    )
    reference = ReferenceMFAC(start(), window=case.window, compress=case.compressor(), **rules)
    oracle = ReferencePruner(reference, saliency, (4, 24, 5), 0.7)
    projections = 0
    for gradients in drifting_gradients(30, scale=case.scale, rank=case.gradient_rank):
        optimizer.param_groups[0]["lr"] = case.lr
        feed(optimizer, params, gradients)
        done = pruner.step()
        reference.step(gradients, case.lr)
        oracle.step()
        if done is not None:
            projections += 1
            assert done.num_pruned == oracle.mask.sum()
        zeros = np.concatenate([p.detach().reshape(-1).numpy() == 0 for p in params.values()])
        assert np.array_equal(zeros, oracle.mask)
    assert projections == 5
    assert oracle.mask.sum() == int(0.7 * 224)
    assert deviation(params, reference) <= 1e-3


# ---------------------------------------------------------------------------------------------- sparse regression


def designs() -> list[tuple[int, int, float, float]]:
    """Rows, nonzeros of 200, correlation of columns, λ/L; with the steps of k-IHT, and of I-OBS, that were found."""
    return [(400, 20, 0.9, 1e-3), (400, 20, 0.0, 1e-2), (120, 15, 0.0, 1e-2), (120, 15, 0.0, 1e-1)]


def regression_steps(design: tuple[int, int, float, float], seed: int, correction: bool | None) -> int:
    """Steps to a relative error of 1e-6, at most 300: of the pruner's projections, or of k-IHT (None)."""
    n, k, correlation, ratio = design
    d = 200
    rng = np.random.default_rng(seed)
    where = np.arange(d)
    A = rng.normal(size=(n, d)) @ np.linalg.cholesky(correlation ** np.abs(where[:, None] - where[None])).T
    truth = np.zeros(d)
    truth[rng.choice(d, k, replace=False)] = rng.normal(size=k)
    H = A.T @ A / n
    L = float(np.linalg.eigvalsh(H)[-1])
    damping = ratio * L
    inverse = np.linalg.inv(H + damping * np.eye(d))
    param = nn.Parameter(torch.zeros(d, 1))
    # rows with the same GᵀG/m as those of the design, and no more than there are columns
    G = A if n < d else np.sqrt(d) * np.linalg.cholesky(H).T
    optimizer = LowRankMFAC([param], window=len(G), rank=1, damping=damping)
    param.grad = torch.zeros(d, 1)
    optimizer.step()
    optimizer.state[param]["rows"].copy_(torch.tensor(G))
    pruner = IOBSPruner(
        optimizer,
        sparsity=1 - k / d,
        begin=1,
        every=1,
        schedule="constant",
        correction=bool(correction),
        damping=None,
    )
    x = np.zeros(d)
    for step in range(1, 301):
        gradient = H @ (x - truth)
        if correction is None:
            x = x - gradient / L
            x[iobs.lowest(np.abs(x), d - k)] = 0
        else:
            with torch.no_grad():
                param.copy_(torch.tensor(x - inverse @ gradient)[:, None])
            pruner.step()
            x = param.detach().double().numpy()[:, 0]
        if np.linalg.norm(x - truth) <= 1e-6 * np.linalg.norm(truth):
            return step
    return 301


@pytest.mark.parametrize("design", designs(), ids=str)
def test_sparse_regression_takes_fewer_steps_than_iterative_hard_thresholding(
    design: tuple[int, int, float, float],
) -> None:
    medians = [np.median([regression_steps(design, seed, c) for seed in range(5)]) for c in (None, False, True)]
    thresholding, without, corrected = medians
    assert corrected <= without < 0.5 * thresholding, medians
    assert corrected <= 30, medians
