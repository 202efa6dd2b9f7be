"""State that belongs to all parameters together: Gram matrix and ring position, saved, resumed, planned."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_lowmem_optim import plan_optimizer, plan_state
from hf_lowmem_optim.memory.table import llama_2_7b_tensors
from hf_lowmem_optim.optimizers import LowMemoryOptimizer
from tests.optimizers.cases import CASES, SHAPES, Case, assert_resumes, assert_same_state, gradients, make_params, run

SHARING = [case for case in CASES.values() if case.coupled]


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
    assert_resumes(case, list(gradients(11)), steps_before, **hyper)


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


def test_a_state_without_it_or_with_another_one_is_refused(case: Case) -> None:
    params = make_params()
    optimizer = case.build(params.values())
    run(optimizer, params, gradients(3))
    for spoil, message in (
        (lambda state: [state[0].pop("shared_gram"), state[0].pop("shared_step")], "belong to all parameters together"),
        (lambda state: state[1].update(state[0]), "'shared_gram'|belongs to another optimizer"),
        (lambda state: state[0].pop("shared_step"), "'shared_step' was saved as None"),
        (lambda state: state[0].update(shared_step=2), "'shared_step' is 2, but a parameter has taken part in 3 steps"),
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


@pytest.mark.parametrize("error_feedback", ["fp32", "bf16", "8bit", "4bit"])
@pytest.mark.parametrize("scope", ["model", "tensor"])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_planned_bytes_are_measured_bytes(case: Case, error_feedback: str, scope: str, momentum: float) -> None:
    params = make_params(torch.bfloat16)
    dense = {"params": [params["square"], params["vector"]], case.dense_key: None}
    others = {"params": [params[key] for key in ("wide", "tall", "conv", "scalar")]}
    optimizer = case.build([dense, others], error_feedback=error_feedback, scope=scope, momentum=momentum)
    planned = plan_optimizer(optimizer).total_bytes
    run(optimizer, params, gradients(1, torch.bfloat16))
    tensors = [v for entry in optimizer.state.values() for v in entry.values() if isinstance(v, Tensor)]
    assert planned == sum(tensor.nbytes for tensor in tensors)
    # nothing is a view of something larger but of equal tensors side by side, at multiples of 64 bytes
    stored = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    assert planned <= sum(stored.values()) <= planned + 63 * len(tensors)


@pytest.mark.parametrize(
    ("name", "hyper", "most"),
    [
        ("sparse_mfac", {"window": 32, "density": 0.01, "error_feedback": "8bit"}, 2.4),
        ("sparse_ggt", {"window": 32, "density": 0.01, "error_feedback": "8bit"}, 2.4),
        ("sparse_mfac", {"window": 32, "density": 0.01, "error_feedback": "4bit"}, 1.9),
        ("sparse_mfac", {"window": 1024, "density": 0.01, "error_feedback": "fp32"}, 45.1),
        ("lowrank_mfac", {"window": 32, "rank": 4, "error_feedback": "8bit"}, 1.4),
        ("microadam", {}, 0.97),
    ],
    ids=str,
)
def test_bytes_per_parameter_on_llama_2_7b(name: str, hyper: dict[str, Any], most: float) -> None:
    linear, norms = llama_2_7b_tensors()
    report = plan_state(name, {key: (shape, torch.bfloat16) for key, shape in {**linear, **norms}.items()}, **hyper)
    assert 6.73e9 < report.num_parameters < 6.75e9
    assert report.total_bytes / report.num_parameters <= most
