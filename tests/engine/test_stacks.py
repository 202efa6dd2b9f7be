"""A stack of matrices in one parameter: trained, planned, saved and checked as if each were a parameter of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_lowmem_optim import OPTIMIZERS, measure_state, plan_optimizer
from hf_lowmem_optim.engine.buckets import own_tensors
from hf_lowmem_optim.memory.budget import BudgetSearch
from hf_lowmem_optim.memory.plan import plan_temporaries
from hf_lowmem_optim.optimizers import LowMemoryOptimizer
from tests.optimizers.cases import assert_equal, assert_same_state, sizes_of_batches, through_a_file

COUNT, STEPS = 5, 6
SPARSE = {"density": 0.1, "block_size": 64, "window": 3}
MICROADAM: dict[str, Any] = {**SPARSE, "min_compress_size": 100}
LOW_RANK: dict[str, Any] = {"rank": 4, "window": 3}
SETTINGS: list[tuple[str, dict[str, Any]]] = [
    ("ldadam", {"rank": 4, "weight_decay": 0.1}),
    ("ldadam", {"rank": 4, "error_feedback": "8bit", "stochastic_rounding": True}),
    ("ldadam", {"rank": 4, "error_feedback": "param", "state_dtype": "param"}),
    ("ldadam", {"rank": 4, "error_feedback": "grad"}),
    ("ldadam", {"rank": 4, "error_feedback": "none"}),
    ("lordo", {"rank": 4, "sync_every": 2, "error_feedback": "4bit", "weight_decay": 0.1}),
    ("lowrank_mfac", {**LOW_RANK, "momentum": 0.5}),
    ("lowrank_mfac", {**LOW_RANK, "scope": "tensor"}),
    ("lowrank_mfac", {**LOW_RANK, "rank": 30, "lr": 0.1}),  # the gradients themselves are in the window
    ("dct_adamw", {"rank": 4, "update_interval": 2, "weight_decay": 0.1}),
    ("trion", {"rank": 4, "state_dtype": "param"}),
    ("microadam", MICROADAM),
    ("sparse_mfac", {**SPARSE, "momentum": 0.5}),
    ("sparse_mfac", {**SPARSE, "scope": "tensor"}),
    ("sparse_ggt", SPARSE),
    ("ldadam_layerwise", {"rank": 4, "clip_tensor_norm": None}),
    ("dct_adamw_layerwise", {"rank": 4}),
    ("lowrank_mfac_layerwise", LOW_RANK),
    ("microadam_layerwise", MICROADAM),
]


def values(shape: Sequence[int], seed: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def gradient_of(step: int, shape: Sequence[int], dtype: torch.dtype) -> Tensor | None:
    """A step without gradient; a matrix that never has one, one that has it late: experts that no token reached."""
    gradient = values((COUNT, *shape), 10 + step, dtype)
    gradient[1] = 0
    gradient[2] *= step >= 3
    return None if step == 4 else gradient


def transposed(value: Tensor) -> Tensor:
    """The same values, of which no matrix is contiguous."""
    return value.mT.contiguous().mT


def build(name: str, params: Any, hyper: dict[str, Any], *, stacked: bool) -> LowMemoryOptimizer:
    return OPTIMIZERS[name].optimizer_class(params, stacked=stacked, **hyper)


@pytest.mark.parametrize(
    ("name", "hyper", "shape", "dtype"),
    [
        # each setting with every shape and both dtypes, and so over all settings each shape with either
        (*setting, shape, (torch.float32, torch.bfloat16)[(number + other) % 2])
        for number, setting in enumerate(SETTINGS)
        for other, shape in enumerate([(32, 48), (48, 32), (33, 35)])
    ],
    ids=str,
)
def test_a_stack_is_trained_like_its_matrices(
    name: str, hyper: dict[str, Any], shape: tuple[int, int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the bit on plain torch, and the state is that of the matrices; beside other tensors of the same system.

    But for products with a float32 error of odd size: how they are rounded depends on its address.
    """
    monkeypatch.setenv("HF_LOWMEM_OPTIM_BACKEND", "reference")
    start = values((COUNT, *shape), 0, dtype)
    stack, matrices = nn.Parameter(transposed(start)), [nn.Parameter(matrix.clone()) for matrix in start]
    beside = [nn.Parameter(torch.ones(*shape, dtype=dtype)) for _ in range(2)]
    one = build(name, [stack, beside[0]], hyper, stacked=True)
    many = build(name, [*matrices, beside[1]], hyper, stacked=False)
    in_backward = one.method.layerwise or hyper.get("error_feedback") == "grad"
    for step in range(STEPS):
        gradient, other = gradient_of(step, shape, dtype), values(shape, 90 + step, dtype)
        pairs = [(weight, other) for weight in beside]
        if gradient is not None:
            pairs += [(stack, transposed(gradient)), *zip(matrices, gradient, strict=True)]
        for weight, grad in pairs:
            if in_backward:
                (weight * grad).sum().backward()
            else:
                weight.grad = grad.clone()
        for optimizer in (one, many):
            optimizer.step()
            optimizer.zero_grad()
    assert torch.equal(*beside) and not torch.equal(stack, start) and stack.isfinite().all()
    together, state = torch.stack([matrix.detach() for matrix in matrices]), own_tensors(one.state[stack])
    if shape == (33, 35) and dtype == torch.float32 and "error" in state:
        torch.testing.assert_close(stack.detach(), together, rtol=1e-5, atol=1e-6)
    else:
        assert torch.equal(stack, together)
        for key, parts in state.items():
            assert_equal(parts, [many.state[matrix][key] for matrix in matrices])
    assert measure_state(one) == plan_optimizer(one)
    assert measure_state(one).component_bytes == plan_optimizer(many).component_bytes


@pytest.mark.parametrize("name", ["ldadam", "lowrank_mfac", "microadam", "sparse_mfac"])
def test_micro_batches_go_into_the_errors_of_the_matrices(name: str) -> None:
    hyper = {"ldadam": {"rank": 4, "stochastic_rounding": True}, "lowrank_mfac": LOW_RANK}.get(name, SPARSE)
    hyper = MICROADAM if name == "microadam" else hyper
    start = values((COUNT, 32, 48), 0, torch.float32)
    stack, matrices = nn.Parameter(start.clone()), [nn.Parameter(matrix.clone()) for matrix in start]
    optimizers: list[Any] = [
        build(f"{name}_layerwise", [stack], hyper, stacked=True),
        build(f"{name}_layerwise", matrices, hyper, stacked=False),
    ]
    for step in range(4):
        for optimizer, weights in zip(optimizers, ([stack], matrices), strict=True):
            parts = [values(start.shape, 7 * step + i, torch.float32) for i in range(2)]
            given = [[part] if weights == [stack] else list(part) for part in parts]
            with optimizer.accumulating():
                sum((w * g).sum() for w, g in zip(weights, given[0], strict=True)).backward()
            assert all(weight.grad is None for weight in weights)
            sum((w * g).sum() for w, g in zip(weights, given[1], strict=True)).backward()
            optimizer.step()
    assert torch.equal(stack, torch.stack([matrix.detach() for matrix in matrices]))


@pytest.mark.parametrize(("name", "hyper"), [("ldadam", {"rank": 4}), ("lowrank_mfac", LOW_RANK)], ids=str)
@pytest.mark.parametrize("count", [1, COUNT])
@pytest.mark.parametrize("rounding", ["nearest", "stochastic", "compensated"])
def test_a_run_that_is_resumed_goes_on_alike(name: str, hyper: dict[str, Any], count: int, rounding: str) -> None:
    """Two stacks, also of one matrix each, whose loaded state has storages of its own."""
    hyper = {**hyper, "weight_rounding": rounding}
    straight = [nn.Parameter(values((count, 32, 48), seed, torch.bfloat16)) for seed in range(2)]
    optimizer = build(name, straight, hyper, stacked=True)

    def train(each: LowMemoryOptimizer, weights: Sequence[nn.Parameter], steps: range) -> None:
        for step in steps:
            for index, weight in enumerate(weights):
                weight.grad = values(weight.shape, 100 * index + step, weight.dtype)
            each.step()

    train(optimizer, straight, range(3))
    saved, weights = through_a_file((optimizer.state_dict(), [weight.data for weight in straight]))
    for state in saved["state"].values():
        state.update({key: value.clone() for key, value in state.items() if isinstance(value, Tensor)})
    resumed = [nn.Parameter(weight) for weight in weights]
    second = build(name, resumed, hyper, stacked=True)
    second.load_state_dict(saved)
    for each, params in ((optimizer, straight), (second, resumed)):
        train(each, params, range(3, 6))
    assert_equal(straight, resumed)
    assert_same_state(optimizer, second)


def test_each_matrix_is_rounded_by_draws_of_its_own() -> None:
    start, gradient = values((32, 48), 0, torch.bfloat16), values((32, 48), 1, torch.bfloat16)
    stack = nn.Parameter(torch.stack([start] * COUNT))
    optimizer = build("ldadam", [stack], {"rank": 4, "lr": 1e-4, "weight_rounding": "stochastic"}, stacked=True)
    stack.grad = torch.stack([gradient] * COUNT)
    optimizer.step()
    moved = [(matrix != start).flatten() for matrix in stack.detach()]
    for index, one in enumerate(moved):
        assert 0 < one.double().mean() < 1
        for other in moved[:index]:
            # as independent draws would, given how often each weight moves
            assert not torch.equal(one, other) and (one & other).sum() < 0.9 * one.sum()


def test_matrices_of_a_stack_share_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also those of several stacks; small ones on a CPU as on a GPU."""
    sizes = sizes_of_batches(monkeypatch)
    stacks = [nn.Parameter(values((COUNT, 32, 48), seed, torch.float32)) for seed in range(3)]
    optimizer = build("ldadam", stacks, {"rank": 4}, stacked=True)
    for stack in stacks:
        stack.grad = torch.ones_like(stack)
    optimizer.step()
    assert sum(sizes) == 3 * COUNT and len(sizes) <= 3


def test_only_three_dimensions_make_a_stack_and_only_if_asked() -> None:
    method = OPTIMIZERS["ldadam"].optimizer_class.method
    on, off = ({**method.options.defaults(), "stacked": value, "rank": 3} for value in (True, False))
    for shape in ((8, 4, 3, 3), (32, 48), (48,)):
        weight = torch.empty(shape, device="meta")
        assert method.state_specs(weight, on) == method.state_specs(weight, off)
    weight = torch.empty(4, 32, 48, device="meta")
    assert method.state_specs(weight, on)["basis"].shape == (4, 32, 3)
    assert method.state_specs(weight, off)["basis"].shape == (4, 3)
    assert method.state_specs(weight, on)["basis"].shard(2).shape == (2, 32, 3)
    assert not method.compresses((0, 32, 48), on) and not method.compresses((32, 2, 48), on)


def test_the_dense_rule_does_not_know_stacks() -> None:
    """What is too small as matrices is dense, to the bit, although it is large enough as a whole."""
    stacks = [nn.Parameter(torch.ones(COUNT, 32, 8)) for _ in range(2)]
    optimizers = [build("ldadam", [stacks[0]], {"rank": 8}, stacked=True), torch.optim.AdamW([stacks[1]], fused=True)]
    optimizers[1].param_groups[0].update(optimizers[0].param_groups[0], params=[stacks[1]])
    for optimizer, stack in zip(optimizers, stacks, strict=True):
        for step in range(3):
            stack.grad = values(stack.shape, step, torch.float32)
            optimizer.step()
    assert torch.equal(*stacks) and optimizers[0].state[stacks[0]]["exp_avg"].shape == stacks[0].shape


def test_a_checkpoint_of_a_version_without_stacks_loads_where_there_is_none() -> None:
    weight = nn.Parameter(torch.ones(20, 8, 6))
    old = build("ldadam", [weight], {"rank": 4}, stacked=False)
    weight.grad = torch.ones_like(weight)
    old.step()
    saved = old.state_dict()
    del saved["param_groups"][0]["stacked"]
    new = build("ldadam", [weight], {"rank": 4}, stacked=False)
    new.load_state_dict(saved)
    assert new.param_groups[0]["stacked"] is False
    assert_equal(own_tensors(old.state[weight]).values(), own_tensors(new.state[weight]).values())
    stacked = build("ldadam", [weight], {"rank": 4}, stacked=True)
    with pytest.raises(ValueError, match=r"saved with stacked=False, .* has stacked=True"):
        stacked.load_state_dict(saved)
    assert not stacked.state


def test_what_kernels_take_for_granted_is_checked_in_every_matrix() -> None:
    weight = nn.Parameter(torch.ones(COUNT, 33, 35))
    optimizer = build("microadam", [weight], MICROADAM, stacked=True)
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    saved = through_a_file(optimizer.state_dict())
    build("microadam", [weight], MICROADAM, stacked=True).load_state_dict(saved)
    saved["state"][0]["indices"][3, 0, -1] = 33 * 35 % 64  # behind the end of the last block
    with pytest.raises(ValueError, match="indices"):
        build("microadam", [weight], MICROADAM, stacked=True).load_state_dict(saved)


@pytest.mark.parametrize("name", ["ldadam", "lowrank_mfac"])
def test_a_step_is_planned_for_the_matrices(name: str) -> None:
    """The bound of what it allocates, and the largest rank, are those of the matrices by themselves."""
    cls = OPTIMIZERS[name].optimizer_class
    defaults, stack = cls.method.options.defaults(), torch.empty(64, 512, 384, device="meta")
    one = [{**defaults, "stacked": True, "params": [stack]}]
    many = [{**defaults, "params": list(stack)}]
    whole = [{**defaults, "params": [stack]}]
    assert plan_temporaries(cls, one) == plan_temporaries(cls, many) < plan_temporaries(cls, whole)
    of_rank_100 = BudgetSearch(cls, many).total_bytes({"rank": 100})
    assert (
        BudgetSearch(cls, one).largest(of_rank_100)["rank"]
        == BudgetSearch(cls, many).largest(of_rank_100)["rank"]
        == 100
    )
    # any rank below the smaller dimension fits
    assert "rank" not in BudgetSearch(cls, one).largest(2**60) and BudgetSearch(cls, one)._limits()["rank"] == 383
