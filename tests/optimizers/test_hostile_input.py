"""What users, files and other libraries hand in: refused with words, or right; never a crash or another trajectory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hf_lowmem_optim.optimizers import (
    DCTAdamW,
    LDAdam,
    LowMemoryOptimizer,
    LowRankMFAC,
    MicroAdam,
    SparseGGT,
    SparseMFAC,
    Trion,
)
from hf_lowmem_optim.registry import OPTIMIZERS
from tests.optimizers.cases import CASES, Case, assert_same_state, gradients, make_params, run

NORMAL = [case for case in CASES.values() if not case.layerwise and not case.takes_gradients]


@pytest.fixture(params=NORMAL, ids=lambda case: case.name)
def case(request: pytest.FixtureRequest) -> Case:
    return request.param  # type: ignore[no-any-return]


# ---------------------------------------------------------------------------------------------------- state dicts


def test_a_state_dict_with_something_wrong_is_refused_or_harmless() -> None:
    """The layer-wise twins load by the same code: they are tried less often."""
    counts = {name: 100 if entry.optimizer_class.method.layerwise else 500 for name, entry in OPTIMIZERS.items()}
    given = [f"{name}={count}" for name, count in counts.items()]
    command = [sys.executable, "-W", "ignore", "-m", "tests.optimizers.state_fuzzer", *given]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500 * len(counts))
    assert done.returncode == 0, f"after {done.stdout}: {done.stderr[-2000:]}"
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert [each["name"] for each in found] == list(counts)
    for each in found:
        assert not each["faults"]
        assert each["refused"] > 0.6 * counts[each["name"]] and each["harmless"] > 0.04 * counts[each["name"]]


@pytest.mark.parametrize("index", [-1, 32, 32767])
def test_indices_beyond_their_block_are_refused(index: int) -> None:
    case = CASES["microadam"]
    params = make_params()
    optimizer = case.build(params.values())
    run(optimizer, params, gradients(2))
    saved = optimizer.state_dict()
    saved["state"][0]["indices"][1, 3] = index
    with pytest.raises(ValueError, match=r"'indices' holds .* for blocks of 32 entries"):
        case.build(make_params().values()).load_state_dict(saved)


def test_groups_that_disagree_are_refused_by_the_load(caplog: pytest.LogCaptureFixture) -> None:
    def build() -> SparseMFAC:
        wide, tall, *_ = make_params().values()
        return SparseMFAC([{"params": [wide]}, {"params": [tall]}], window=4, weight_decay=0.1)

    optimizer = build()
    saved = optimizer.state_dict()
    saved["param_groups"][0]["weight_decay"] = 0.3
    saved["param_groups"][1]["damping"] = 0.5
    with pytest.raises(ValueError, match=r"cannot load this state: damping=0\.5 of a parameter group differs"):
        optimizer.load_state_dict(saved)
    assert optimizer.param_groups[1]["damping"] == 1e-5 and not caplog.records


# ---------------------------------------------------------------------------------------------- memory, in a step


def free(tensor: Tensor) -> None:
    tensor.untyped_storage().resize_(0)


def expand_state(optimizer: LowMemoryOptimizer, param: Tensor) -> None:
    state = optimizer.state[param]
    key = next(key for key, value in state.items() if isinstance(value, Tensor))
    state[key] = torch.zeros((), dtype=state[key].dtype).expand(state[key].shape)


def enlarge(optimizer: LowMemoryOptimizer, param: Tensor) -> None:
    param.grad = None
    param.data = torch.zeros(64, 400)
    param.grad = torch.zeros(64, 400)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda _, param: free(param.grad), "the gradient of parameter 0 .* has no memory of its size"),
        (
            lambda _, param: [setattr(param, "data", param.data.clone()), free(param.data)],
            "parameter 0 .* has no memory of its size",
        ),
        (lambda optimizer, param: free(next(iter(state_of(optimizer, param)))), "has no memory of its size"),
        (expand_state, "of the state of parameter 0 .* is not contiguous"),
        (enlarge, "does not fit the options of its group"),
        (lambda _, param: setattr(param, "data", torch.zeros(3, 3)), "param.data was replaced"),
        (lambda optimizer, param: optimizer.state[param].update(to_meta(optimizer, param)), "is on meta"),
    ],
)
@pytest.mark.parametrize("dense", [False, True])
def test_memory_that_is_not_there_is_refused(case: Case, dense: bool, spoil: Callable[..., Any], message: str) -> None:
    params = make_params()
    optimizer = case.build(params.values(), **({case.dense_key: None} if dense else {}))
    run(optimizer, params, gradients(2))
    first = params["wide"]
    others = {key: param.detach().clone() for key, param in params.items() if key != "wide"}
    for key, param in params.items():
        param.grad = next(gradients(1))[key]
    spoil(optimizer, first)
    with pytest.raises((ValueError, RuntimeError), match=message):
        optimizer.step()
    assert all(torch.equal(params[key], value) for key, value in others.items())
    assert all(state["step"] == 2 for state in optimizer.state.values())


def state_of(optimizer: LowMemoryOptimizer, param: Tensor) -> list[Tensor]:
    """State tensors of one parameter, in storages of their own."""
    state = optimizer.state[param]
    for key, value in state.items():
        if isinstance(value, Tensor):
            state[key] = value.clone()
    return [value for value in state.values() if isinstance(value, Tensor)]


def to_meta(optimizer: LowMemoryOptimizer, param: Tensor) -> dict[str, Tensor]:
    return {key: value.to("meta") for key, value in optimizer.state[param].items() if isinstance(value, Tensor)}


@pytest.mark.parametrize("dense", [False, True])
def test_a_lazy_gradient_is_what_it_stands_for(case: Case, dense: bool) -> None:
    runs = []
    for lazy in (False, True):
        params = make_params()
        optimizer = case.build(params.values(), **({case.dense_key: None} if dense else {}))
        for grads in gradients(3):
            for key, param in params.items():
                # what .imag of a conjugate gives
                negated = torch.complex(torch.zeros_like(grads[key]), grads[key]).conj().imag
                zero = torch._efficientzerotensor(param.shape) if lazy else torch.zeros(param.shape)
                param.grad = zero if key == "tall" else negated if lazy else -grads[key]
            optimizer.step()
        runs.append(list(params.values()))
    assert all(torch.equal(one, other) for one, other in zip(*runs, strict=True))


# --------------------------------------------------------------------------------------------- what torch allows


def test_a_learning_rate_may_be_a_tensor_that_changes_in_place(case: Case) -> None:
    runs = []
    for kind in (float, torch.tensor):
        params, rate = make_params(), kind(0.03125)
        optimizer = case.build(params.values(), lr=rate)
        run(optimizer, params, gradients(2))
        if kind is float:
            optimizer.param_groups[0]["lr"] = 0.5
        else:
            rate.fill_(0.5)
        run(optimizer, params, gradients(2, seed=4))
        runs.append((optimizer, list(params.values())))
    assert all(torch.equal(one, other) for one, other in zip(runs[0][1], runs[1][1], strict=True))
    again = case.build(make_params().values())
    again.load_state_dict(runs[1][0].state_dict())
    assert float(again.param_groups[0]["lr"]) == 0.5
    with pytest.raises(ValueError, match="Tensor lr must be 1-element"):
        case.build(make_params().values(), lr=torch.tensor([0.1, 0.2]))


def test_a_compiled_step_is_the_step(case: Case) -> None:
    params, plain = make_params(), make_params()
    optimizer, untouched = case.build(params.values()), case.build(plain.values())
    compiled = torch.compile(lambda: optimizer.step(), backend="eager")
    for grads in gradients(3):
        for key in params:
            params[key].grad, plain[key].grad = grads[key].clone(), grads[key].clone()
        compiled()
        untouched.step()
    assert all(torch.equal(params[key], plain[key]) for key in params)
    assert_same_state(optimizer, untouched)


def test_a_group_without_names_joins_groups_with_names(case: Case) -> None:
    params = make_params()
    (first, weight), *others = params.items()
    optimizer = case.build([(first, weight)])
    optimizer.add_param_group({"params": [param for _, param in others], "lr": 0.5})
    run(optimizer, params, gradients(2))
    assert all(optimizer.state[param]["step"] == 2 for param in params.values())
    again = case.build([(first, nn.Parameter(weight.detach()))])
    again.add_param_group({"params": [nn.Parameter(param.detach()) for _, param in others]})
    again.load_state_dict(optimizer.state_dict())
    assert_same_state(optimizer, again)


class WithoutFloat64(TorchDispatchMode):
    """Refuses what Apple's MPS refuses."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if any(isinstance(leaf, Tensor) and leaf.dtype == torch.float64 for leaf in tree_leaves(out)):
            raise TypeError(f"no float64: {func}")
        return out


@pytest.mark.parametrize("cls", [LDAdam, DCTAdamW, Trion, MicroAdam, SparseMFAC, LowRankMFAC, SparseGGT])
def test_a_device_without_float64_is_served_or_refused(
    cls: type[LowMemoryOptimizer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_LOWMEM_OPTIM_BACKEND", "reference")
    with FakeTensorMode():
        there = nn.Parameter(torch.empty(64, 96, device="mps"))
    if cls.method.shared_state is not None:
        with pytest.raises(ValueError, match="float64, which mps has not"):
            cls([there])
        cls([{"params": [there], cls.method.switch[0]: None}])
        return
    cls([there])
    params = [nn.Parameter(torch.randn(64, 96)), nn.Parameter(torch.randn(64))]
    optimizer = cls(params)
    with WithoutFloat64():
        for _ in range(3):
            for param in params:
                param.grad = torch.randn_like(param)
            optimizer.step()
    assert all(param.isfinite().all() for param in params)


def test_threads_take_turns_in_the_interpreter() -> None:
    script = """
import sys, threading, torch
from torch import nn
from hf_lowmem_optim import MicroAdam
def train(out):
    generator = torch.Generator().manual_seed(0)
    p = nn.Parameter(torch.zeros(16, 64))
    optimizer = MicroAdam([p], lr=0.1, block_size=256, window=2, min_compress_size=1)
    p.grad = torch.randn(16, 64, generator=generator)
    optimizer.step()
    out.append(p.detach())
sys.setswitchinterval(1e-5)
found = []
threads = [threading.Thread(target=train, args=(found,)) for _ in range(3)]
for thread in threads: thread.start()
for thread in threads: thread.join()
assert len(found) == 3 and all(torch.equal(found[0], each) for each in found), len(found)
"""
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "HF_LOWMEM_OPTIM_BACKEND": "triton"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]


# -------------------------------------------------------------------------------------------------------- numbers


@pytest.mark.parametrize("scale", [1e18, 1e24, 1e30, 1e36])
def test_a_huge_gradient_leaves_the_weights_finite(case: Case, scale: float) -> None:
    """As AdamW does, whose second moment then is infinite, and whose weights stop moving."""
    params = make_params()
    optimizer = case.build(params.values())
    for grads in gradients(6):
        for key, param in params.items():
            param.grad = grads[key] * scale
        optimizer.step()
        assert all(param.isfinite().all() for param in params.values())


@pytest.mark.parametrize("tall", [False, True])
def test_weights_without_a_gradient_do_not_move_by_rounding_noise(tall: bool) -> None:
    """The basis has more columns than the gradient has directions."""
    generator = torch.Generator().manual_seed(0)
    grad = torch.randn(96, 2, generator=generator) @ torch.randn(2, 128, generator=generator)
    grad[40:50] = 0
    weight = nn.Parameter(torch.zeros(128, 96) if tall else torch.zeros(96, 128))
    optimizer = LDAdam([weight], lr=1.0, rank=16, error_feedback="fp32")
    for _ in range(3):
        weight.grad = (grad.mT if tall else grad).contiguous()
        optimizer.step()
        moved = (weight.detach().mT if tall else weight.detach()).abs()
        assert moved[40:50].max() < 1e-5 < 0.1 < moved[:40].max()
