"""State that belongs to all parameters together: Gram matrix and ring position, saved, resumed, planned."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

from hf_lowmem_optim.optimizers import LowMemoryOptimizer, LowRankMFAC, SparseGGT, SparseMFAC
from tests.optimizers.cases import CASES, SHAPES, Case, assert_same_state, gradients, make_params, run

SHARING = [case for case in CASES.values() if case.coupled]
CLASSES = [SparseMFAC, LowRankMFAC, SparseGGT]


@pytest.fixture(params=SHARING, ids=lambda case: case.name)
def case(request: pytest.FixtureRequest) -> Case:
    return request.param  # type: ignore[no-any-return]


def shared(optimizer: LowMemoryOptimizer) -> dict[str, Any]:
    """What the state of the first parameter has beside its own."""
    (home,) = [param for param, state in optimizer.state.items() if "shared_step" in state]
    assert home is optimizer.param_groups[0]["params"][0]
    return {key.removeprefix("shared_"): v for key, v in optimizer.state[home].items() if key.startswith("shared_")}


def test_it_is_in_the_state_of_the_first_parameter(case: Case) -> None:
    params = make_params()
    optimizer = case.build(params.values())
    run(optimizer, params, gradients(7))
    entry = shared(optimizer)
    window = case.hyper["window"]
    assert entry["step"] == 7 and entry["gram"].shape == (window, window) and entry["gram"].dtype == torch.float64
    assert torch.equal(entry["gram"], entry["gram"].T) and (entry["gram"].diagonal() > 0).all()
    assert optimizer.state_dict()["state"][0]["shared_gram"] is entry["gram"]


def test_it_is_there_though_the_first_parameter_has_no_gradient_yet(case: Case) -> None:
    runs = []
    for absent in (None, torch.zeros(SHAPES["wide"])):
        params = make_params()
        optimizer = case.build(params.values())
        for grads in gradients(3):
            for key, param in params.items():
                param.grad = grads[key].clone() if key != "wide" else absent
            optimizer.step()
        assert shared(optimizer)["step"] == 3
        runs.append([param.detach() for key, param in params.items() if key != "wide"])
    assert next(iter(SHAPES)) == "wide" and all(torch.equal(one, other) for one, other in zip(*runs, strict=True))


@pytest.mark.parametrize("steps_before", [1, 4, 6])
@pytest.mark.parametrize("hyper", [{}, {"error_feedback": "4bit"}, {"scope": "tensor"}, {"error_feedback": "bf16"}])
def test_resume_is_bit_for_bit_wherever_the_ring_stands(case: Case, steps_before: int, hyper: dict[str, Any]) -> None:
    straight = make_params()
    optimizer = case.build(straight.values(), **hyper)
    steps = list(gradients(11))
    run(optimizer, straight, iter(steps[:steps_before]))
    file = io.BytesIO()
    torch.save((optimizer.state_dict(), {k: v.data for k, v in straight.items()}), file)
    run(optimizer, straight, iter(steps[steps_before:]))
    file.seek(0)
    saved, values = torch.load(file, weights_only=True)
    resumed = {k: nn.Parameter(v) for k, v in values.items()}
    second = case.build(resumed.values(), **hyper)
    second.load_state_dict(saved)
    run(second, resumed, iter(steps[steps_before:]))
    assert all(torch.equal(straight[k], resumed[k]) for k in SHAPES)
    assert_same_state(optimizer, second)


def test_loading_replaces_what_was_there(case: Case) -> None:
    params = make_params()
    optimizer = case.build(params.values())
    run(optimizer, params, gradients(5))
    saved = copy.deepcopy(optimizer.state_dict())
    run(optimizer, params, gradients(3, seed=9))
    assert shared(optimizer)["step"] == 8
    optimizer.load_state_dict(saved)
    gram = saved["state"][0]["shared_gram"]
    assert shared(optimizer)["step"] == 5 and torch.equal(shared(optimizer)["gram"], gram)
    # a state from before the first step has none
    fresh = case.build(make_params().values()).state_dict()
    optimizer.load_state_dict(fresh)
    assert not optimizer.state


def test_distributed_checkpoint_carries_it(case: Case) -> None:
    model, twin = (nn.ParameterDict(make_params()) for _ in range(2))
    optimizer, second = case.build(model.parameters()), case.build(twin.parameters())
    run(optimizer, dict(model.items()), gradients(6))
    saved = copy.deepcopy(get_optimizer_state_dict(model, optimizer))
    twin.load_state_dict(model.state_dict())
    set_optimizer_state_dict(twin, second, saved)
    for each, tensors in ((optimizer, model), (second, twin)):
        run(each, dict(tensors.items()), gradients(5, seed=3))
    assert all(torch.equal(model[k], twin[k]) for k in SHAPES)
    assert_same_state(optimizer, second)


def test_accelerates_round_trip_before_the_first_step(case: Case) -> None:
    from accelerate import Accelerator
    from accelerate.optimizer import AcceleratedOptimizer

    Accelerator(cpu=True)
    params, plain = make_params(), make_params()
    optimizer, untouched = case.build(params.values()), case.build(plain.values())
    wrapped = AcceleratedOptimizer(optimizer)
    for grads in gradients(6):
        for key in SHAPES:
            params[key].grad, plain[key].grad = grads[key].clone(), grads[key].clone()
        wrapped.step()
        untouched.step()
    # and after it, as a wrapper around a resumed optimizer makes it
    AcceleratedOptimizer(optimizer)
    assert all(torch.equal(params[k], plain[k]) for k in SHAPES)
    assert_same_state(optimizer, untouched)


def test_a_state_without_it_or_with_another_one_is_refused(case: Case) -> None:
    params = make_params()
    optimizer = case.build(params.values())
    run(optimizer, params, gradients(3))
    for spoil, message in (
        (lambda state: [state[0].pop("shared_gram"), state[0].pop("shared_step")], "belong to all parameters together"),
        (lambda state: state[1].update(state[0]), "'shared_gram'|belongs to another optimizer"),
        (lambda state: state[0].pop("shared_step"), "'shared_step' was saved as None"),
        (lambda state: state[0].pop("shared_gram"), "'shared_gram' was saved as None"),
        (lambda state: state[0].update(shared_gram=torch.zeros(3, 3, dtype=torch.float64)), "'shared_gram' was saved"),
        (lambda state: state[0].update(shared_gram=state[0]["shared_gram"].float()), "'shared_gram' was saved as"),
    ):
        saved = copy.deepcopy(optimizer.state_dict())
        spoil(saved["state"])
        fresh = case.build(make_params().values())
        with pytest.raises(ValueError, match=message):
            fresh.load_state_dict(saved)
        assert not fresh.state
    # a wrapper that fills in the state itself
    del optimizer.state[optimizer.param_groups[0]["params"][0]]["shared_step"]
    with pytest.raises(ValueError, match="has a window of gradients, but no parameter's state has 'shared_step'"):
        optimizer.step()
    for key, value in (("window", 3), ("scope", "tensor")):
        other = case.build(make_params().values(), **{key: value})
        with pytest.raises(ValueError, match=f"saved with {key}="):
            other.load_state_dict(optimizer.state_dict())


def test_dense_groups_alone_have_none(case: Case) -> None:
    params = make_params()
    optimizer = case.build(params.values(), **{case.dense_key: None})
    run(optimizer, params, gradients(2))
    assert not any("shared_step" in state for state in optimizer.state.values())
    assert not optimizer.method.shared_specs(optimizer.param_groups)
    second = case.build(make_params().values(), **{case.dense_key: None})
    second.load_state_dict(optimizer.state_dict())
    assert_same_state(optimizer, second)


# ------------------------------------------------------------------------------------------------------- memory


def planned_bytes(optimizer_class: type[LowMemoryOptimizer], groups: list[dict[str, Any]]) -> int:
    own = (s.nbytes for g in groups for p in g["params"] for s in optimizer_class.method.state_specs(p, g).values())
    return sum(own) + sum(spec.nbytes for spec in optimizer_class.method.shared_specs(groups).values())


@pytest.mark.parametrize("error_feedback", ["fp32", "bf16", "8bit", "4bit"])
@pytest.mark.parametrize("scope", ["model", "tensor"])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("cls", CLASSES)
def test_planned_bytes_are_measured_bytes(
    cls: Callable[..., LowMemoryOptimizer], error_feedback: str, scope: str, momentum: float
) -> None:
    params = make_params(torch.bfloat16)
    groups = [{"params": [params.pop("square"), params.pop("vector")], cls.method.switch[0]: None}]  # type: ignore[attr-defined]
    groups.append({"params": list(params.values())})
    optimizer = cls(groups, window=7, error_feedback=error_feedback, scope=scope, momentum=momentum)
    everything = [p for g in optimizer.param_groups for p in g["params"]]
    for param in everything:
        param.grad = torch.randn_like(param)
    planned = planned_bytes(type(optimizer), optimizer.param_groups)
    optimizer.step()
    tensors = [v for entry in optimizer.state.values() for v in entry.values() if isinstance(v, Tensor)]
    assert planned == sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    # nothing is a view of something larger but of equal tensors side by side, at multiples of 64 bytes
    stored = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    assert planned <= sum(stored.values()) <= planned + 63 * len(tensors)


def llama_2_7b() -> list[Tensor]:
    """Shapes of the 6.7 B parameters, on the meta device."""
    hidden, inner, vocabulary, layers = 4096, 11008, 32000, 32
    layer = [(hidden, hidden)] * 4 + [(inner, hidden)] * 2 + [(hidden, inner)] + [(hidden,)] * 2
    shapes = [(vocabulary, hidden)] * 2 + layer * layers + [(hidden,)]
    return [torch.empty(shape, dtype=torch.bfloat16, device="meta") for shape in shapes]


@pytest.mark.parametrize(
    ("cls", "hyper", "most"),
    [
        (SparseMFAC, {"window": 32, "density": 0.01, "error_feedback": "8bit"}, 2.4),
        (SparseGGT, {"window": 32, "density": 0.01, "error_feedback": "8bit"}, 2.4),
        (SparseMFAC, {"window": 32, "density": 0.01, "error_feedback": "4bit"}, 1.9),
        (SparseMFAC, {"window": 1024, "density": 0.01, "error_feedback": "fp32"}, 45.1),
        (LowRankMFAC, {"window": 32, "rank": 4, "error_feedback": "8bit"}, 1.4),
    ],
    ids=str,
)
def test_bytes_per_parameter_on_llama_2_7b(cls: type[LowMemoryOptimizer], hyper: dict[str, Any], most: float) -> None:
    params = llama_2_7b()
    count = sum(p.numel() for p in params)
    assert 6.73e9 < count < 6.75e9
    group = {**cls.method.options.defaults(), **hyper, "params": params}
    per_parameter = planned_bytes(cls, [group]) / count
    print(f"{cls.__name__} {hyper}: {per_parameter:.3f} bytes per parameter")
    assert per_parameter <= most
