"""Trion against its paper: a float64 transcription, and the exact limits."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from hf_lowmem_optim import OptimizerFactory, Trion, measure_state, plan_optimizer
from hf_lowmem_optim.ops.newton_schulz import newton_schulz as operation
from hf_lowmem_optim.optimizers import trion
from tests.optimizers.cases import assert_equal, through_a_file
from tests.optimizers.test_dct_adamw import SKIPPED, ZERO, check_together_and_alone, drifting_gradients
from tests.reference.dct_adamw import cosine_basis
from tests.reference.trion import ReferenceTrion, newton_schulz


@dataclass(frozen=True)
class Parity:
    shape: tuple[int, int] = (24, 40)
    options: dict[str, Any] = field(default_factory=dict)
    dct_type: int = 3
    transform: str = "matmul"
    rank: int = 5
    absent: bool = False


PARITY = [
    *(Parity(shape, dct_type=kind) for shape in ((24, 40), (40, 24), (32, 32), (11, 19)) for kind in (2, 3)),
    *(Parity(shape, {"weight_decay": 0.1}, kind, "fft") for shape in ((25, 40), (40, 24)) for kind in (2, 3)),
    *(Parity(shape, {"scaling": c}) for shape in ((24, 40), (40, 24)) for c in ("dion", "kimi", "none")),
    Parity((40, 24), {"newton_schulz": "polar", "ranking": "l2"}),
    Parity(options={"newton_schulz": "polar", "momentum": 0.5}, absent=True),
    Parity(options={"ranking": "l2", "momentum": 0.0}, absent=True),
    Parity((32, 32), {"weight_decay": 0.1}, transform="fft", absent=True),
    Parity((40, 24), rank=1),
    *(Parity(shape, {"weight_decay": 0.1}, rank=rank) for shape in ((24, 40), (40, 24)) for rank in (24, 100)),
]


@pytest.mark.parametrize("case", PARITY, ids=str)
def test_parity_with_the_float64_transcription(case: Parity) -> None:
    start = 0.1 * np.random.default_rng(0).normal(size=case.shape).astype(np.float32)
    weight = nn.Parameter(torch.tensor(start))
    optimizer = Trion([weight], rank=case.rank, dct_type=case.dct_type, transform=case.transform, **case.options)
    basis = cosine_basis(min(case.shape), case.dct_type)
    reference = ReferenceTrion(start, basis, rank=case.rank, **case.options)
    for step, gradient in enumerate(drifting_gradients(case.shape, 16)):
        lr = optimizer.param_groups[0]["lr"] = 0.02 * (1 - step / 40)
        gradient = gradient * (not (case.absent and step in ZERO and case.options.get("momentum") != 0.0))
        weight.grad = None if case.absent and step in SKIPPED else torch.tensor(gradient)
        optimizer.step()
        if weight.grad is not None:
            reference.step(gradient, lr)
    error = np.linalg.norm(weight.detach().double().numpy() - reference.W)
    assert error <= 1e-5 * np.linalg.norm(reference.W - start), error / np.linalg.norm(reference.W - start)
    # the momentum in the basis, or as it is where all rows are chosen
    expected = basis.T @ reference.M if case.rank < min(case.shape) else reference.M
    found = optimizer.state[weight]["momentum"].double().numpy()
    assert np.linalg.norm(found - expected) <= 2e-6 * np.linalg.norm(expected)


def test_gradients_in_the_span_of_r_columns_are_muon_on_the_coefficients() -> None:
    rows, (p, q) = [0, 3, 11, 19], (24, 40)
    columns = torch.tensor(cosine_basis(p, 3)[:, rows], dtype=torch.float32)
    weight, coefficients = nn.Parameter(torch.zeros(p, q)), nn.Parameter(torch.zeros(4, q))
    optimizer = Trion([weight], rank=4, scaling="none")
    muon = Trion([coefficients], rank=4, scaling="none")
    for gradient in drifting_gradients((4, q), 15):
        coefficients.grad = torch.tensor(gradient)
        weight.grad = columns @ coefficients.grad
        optimizer.step()
        muon.step()
    assert (weight - columns @ coefficients).norm() <= 1e-5 * coefficients.norm()


def test_gradients_are_momentum_and_what_has_been_forgotten() -> None:
    """Σ g = B N + (1 − μ)·Σ B_I b."""
    B, weight = torch.tensor(cosine_basis(24, 3)), nn.Parameter(torch.zeros(40, 24))
    optimizer = Trion([weight], rank=5, momentum=0.75)
    total, forgotten, before = (torch.zeros(24, 40, dtype=torch.float64) for _ in range(3))
    for gradient in drifting_gradients((40, 24), 12):
        weight.grad = torch.tensor(gradient)
        optimizer.step()
        total += weight.grad.double().T
        N = before + B.T @ weight.grad.double().T
        rows = N.abs().sum(1).topk(5).indices
        forgotten += 0.25 * B[:, rows] @ N[rows]
        before = optimizer.state[weight]["momentum"].double()
    assert (B @ before + forgotten - total).norm() <= 1e-6 * total.norm()


def test_the_size_of_gradients_does_not_matter() -> None:
    weights = [nn.Parameter(torch.zeros(24, 40)) for _ in range(2)]
    optimizers = [Trion([weight], rank=5) for weight in weights]
    for gradient in drifting_gradients((24, 40), 12):
        for weight, optimizer, scale in zip(weights, optimizers, (2.0**8, 2.0**12), strict=True):
            weight.grad = torch.tensor(gradient) * scale
            optimizer.step()
    assert (weights[0] - weights[1]).norm() <= 1e-6 * weights[0].norm()


@pytest.mark.parametrize("transform", ["matmul", "fft"])
@pytest.mark.parametrize("scaling", ["kimi", "none"])
def test_a_transposed_matrix_has_the_transposed_trajectory(transform: str, scaling: str) -> None:
    wide, tall = nn.Parameter(torch.zeros(24, 40)), nn.Parameter(torch.zeros(40, 24))
    optimizer = Trion([wide, tall], rank=5, transform=transform, weight_decay=0.1, scaling=scaling)
    for gradient in drifting_gradients((24, 40), 12):
        wide.grad, tall.grad = torch.tensor(gradient), torch.tensor(gradient.T.copy())
        optimizer.step()
    assert (wide - tall.T).norm() <= 1e-5 * wide.norm()


def test_without_a_gradient_only_decay_moves() -> None:
    weight = nn.Parameter(torch.ones(24, 40))
    optimizer = Trion([weight], lr=0.1, rank=5, weight_decay=0.5)
    for _ in range(2):
        weight.grad = torch.zeros_like(weight)
        optimizer.step()
    torch.testing.assert_close(weight.detach(), torch.full((24, 40), 0.95**2))


def test_without_momentum_chosen_rows_are_forgotten_and_the_others_kept() -> None:
    weight = nn.Parameter(torch.zeros(24, 40))
    optimizer = Trion([weight], rank=5, momentum=0.0)
    weight.grad = torch.tensor(drifting_gradients((24, 40), 1)[0])
    optimizer.step()
    N = optimizer.state[weight]["momentum"]
    coefficients = torch.tensor(cosine_basis(24, 3), dtype=torch.float32).T @ weight.grad
    chosen = coefficients.abs().sum(1).topk(5).indices.sort().values
    assert (~N.any(1)).nonzero().flatten().tolist() == chosen.tolist()
    coefficients[chosen] = 0
    torch.testing.assert_close(N, coefficients, rtol=1e-5, atol=1e-8)


def test_of_equal_rows_the_first_are_chosen() -> None:
    weight = nn.Parameter(torch.zeros(24, 40))
    optimizer = Trion([weight], rank=3, momentum=0.5)
    weight.grad = torch.zeros(24, 40)
    optimizer.step()
    momentum = optimizer.state[weight]["momentum"]
    momentum.fill_(1.0)
    momentum[20, 3] = -2.0
    optimizer.step()
    assert (momentum[:, 0] == 0.5).nonzero().flatten().tolist() == [0, 1, 20]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_the_dense_rule_is_torchs_adamw_at_its_own_rate(dtype: torch.dtype, weight_decay: float) -> None:
    """Also under a schedule: the ratio stays."""
    ours, theirs = (
        [nn.Parameter(torch.full(shape, 0.01, dtype=dtype)) for shape in ((30,), (20, 24))] for _ in range(2)
    )
    optimizer = Trion([{"params": ours, "rank": None}], lr=0.02, weight_decay=weight_decay)
    adamw = torch.optim.AdamW(theirs, betas=(0.9, 0.95), eps=1e-10, weight_decay=weight_decay, fused=True)
    for step, gradient in enumerate(drifting_gradients((20, 24), 6)):
        lr = optimizer.param_groups[0]["lr"] = 0.02 * (1 - step / 10)
        adamw.param_groups[0]["lr"] = lr * 0.015
        for pair in zip(ours, theirs, strict=True):
            for weight in pair:
                weight.grad = torch.tensor(gradient).to(dtype) if weight.dim() == 2 else torch.ones_like(weight)
        optimizer.step()
        adamw.step()
    assert_equal(ours, theirs)
    assert (ours[1] != torch.full_like(ours[1], 0.01)).float().mean() > 0.9


def test_the_factory_gives_the_method_its_own_ratio() -> None:
    """By keyword and in ``optim_args``; a rate of an override is multiplied, too."""
    model = nn.Sequential(nn.Embedding(30, 16), nn.Linear(16, 40))
    overrides = {"0": {"lr": 1.0, "dense_lr_ratio": 0.5}}
    optimizer = OptimizerFactory("trion", lr=0.1, dense_lr_ratio=0.25, overrides=overrides)(model)
    found = {group["param_names"][0]: group for group in optimizer.param_groups}
    assert [found[name]["lr"] for name in ("0.weight", "1.weight", "1.bias")] == [1.0, 0.1, 0.1]
    assert [found[name]["dense_lr_ratio"] for name in ("0.weight", "1.bias")] == [0.5, 0.25]
    options = optimizer.method.options_of(found["0.weight"])
    assert (options.lr, options.dense_lr) == (1.0, 0.5)
    with pytest.raises(ValueError, match="dense_lr_ratio=0 is out of range"):
        OptimizerFactory("trion", dense_lr_ratio=0)
    with pytest.raises(ValueError, match=r"dense_lr_ratio=0\.5 has no effect: it is for the dense rule"):
        OptimizerFactory("trion", overrides={"1": {"dense_lr_ratio": 0.5, "rank": 4}}, target_modules=["1"])(
            nn.Sequential(nn.Embedding(30, 16), nn.Linear(16, 40, bias=False))
        )


@pytest.mark.parametrize("rank", [5, 24])
@pytest.mark.parametrize("state_dtype", ["fp32", "param"])
def test_state_is_the_momentum_and_resumes_bit_for_bit(state_dtype: str, rank: int) -> None:
    ends = []
    for stop in (False, True):
        weights = [nn.Parameter(torch.zeros(shape, dtype=torch.bfloat16)) for shape in ((24, 40), (40, 24), (24, 40))]
        optimizer = Trion(weights, rank=rank, state_dtype=state_dtype)
        for step in range(8):
            if stop and step == 5:
                saved = through_a_file(optimizer.state_dict())
                optimizer = Trion(weights, rank=rank, state_dtype=state_dtype)
                optimizer.load_state_dict(saved)
            for index, weight in enumerate(weights):
                gradient = drifting_gradients(tuple(weight.shape), 1, seed=10 * step + index)[0]
                weight.grad = torch.tensor(gradient).bfloat16()
            optimizer.step()
        components = measure_state(optimizer).component_bytes
        assert measure_state(optimizer) == plan_optimizer(optimizer)
        assert components["momentum"] == 3 * 24 * 40 * (2 if state_dtype == "param" else 4)
        assert components.get("dct_basis", 0) == (4 * 24**2 if rank < 24 else 0)
        ends.append(weights)
    assert_equal(*ends)


@pytest.mark.parametrize("shape", [(32, 48), (48, 32), (32, 32), (21, 33)])
@pytest.mark.parametrize("options", [{"rank": 4}, {"rank": 50, "weight_decay": 0.1}], ids=str)
def test_equal_matrices_in_one_call_are_as_if_alone(
    shape: tuple[int, int], options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trion, "one_by_one", lambda W: False)
    check_together_and_alone(Trion, shape, options, monkeypatch)


@pytest.mark.parametrize("polynomials", ["muon", "polar"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_newton_schulz_makes_rows_nearly_orthonormal(polynomials: str, dtype: torch.dtype) -> None:
    rng = np.random.default_rng(0)
    left, right = (np.linalg.qr(rng.normal(size=(40, 40)))[0] for _ in range(2))
    b = np.stack([left[:12] @ np.diag(np.linspace(0.05, 1, 40)) @ right, np.zeros((12, 40))])
    given = torch.tensor(b, dtype=torch.float32)
    out = operation(given, polynomials, dtype).double()
    assert torch.equal(given, torch.tensor(b, dtype=torch.float32)) and not out[1].any()
    expected = newton_schulz(b[0], polynomials)
    tolerance = 1e-5 if dtype == torch.float32 else 0.05
    assert np.linalg.norm(out[0].numpy() - expected) <= tolerance * np.linalg.norm(expected)
    values = torch.linalg.svdvals(out[0])
    low, high = (0.675, 1.135) if polynomials == "muon" else (0.975, 1.035)
    slack = 0.03 if dtype == torch.bfloat16 else 0.0
    assert low - slack <= values.min() and values.max() <= high + slack


def test_products_in_bfloat16_are_coarse_and_in_no_preferred_direction() -> None:
    weights = [nn.Parameter(torch.zeros(24, 40)) for _ in range(2)]
    optimizers = [
        Trion([weight], rank=8, ns_dtype=dtype) for weight, dtype in zip(weights, ("fp32", "bf16"), strict=True)
    ]
    for gradient in drifting_gradients((24, 40), 10):
        for weight, optimizer in zip(weights, optimizers, strict=True):
            weight.grad = torch.tensor(gradient)
            optimizer.step()
    assert 0 < (weights[0] - weights[1]).norm() <= 0.1 * weights[0].norm()
