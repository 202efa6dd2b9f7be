"""Dash against a float64 transcription, its exact limits, its storage, and the spread of its roots."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from hf_lowmem_optim import Dash, plan_state
from hf_lowmem_optim.memory.table import llama_2_7b_tensors
from hf_lowmem_optim.optimizers import dash
from tests.optimizers.cases import PUBLISHED
from tests.reference.dash import ReferenceDash

SOLVERS = ("eigh", "newton_db", "coupled_newton")
EXACT: dict[str, Any] = {**PUBLISHED, "spread": False, "solver": "eigh"}
#: What is asked of a root, not of a step.
OF_ROOTS = ("solver", "iterations", "scaling", "damping", "relative_damping")


def drifting(shape: tuple[int, ...], steps: int, seed: int = 0) -> list[np.ndarray]:
    """Gradients whose factors drift, and noise: float32 values."""
    rng = np.random.default_rng(seed)
    rows, columns = shape[0], int(np.prod(shape[1:]))
    rank = min(rows, columns)
    left, right, found = rng.normal(size=(rows, rank)), rng.normal(size=(rank, columns)), []
    for _ in range(steps):
        left = 0.9 * left + 0.3 * rng.normal(size=left.shape)
        full = 0.01 * (left * 0.97 ** np.arange(rank)) @ right + 0.01 * rng.normal(size=(rows, columns))
        found.append(full.astype(np.float32).reshape(shape))
    return found


def train(start: Tensor, steps: list[np.ndarray], **hyper: Any) -> Tensor:
    """Return the weight after some steps."""
    weight = nn.Parameter(start.clone())
    optimizer = Dash([weight], **{"lr": 1e-2, **hyper})
    for gradient in steps:
        weight.grad = torch.from_numpy(gradient).to(weight.dtype)
        optimizer.step()
    return weight.detach()


def off(found: Tensor, expected: Tensor, start: Tensor) -> float:
    """Return the distance of two ends, relative to the way travelled."""
    way = torch.linalg.vector_norm(expected.double() - start.double())
    return float(torch.linalg.vector_norm(found.double() - expected.double()) / way)


# ------------------------------------------------------------------------------------------- the transcription


@dataclass(frozen=True)
class Parity:
    shape: tuple[int, ...]
    block_size: int
    solver: str
    hyper: dict[str, Any] = field(default_factory=dict)


#: Statistics that have full rank when their first roots are due.
FULL = {"start_step": 5}
#: With roots of the first gradient, which miss directions that come later: 1e-6 would ask too much of float32.
DAMPED = {"relative_damping": 1e-2}
VARIANTS: tuple[dict[str, Any], ...] = (
    {"grafting": "adafactor", "weight_decay": 0.1},
    {"momentum": 0.5},
    {"momentum": 0.5, "nesterov": True, "grafting": "none"},
    {"shampoo_beta": 1.0, "bias_correction": False, "betas": (0.0, 0.9)},
    {"spread": True, "precondition_frequency": 7},
    {"solver": "newton_db", "scaling": "frobenius"},
    {"solver": "newton_db", "scaling": "power_iteration"},
    {"solver": "coupled_newton", "scaling": "power_iteration", "iterations": 15},
)
PARITY = [
    *(
        Parity(shape, size, solver, FULL)
        for shape, size in (((24, 40), 100), ((24, 40), 16), ((37, 21), 8), ((8, 3, 3, 3), 10))
        for solver in SOLVERS
    ),
    *(Parity((24, 40), 16, each.get("solver", "eigh"), DAMPED | each) for each in VARIANTS),
]


@pytest.mark.parametrize("case", PARITY, ids=str)
def test_parity_with_the_float64_transcription(case: Parity) -> None:
    """With remainder blocks, a block that never has a gradient, and a step that has none at all."""
    start = np.random.default_rng(1).normal(size=case.shape).astype(np.float32)
    hyper = {"spread": False, "precondition_frequency": 3, "grafting": "adam", "lr": 1e-2, **case.hyper}
    hyper["solver"] = case.solver
    weight = nn.Parameter(torch.tensor(start))
    optimizer = Dash([weight], block_size=case.block_size, **{**PUBLISHED, **hyper})
    root = {key: hyper.pop(key) for key in OF_ROOTS if key in hyper}
    lr = hyper.pop("lr")
    reference = ReferenceDash(start, block_size=case.block_size, root=root, **hyper)
    for step, gradient in enumerate(drifting(case.shape, 14)):
        if case.block_size < 100:
            gradient.reshape(len(gradient), -1)[: case.block_size, : case.block_size] = 0
        weight.grad = None if step == 4 else torch.from_numpy(gradient)
        optimizer.param_groups[0]["lr"] = lr * (1 - step / 20)
        optimizer.step()
        if step != 4:
            reference.step(gradient, lr * (1 - step / 20))
    end = torch.from_numpy(reference.W).view(case.shape)
    assert off(weight.detach(), end, torch.from_numpy(start)) <= 3e-5


# ------------------------------------------------------------------------------------------------ exact limits


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize(
    "limit",
    [
        *({"block_size": 1, "scaling": scaling} for scaling in ("power_norm", "frobenius", "power_iteration")),
        {"start_step": 100, "block_size": 16},
    ],
    ids=str,
)
def test_blocks_of_one_entry_and_a_late_start_are_adamw(limit: dict[str, Any], solver: str) -> None:
    start, steps = random(7, 12), drifting((7, 12), 8)
    theirs = nn.Parameter(start.clone())
    adamw = torch.optim.AdamW([theirs], lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1)
    for gradient in steps:
        theirs.grad = torch.from_numpy(gradient)
        adamw.step()
    ours = train(start, steps, **{**EXACT, "solver": solver}, **limit, weight_decay=0.1)
    assert off(ours, theirs.detach(), start) <= 1e-5


def test_diagonal_gradients_are_divided_by_their_own_root() -> None:
    diagonals = random(6, 8).abs() + 0.1
    none = {**EXACT, "grafting": "none", "precondition_frequency": 1}
    end = train(torch.zeros(8, 8), [np.diag(each.numpy()) for each in diagonals], **none, lr=1.0)
    m, square, expected = torch.zeros(8), torch.zeros(8), torch.zeros(8)
    for each in diagonals:
        m, square = 0.9 * m + 0.1 * each, 0.95 * square + 0.05 * each**2
        expected -= m / square.sqrt()
    torch.testing.assert_close(end, torch.diag(expected), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_gradient_of_rank_one_is_kept(solver: str) -> None:
    gradient = torch.outer(random(12, seed=1), random(20, seed=2))
    end = train(torch.zeros(12, 20), [gradient.numpy()] * 5, **{**EXACT, "solver": solver})
    cosine = (end * gradient).sum() / end.norm() / gradient.norm()
    assert cosine <= -1 + 1e-6


@pytest.mark.parametrize("solver", SOLVERS)
def test_the_first_step_is_the_polar_factor_with_adams_norm(solver: str) -> None:
    U, V = (torch.linalg.qr(random(16, 16, seed=seed))[0] for seed in (1, 2))
    gradient = U @ torch.diag(torch.linspace(1, 3, 16)) @ V
    undamped = {**EXACT, "solver": solver, "damping": 0.0, "relative_damping": 0.0, "iterations": 15}
    end = train(torch.zeros(16, 16), [gradient.numpy()], **undamped, lr=1.0)
    # every entry of Adam's first direction is a sign
    torch.testing.assert_close(-end, U @ V * 16 / 4, rtol=0, atol=2e-5)


@pytest.mark.parametrize("solver", SOLVERS)
def test_symmetries(solver: str) -> None:
    """Transposed and permuted weights, and scaled gradients, with everything that has their unit."""
    hyper = {**EXACT, "solver": solver, "relative_damping": 1e-3, "precondition_frequency": 3}
    start, steps = random(20, 28), drifting((20, 28), 8)
    end = train(start, steps, block_size=16, **hyper)
    other = train(start.T.contiguous(), [each.T.copy() for each in steps], block_size=16, **hyper)
    assert off(other.T, end, start) <= 1e-5
    rows, columns = (torch.randperm(n, generator=torch.Generator().manual_seed(n)) for n in (20, 28))
    end = train(start, steps, block_size=28, **hyper)
    permuted = [each[rows.numpy()][:, columns.numpy()] for each in steps]
    assert off(train(start[rows][:, columns], permuted, block_size=28, **hyper), end[rows][:, columns], start) <= 1e-5
    for c in (2.0**-20, 2.0**20):
        scaled = {**hyper, "eps": 1e-8 * c, "damping": 1e-10 * c**2}
        assert off(train(start, [c * each for each in steps], block_size=28, **scaled), end, start) <= 1e-6


@pytest.mark.parametrize("hyper", [{}, {**PUBLISHED, "solver": "coupled_newton"}], ids=["8bit", "fp32"])
@pytest.mark.parametrize("size", [16, 9])
def test_a_block_alone_is_the_block_in_its_matrix(hyper: dict[str, Any], size: int) -> None:
    """To the bit; blocks of odd sizes, too."""
    hyper = {**hyper, "spread": False, "block_size": size, "precondition_frequency": 2}
    start, steps = random(40, 23), drifting((40, 23), 5)
    whole = train(start, steps, **hyper)
    for i in range(0, 40, size):
        for j in range(0, 23, size):
            block = (slice(i, i + size), slice(j, j + size))
            alone = train(start[block].contiguous(), [each[block].copy() for each in steps], **hyper)
            assert torch.equal(alone, whole[block]), (i, j)


# -------------------------------------------------------------------------------------------------- edge cases


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("hyper", [{}, PUBLISHED], ids=["8bit", "fp32"])
def test_a_gradient_that_is_not_finite_stays_in_its_block(hyper: dict[str, Any], solver: str) -> None:
    start, steps = random(32, 48), drifting((32, 48), 6)
    hyper = {**hyper, "solver": solver, "block_size": 16, "precondition_frequency": 2}
    expected = train(start, steps, **hyper)
    for bad in (np.nan, np.inf):
        spoiled = [each.copy() for each in steps]
        spoiled[2][20, 5] = bad
        end = train(start, spoiled, **hyper)
        assert end[16:, :16].isnan().all()
        end[16:, :16] = expected[16:, :16]
        assert torch.equal(end, expected)


def test_a_block_without_gradients_is_only_decayed() -> None:
    start, steps = random(32, 24), drifting((32, 24), 4)
    for each in steps:
        each[16:] = 0
    for hyper in ({}, PUBLISHED):
        end = train(start, steps, block_size=16, weight_decay=0.5, **hyper)
        decayed = start[16:].clone()
        for _ in steps:
            decayed *= 1 - 1e-2 * 0.5
        assert torch.equal(end[16:], decayed)


@pytest.mark.parametrize("scale", [1e-23, 1e-12, 1e12])
def test_gradients_of_any_size_move_the_weights_as_far_as_adam(scale: float) -> None:
    """Below 1e-22, squares are zero in float32: m with Adam's norm is Adam's direction."""
    gradient = random(16, 24).numpy() * scale
    for hyper in ({}, {**PUBLISHED, "solver": "newton_db"}):
        end = train(torch.zeros(16, 24), [gradient] * 3, block_size=16, eps=1e-30, **hyper)
        assert end.isfinite().all()
        if scale > 1e-20:
            assert torch.linalg.vector_norm(end) == pytest.approx(3e-2 * 384**0.5, rel=0.1)


def test_roots_that_are_not_there_yet_are_adams_direction() -> None:
    """Also where a schedule brings the start forward: a step from zero roots would move nothing."""
    start, steps = random(16, 16), drifting((16, 16), 8)
    weight = nn.Parameter(start.clone())
    optimizer = Dash([weight], lr=1e-2, start_step=50, precondition_frequency=100, **EXACT)
    for gradient in steps[:4]:
        weight.grad = torch.from_numpy(gradient)
        optimizer.step()
    optimizer.param_groups[0]["start_step"] = 1
    before = weight.detach().clone()
    for gradient in steps[4:]:
        weight.grad = torch.from_numpy(gradient)
        optimizer.step()
    assert torch.equal(weight.detach(), train(start, steps, start_step=50, **EXACT))
    assert not torch.equal(weight.detach(), before)


def test_many_iterations_without_damping_are_refused() -> None:
    undamped = {"damping": 0.0, "relative_damping": 0.0, "iterations": 16}
    with pytest.raises(ValueError, match=r"iterations=16 need relative_damping=1e-6"):
        Dash([nn.Parameter(torch.zeros(3, 3))], solver="newton_db", **undamped)
    Dash([nn.Parameter(torch.zeros(3, 3))], solver="eigh", **undamped)


def test_equal_matrices_of_one_small_block_are_as_if_alone() -> None:
    """Of each, one pair of statistics, far from the next matrix's."""
    starts, steps = [random(4, 16, seed=i) for i in range(3)], drifting((4, 16), 4)
    weights = [nn.Parameter(start.clone()) for start in starts]
    optimizer = Dash(weights, lr=1e-2, spread=False)
    for gradient in steps:
        for weight in weights:
            weight.grad = torch.from_numpy(gradient)
        optimizer.step()
    for weight, start in zip(weights, starts, strict=True):
        assert torch.equal(weight.detach(), train(start, steps, spread=False))


# ----------------------------------------------------------------------------------------------------- storage


LOW = {"statistics_dtype": "8bit", "root_dtype": "8bit", "moment_dtype": "8bit", "grafting": "adafactor"}


@pytest.mark.parametrize(
    ("hyper", "large", "small"),
    [
        (PUBLISHED, 24.04, 24.0),
        ({**PUBLISHED, "moment_dtype": "bf16", "grafting": "adafactor"}, 18.05, 18.07),
        ({**LOW, "moment_dtype": "bf16", "grafting": "adam"}, 8.15, 8.24),
        ({}, 3.22, 3.36),
        ({"root_dtype": "4bit"}, 2.72, 2.87),
        ({"root_dtype": "4bit", "statistics_dtype": "4bit"}, 2.22, 2.37),
    ],
    ids=str,
)
def test_bytes_per_parameter_on_llama_2_7b(hyper: dict[str, Any], large: float, small: float) -> None:
    linear, others = llama_2_7b_tensors()
    matrices = {name: (shape, torch.bfloat16) for name, shape in (linear | others).items() if len(shape) == 2}
    for block_size, most in ((1024, large), (128, small)):
        report = plan_state("dash", matrices, block_size=block_size, **hyper)
        assert most - 0.01 < report.total_bytes / report.num_parameters <= most


@pytest.mark.parametrize("moment_dtype", ["8bit", "bf16"])
def test_a_stored_moment_goes_the_way_of_float32_on_badly_scaled_columns(moment_dtype: str) -> None:
    """In 8 bits of m itself, noise of small columns is as large as that of their neighbours, and √v multiplies it."""
    scales = np.logspace(0, -8, 64, dtype=np.float32)
    scales[20] = 0
    start, steps = torch.zeros(48, 64), [each * scales for each in drifting((48, 64), 30)]
    hyper = {"block_size": 32, "spread": False, "grafting": "adafactor", "eps": 1e-30}
    exact = train(start, steps, **{**PUBLISHED, **hyper})
    assert off(train(start, steps, **{**PUBLISHED, **hyper, "moment_dtype": moment_dtype}), exact, start) <= 0.05


def test_low_memory_storage_hardly_turns_the_steps() -> None:
    start, steps = torch.zeros(48, 64), drifting((48, 64), 30)
    hyper = {"block_size": 32, "spread": False}
    exact = train(start, steps, **hyper, **PUBLISHED)
    for storage, least in (({**LOW, "grafting": "adam"}, 0.9999), ({**PUBLISHED, "root_dtype": "bf16"}, 0.99999)):
        end = train(start, steps, **hyper, **storage)
        assert (end * exact).sum() / end.norm() / exact.norm() >= least
    hyper["relative_damping"] = 1e-3
    exact = train(start, steps, **hyper, **PUBLISHED)
    end = train(start, steps, **hyper, statistics_dtype="4bit", root_dtype="4bit")
    assert (end * exact).sum() / end.norm() / exact.norm() >= 0.995


# ------------------------------------------------------------------------------------------------------ spread


@pytest.mark.parametrize("shapes", [[(64, 64), (64,)] * 10, [(384, 384)], [(96, 40)] * 7], ids=str)
def test_roots_are_spread_over_the_steps(shapes: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch) -> None:
    """Each block's once per interval, and no step computes much more than its share."""
    counts: Counter[int] = Counter()
    original = dash.inverse_fourth_root

    def counted(A: Tensor, how: Any) -> Tensor:
        counts[optimizer.state[weights[0]]["step"]] += len(A)
        return original(A, how)

    monkeypatch.setattr(dash, "inverse_fourth_root", counted)
    weights = [nn.Parameter(torch.ones(shape)) for shape in shapes]
    optimizer = Dash(weights, block_size=64)
    for _ in range(20):
        for weight in weights:
            weight.grad = torch.ones_like(weight)
        optimizer.step()
    blocks = sum(-(-shape[0] // 64) * -(-shape[1] // 64) for shape in shapes if len(shape) == 2)
    assert [sum(counts[i] for i in span) for span in (range(1, 11), range(11, 21))] == [2 * blocks] * 2
    assert max(counts.values()) <= 2 * max(2, -(-2 * blocks // 10))


def test_the_global_random_stream_is_left_alone_by_every_scaling() -> None:
    before = torch.manual_seed(3).get_state()
    for scaling in ("power_norm", "frobenius", "power_iteration"):
        train(random(16, 16), drifting((16, 16), 2), solver="newton_db", scaling=scaling)
    assert torch.equal(torch.get_rng_state(), before)


def test_spread_goes_by_the_place_among_all_parameters() -> None:
    """Equal weights with equal gradients have their roots in different steps."""
    weights, steps = [nn.Parameter(torch.ones(16, 24)) for _ in range(3)], drifting((16, 24), 8)
    optimizer = Dash(weights, lr=1e-2, **{**EXACT, **DAMPED, "spread": True})
    for gradient in steps:
        for weight in weights:
            weight.grad = torch.from_numpy(gradient)
        optimizer.step()
    ends = []
    for place, weight in enumerate(weights):
        root = {"solver": "eigh", **DAMPED}
        reference = ReferenceDash(np.ones((16, 24)), block_size=1024, root=root, place=place, spread=True)
        for gradient in steps:
            reference.step(gradient, 1e-2)
        ends.append(torch.from_numpy(reference.W))
        assert off(weight.detach(), ends[-1], torch.ones(16, 24)) <= 3e-5
    assert off(ends[0], ends[1], torch.ones(16, 24)) > 0.01 < off(ends[1], ends[2], torch.ones(16, 24))
