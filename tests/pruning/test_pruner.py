"""The pruner beside optimizers: what is zero stays zero, exactly so many are, and what cannot work is refused."""

from __future__ import annotations

import copy
import itertools
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_lowmem_optim import LDAdam, LDAdamLayerwise, LowRankMFAC, SparseGGT, SparseMFAC, fp32_state_dict
from hf_lowmem_optim.pruning.pruner import IOBSPruner
from tests.sharding.processes import launch
from tests.trainer.runs import assert_equal_to_the_bit

MFAC: dict[str, Any] = {"window": 8, "density": 0.5, "block_size": 64, "damping": 1e-2, "lr": 1e-2}
SHORT: dict[str, Any] = {"begin": 2, "end": 8, "every": 3}


def network(dtype: torch.dtype = torch.float32, **sizes: int) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 8)).to(dtype)


def train(model: nn.Module, optimizer: Any, pruner: IOBSPruner | None, steps: range) -> list[Any]:
    done = []
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(16, 12, generator=generator)
        target = torch.sin(3 * x[:, :8])
        optimizer.zero_grad()
        loss = (model(x.to(next(model.parameters()).dtype)).float() - target).square().mean()
        loss.backward()
        optimizer.step()
        done.append(pruner.step() if pruner is not None else None)
    return done


def zeros(model: nn.Module) -> int:
    return sum(int((p == 0).sum()) for p in model.parameters() if p.dim() >= 2)


NUMEL = 12 * 16 + 16 * 8


def build(kind: str, model: nn.Module) -> Any:
    parameters = list(model.named_parameters())
    if kind == "sparse_mfac":
        return SparseMFAC(parameters, weight_decay=0.1, **MFAC)
    if kind == "lowrank_mfac":
        return LowRankMFAC(parameters, lr=1e-2, window=8, rank=2, damping=1e-2, momentum=0.5)
    if kind == "per tensor":
        return SparseMFAC(parameters, scope="tensor", **MFAC)
    if kind == "sparse_ggt":
        return SparseGGT(parameters, lr=1e-1, window=8, density=0.5)
    if kind == "ldadam":
        return LDAdam(parameters, lr=1e-2, rank=2)
    if kind == "ldadam_layerwise":
        return LDAdamLayerwise(parameters, lr=1e-2, rank=2)
    return torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.1)


WINDOWS = ["sparse_mfac", "lowrank_mfac", "per tensor", "sparse_ggt"]
OTHERS = ["ldadam", "ldadam_layerwise", "adamw"]


@pytest.mark.parametrize("kind", [*WINDOWS, *OTHERS])
def test_exactly_so_many_entries_are_zero_after_every_step(kind: str) -> None:
    """Not an entry more, through weight decay and momentum, also after the last projection; others move."""
    model = network()
    optimizer = build(kind, model)
    settings = {} if kind in WINDOWS else {"correction": False}
    pruner = IOBSPruner(optimizer, sparsity=0.7, initial_sparsity=0.1, **SHORT, **settings)
    done = train(model, optimizer, pruner, range(12))
    assert [index + 1 for index, each in enumerate(done) if each is not None] == [2, 5, 8]
    sizes = [12 * 16, 16 * 8] if kind == "per tensor" else [NUMEL]
    assert zeros(model) == done[7].num_pruned == sum(int(0.7 * size) for size in sizes)
    assert done[7].sparsity == zeros(model) / NUMEL
    assert 0.1 * NUMEL - 2 < done[1].num_pruned <= 0.1 * NUMEL < done[4].num_pruned < 0.7 * NUMEL
    assert (done[7].loss_increase is None) == (kind in OTHERS)
    if kind in WINDOWS:
        assert done[7].loss_increase > 0
    before = [p.detach().clone() for p in model.parameters()]
    train(model, optimizer, pruner, range(12, 13))
    for now, then in zip(model.parameters(), before, strict=True):
        if now.dim() >= 2:
            assert torch.equal(now == 0, then == 0)
        assert ((now != then) | (then == 0)).float().mean() > 0.9


@pytest.mark.parametrize("saliency", ["magnitude", "obs"])
def test_patterns_leave_exactly_two_of_four(saliency: Any) -> None:
    model = network()
    optimizer = SparseMFAC(model.parameters(), **MFAC)
    pruner = IOBSPruner(optimizer, pattern=(2, 4), saliency=saliency, **SHORT)
    done = train(model, optimizer, pruner, range(9))
    for weight in (model[0].weight, model[2].weight):
        assert bool(((weight.view(-1, 4) == 0).sum(1) == 2).all())
    # one of four on the way
    assert [each.sparsity for each in done if each is not None] == [0.0, 0.25, 0.5]


@pytest.mark.parametrize("rounding", ["nearest", "stochastic", "compensated"])
def test_zeros_of_bfloat16_weights_are_exact(rounding: str) -> None:
    model = network(torch.bfloat16)
    optimizer = SparseMFAC(model.named_parameters(), weight_rounding=rounding, weight_decay=0.1, **MFAC)
    pruner = IOBSPruner(optimizer, sparsity=0.7, **SHORT)
    train(model, optimizer, pruner, range(11))
    assert zeros(model) == int(0.7 * NUMEL)
    wide = fp32_state_dict(model, optimizer)
    assert sum(int((value == 0).sum()) for key, value in wide.items() if "weight" in key) == int(0.7 * NUMEL)


def test_entries_compete_again_and_come_back() -> None:
    model = network()
    optimizer = SparseMFAC(model.parameters(), **{**MFAC, "lr": 0.1})
    pruner = IOBSPruner(optimizer, sparsity=0.5, schedule="constant", begin=1, end=20, every=3)
    masks = []
    for step in range(20):
        (done,) = train(model, optimizer, pruner, range(step, step + 1))
        if done is not None:
            masks.append((torch.cat([p.reshape(-1) for p in model.parameters() if p.dim() > 1]) == 0, done))
    assert any(done.kept_changed for _, done in masks)
    for (before, _), (after, done) in itertools.pairwise(masks):
        assert done.kept_changed == int((before & ~after).sum())


def test_a_stack_of_matrices_is_pruned_as_its_matrices() -> None:
    stack = nn.Parameter(torch.randn(3, 8, 10, generator=torch.Generator().manual_seed(0)))
    apart = [nn.Parameter(each.clone()) for each in stack.detach()]
    results = []
    for params in ([stack], apart):
        optimizer = SparseMFAC(params, stacked=len(params) == 1, **MFAC)
        pruner = IOBSPruner(optimizer, sparsity=0.6, saliency="obs", **SHORT)
        for step in range(9):
            whole = torch.randn(3, 8, 10, generator=torch.Generator().manual_seed(step))
            for param, grad in zip(params, [whole] if len(params) == 1 else whole, strict=True):
                param.grad = grad.clone()
            optimizer.step()
            pruner.step()
        results.append(torch.stack([p.detach() for p in params]).view(3, 8, 10))
    assert torch.equal(*results) and int((results[0] == 0).sum()) == 144


@pytest.mark.parametrize("kind", ["sparse_mfac", "lowrank_mfac", "adamw"])
def test_a_resumed_run_is_that_of_one_go_to_the_bit(kind: str) -> None:
    """Across a projection, and before the first."""
    settings: dict[str, Any] = {"correction": kind != "adamw", "sparsity": 0.7, **SHORT}
    for stop in (1, 4, 10):
        whole = network()
        optimizer = build(kind, whole)
        pruner = IOBSPruner(optimizer, **settings)
        train(whole, optimizer, pruner, range(stop))
        saved = copy.deepcopy((whole.state_dict(), optimizer.state_dict(), pruner.num_steps))
        train(whole, optimizer, pruner, range(stop, 12))

        resumed = network()
        second = build(kind, resumed)
        resumed.load_state_dict(saved[0])
        second.load_state_dict(saved[1])
        again = IOBSPruner(second, **settings)
        again.resume(saved[2])
        train(resumed, second, again, range(stop, 12))
        assert_equal_to_the_bit(whole.state_dict(), resumed.state_dict())
        assert_equal_to_the_bit(optimizer.state_dict(), second.state_dict())


def test_a_sparsity_of_zero_changes_nothing_to_the_bit() -> None:
    models = [network(torch.bfloat16), network(torch.bfloat16)]
    for model, sparsity in zip(models, (None, 0.0), strict=True):
        optimizer = SparseMFAC(model.parameters(), **MFAC)
        pruner = None if sparsity is None else IOBSPruner(optimizer, sparsity=sparsity, **SHORT)
        train(model, optimizer, pruner, range(9))
    assert_equal_to_the_bit(models[0].state_dict(), models[1].state_dict())


def test_without_gradients_the_projection_is_that_of_magnitude() -> None:
    """F = λI: nothing is corrected, both saliencies choose the same, and the loss is λ/2 of the squares removed."""
    results = []
    for settings in ({"saliency": "obs"}, {}, {"correction": False}):
        model = network()
        before = torch.cat([p.detach().reshape(-1) for p in model.parameters() if p.dim() > 1])
        optimizer = SparseMFAC(model.parameters(), **MFAC)
        for param in model.parameters():
            param.grad = torch.zeros_like(param)
        optimizer.step()
        pruner = IOBSPruner(optimizer, sparsity=0.4, begin=1, end=1, damping=None, **settings)
        done = pruner.step()
        assert done is not None
        removed = before.abs().sort().values[: done.num_pruned].double()
        assert done.loss_increase == pytest.approx(0.005 * float(removed @ removed), rel=1e-6)
        results.append(model.state_dict())
    assert_equal_to_the_bit(results[0], results[1])
    assert_equal_to_the_bit(results[0], results[2])
    assert zeros(model) == 128


def test_the_predicted_loss_is_that_of_the_quadratic_with_and_without_correction() -> None:
    for correction in (True, False):
        model = network()
        optimizer = SparseMFAC(model.parameters(), **{**MFAC, "density": 1.0, "value_dtype": "fp32"})
        pruner = IOBSPruner(optimizer, sparsity=0.5, begin=6, end=6, damping=0.3, correction=correction)
        train(model, optimizer, pruner, range(5))
        train(model, optimizer, None, range(5, 6))
        before = torch.cat([p.detach().reshape(-1) for p in model.parameters()]).double()
        done = pruner.step()
        change = torch.cat([p.detach().reshape(-1) for p in model.parameters()]).double() - before
        # with all entries kept a row is the flat gradient
        G = torch.cat([optimizer.state[p]["values"] for p in model.parameters()], dim=1).double()
        expected = 0.5 * (0.3 * change @ change + (G @ change).square().sum() / 8)
        assert done is not None and done.loss_increase == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize("where", ["window", "weights"])
def test_a_projection_by_nan_is_left_out_and_told(where: str, caplog: pytest.LogCaptureFixture) -> None:
    model = network()
    optimizer = SparseMFAC(model.named_parameters(), **MFAC)
    pruner = IOBSPruner(optimizer, sparsity=0.5, **SHORT)
    train(model, optimizer, pruner, range(4))
    before, pruned = model[0].weight.detach().clone(), int((model[0].weight == 0).sum())
    tensor: Tensor = optimizer.state[model[2].weight]["values"] if where == "window" else model[2].weight.data
    tensor.view(-1)[3] = torch.nan
    with caplog.at_level(logging.ERROR):
        assert pruner.step() is None
    assert "not finite" in caplog.text and "step 5" in caplog.text
    assert torch.equal(model[0].weight, before) and int((model[0].weight == 0).sum()) == pruned


def test_windows_that_are_too_sparse_and_small_dampings_are_told(caplog: pytest.LogCaptureFixture) -> None:
    model = network()
    optimizer = SparseMFAC(model.parameters(), **{**MFAC, "density": 0.25})
    with caplog.at_level(logging.WARNING):
        pruner = IOBSPruner(optimizer, damping=None, begin=2, end=2)
    assert "window=8 × density=0.25 is 2 gradients" in caplog.text
    for group in optimizer.param_groups:
        group["damping"] = 1e-9
    with caplog.at_level(logging.WARNING):
        train(model, optimizer, pruner, range(3))
    assert caplog.text.count("far below") == 1
    caplog.clear()
    IOBSPruner(SparseMFAC(network().parameters(), **MFAC))
    assert not caplog.text


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sparsity": 1.0}, "sparsity=1.0"),
        ({"sparsity": 0.3, "pattern": (2, 4)}, "contradicts"),
        ({"pattern": (4, 2)}, "N < M"),
        (
            {"pattern": (3, 5), "exclude": ["0"]},
            "last dimension of parameter '2.weight', 16, is not divisible by the 5",
        ),
        ({"begin": 50, "end": 40}, "end=40"),
        ({"begin": 0, "end": 950}, "not a multiple of every=100"),
        ({"begin": 0, "end": 50, "schedule": "constant"}, "leave no projection"),
        ({"initial_sparsity": 0.9}, "initial_sparsity=0.9"),
        ({"every": 0}, "every=0"),
        ({"schedule": "linear"}, "schedule='linear'"),
        ({"saliency": "random"}, "saliency='random'"),
        ({"damping": 0.0}, "damping=0.0"),
        ({"damping": "mean"}, "damping='mean'"),
        ({"scope": "layer"}, "scope='layer'"),
        ({"exclude": ["emb"]}, "'emb' names no parameter"),
        ({"exclude": ["weight"]}, "no matrix that could be pruned"),
    ],
)
def test_wrong_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    optimizer = SparseMFAC(network().named_parameters(), **MFAC)
    with pytest.raises(ValueError, match=message):
        IOBSPruner(optimizer, **settings)


@pytest.mark.parametrize(
    ("name", "wrong"), [("damping", [1.0]), ("damping", True), ("initial_sparsity", "0.5"), ("pattern", 4)]
)
def test_settings_of_wrong_types_are_named(name: str, wrong: Any) -> None:
    optimizer = SparseMFAC(network().named_parameters(), **MFAC)
    with pytest.raises(TypeError, match=f"^{name}="):
        IOBSPruner(optimizer, **{name: wrong})


def test_one_name_may_be_excluded_as_it_is() -> None:
    with pytest.raises(ValueError, match="exclude: 'weigh' names no parameter"):
        IOBSPruner(SparseMFAC(network().named_parameters(), **MFAC), exclude="weigh")


def test_what_cannot_be_pruned_is_refused() -> None:
    model = network()
    with pytest.raises(ValueError, match="sparse_mfac or lowrank_mfac"):
        IOBSPruner(build("ldadam", model))
    with pytest.raises(ValueError, match="damping of SparseGGT"):
        IOBSPruner(build("sparse_ggt", model), damping=None)
    with pytest.raises(ValueError, match="scope='tensor'"):
        IOBSPruner(build("per tensor", model), scope="model")
    optimizer = build("sparse_mfac", model)
    first = IOBSPruner(optimizer)
    with pytest.raises(ValueError, match="has a pruner already"):
        IOBSPruner(optimizer)
    first.remove()
    IOBSPruner(optimizer)
    with pytest.raises(ValueError, match="frozen"):
        IOBSPruner(SparseMFAC(model.requires_grad_(False).parameters(), **MFAC))


def test_nothing_is_projected_when_all_is_frozen_by_then() -> None:
    model = network()
    optimizer = SparseMFAC(model.named_parameters(), **MFAC)
    pruner = IOBSPruner(optimizer, begin=1, end=1, every=1)
    for param in model.parameters():
        param.requires_grad_(param.dim() < 2)
    assert pruner.step() is None


def test_frozen_tensors_are_never_touched() -> None:
    model = network()
    model[0].requires_grad_(False)
    before = model[0].weight.clone()
    optimizer = SparseMFAC(model.named_parameters(), **MFAC)
    train(model, optimizer, IOBSPruner(optimizer, **SHORT), range(9))
    assert torch.equal(model[0].weight, before) and zeros(model) == 64


def test_replicas_prune_alike_to_the_bit_and_shards_are_refused(tmp_path: Path) -> None:
    (first, second), _ = launch(
        [("tests.pruning.jobs:replicas", 2), ("tests.pruning.jobs:sharded", 2)], tmp_path, timeout=300
    )
    assert_equal_to_the_bit(first, second)
    assert sum(int((p == 0).sum()) for p in first) == int(0.7 * NUMEL)
