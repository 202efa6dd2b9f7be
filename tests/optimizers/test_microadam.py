"""MicroAdam against its paper: a float64 transcription and exact limits."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from hf_lowmem_optim.optimizers.microadam import MicroAdam, MicroAdamOptions, microadam_state
from hf_lowmem_optim.spec import QuantFormat
from tests.optimizers.cases import stored_error
from tests.reference.microadam import ReferenceMicroAdam

SMALL = {"block_size": 128, "quant_block_size": 16, "min_compress_size": 1}
BACKENDS = ["reference", "cpu"]


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "cpu":
        pytest.importorskip("numba")
    monkeypatch.setenv("HF_LOWMEM_OPTIM_BACKEND", request.param)
    return str(request.param)


def gradients(numel: int, num_steps: int, seed: int = 1) -> Iterator[np.ndarray]:
    """Drifting gradients with heavy tails: float32 values."""
    rng = np.random.default_rng(seed)
    mean = rng.standard_t(3, size=numel)
    for _ in range(num_steps):
        mean = 0.9 * mean + 0.4 * rng.standard_t(3, size=numel)
        yield (0.01 * mean).astype(np.float32)


@dataclass(frozen=True)
class Parity:
    numel: int = 700
    window: int = 4
    density: float = 0.1
    weight_decay: float = 0.0
    extra: dict[str, Any] = field(default_factory=dict)
    steps: int = 35


PARITY = [
    Parity(),
    Parity(numel=384, window=7, density=0.03, weight_decay=0.1),
    Parity(numel=641, window=3, density=0.25, extra={"bits": 8}),
    Parity(weight_decay=0.1, extra={"alpha": 0.3}),
    Parity(extra={"bias_correction": "window", "betas": (0.8, 0.95)}),
    Parity(numel=5, window=2, density=1.0),
    # until a number so near the middle of two codes comes that float64 takes the other one
    Parity(weight_decay=0.1, extra={"value_dtype": "4bit"}, steps=12),
    Parity(numel=384, extra={"value_dtype": "8bit"}, steps=12),
]


@pytest.mark.parametrize("case", PARITY, ids=str)
def test_parity_with_the_float64_transcription(case: Parity, backend: str) -> None:
    start = np.random.default_rng(0).normal(size=case.numel).astype(np.float32)
    hyper = {"window": case.window, "density": case.density, "weight_decay": case.weight_decay, "value_dtype": "bf16"}
    hyper |= case.extra
    sizes = {"block_size": SMALL["block_size"], "quant_block_size": SMALL["quant_block_size"]}
    weight = nn.Parameter(torch.tensor(start))
    optimizer = MicroAdam([weight], **SMALL, **hyper)
    reference = ReferenceMicroAdam(start, **sizes, **hyper)
    for step, gradient in enumerate(gradients(case.numel, case.steps)):
        lr = 1e-2 * (1 - step / 50)
        optimizer.param_groups[0]["lr"] = lr
        weight.grad = torch.tensor(gradient)
        optimizer.step()
        reference.step(gradient, lr)
    way = np.linalg.norm(reference.W - start)
    assert np.linalg.norm(weight.detach().double().numpy() - reference.W) <= 1e-5 * way
    # what is left of the gradients to half a step of the quantizer, which both round alike
    stored = stored_error(optimizer.state[weight], case.numel, QuantFormat(case.extra.get("bits", 4), 16))
    np.testing.assert_allclose(
        stored.double().numpy(), reference.error, rtol=0, atol=1e-5 * np.abs(reference.error).max()
    )
    # the indices chosen last, exactly
    row = (case.steps - 1) % case.window
    indices = optimizer.state[weight]["indices"][row].long()
    if hyper["value_dtype"] == "4bit":
        indices &= 0xFFF
    block_of = torch.arange(len(indices)) // math.ceil(case.density * SMALL["block_size"])
    assert sorted((block_of * SMALL["block_size"] + indices).tolist()) == sorted(reference.rows[-1])


def test_density_one_is_adam_until_the_window_is_full(backend: str) -> None:
    """Bfloat16 values keep it exact: gradients on that grid leave no error."""
    start = torch.linspace(-1, 1, 300)
    weight, twin = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    optimizer = MicroAdam([weight], lr=1e-2, density=1.0, window=8, value_dtype="bf16", **SMALL)
    adam = torch.optim.Adam([twin], lr=1e-2, betas=(0.9, 0.999), eps=1e-8)
    for gradient in gradients(300, 8):
        grad = torch.tensor(gradient).bfloat16().float()
        weight.grad, twin.grad = grad.clone(), grad.clone()
        optimizer.step()
        adam.step()
        torch.testing.assert_close(weight, twin, rtol=1e-6, atol=1e-7)
        assert not any(optimizer.state[weight][f"error_{part}"].any() for part in ("codes", "lo", "hi"))


def test_a_trajectory_on_the_quantizers_grid_is_exact() -> None:
    """An error whose entries are lo + u·{0…15}, lo = −8, hi = 7, comes back from four bits as it was, step after step.

    The gradient is a large entry per block, which is kept, and small ones on the grid in the first step only.
    """
    small = (torch.arange(64) % 16 - 8).float()
    weight = nn.Parameter(torch.zeros(64))
    sizes = {"block_size": 64, "quant_block_size": 64, "min_compress_size": 1}
    optimizer = MicroAdam([weight], lr=0.5, density=1 / 64, window=2, **sizes)
    # entry 5 is selected: its grid value goes with it at the first step
    expected = small.clone()
    expected[5] = 0.0
    for step in range(5):
        weight.grad = small.clone() if step == 0 else torch.zeros(64)
        weight.grad[5] = 1024.0
        optimizer.step()
        assert torch.equal(stored_error(optimizer.state[weight], 64, QuantFormat(4, 64)), expected)


def test_window_bias_correction_bounds_the_step() -> None:
    """A constant gradient moves by lr under "window", by up to (1 − β1^m)/√(1 − β2^m)·lr under "step"."""
    last = {}
    for bias_correction in ("step", "window"):
        weight = nn.Parameter(torch.zeros(64, dtype=torch.float32))
        optimizer = MicroAdam([weight], lr=1.0, density=1.0, bias_correction=bias_correction, **SMALL)
        for step in range(20):
            if step == 10:  # far into a run; the row that comes next stays the first
                optimizer.state[weight]["step"] = 6000
            before = weight.detach().clone()
            weight.grad = torch.ones(64)
            optimizer.step()
        last[bias_correction] = float((before - weight.detach())[0])
    assert last["window"] == pytest.approx(1.0, rel=1e-2)
    assert last["step"] == pytest.approx((1 - 0.9**10) / math.sqrt(1 - 0.999**10), rel=1e-2)
    assert last["step"] == pytest.approx(6.5, abs=0.1)


@pytest.mark.parametrize(("value_dtype", "most"), [("bf16", 0.97), ("8bit", 0.89), ("4bit", 0.79)])
def test_bytes_per_parameter_of_a_7b_models_matrices(value_dtype: str, most: float) -> None:
    for shape in ((4096, 4096), (11008, 4096)):
        specs = microadam_state(shape, torch.bfloat16, MicroAdamOptions(value_dtype=value_dtype))
        assert specs is not None
        assert most - 0.02 < sum(spec.nbytes for spec in specs.values()) / math.prod(shape) < most


def test_values_of_old_checkpoints_are_bfloat16() -> None:
    saved = MicroAdam([nn.Parameter(torch.zeros(300))], value_dtype="bf16", **SMALL).state_dict()
    for group in saved["param_groups"]:
        del group["value_dtype"]
    MicroAdam([nn.Parameter(torch.zeros(300))], value_dtype="bf16", **SMALL).load_state_dict(saved)
    with pytest.raises(ValueError, match=r"was saved with value_dtype='bf16', .* Build it with value_dtype='bf16'"):
        MicroAdam([nn.Parameter(torch.zeros(300))], value_dtype="4bit", **SMALL).load_state_dict(saved)


def test_min_compress_size() -> None:
    small, large = nn.Parameter(torch.zeros(4095)), nn.Parameter(torch.zeros(4096))
    optimizer = MicroAdam([small, large])
    small.grad, large.grad = torch.ones(4095), torch.ones(4096)
    optimizer.step()
    assert "exp_avg" in optimizer.state[small] and "indices" in optimizer.state[large]


def test_backends_agree() -> None:
    pytest.importorskip("numba")
    results = []
    for backend in BACKENDS:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("HF_LOWMEM_OPTIM_BACKEND", backend)
            weight = nn.Parameter(torch.linspace(-1, 1, 1000))
            optimizer = MicroAdam([weight], lr=1e-2, stochastic_rounding=True, weight_decay=0.1, **SMALL)
            for gradient in gradients(1000, 25):
                weight.grad = torch.tensor(gradient)
                optimizer.step()
            results.append((weight.detach(), optimizer.state[weight]))
    assert torch.equal(results[0][0], results[1][0])
    for key, value in results[0][1].items():
        assert value == results[1][1][key] if key == "step" else torch.equal(value, results[1][1][key]), key
