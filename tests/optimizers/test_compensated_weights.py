"""Narrow weights with a correction: training is that of float32 weights, up to the last of 24 bits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_lowmem_optim import fp32_state_dict, load_fp32_state_dict_, measure_state, plan_optimizer
from hf_lowmem_optim.ops.weight_correction import CORRECTION, join_weights, split_weights_
from hf_lowmem_optim.optimizers import LowMemoryOptimizer
from hf_lowmem_optim.registry import OPTIMIZERS
from tests.optimizers.cases import (
    CASES,
    SHAPES,
    Case,
    assert_equal,
    assert_resumes,
    assert_same_state,
    gradients,
    make_params,
    odd_layout,
    run,
    through_a_file,
)

NARROW = [torch.bfloat16, torch.float16]
COMPENSATED: dict[str, Any] = {"weight_rounding": "compensated"}
#: The same numbers in the moments, whatever the dtype of the weights.
FP32_MOMENTS: dict[str, Any] = {"dense_state": "fp32"}
#: One for each optimizer: the layer-wise ones share the update of the normal ones.
ONE_DTYPE = [(name, NARROW[entry.optimizer_class.method.layerwise]) for name, entry in OPTIMIZERS.items()]


def wide(params: dict[str, nn.Parameter], optimizer: LowMemoryOptimizer) -> dict[str, Tensor]:
    """The weights with their corrections."""
    model = nn.ParameterDict(params)
    return {key.removeprefix("model."): value for key, value in fp32_state_dict(model, optimizer).items()}


def pair(value: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    weight, correction = (torch.empty(value.shape, dtype=each) for each in (dtype, torch.int8))
    split_weights_([weight], [correction], [value.contiguous()])
    return weight, correction


def both(name: str, dtype: torch.dtype, keys: Sequence[str], **hyper: Any) -> list[Any]:
    """Parameters and optimizer of compensated weights, and of float32 ones that begin as the same numbers."""
    narrow = {key: param for key, param in make_params(dtype).items() if key in keys}
    floats = {key: nn.Parameter(param.detach().float()) for key, param in narrow.items()}
    # a sync looks at the weights that are stored, which here are rounded and there are not
    case, hyper = CASES[name], {**hyper, **({"sync_every": 64} if name == "lordo" else {})}
    return [
        (narrow, case.build(narrow.values(), **COMPENSATED, **FP32_MOMENTS, **hyper)),
        (floats, case.build(floats.values(), **FP32_MOMENTS, **hyper)),
    ]


def take_step(runs: list[Any], grads: dict[str, Tensor]) -> None:
    for params, optimizer in runs:
        run(optimizer, params, iter([{key: grads[key].to(param.dtype) for key, param in params.items()}]))


@pytest.mark.parametrize("dtype", NARROW, ids=str)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_each_step_is_the_float32_step_split(name: str, dtype: torch.dtype) -> None:
    """To the bit, under both rules; the state is that of float32 weights with the correction beside it."""
    runs = both(name, dtype, list(SHAPES))
    (narrow, optimizer), (floats, other) = runs
    for grads in gradients(5, dtype):
        take_step(runs, grads)
        for key, joined in wide(narrow, optimizer).items():
            weight, correction = pair(floats[key].detach(), dtype)
            assert torch.equal(narrow[key], weight), key
            assert torch.equal(optimizer.state[narrow[key]][CORRECTION], correction), key
            floats[key].data.copy_(joined)
    saved = optimizer.state_dict()
    assert all(entry.pop(CORRECTION).any() or not index for index, entry in saved["state"].items())
    assert saved["state"].keys() == other.state_dict()["state"].keys()
    for index, entry in other.state_dict()["state"].items():
        own = saved["state"][index]
        assert all(torch.equal(own[key], value) for key, value in entry.items() if torch.is_tensor(value))


@pytest.mark.parametrize(("name", "dtype"), ONE_DTYPE)
def test_fifty_steps_follow_float32_weights(name: str, dtype: torch.dtype) -> None:
    """Each adds 2^-9 of the distance of two weights to the difference at most; without corrections it is larger."""
    keys, kind = ("wide", "conv", "vector"), torch.finfo(dtype)
    runs = both(name, dtype, keys, lr=1e-3)
    (narrow, optimizer), (floats, _) = runs
    start = {key: param.detach().clone() for key, param in floats.items()}
    largest = {key: param.abs() for key, param in start.items()}
    for grads in gradients(50, dtype):
        take_step(runs, grads)
        largest = {key: torch.maximum(value, floats[key].detach().abs()) for key, value in largest.items()}
    for key, joined in wide(narrow, optimizer).items():
        exact = floats[key].detach()
        bound = 50 * 2**-9 * kind.eps * torch.exp2(torch.frexp(largest[key]).exponent - 1.0)
        assert ((joined - exact).abs() <= bound).all(), key
        assert ((narrow[key] - exact).abs() > bound).any(), key
        assert (exact - start[key]).norm() > 10 * (joined - exact).norm(), key


@pytest.mark.parametrize(("name", "dtype"), [*ONE_DTYPE, ("ldadam error in gradient", torch.bfloat16)])
def test_resume_is_bit_for_bit(name: str, dtype: torch.dtype) -> None:
    """Also into a layout that has no flat view."""
    assert_resumes(CASES[name], list(gradients(8, dtype)), 4, layout=odd_layout, **COMPENSATED)


@pytest.mark.parametrize("storage", ["param", "fp32", "8bit"])
def test_the_dense_rule_is_adamw_on_float32_weights(storage: str) -> None:
    bitsandbytes: Any = pytest.importorskip("bitsandbytes") if storage == "8bit" else None
    hyper: dict[str, Any] = {"lr": 1e-3, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.05}
    start = torch.randn(60, 100, generator=torch.Generator().manual_seed(0))
    narrow, mixed = nn.Parameter(start.bfloat16()), nn.Parameter(start[:7, :11].half())
    reference = start.bfloat16().float()
    optimizer = OPTIMIZERS["ldadam"].optimizer_class(
        [narrow, mixed], rank=None, dense_state=storage, **COMPENSATED, **hyper
    )
    moments: dict[str, Any] = {}
    for seed in range(6):
        gradient = torch.randn(60, 100, generator=torch.Generator().manual_seed(seed)).bfloat16()
        weight = nn.Parameter(reference)
        if storage == "8bit":
            theirs = bitsandbytes.optim.AdamW8bit([weight], **hyper)
        else:
            theirs = torch.optim.AdamW([weight], fused=True, **hyper)
        if moments:
            theirs.load_state_dict({**theirs.state_dict(), "state": {0: moments}})
        weight.grad = gradient.float()
        theirs.step()
        moments = theirs.state_dict()["state"][0]
        if storage == "param":  # kept in the dtype of the weight
            moments = {k: v.bfloat16().float() if k.startswith("exp") else v for k, v in moments.items()}
        narrow.grad, mixed.grad = gradient, gradient[:7, :11].half()
        optimizer.step()
        expected, correction = pair(weight.detach(), torch.bfloat16)
        assert torch.equal(narrow, expected)
        assert torch.equal(optimizer.state[narrow][CORRECTION], correction)
        reference = join_weights([expected], [correction])[0]
    assert optimizer.state[mixed][CORRECTION].any()


@pytest.mark.parametrize("rounding", ["nearest", "stochastic", "compensated"])
@pytest.mark.parametrize("storage", ["fp32", "8bit"])
def test_the_dense_rule_takes_any_layout(storage: str, rounding: str) -> None:
    """Weights of convolutions in channels_last."""
    if storage == "8bit":
        pytest.importorskip("bitsandbytes")
    given = torch.randn(2, 64, 8, 3, 3, generator=torch.Generator().manual_seed(0)).bfloat16()
    weights = [nn.Parameter(given[0].clone()), nn.Parameter(given[0].to(memory_format=torch.channels_last))]
    for weight in weights:
        optimizer = OPTIMIZERS["ldadam"].optimizer_class(
            [weight], rank=None, dense_state=storage, weight_rounding=rounding
        )
        for _ in range(2):
            weight.grad = torch.empty_like(weight).copy_(given[1])
            optimizer.step()
    assert torch.equal(*weights) and not torch.equal(weights[0], given[0]) and not weights[1].is_contiguous()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_plan_has_a_byte_for_every_narrow_parameter(name: str) -> None:
    params = [*make_params(torch.bfloat16).values(), *make_params(torch.float32).values()]
    plain, optimizer = (CASES[name].build(params, **settings) for settings in ({}, COMPENSATED))
    planned, without = plan_optimizer(optimizer), plan_optimizer(plain)
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer.step()
    assert measure_state(optimizer) == planned
    entries = sum(param.numel() for param in params) // 2
    assert planned.component_bytes == {**without.component_bytes, "weight correction": entries}
    with pytest.raises(ValueError, match="weight_rounding='compensated' has no effect here"):
        CASES[name].build(params[len(SHAPES) :], **COMPENSATED)


@pytest.mark.parametrize("name", ["ldadam", "microadam", "sparse_mfac", "ldadam_layerwise"])
def test_it_can_be_switched_in_a_run(name: str) -> None:
    """Off, the corrections go; on, they begin at zero; a checkpoint brings its own setting along."""
    params = make_params(torch.bfloat16)
    optimizer = CASES[name].build(params.values())
    steps = list(gradients(12, torch.bfloat16))
    for setting in ("nearest", "compensated", "stochastic", "compensated"):
        optimizer.param_groups[0]["weight_rounding"] = setting
        run(optimizer, params, iter(steps[:3]))
        assert {CORRECTION in state for state in optimizer.state.values()} == {setting == "compensated"}
        assert measure_state(optimizer) == plan_optimizer(optimizer)
    other = CASES[name].build(make_params(torch.bfloat16).values())
    other.load_state_dict(through_a_file(optimizer.state_dict()))
    assert other.param_groups[0]["weight_rounding"] == "compensated"
    assert_same_state(optimizer, other)
    # a state without its corrections begins with zeros, too
    saved = optimizer.state_dict()
    for entry in saved["state"].values():
        del entry[CORRECTION]
    with pytest.raises(ValueError, match=CORRECTION):
        other.load_state_dict(saved)


@pytest.mark.parametrize(
    ("name", "option", "values"),
    [("ldadam", "weight_rounding", ("nearest", "compensated")), ("sparse_mfac", "momentum", (0.0, 0.5))],
)
def test_what_had_no_gradient_since_an_option_changed_is_saved_as_it_is_now(
    name: str, option: str, values: tuple[Any, Any]
) -> None:
    """Or nothing could load it: the file has the new setting for all."""
    for before, after in (values, values[::-1]):
        params = make_params(torch.bfloat16)
        optimizer = CASES[name].build(params.values(), **{option: before})
        steps = list(gradients(2, torch.bfloat16))
        run(optimizer, params, iter(steps[:1]))
        optimizer.param_groups[0][option] = after
        for key, param in params.items():
            param.grad = steps[1][key].clone() if key != "wide" else None
        optimizer.step()
        other = CASES[name].build(make_params(torch.bfloat16).values(), **{option: before})
        keys = {key: set(optimizer.state[param]) for key, param in params.items()}
        other.load_state_dict(through_a_file(optimizer.state_dict()))
        # saving has changed nothing, and is not needed to go on
        assert keys == {key: set(optimizer.state[param]) for key, param in params.items()}
        run(optimizer, params, iter(steps[:1]))
        assert measure_state(optimizer) == plan_optimizer(optimizer) == measure_state(other)


def model(dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    built = nn.Sequential(nn.Linear(40, 12), nn.LayerNorm(12), nn.Linear(12, 40), nn.BatchNorm1d(40)).to(dtype)
    built[2].weight.requires_grad_(False)
    return built


@pytest.mark.parametrize("dtype", NARROW, ids=str)
@pytest.mark.parametrize("name", ["ldadam", "sparse_mfac", "microadam_layerwise"])
def test_float32_weights_go_out_and_come_in(name: str, dtype: torch.dtype) -> None:
    """To the bit through a file, into a model that has not begun as into one that has."""
    source = model(dtype)
    build = {"weight_rounding": "compensated", "lr": 1e-3}
    optimizer = CASES[name].build([p for p in source.parameters() if p.requires_grad], **build)

    def train(module: nn.Module, trained: LowMemoryOptimizer, count: int) -> None:
        for seed in range(count):
            x = torch.randn(8, 40, generator=torch.Generator().manual_seed(seed)).to(dtype)
            module(x).float().square().sum().backward()
            trained.step()
            trained.zero_grad()

    train(source, optimizer, 3)
    exported = fp32_state_dict(source, optimizer)
    assert exported.keys() == source.state_dict().keys()
    floats = model(torch.float32)
    floats.load_state_dict(exported)
    rounded = [p for p in source.parameters() if p.requires_grad]
    for param, value in zip(source.parameters(), floats.parameters(), strict=True):
        assert param.requires_grad != torch.equal(param.float(), value)
    assert {exported[k].dtype for k in exported if "num_batches" not in k} == {torch.float32}
    exported = through_a_file(exported)
    for begun in (0, 2):
        target = model(dtype)
        second = CASES[name].build([p for p in target.parameters() if p.requires_grad], **build)
        train(target, second, begun)
        load_fp32_state_dict_(target, second, exported)
        assert_equal(target.state_dict().values(), source.state_dict().values())
        assert_equal(fp32_state_dict(target, second).values(), exported.values())
        train(target, second, 2)
        assert all(second.state[p]["step"] == begun + 2 for p in second.param_groups[0]["params"])
    before = fp32_state_dict(target, second)
    for broken in ({**exported, "0.bias": torch.zeros(3)}, {**exported, "more": torch.zeros(3)}, {"0.bias": 1}):
        with pytest.raises(RuntimeError, match=r"in the model|only in"):
            load_fp32_state_dict_(target, second, broken)
    with pytest.raises(ValueError, match="is in none of the optimizer's groups, so that"):
        load_fp32_state_dict_(target, optimizer, exported)
    second.param_groups[0]["weight_rounding"] = "nearest"
    with pytest.raises(ValueError, match="weight_rounding='nearest' instead of 'compensated', so that"):
        load_fp32_state_dict_(target, second, exported)
    second.param_groups[0]["weight_rounding"] = "compensated"
    assert_equal(fp32_state_dict(target, second).values(), before.values())
    assert len(rounded) == 7
    with pytest.raises(TypeError, match="SGD is not an optimizer of hf_lowmem_optim"):
        fp32_state_dict(source, torch.optim.SGD(source.parameters(), lr=0.1))


def test_a_correction_beside_other_weights_moves_them_by_half_a_spacing_at_most() -> None:
    """As after load_state_dict of a model, or a merge; what is not finite shows."""
    params = make_params(torch.bfloat16)
    optimizer = CASES["ldadam"].build(params.values(), lr=0.0, **COMPENSATED)
    case = Case("ldadam", CASES["ldadam"].hyper)
    trained = case.build(params.values(), lr=1e-2, **COMPENSATED)
    run(trained, params, gradients(3, torch.bfloat16))
    other = make_params(torch.bfloat16, seed=7)
    for key, param in params.items():
        param.data.copy_(other[key])
        optimizer.state[param] = trained.state[param]
    run(optimizer, params, gradients(1, torch.bfloat16))
    for key in SHAPES:
        assert torch.equal(params[key], other[key]), key
    with torch.no_grad():
        params["wide"][0, 0] = torch.nan
        params["wide"][0, 1] = torch.inf
    run(optimizer, params, gradients(1, torch.bfloat16))
    assert params["wide"][0, 0].isnan() and params["wide"][0, 1].isinf()
