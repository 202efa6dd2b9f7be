"""Every adapter makes an optimizer that trains; low-rank ones project the matrices that ours compress."""

from __future__ import annotations

from typing import Any

import peers
import pytest
import torch
from interleave import Contender, Workload, compare, enter, summarize
from peers import FOREACH, FUSED, PEERS, Candidate, build_optimizer, candidates, split_parameters
from torch import nn
from torch.optim import Optimizer

from hf_lowmem_optim import OPTIMIZERS, measure_state

RANK = 8
CANDIDATES = list(candidates([RANK], compiled=False))


@pytest.fixture
def workload() -> Workload:
    torch.manual_seed(0)
    layers = {"embedding": nn.Embedding(50, 64), "wide": nn.Linear(64, 160), "tall": nn.Linear(160, 64)}
    return Workload("small", nn.ModuleDict(layers))


@pytest.mark.parametrize("candidate", CANDIDATES, ids=lambda candidate: candidate.name)
def test_an_optimizer_moves_every_parameter_and_no_gradient(candidate: Candidate, workload: Workload) -> None:
    if candidate.problem is not None:
        assert candidate.problem.startswith(("not installed (pip install ", "needs a GPU"))
        assert enter(candidate, workload) == candidate.problem
        pytest.skip(candidate.problem)
    before = [parameter.detach().clone() for parameter in workload.parameters]
    contender = enter(candidate, workload)
    assert isinstance(contender, Contender), contender
    assert all(not torch.equal(old, new) for old, new in zip(before, workload.parameters, strict=True))
    assert not workload.gradients_changed()
    window = max(group.get("window") or 0 for group in contender.optimizer.param_groups)
    if window:  # it is full before the rounds
        assert min(int(state["step"]) for state in contender.optimizer.state.values() if "step" in state) >= window
    full = 8 * workload.num_parameters
    state = measure_state(contender.optimizer).total_bytes
    if candidate.name.endswith(f"rank={RANK}"):
        dense = 8 * sum(parameter.numel() for parameter in split_parameters(workload.model)[1])
        assert dense < state < 0.6 * full
    elif candidate.name in (FOREACH, FUSED):
        assert state == full + 4 * len(workload.parameters)


def test_everything_that_is_registered_takes_part_once_per_rank() -> None:
    names = [candidate.name for candidate in candidates([4, 16], compiled=True)]
    assert len(names) == len(set(names))
    assert names[:2] == [FOREACH, FUSED]
    in_step = {name for name in OPTIMIZERS if not name.endswith("_layerwise")}
    assert {name.split(" rank=")[0] for name in names} == {*PEERS, *in_step}
    assert {"ldadam rank=4", "ldadam rank=16", "galore-torch rank=4"} <= set(names)
    more = [each.name for each in candidates([4, 16], compiled=True, captured=True, compensated=True)][len(names) :]
    assert {"ldadam rank=4 captured", "microadam captured", "sparse_ggt weight_rounding=compensated"} <= {*more}


def test_a_peer_that_fails_is_a_line_and_ours_an_error_and_shared_gradients_stay(workload: Workload) -> None:
    def build(_: nn.Module) -> Optimizer:
        raise OSError("no compiler\nand more")

    assert enter(Candidate("peer", build, ours=False), workload) == "OSError: no compiler"
    with pytest.raises(OSError, match="no compiler"):
        enter(Candidate("ours", build), workload)

    class Greedy(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            for parameter in self.param_groups[0]["params"]:
                parameter.grad.zero_()

    with pytest.raises(RuntimeError, match="greedy changes the gradients"):
        enter(Candidate("greedy", lambda model: Greedy(model.parameters()), ours=False), workload)


def test_ratios_are_medians_of_rounds_not_of_times(workload: Workload) -> None:
    """A slow moment that meets all alike moves no ratio."""
    entered = [enter(peers.peer(name), workload) for name in (FOREACH, FUSED)]
    first, second = (contender for contender in entered if isinstance(contender, Contender))
    assert compare([first, second], rounds=6, seconds=60.0) >= 0
    assert len(first.times_ms) == len(second.times_ms) == 6
    first.times_ms, second.times_ms = [1.0, 2.0, 100.0, 4.0, 1.0], [3.0, 6.0, 300.0, 12.0, 3.0]
    row = summarize(second, [first, second])
    assert (row["median_ms"], row["ratio_to_foreach"], row["ratio_to_fused"]) == (6.0, 3.0, 1.0)
    assert row["ratio_to_foreach_p10"] == row["ratio_to_foreach_p90"] == 3.0
    assert row["ns_per_parameter"] == pytest.approx(6e6 / workload.num_parameters, abs=1e-3)
    # foreach takes the root of all second moments at once; fused works in place
    assert summarize(first, [first])["peak_temporary_bytes"] >= 4 * workload.num_parameters
    assert row["peak_temporary_bytes"] < 1024


@pytest.mark.parametrize("entry", ["adamw", "muon", "ldadam:rank=4", "lowrank_mfac"])
def test_the_dense_parameters_can_have_a_rate_of_their_own(entry: str, workload: Workload) -> None:
    model = workload.model
    matrices = {id(p) for p in split_parameters(model)[0]}
    assert matrices == {id(model["wide"].weight), id(model["tall"].weight)}  # type: ignore[index]
    name, _, settings = entry.partition(":")
    settings = ",".join(filter(None, (settings, "dense_lr_ratio=4")))
    optimizer = build_optimizer(f"{name}:{settings}", model, 1e-3)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert rates == {id(p): 1e-3 if id(p) in matrices else 4e-3 for p in model.parameters()}

    with pytest.raises(ValueError, match="adamw has no setting 'eps'; there are dense_lr_ratio"):
        build_optimizer("adamw:eps=1", model, 1e-3)
    with pytest.raises(ValueError, match="none of adamw, muon, adamw_8bit, galore, apollo, ldadam"):
        build_optimizer("adamx", model, 1e-3)


def test_muon_is_torchs_on_matrices_and_adamw_on_all_else_at_the_rates_of_its_groups(workload: Workload) -> None:
    optimizer = build_optimizer("muon:dense_lr_ratio=0", workload.model, 1e-3)
    before = [parameter.detach().clone() for parameter in workload.parameters]
    optimizer.step()
    moved = {id(p) for p, old in zip(workload.parameters, before, strict=True) if not torch.equal(p, old)}
    matrices, others = split_parameters(workload.model)
    assert moved == {id(p) for p in matrices}
    momenta = 4 * sum(p.numel() for p in matrices)
    assert measure_state(optimizer).total_bytes == momenta + sum(8 * p.numel() + 4 for p in others)
