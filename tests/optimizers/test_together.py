"""Which tensors a sparse rule takes in one call."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_lowmem_optim import OPTIMIZERS, MicroAdam, SparseMFAC
from hf_lowmem_optim.kernels.backend import ENVIRONMENT_VARIABLE
from hf_lowmem_optim.optimizers.pending import PendingUpdate
from hf_lowmem_optim.optimizers.together import split_together


def pending(param: Tensor, grad: Tensor | None = None, seed: int | None = None) -> PendingUpdate:
    return PendingUpdate(param, torch.zeros_like(param) if grad is None else grad, {}, {}, seed)


@pytest.mark.skipif(importlib.util.find_spec("numba") is None, reason="numba is not installed")
def test_plain_contiguous_tensors_of_a_cpu_go_together(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, weight = torch.zeros(4, 6), nn.Parameter(torch.zeros(5, dtype=torch.bfloat16))
    wrapped = torch.zeros(3).as_subclass(type("Wrapped", (Tensor,), {}))
    updates = [
        pending(plain),
        pending(plain.T),
        pending(weight),
        pending(plain, seed=3),
        pending(wrapped),
        pending(plain, grad=torch.zeros(6, 4).T),
        pending(torch.zeros(2, device="meta")),
    ]
    assert split_together(updates) == ([0, 2], [1, 3, 4, 5, 6])
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "reference")
    assert split_together(updates) == ([], list(range(7)))


def test_a_backend_that_is_demanded_for_another_device_is_not_in_the_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton does not run on a CPU without the interpreter: with tensors of a GPU alone nobody asks it to."""
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "triton")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert split_together([pending(torch.zeros(2, device="meta"))]) == ([], [0])


def groups() -> list[list[Tensor]]:
    """Parameters of three groups with gradients, of sizes from one block to several."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for shapes in (((300, 40), (7000,)), ((4096,), (128, 64)), ((5000,),)):
        weights = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
        for weight in weights:
            weight.grad = torch.randn(weight.shape, generator=generator)
        made.append(list[Tensor](weights))
    return made


SETTINGS: dict[str, list[dict[str, Any]]] = {
    "microadam": [
        {"lr": 1e-2, "weight_decay": 0.1},
        {"eps": 1e-3, "betas": (0.5, 0.7), "block_size": 1024, "stochastic_rounding": True},
        {"alpha": 0.5},
    ],
    "sparse_mfac": [{"lr": 1e-2, "weight_decay": 0.1}, {"momentum": 0.9}, {"block_size": 1024, "density": 0.05}],
    "sparse_ggt": [{"error_feedback": "bf16"}, {"value_dtype": "fp32"}, {"lr": 1e-1, "momentum": 0.5}],
}


@pytest.mark.skipif(importlib.util.find_spec("numba") is None, reason="numba is not installed")
@pytest.mark.parametrize("name", list(SETTINGS))
def test_groups_with_settings_of_their_own_are_as_in_the_reference(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    results = []
    for backend in ("reference", "cpu"):
        monkeypatch.setenv(ENVIRONMENT_VARIABLE, backend)
        members = groups()
        settings = [{"params": params, **own} for params, own in zip(members, SETTINGS[name], strict=True)]
        optimizer = OPTIMIZERS[name].optimizer_class(settings, lr=1e-3, window=3)
        late = members[0][1]
        grad, late.grad = late.grad, None
        for step in range(7):
            if step == 2:
                late.grad = grad
            optimizer.step()
            for params in members:
                for param in params:
                    if param.grad is not None:
                        param.grad.mul_(-1.1).add_(param.detach(), alpha=0.3)
        results.append(optimizer)
    for expected, found in zip(*(o.param_groups for o in results), strict=True):
        for one, other in zip(expected["params"], found["params"], strict=True):
            if name == "microadam":
                assert torch.equal(one, other)
            else:  # products are added in another order
                torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    assert [len(o.state) for o in results] == [6 if name != "microadam" else 5] * 2


@pytest.mark.skipif(importlib.util.find_spec("numba") is None, reason="numba is not installed")
def test_windows_of_two_lengths_in_a_group(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tensor keeps the window that it began with, also beside one that began after the setting had changed."""
    results = []
    for backend in ("reference", "cpu"):
        monkeypatch.setenv(ENVIRONMENT_VARIABLE, backend)
        first, second = groups()[0]
        optimizer = MicroAdam([first, second], window=2)
        grad, second.grad = second.grad, None
        for step in range(6):
            if step == 3:  # both at their fourth update in the end
                second.grad, first.grad, kept = grad, None, first.grad
                optimizer.param_groups[0]["window"] = 4
            optimizer.step()
        first.grad = kept
        optimizer.step()
        assert [optimizer.state[p]["indices"].shape[0] for p in (first, second)] == [2, 4]
        results.append([first, second])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("scope", ["model", "tensor"])
def test_a_window_that_changes_in_a_run_is_refused(scope: Any) -> None:
    """And the refused step leaves no trace in what follows."""
    weights = [groups()[0][0] for _ in range(2)]
    optimizers = [SparseMFAC([weight], window=4, scope=scope) for weight in weights]
    for optimizer in optimizers:
        optimizer.step()
    refused = optimizers[0]
    refused.param_groups[0]["window"] = 2
    with pytest.raises(ValueError, match="window=2, but the state has 4 rows: it cannot change in a run"):
        refused.step()
    assert torch.equal(*weights)
    if scope == "model":  # else the tensor's own count is what counts, and says that there was a gradient
        refused.param_groups[0]["window"] = 4
        for optimizer in optimizers:
            optimizer.step()
        assert torch.equal(*weights)
