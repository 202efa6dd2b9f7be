"""SparseMFAC, LowRankMFAC and SparseGGT against their definitions: dense float64 matrices, solved."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from hf_lowmem_optim.engine.buckets import own_tensors
from hf_lowmem_optim.ops.low_rank import seeded_sketch
from hf_lowmem_optim.optimizers import LowMemoryOptimizer, LowRankMFAC, SparseGGT, SparseMFAC, lowrank_mfac
from tests.reference.ggt import ReferenceGGT
from tests.reference.mfac import ReferenceMFAC, keep_everything, power_sgd, top_k

SHAPES: dict[str, tuple[int, ...]] = {"wide": (6, 20), "tall": (16, 5), "conv": (4, 2, 3), "vector": (9,), "scalar": ()}
EXACT_SPARSE = {"density": 1.0, "block_size": 64, "value_dtype": "fp32", "error_feedback": "fp32"}
CLASSES = [SparseMFAC, LowRankMFAC, SparseGGT]
DAMPINGS = [1e-8, 1e-5, 1e-2, 1.0]


def start() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {k: rng.normal(size=s).astype(np.float32) for k, s in SHAPES.items()}


def drifting_gradients(
    num_steps: int, *, scale: float = 0.1, rank: int | None = None
) -> Iterator[dict[str, np.ndarray]]:
    """Gradients that resemble each other, as in training; matrices of the given rank."""
    rng = np.random.default_rng(1)
    base = {k: rng.normal(size=s) for k, s in SHAPES.items()}
    for _ in range(num_steps):
        for key, shape in SHAPES.items():
            base[key] = 0.8 * base[key] + 0.6 * rng.normal(size=shape)
        gradients = dict(base)
        if rank is not None:
            for key in ("wide", "tall"):
                p, q = SHAPES[key]
                gradients[key] = rng.normal(size=(p, rank)) @ rng.normal(size=(rank, q))
        yield {k: (scale * np.asarray(g)).astype(np.float32) for k, g in gradients.items()}


def as_parameters(values: Mapping[str, np.ndarray]) -> dict[str, nn.Parameter]:
    return {k: nn.Parameter(torch.tensor(v)) for k, v in values.items()}


def feed(optimizer: LowMemoryOptimizer, params: Mapping[str, nn.Parameter], gradients: Mapping[str, Any]) -> None:
    for key, param in params.items():
        param.grad = torch.tensor(gradients[key]).to(param.dtype) if key in gradients else None
    optimizer.step()


def deviation(params: Mapping[str, nn.Parameter], reference: ReferenceMFAC) -> float:
    """Relative to the way travelled, a harder measure than relative to the parameters."""
    began = start()
    pairs = [(params[k].detach().double().numpy(), reference.W[k], began[k]) for k in params]
    apart = sum(np.sum((ours - theirs) ** 2) for ours, theirs, _ in pairs)
    return float(np.sqrt(apart / sum(np.sum((theirs - origin) ** 2) for _, theirs, origin in pairs)))


@dataclass(frozen=True)
class Parity:
    optimizer: type[LowMemoryOptimizer]
    hyper: dict[str, Any] = field(default_factory=dict)
    damping: float = 1e-3
    momentum: float = 0.0
    weight_decay: float = 0.0
    window: int = 6
    gradient_rank: int | None = None
    scale: float = 0.1
    #: Large enough for the way travelled to be far above the rounding of the parameters.
    lr: float = 1e-2

    def compressor(self) -> Any:
        if self.optimizer is LowRankMFAC:
            rank = self.hyper["rank"]
            columns = {"wide": 20, "tall": 5, "conv": 6}
            factored = {k: q for k, q in columns.items() if rank * (SHAPES[k][0] + q) < SHAPES[k][0] * q}
            cpu = torch.device("cpu")
            return power_sgd({k: seeded_sketch(q, rank, cpu).double().numpy() for k, q in factored.items()})
        if self.hyper["density"] == 1.0:
            return keep_everything
        return top_k(**{key: self.hyper[key] for key in ("density", "block_size", "value_dtype")})


def sparse(density: float, value_dtype: str) -> dict[str, Any]:
    return {"density": density, "block_size": 64, "value_dtype": value_dtype, "error_feedback": "fp32"}


EXACT_LIMITS = [
    *(Parity(cls, EXACT_SPARSE, damping=d) for cls in (SparseMFAC, SparseGGT) for d in DAMPINGS),
    *(Parity(cls, EXACT_SPARSE, momentum=0.9, weight_decay=0.1) for cls in (SparseMFAC, SparseGGT)),
    *(Parity(cls, EXACT_SPARSE, window=40) for cls in (SparseMFAC, SparseGGT)),
    *(Parity(cls, EXACT_SPARSE, window=1) for cls in (SparseMFAC, SparseGGT)),
    *(Parity(cls, EXACT_SPARSE, scale=1e-4) for cls in (SparseMFAC, SparseGGT)),
    *(Parity(cls, EXACT_SPARSE, scale=1e3, lr=10.0) for cls in (SparseMFAC, SparseGGT)),
    *(Parity(LowRankMFAC, {"rank": 3, "error_feedback": "fp32"}, gradient_rank=2, damping=d) for d in DAMPINGS),
    # the factors would be larger than the matrices, which are kept as they are
    Parity(LowRankMFAC, {"rank": 5, "error_feedback": "8bit"}, momentum=0.5, weight_decay=0.1),
]
COMPRESSED = [
    *(Parity(cls, sparse(d, v)) for cls in (SparseMFAC, SparseGGT) for d in (0.05, 0.3) for v in ("bf16", "fp32")),
    Parity(SparseMFAC, sparse(0.1, "bf16"), momentum=0.9, weight_decay=0.1, damping=1e-5),
    Parity(SparseMFAC, sparse(0.1, "4bit"), momentum=0.9, weight_decay=0.1),
    Parity(SparseGGT, sparse(0.1, "8bit")),
    Parity(LowRankMFAC, {"rank": 1, "error_feedback": "fp32"}),
    Parity(LowRankMFAC, {"rank": 3, "error_feedback": "fp32"}, momentum=0.9, weight_decay=0.1, damping=1e-5),
]


def run_parity(case: Parity, num_steps: int = 25, absent: Mapping[int, set[str]] | None = None) -> float:
    rules = {"damping": case.damping, "momentum": case.momentum, "weight_decay": case.weight_decay}
    params = as_parameters(start())
    optimizer = case.optimizer(params.values(), window=case.window, **rules, **case.hyper)
    reference_class = ReferenceGGT if case.optimizer is SparseGGT else ReferenceMFAC
    reference = reference_class(start(), window=case.window, compress=case.compressor(), **rules)
    for step, gradients in enumerate(drifting_gradients(num_steps, scale=case.scale, rank=case.gradient_rank)):
        lr = case.lr * (1 - step / 40)
        optimizer.param_groups[0]["lr"] = lr
        present = {k: g for k, g in gradients.items() if k not in (absent or {}).get(step, set())}
        feed(optimizer, params, present)
        reference.step(present, lr)
    return deviation(params, reference)


@pytest.mark.parametrize("case", [*EXACT_LIMITS, *COMPRESSED], ids=str)
def test_parity_with_the_float64_definition(case: Parity) -> None:
    error = run_parity(case)
    assert error <= 1e-4, error


def test_a_long_window_is_read_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of factors and of whole matrices."""
    monkeypatch.setattr(lowrank_mfac, "_CPU_CHUNK_ENTRIES", 1)
    error = run_parity(Parity(LowRankMFAC, {"rank": 3, "error_feedback": "fp32"}))
    assert error <= 1e-4, error


@pytest.mark.parametrize(
    "case",
    [
        Parity(SparseMFAC, EXACT_SPARSE),
        Parity(SparseGGT, EXACT_SPARSE),
        Parity(SparseMFAC, sparse(0.1, "bf16"), momentum=0.9),
        Parity(LowRankMFAC, {"rank": 3, "error_feedback": "fp32"}),
    ],
    ids=str,
)
def test_a_tensor_without_a_gradient_counts_as_zero_and_stays(case: Parity) -> None:
    """Also one that first appears when the window has wrapped, and one that is away for a whole window."""
    late: dict[int, set[str]] = {step: {"tall"} for step in range(8)}
    away = {step: {"wide", "vector"} for step in range(10, 17)}
    error = run_parity(case, absent={**late, **away, 20: {"conv"}})
    assert error <= 1e-4, error


@given(
    st.integers(1, 300),
    st.sampled_from([0.01, 0.1, 0.37, 1.0]),
    st.sampled_from([1, 7, 64, 256]),
    st.sampled_from(["bf16", "fp32"]),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    st.tuples(st.integers(1, 5), st.sampled_from([1e-6, 1.0, 1e4]), st.integers(0, 2**20)),
)
def test_what_is_kept_and_what_is_left_make_up_the_whole_exactly(
    numel: int, density: float, block_size: int, value_dtype: str, dtype: torch.dtype, run: tuple[int, float, int]
) -> None:
    """C(acc) + ξ_new == acc, to the bit: the rounding of the values belongs to ξ."""
    num_steps, scale, seed = run
    generator = torch.Generator().manual_seed(seed)
    weight = nn.Parameter(torch.zeros(numel, dtype=dtype))
    group = {"density": density, "block_size": block_size, "error_feedback": "fp32", "value_dtype": value_dtype}
    optimizer = SparseMFAC([weight], lr=0.0, window=3, **group)
    error = torch.zeros(numel)
    for step in range(1, num_steps + 1):
        weight.grad = (scale * torch.randn(numel, generator=generator)).to(dtype)
        acc = error + weight.grad.float()
        optimizer.step()
        state, row = optimizer.state[weight], (step - 1) % 3
        error = state["error"].clone()
        c = torch.zeros(numel, dtype=torch.float64)
        kept_full = -(-round(density * block_size * 100) // 100)
        starts = torch.arange(state["indices"].shape[1]) // kept_full * block_size
        c[starts + state["indices"][row]] = state["values"][row].double()
        assert torch.equal(c + error.double(), acc.double())


@pytest.mark.parametrize("error_feedback", ["fp32", "bf16", "8bit", "4bit"])
@pytest.mark.parametrize("cls", [SparseMFAC, LowRankMFAC])
def test_every_storage_of_the_error_keeps_most_of_it(cls: type[LowMemoryOptimizer], error_feedback: str) -> None:
    """One step: the update is that of the first c, and what is fed back in the second step brings the rest."""
    hyper = {"rank": 1} if cls is LowRankMFAC else {"density": 0.05, "block_size": 64}
    weight = nn.Parameter(torch.zeros(32, 64))
    optimizer = cls([weight], lr=1.0, window=4, damping=1e6, error_feedback=error_feedback, **hyper)
    generator = torch.Generator().manual_seed(0)
    gradient = torch.randn(32, 64, generator=generator)
    # with a huge damping the method is gradient descent with error feedback at the rate 1/λ
    for _ in range(400):
        weight.grad = gradient.clone()
        optimizer.step()
    average = -weight.detach() * 1e6 / 400
    allowed = {"fp32": 0.12, "bf16": 0.13, "8bit": 0.2, "4bit": 0.6}[error_feedback]
    assert torch.linalg.norm(average - gradient) <= allowed * torch.linalg.norm(gradient)


def test_scope_tensor_is_one_optimizer_per_tensor() -> None:
    together, alone = as_parameters(start()), as_parameters(start())
    hyper = {"window": 4, "damping": 1e-3, "density": 0.3}
    optimizer = SparseMFAC(together.values(), scope="tensor", **hyper)
    singles = {k: SparseMFAC([p], **hyper) for k, p in alone.items()}
    for gradients in drifting_gradients(9):
        feed(optimizer, together, gradients)
        for key, single in singles.items():
            feed(single, {key: alone[key]}, gradients)
    assert not any("shared_gram" in state for state in optimizer.state.values())
    assert all(torch.equal(together[k], alone[k]) for k in SHAPES)


def test_groups_must_agree_on_what_they_share() -> None:
    for key, value in (("window", 8), ("damping", 1e-3), ("scope", "tensor")):
        one, other = ({"params": [nn.Parameter(torch.zeros(8, 8))]} for _ in range(2))
        with pytest.raises(ValueError, match=rf"{key}=.*density=None.*scope=\"tensor\""):
            SparseMFAC([one, {**other, key: value}])
        # the dense rule shares nothing
        SparseMFAC([one, {**other, key: value, "density": None}])
        SparseMFAC([{**one, "density": None}, {**other, key: value}])
    # nor do systems for each tensor
    for own in ({"window": 8}, {"damping": 1e-3}):
        params = as_parameters(start())
        groups = [{"params": [param]} for param in params.values()]
        groups[0].update(own)
        feed(SparseMFAC(groups, scope="tensor"), params, next(drifting_gradients(1)))


def test_groups_of_one_system_may_be_compressed_differently() -> None:
    settings = {"wide": sparse(0.05, "bf16"), "tall": {**sparse(0.3, "4bit"), "block_size": 32}}
    names, params = list(start()), as_parameters(start())
    groups = [{"params": [params[key]], **settings.get(key, EXACT_SPARSE)} for key in names]
    optimizer = SparseMFAC(groups, window=6, damping=1e-3, lr=1e-2)
    keys = ("density", "block_size", "value_dtype")
    compress = {key: top_k(**{name: hyper[name] for name in keys}) for key, hyper in settings.items()}
    reference = ReferenceMFAC(
        start(), window=6, damping=1e-3, compress=lambda key, acc, t: compress.get(key, keep_everything)(key, acc, t)
    )
    for gradients in drifting_gradients(12):
        feed(optimizer, params, gradients)
        reference.step(gradients, 1e-2)
    assert deviation(params, reference) < 1e-4


def test_the_velocity_follows_the_momentum_of_its_group() -> None:
    """Momentum may be scheduled; a run that turns it on or off can be saved and resumed."""
    params = as_parameters(start())
    frozen = params["tall"]
    others = [param for param in params.values() if param is not frozen]
    optimizer = SparseMFAC([{"params": others}, {"params": [frozen], "lr": 0.0}], window=4, density=0.3)
    for step, gradients in enumerate(drifting_gradients(9)):
        optimizer.param_groups[0]["momentum"] = 0.9 if 3 <= step < 6 else 0.0
        feed(optimizer, params, gradients)
        for group in optimizer.param_groups:
            for param in group["params"]:
                assert ("velocity" in optimizer.state[param]) is (3 <= step < 6 and param is not frozen)
                assert set(optimizer.method.state_specs(param, group)) == set(own_tensors(optimizer.state[param]))
    moved = {key for key, began in start().items() if not torch.equal(params[key], torch.tensor(began))}
    assert moved == {*params} - {"tall"}


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("damping", DAMPINGS)
@pytest.mark.parametrize("scale", [1e-30, 1e-6, 1.0, 1e6, 1e18])
def test_repeated_and_zero_gradients(cls: type[LowMemoryOptimizer], damping: float, scale: float) -> None:
    """A constant gradient, then zeros, then its negative, through a window that wraps: finite throughout."""
    params = as_parameters(start())
    hyper = {} if cls is LowRankMFAC else {"density": 0.3}
    optimizer = cls(params.values(), window=5, damping=damping, error_feedback="fp32", **hyper)
    (gradients,) = drifting_gradients(1, scale=scale)
    for sign in [1.0] * 7 + [0.0] * 7 + [-1.0] * 3 + [0.0, 1.0]:
        feed(optimizer, params, {k: sign * g for k, g in gradients.items()})
        assert all(torch.isfinite(p).all() for p in params.values())
    tensors = [v for s in optimizer.state.values() for v in s.values() if isinstance(v, Tensor)]
    assert all(torch.isfinite(v).all() for v in tensors)


@pytest.mark.parametrize("damping", DAMPINGS)
def test_a_constant_gradient_is_divided_by_its_weight_in_the_window(damping: float) -> None:
    """k copies: F = λI + (k/m)·ggᵀ, so u = g/(λ + k‖g‖²/m), also where cancelling weights could hide it."""
    weight = nn.Parameter(torch.zeros(300, dtype=torch.float32))
    optimizer = SparseMFAC([weight], lr=1.0, window=8, damping=damping, **EXACT_SPARSE)
    gradient = torch.randn(300, generator=torch.Generator().manual_seed(0))
    square = float(gradient.double().square().sum())
    for step in range(1, 13):
        weight.data.zero_()
        weight.grad = gradient.clone()
        optimizer.step()
        expected = -gradient.double() / (damping + min(step, 8) / 8 * square)
        assert torch.linalg.norm(weight.detach().double() - expected) <= 1e-3 * torch.linalg.norm(expected)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("cls", CLASSES)
def test_not_finite_gradients_reach_every_tensor_and_nothing_raises(cls: type[LowMemoryOptimizer], bad: float) -> None:
    """One Fisher matrix: what is not finite in one tensor is in all of them, as the formula has it."""
    params = as_parameters(start())
    optimizer = cls(params.values(), window=4)
    steps = list(drifting_gradients(6))
    steps[2]["vector"][3] = bad
    for gradients in steps:
        feed(optimizer, params, gradients)
    assert all(not torch.isfinite(p).all() for p in params.values())
