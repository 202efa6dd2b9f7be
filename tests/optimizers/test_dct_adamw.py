"""DCT-AdamW against its paper: a float64 transcription, the conservation law, and the exact limits."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from hf_lowmem_optim import DCTAdamW, OptimizerFactory, measure_state, plan_optimizer, plan_state
from hf_lowmem_optim.engine import buckets
from hf_lowmem_optim.memory.plan import compressed_bytes_per_parameter
from hf_lowmem_optim.ops.cosine_basis import Basis, basis_matrix, by_fft
from hf_lowmem_optim.optimizers import LowMemoryOptimizer, dct_adamw
from hf_lowmem_optim.optimizers.dct_adamw import DCTAdamWOptions
from hf_lowmem_optim.spec import QuantFormat
from tests.optimizers.cases import sizes_of_batches, stored_error
from tests.reference.dct_adamw import PaperDCTAdamW, ReferenceDCTAdamW, cosine_basis

CPU = torch.device("cpu")
#: Steps without a gradient, and with one of zeros.
SKIPPED, ZERO = {5}, {8, 9}


def drifting_gradients(shape: tuple[int, int], num_steps: int, seed: int = 1) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    base, steps = rng.normal(size=shape), []
    for _ in range(num_steps):
        base = 0.8 * base + 0.6 * rng.normal(size=shape)
        steps.append((0.01 * base).astype(np.float32))
    return steps


def train(optimizer: Any, weight: nn.Parameter, gradients: list[np.ndarray]) -> Iterator[None]:
    for gradient in gradients:
        weight.grad = torch.tensor(gradient)
        optimizer.step()
        yield


@dataclass(frozen=True)
class Parity:
    shape: tuple[int, int] = (24, 40)
    options: dict[str, Any] = field(default_factory=dict)
    weight_decay: float = 0.0
    rank: int = 5
    absent: bool = False


PARITY = [
    *(Parity(shape, {"dct_type": kind}) for shape in ((24, 40), (40, 24), (32, 32), (11, 19)) for kind in (2, 3)),
    *(Parity(shape, {"transform": "fft", "dct_type": kind}, 0.1) for shape in ((25, 40), (40, 24)) for kind in (2, 3)),
    Parity(options={"ranking": "l2"}, weight_decay=0.1),
    Parity((40, 24), {"ranking": "l2", "update_interval": 3}),
    Parity(options={"update_interval": 4, "transform": "fft"}, absent=True),
    Parity((32, 32), {"update_interval": 100}),
    Parity((40, 24), {"error_feedback": "none"}, 0.1),
    Parity(options={"error_feedback": "none", "update_interval": 5}, absent=True),
    Parity((32, 32), absent=True, weight_decay=0.1),
    Parity((40, 24), {"ranking": "l2"}, rank=1, absent=True),
    Parity((11, 19), {"betas": (0.0, 0.95)}, rank=10),
    Parity(options={"basis": "identity"}, weight_decay=0.1, absent=True),
    Parity((40, 24), {"basis": "identity", "update_interval": 3}),
    Parity((40, 24), {"basis": "random"}, absent=True),
    Parity((11, 19), {"basis": "random", "ranking": "l2", "error_feedback": "none"}),
]


def float64_basis(p: int, options: dict[str, Any]) -> np.ndarray:
    """Independent of the package but for the random numbers."""
    kind = options.get("basis", "dct")
    if kind == "random":
        return basis_matrix(Basis("random", p, False), CPU).double().numpy()
    return np.eye(p) if kind == "identity" else cosine_basis(p, options.get("dct_type", 3))


@pytest.mark.parametrize("case", PARITY, ids=str)
def test_parity_with_the_float64_transcription(case: Parity) -> None:
    options = {"error_feedback": "fp32", **case.options}
    start = np.random.default_rng(0).normal(size=case.shape).astype(np.float32)
    weight = nn.Parameter(torch.tensor(start))
    optimizer = DCTAdamW([weight], rank=case.rank, weight_decay=case.weight_decay, **options)
    of_reference = {k: v for k, v in options.items() if k in ("betas", "ranking", "update_interval")}
    reference = ReferenceDCTAdamW(
        *(start, float64_basis(min(case.shape), options)),
        rank=case.rank,
        weight_decay=case.weight_decay,
        error_feedback=options["error_feedback"] != "none",
        **of_reference,
    )
    for step, gradient in enumerate(drifting_gradients(case.shape, 16)):
        lr = optimizer.param_groups[0]["lr"] = 0.1 * (1 - step / 40)
        gradient = gradient * (not (case.absent and step in ZERO))
        weight.grad = None if case.absent and step in SKIPPED else torch.tensor(gradient)
        optimizer.step()
        if weight.grad is not None:
            reference.step(gradient, lr)
        assert optimizer.state[weight]["indices"].tolist() == reference.rows.tolist()
    # relative to the way travelled, a harder measure than relative to the parameters
    error = np.linalg.norm(weight.detach().double().numpy() - reference.W)
    assert error <= 1e-5 * np.linalg.norm(reference.W - start), error / np.linalg.norm(reference.W - start)
    assert optimizer.state[weight]["step"] == reference.t >= 15


@pytest.mark.parametrize("shape", [(11, 19), (19, 11), (12, 12)])
@pytest.mark.parametrize("error_feedback", [True, False])
def test_the_transcription_is_the_papers_form(shape: tuple[int, int], error_feedback: bool) -> None:
    """The error in the basis, and rows that move instead of a rotation, change nothing but rounding."""
    for dct_type, interval, ranking in ((2, 1, "l1"), (3, 1, "l2"), (3, 4, "l1")):
        start, B = np.ones(shape), cosine_basis(min(shape), dct_type)
        options = {"rank": 5, "update_interval": interval, "ranking": ranking, "error_feedback": error_feedback}
        ours, theirs = (cls(start, B, **options) for cls in (ReferenceDCTAdamW, PaperDCTAdamW))
        for gradient in drifting_gradients(shape, 15):
            ours.step(gradient, 0.1)
            theirs.step(gradient, 0.1)
        assert np.linalg.norm(ours.W - theirs.W) <= 1e-12 * np.linalg.norm(ours.W - start)


def test_gradients_in_the_span_of_r_columns_are_adamw_on_the_coefficients() -> None:
    rows, (p, q) = [0, 3, 11, 19], (24, 40)
    columns = torch.tensor(cosine_basis(p, 3)[:, rows], dtype=torch.float32)
    weight, coefficients = nn.Parameter(torch.zeros(p, q)), nn.Parameter(torch.zeros(4, q))
    optimizer = DCTAdamW([weight], lr=1e-2, rank=4, error_feedback="fp32")
    adamw = torch.optim.AdamW([coefficients], lr=1e-2, weight_decay=0.0)
    for gradient in drifting_gradients((4, q), 15):
        coefficients.grad = torch.tensor(gradient)
        weight.grad = columns @ coefficients.grad
        optimizer.step()
        adamw.step()
        assert optimizer.state[weight]["indices"].tolist() == rows
        assert optimizer.state[weight]["error"].abs().max() <= 2e-6 * gradient.max()
    error = (weight - columns @ coefficients).norm()
    assert error <= 1e-5 * coefficients.norm()


def test_all_rows_are_adamw_in_the_rotated_basis() -> None:
    """The update itself: a matrix of so small a dimension takes the dense rule."""
    B, options = torch.tensor(cosine_basis(24, 3), dtype=torch.float32), DCTAdamWOptions(rank=24, error_feedback="fp32")
    weight, coefficients = torch.zeros(24, 40), nn.Parameter(torch.zeros(24, 40))
    assert DCTAdamW.method.state(weight.shape, weight.dtype, options) is None
    state = {key: torch.zeros(1, 24, 40) for key in ("exp_avg", "exp_avg_sq", "error")}
    state["indices"] = torch.zeros(1, 24, dtype=torch.int16)
    adamw = torch.optim.AdamW([coefficients], lr=options.lr, weight_decay=0.0)
    for t, gradient in enumerate(drifting_gradients((24, 40), 12), start=1):
        dct_adamw.dct_adamw_update_([weight], [torch.tensor(gradient)], state, t, options)
        coefficients.grad = B.T @ torch.tensor(gradient)
        adamw.step()
    assert not state["error"].any()
    assert (weight - B @ coefficients).norm() <= 1e-5 * weight.norm()


@pytest.mark.parametrize("error_feedback", ["fp32", "bf16", "param", "8bit", "4bit"])
@pytest.mark.parametrize("tall", [False, True])
def test_nothing_is_lost(error_feedback: str, tall: bool) -> None:
    """B_I p̃ + B E = g + B E₋ with what was stored; chosen rows of an error that is not quantized are 0 to the bit."""
    shape = (50, 32) if tall else (32, 50)
    dtype = torch.bfloat16 if error_feedback == "param" else torch.float32
    weight = nn.Parameter(torch.zeros(shape, dtype=dtype))
    optimizer = DCTAdamW([weight], rank=6, error_feedback=error_feedback, betas=(0.0, 0.999), ranking="l2")
    B, before = torch.tensor(cosine_basis(32, 3)), torch.zeros(32, 50, dtype=torch.float64)
    bits = {"8bit": 8, "4bit": 4}.get(error_feedback)
    for gradient in drifting_gradients(shape, 12):
        weight.grad = torch.tensor(gradient).to(dtype)
        optimizer.step()
        state, g = optimizer.state[weight], weight.grad.double()
        rows, S = state["indices"].long(), B.T @ (g.T if tall else g) + before
        torch.testing.assert_close(state["exp_avg"].double(), S[rows], rtol=1e-5, atol=1e-7)  # β1 = 0: m is p̃
        if bits is None:
            assert not state["error"][rows].any()
            after, bound = state["error"].double(), {"fp32": 0.0}.get(error_feedback, 2.0**-8) * S.abs()
        else:
            after = stored_error(state, 1600, QuantFormat(bits)).view(32, 50).double()
            unit = (state["error_hi"].double() - state["error_lo"].double()) / (2**bits - 1)
            bound = 0.5 * unit.repeat_interleave(64).view(32, 50)
        S[rows] = 0
        assert ((after - S).abs() - bound).max() <= 3e-6 * S.abs().max()
        if bits is None:  # the best choice of six rows of 32
            assert after.square().sum() <= (1 - 6 / 32) * (S.square().sum() + state["exp_avg"].double().square().sum())
        before = after


@pytest.mark.parametrize("transform", ["matmul", "fft"])
def test_a_transposed_matrix_has_the_transposed_trajectory(transform: str) -> None:
    wide, tall = nn.Parameter(torch.zeros(24, 40)), nn.Parameter(torch.zeros(40, 24))
    optimizer = DCTAdamW([wide, tall], lr=1e-2, rank=5, transform=transform, weight_decay=0.1, error_feedback="fp32")
    for gradient in drifting_gradients((24, 40), 12):
        wide.grad, tall.grad = torch.tensor(gradient), torch.tensor(gradient.T.copy())
        optimizer.step()
        assert torch.equal(*(optimizer.state[weight]["indices"] for weight in (wide, tall)))
    assert (wide - tall.T).norm() <= 1e-5 * wide.norm()


def test_the_size_of_gradients_does_not_matter() -> None:
    weights = [nn.Parameter(torch.zeros(24, 40)) for _ in range(2)]
    optimizers = [DCTAdamW([weight], rank=5, eps=1e-30) for weight in weights]
    for gradient in drifting_gradients((24, 40), 12):
        for weight, optimizer, scale in zip(weights, optimizers, (1.0, 2.0**-12), strict=True):
            weight.grad = torch.tensor(gradient) * scale
            optimizer.step()
    assert torch.equal(*weights)


def test_zero_gradients_move_by_decay_and_old_momentum() -> None:
    """From the first step on, which then chooses the first rows until the next choice."""
    weight = nn.Parameter(torch.ones(24, 40))
    optimizer = DCTAdamW([weight], lr=0.1, rank=5, update_interval=3, weight_decay=0.5, error_feedback="fp32")
    for _ in train(optimizer, weight, [np.zeros((24, 40), np.float32)] * 2):
        assert optimizer.state[weight]["indices"].tolist() == [0, 1, 2, 3, 4]
    torch.testing.assert_close(weight.detach(), torch.full((24, 40), 0.95**2))
    for _ in train(optimizer, weight, drifting_gradients((24, 40), 4)):
        pass
    before = optimizer.state[weight]["exp_avg"].clone()
    optimizer.param_groups[0]["update_interval"] = 100
    optimizer.state[weight]["error"].zero_()
    for _ in train(optimizer, weight, [np.zeros((24, 40), np.float32)]):
        torch.testing.assert_close(optimizer.state[weight]["exp_avg"], 0.9 * before)
    assert torch.isfinite(weight).all()


def test_equal_rows_are_chosen_from_the_first() -> None:
    weight = nn.Parameter(torch.zeros(24, 40))
    optimizer = DCTAdamW([weight], rank=4, basis="identity", error_feedback="none", update_interval=1)
    gradient = np.ones((24, 40), np.float32)
    gradient[17] = 2.0
    for _ in train(optimizer, weight, [gradient] * 2):
        assert optimizer.state[weight]["indices"].tolist() == [0, 1, 2, 17]


def test_a_row_that_is_not_a_number_is_chosen_and_reaches_the_weights() -> None:
    weight = nn.Parameter(torch.zeros(24, 40))
    optimizer = DCTAdamW([weight], rank=2, basis="identity", error_feedback="fp32")
    gradient = drifting_gradients((24, 40), 1)[0]
    gradient[20, 7] = np.nan
    for _ in train(optimizer, weight, [gradient]):
        assert 20 in optimizer.state[weight]["indices"].tolist()
        assert torch.isnan(weight[20, 7]) and torch.isfinite(optimizer.state[weight]["error"]).all()
        assert torch.isnan(weight).sum() == 1


def test_rows_that_stay_keep_their_moments_and_new_ones_begin_at_zero() -> None:
    weight = nn.Parameter(torch.zeros(6, 8))
    optimizer = DCTAdamW([weight], rank=3, basis="identity", error_feedback="none", betas=(0.5, 0.75))
    gradients = [np.zeros((6, 8), np.float32) for _ in range(2)]
    gradients[0][[1, 3, 5]] = 8.0
    gradients[1][[0, 3, 5]] = [[16.0], [4.0], [2.0]]
    for _ in train(optimizer, weight, gradients):
        pass
    state = optimizer.state[weight]
    assert state["indices"].tolist() == [0, 3, 5]
    assert state["exp_avg"][:, 0].tolist() == [8.0, 4.0, 3.0]
    assert state["exp_avg_sq"][:, 0].tolist() == [64.0, 16.0, 13.0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: rows.fill_(24), r"'indices' holds 24 … 24 for 24 rows"),
        (lambda rows: rows.fill_(-1), r"'indices' holds -1 … -1 for 24 rows"),
        (lambda rows: rows.copy_(rows.flip(0)), r"'indices' does not ascend"),
        (lambda rows: rows.fill_(3), r"'indices' does not ascend"),
    ],
)
def test_rows_that_cannot_be_are_refused_by_a_load(change: Any, message: str) -> None:
    weight = nn.Parameter(torch.zeros(24, 40))
    optimizer = DCTAdamW([weight], rank=4)
    for _ in train(optimizer, weight, drifting_gradients((24, 40), 1)):
        pass
    saved = copy.deepcopy(optimizer.state_dict())
    change(saved["state"][0]["indices"])
    with pytest.raises(ValueError, match=message):
        DCTAdamW([weight], rank=4).load_state_dict(saved)


def test_settings_without_effect_are_refused() -> None:
    weight = nn.Parameter(torch.zeros(24, 40))
    for options in ({"basis": "identity", "dct_type": 2}, {"basis": "random", "transform": "fft"}):
        with pytest.raises(ValueError, match="have no effect with"):
            DCTAdamW([weight], **options)
    with pytest.raises(ValueError, match="stochastic_rounding=True needs a quantized error"):
        DCTAdamW([weight], error_feedback="none", stochastic_rounding=True)
    with pytest.raises(ValueError, match="error_feedback='grad' is not one of"):
        DCTAdamW([weight], error_feedback="grad")


def test_bytes_per_parameter() -> None:
    """Those of the table in the docstring; the basis is counted once for all matrices of a dimension."""
    tensors = {str(i): ((2048, 5632), torch.float32) for i in range(3)}
    for options, expected in (
        ({"error_feedback": "4bit"}, 1.5625),
        ({"error_feedback": "4bit", "state_dtype": "param"}, 1.0625),
        ({"error_feedback": "none", "state_dtype": "param"}, 0.5),
    ):
        meta = [torch.empty(shape, dtype=torch.bfloat16, device="meta") for shape, _ in tensors.values()]
        group = {**DCTAdamW.method.options.defaults(), "rank": 256, **options, "params": meta}
        assert compressed_bytes_per_parameter(DCTAdamW, [group]) == pytest.approx(expected, abs=1e-3)
    components = plan_state("dct_adamw", tensors, transform="matmul").component_bytes
    assert components["dct_basis"] == 4 * 2048**2
    assert plan_state("dct_adamw", tensors, transform="fft").component_bytes["dct_basis"] == 16 * 2048
    assert plan_state("dct_adamw", tensors, basis="random").component_bytes["random_basis"] == 4 * 2048**2
    assert not {"dct_basis", "random_basis"} & plan_state("dct_adamw", tensors, basis="identity").component_bytes.keys()
    assert plan_state("dct_adamw", {"0": ((40000, 40001), torch.bfloat16)}).component_bytes["indices"] == 4 * 128


def test_the_basis_is_measured_once_and_not_saved() -> None:
    weights = [nn.Parameter(torch.zeros(shape)) for shape in ((37, 41), (41, 37), (37, 50), (30,))]
    optimizer = DCTAdamW(weights, rank=4)
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    assert measure_state(optimizer).total_bytes == 0
    optimizer.step()
    assert measure_state(optimizer) == plan_optimizer(optimizer)
    assert measure_state(optimizer).component_bytes["dct_basis"] == 4 * 37**2
    saved = [value for state in optimizer.state_dict()["state"].values() for value in state.values()]
    kept = sum(value.nbytes for value in saved if isinstance(value, Tensor))
    assert measure_state(optimizer).total_bytes == kept + 4 * 37**2


@pytest.mark.parametrize("shape", [(32, 48), (48, 32), (32, 32), (21, 33)])
@pytest.mark.parametrize(
    "options",
    [
        {"error_feedback": "none"},
        {"error_feedback": "fp32", "update_interval": 2},
        {"error_feedback": "bf16", "transform": "fft", "state_dtype": "param"},
        {"error_feedback": "fp32", "basis": "identity", "weight_decay": 0.1},
    ],
    ids=str,
)
def test_equal_matrices_in_one_call_are_as_if_alone(
    shape: tuple[int, int], options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dct_adamw, "one_by_one", lambda W: False)
    check_together_and_alone(DCTAdamW, shape, {"rank": 4, **options}, monkeypatch)


def check_together_and_alone(
    cls: type[LowMemoryOptimizer], shape: tuple[int, int], options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """To rounding, as on a GPU; a CPU takes one after the other, to the bit (tests/engine/test_buckets.py)."""
    monkeypatch.setattr(buckets, "_rounds_alike", lambda update: True)
    sizes = sizes_of_batches(monkeypatch)
    together, apart = ([nn.Parameter(torch.zeros(shape)) for _ in range(3)] for _ in range(2))
    one, each = cls(together, **options), [cls([weight], **options) for weight in apart]
    for seed in range(5):
        for index, pair in enumerate(zip(together, apart, strict=True)):
            for weight in pair:
                weight.grad = torch.tensor(drifting_gradients(shape, 1, seed=10 * seed + index)[0])
        for optimizer in (one, *each):
            optimizer.step()
    assert max(sizes) == 3
    for weight, alone in zip(together, apart, strict=True):
        assert (weight - alone).norm() <= 1e-5 * alone.norm()


def test_accumulation_in_layerwise_mode_goes_through_the_error_in_the_basis() -> None:
    """Also of a tall matrix: what is put aside is the transform of the gradient."""
    models = [nn.Linear(40, 24, bias=False), nn.Linear(40, 24, bias=False)]
    models[1].load_state_dict(models[0].state_dict())
    layerwise = OptimizerFactory("dct_adamw_layerwise", lr=1e-2, rank=5, error_feedback="fp32")(models[0])
    normal = OptimizerFactory("dct_adamw", lr=1e-2, rank=5, error_feedback="fp32")(models[1])
    start, generator = models[0].weight.detach().clone(), torch.Generator().manual_seed(0)
    for _ in range(5):
        inputs = [torch.randn(3, 40, generator=generator) for _ in range(3)]
        for number, x in enumerate(inputs):
            layerwise.is_last_micro_batch = lambda number=number: number == 2
            for model in models:
                model(x).square().sum().backward()
        assert models[0].weight.grad is None
        for optimizer in (layerwise, normal):
            optimizer.step()
            optimizer.zero_grad()
    way = (models[1].weight - start).norm()
    assert (models[0].weight - models[1].weight).norm() <= 1e-5 * way
    assert torch.equal(*(o.state[m.weight]["indices"] for o, m in zip((layerwise, normal), models, strict=True)))
    torch.testing.assert_close(
        *(o.state[m.weight]["error"] for o, m in zip((layerwise, normal), models, strict=True)), rtol=1e-4, atol=1e-5
    )


def test_auto_is_a_matter_of_dimension_and_device() -> None:
    assert [by_fft(n, "auto", CPU) for n in (255, 256)] == [False, True]
    assert [by_fft(n, "auto", torch.device("meta")) for n in (2048, 2049)] == [False, True]
    assert by_fft(4, "fft", CPU) and not by_fft(4096, "matmul", CPU)
    # and both are the same step
    ends = []
    for transform in ("auto", "fft", "matmul"):
        weight = nn.Parameter(torch.zeros(256, 300))
        optimizer = DCTAdamW([weight], lr=1e-2, rank=16, transform=transform, error_feedback="fp32")
        for _ in train(optimizer, weight, drifting_gradients((256, 300), 4)):
            pass
        ends.append((weight.detach(), optimizer))
    assert torch.equal(ends[0][0], ends[1][0])
    assert_same_state_but_for_rounding(ends[0], ends[2])


def assert_same_state_but_for_rounding(one: tuple[Tensor, DCTAdamW], other: tuple[Tensor, DCTAdamW]) -> None:
    assert 0 < (one[0] - other[0]).norm() <= 1e-4 * one[0].norm()
    first, second = (next(iter(optimizer.state.values())) for _, optimizer in (one, other))
    assert torch.equal(first["indices"], second["indices"])
    torch.testing.assert_close(first["error"], second["error"], rtol=1e-4, atol=1e-7)


def test_a_quantized_error_may_be_rounded_stochastically() -> None:
    weights = [nn.Parameter(torch.zeros(24, 40)) for _ in range(2)]
    optimizers = [DCTAdamW([w], rank=5, stochastic_rounding=on) for w, on in zip(weights, (False, True), strict=True)]
    for weight, optimizer in zip(weights, optimizers, strict=True):
        for _ in train(optimizer, weight, drifting_gradients((24, 40), 3)):
            pass
    assert not torch.equal(*(o.state[w]["error_codes"] for o, w in zip(optimizers, weights, strict=True)))
