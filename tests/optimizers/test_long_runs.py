"""What a run may meet besides gradients: skipped steps, many of them, and its end. For every optimizer."""

from __future__ import annotations

import contextlib
import gc
import weakref
from collections import Counter
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from hf_lowmem_optim import OptimizerFactory
from hf_lowmem_optim.optimizers import microadam
from tests.optimizers.cases import CASES, Case, assert_equal, assert_same_state, gradients, make_params


@pytest.fixture(autouse=True, scope="module")
def only_new_objects_are_looked_at() -> None:
    """What the tests before these left is none of theirs, and takes seconds to go through; ``conftest.py`` thaws it."""
    microadam._row_weights.cache_clear()  # or what it has now would be replaced by what is counted
    gc.collect()
    gc.freeze()


every_case = pytest.mark.parametrize("case", CASES.values(), ids=lambda case: case.name)


@every_case
def test_a_step_that_the_gradient_scaler_skips_leaves_no_trace(case: Case) -> None:
    """fp16 training: the overflowing batch is as if it had not been there; scales are powers of two, so exact."""
    if case.layerwise or case.takes_gradients:
        pytest.skip("refused: tests/optimizers/test_layerwise.py and test_gradient_error.py")
    steps, ends = list(gradients(6)), []
    overflowing = {key: torch.full_like(grad, torch.inf) for key, grad in steps[0].items()}
    for given in (steps, [*steps[:3], overflowing, *steps[3:]]):
        params = make_params()
        optimizer = case.build(list(params.values()))
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=10**6)
        for grads in given:
            # the loss, and so every gradient, is multiplied by the scale
            scale = scaler.scale(torch.ones(()))
            for key, param in params.items():
                param.grad = grads[key] * scale
            scaler.step(optimizer)
            scaler.update()
        assert scaler.get_scale() == (2.0**10 if given is steps else 2.0**9)
        ends.append((params, optimizer))
    (params, optimizer), (others, other) = ends
    assert_equal(params.values(), others.values())
    assert_same_state(optimizer, other)
    assert not any(
        torch.equal(param, before) for param, before in zip(params.values(), make_params().values(), strict=True)
    )


def live_tensors() -> Counter[tuple[int, ...]]:
    gc.collect()
    return Counter(tuple(each.shape) for each in gc.get_objects() if type(each) in (Tensor, nn.Parameter))


@every_case
def test_nothing_grows_over_many_steps(case: Case) -> None:
    """Through a backward pass, in which layer-wise optimizers do their work; with two micro-batches."""
    params = make_params()
    optimizer = case.build(list(params.values()))
    steps = list(gradients(20))

    def train() -> None:
        for grads in steps:
            for last in (False, True):
                with contextlib.nullcontext() if last or not case.layerwise else optimizer.accumulating():
                    sum((param * grads[key]).sum() for key, param in params.items()).backward()
            optimizer.step()
            optimizer.zero_grad()

    train()
    before = live_tensors()
    for _ in range(2):
        train()
    assert live_tensors() == before
    assert {state["step"] for state in optimizer.state.values()} == {60}


@pytest.fixture
def no_collector() -> Iterator[None]:
    """Only reference counts free anything."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@every_case
def test_no_reference_cycle_keeps_the_model_alive(case: Case, no_collector: None) -> None:
    model = nn.Sequential(nn.Linear(16, 40), nn.Linear(40, 16))
    optimizer = OptimizerFactory(case.name, **case.hyper)(model)
    model(torch.randn(2, 16)).square().sum().backward()
    optimizer.step()
    held = [weakref.ref(each) for each in (model, optimizer, *model.parameters())]
    state = weakref.ref(next(v for v in optimizer.state[model[0].weight].values() if isinstance(v, Tensor)))
    assert all(each() is not None for each in (*held, state))
    del optimizer
    assert state() is None
    del model
    assert [each() for each in held] == [None] * len(held)
