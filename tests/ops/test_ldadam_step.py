"""A later step of LDAdam by the fused kernels beside the torch version, whose parts Triton serves, too."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from rounded_products import RoundedProducts
from torch import Tensor

from hf_lowmem_optim.engine.buckets import allocate_stacked
from hf_lowmem_optim.ops import dispatch
from hf_lowmem_optim.ops.low_rank import PRODUCTS_VARIABLE, precision_of_products
from hf_lowmem_optim.optimizers.ldadam import LDAdam, LDAdamOptions, ldadam_state, ldadam_update_
from tests.ops.backends import BF16, DEVICE, EMULATED, FP16, FP32, INTERPRETED, ON_GPU, QUIET, Use, normal
from tests.optimizers.test_ldadam import drifting_gradients
from tests.reference.ldadam import ReferenceLDAdam

fused = pytest.importorskip("hf_lowmem_optim.ops.triton.ldadam_step", exc_type=ImportError)
residual = pytest.importorskip("hf_lowmem_optim.ops.triton.residual", exc_type=ImportError)
pytestmark = [*([] if INTERPRETED else ON_GPU), QUIET]

State = dict[str, Tensor]
#: W, gradients, state.
Matrices = tuple[list[Tensor], list[Tensor], State]


@pytest.fixture(autouse=True)
def triton_in_full_precision(use: Use, monkeypatch: pytest.MonkeyPatch) -> None:
    use("triton")
    monkeypatch.setenv(PRODUCTS_VARIABLE, "ieee")


def matrices(shape: tuple[int, int], dtype: torch.dtype, o: LDAdamOptions, n: int = 2) -> Matrices:
    """Matrices after two steps in torch, with the gradients of the third."""
    W = [normal(*shape, seed=i).to(dtype) for i in range(n)]
    specs = ldadam_state(shape, dtype, o)
    assert specs is not None
    parts = allocate_stacked(specs, n, torch.device(DEVICE))
    state = {key: torch.stack([part[key] for part in parts]) for key in specs}
    for t in (1, 2, 3):
        low = normal(shape[0], 4, seed=t) @ normal(4, shape[1], seed=t + 5)
        g = [(low + normal(*shape, seed=10 * t + i)).to(dtype) for i in range(n)]
        if o.error_feedback == "grad":
            g = [state["error"][0].add_(g[0])]
        if t < 3:
            ldadam_update_.torch_version(W, g, state, t, o)
    return W, g, state


def copied(given: Matrices, o: LDAdamOptions) -> Matrices:
    W, g, state = [w.clone() for w in given[0]], given[1], {key: value.clone() for key, value in given[2].items()}
    return W, [state["error"][0]] if o.error_feedback == "grad" else g, state


def both(
    shape: tuple[int, int], dtype: torch.dtype, o: LDAdamOptions, n: int = 2
) -> tuple[Matrices, Matrices, Matrices]:
    """The matrices before a step, after it in torch, and after it fused."""
    before = matrices(shape, dtype, o, n)
    one, other = copied(before, o), copied(before, o)
    ldadam_update_.torch_version(*one, 3, o)
    assert fused._why_not(*other, 3, o) is None
    fused.later_step_(*other, 3, o)
    return before, one, other


def distance(got: Tensor, expected: Tensor, start: Tensor | float = 0.0) -> float:
    """Relative to the way travelled."""
    got, expected = got.double(), expected.double()
    return ((got - expected).norm() / (expected - start).norm()).item()


def check_same(before: Matrices, expected: Matrices, got: Matrices) -> None:
    """To the rounding of products in float32; a few codes may fall on the other side of a half."""
    dtype = got[0][0].dtype
    for w, x, y in zip(before[0], expected[0], got[0], strict=True):
        assert not torch.equal(x, w)
        if dtype == FP32:  # of weights that are a hundred steps away from 0
            assert distance(y, x, w) <= 2e-5
        else:
            assert (x != y).double().mean() < 0.01
            assert ((y.double() - x.double()).abs() <= torch.finfo(dtype).eps * x.double().abs()).all()
    for key, value in expected[2].items():
        if key == "error_codes":
            codes = [(part[key].int() >> shift) & 15 for part in (expected[2], got[2]) for shift in (0, 4)]
            differing = (value != got[2][key]).double().mean().item()
            assert differing < 0.01 and any(code.any() for code in codes)
        else:
            half = value.dtype != FP32
            assert distance(got[2][key], value) <= (4e-3 if half else 1e-5), key


CASES: list[tuple[tuple[int, int], int, torch.dtype, dict[str, Any]]] = [
    ((64, 128), 16, BF16, {"error_feedback": "4bit", "weight_decay": 0.1}),
    ((128, 64), 16, BF16, {"error_feedback": "4bit"}),
    ((100, 128), 16, FP32, {"error_feedback": "4bit"}),
    ((70, 128), 5, FP32, {"error_feedback": "8bit"}),
    ((103, 64), 20, FP16, {"error_feedback": "8bit"}),
    ((64, 128), 40, FP16, {"error_feedback": "4bit"}),
    ((50, 77), 6, FP32, {"error_feedback": "fp32", "betas": (0.0, 0.9)}),
    ((77, 50), 6, BF16, {"error_feedback": "bf16", "weight_decay": 0.1}),
    ((48, 80), 4, FP32, {"error_feedback": "none"}),
    ((80, 33), 3, BF16, {"error_feedback": "none"}),
    ((48, 96), 4, FP16, {"error_feedback": "param", "state_dtype": "param"}),
    ((64, 80), 36, FP32, {"error_feedback": "param"}),
    ((40, 128), 4, FP32, {"error_feedback": "4bit", "stochastic_rounding": True}),
    ((70, 64), 4, BF16, {"error_feedback": "8bit", "stochastic_rounding": True}),
    # blocks of the error go on in the next row, or in the next four; the last one is shorter, or ends in half a byte
    ((24, 147), 6, BF16, {"error_feedback": "4bit", "weight_decay": 0.1}),
    ((67, 15), 5, FP32, {"error_feedback": "4bit", "stochastic_rounding": True}),
    ((33, 70), 17, FP32, {"error_feedback": "8bit"}),
    ((24, 80), 4, BF16, {"error_feedback": "8bit", "stochastic_rounding": True}),
]


@pytest.mark.parametrize(("shape", "rank", "dtype", "options"), CASES, ids=str)
def test_a_fused_step_is_the_torch_version(
    shape: tuple[int, int], rank: int, dtype: torch.dtype, options: dict[str, Any]
) -> None:
    check_same(*both(shape, dtype, LDAdamOptions(rank=rank, lr=1e-2, **options)))


@pytest.mark.parametrize(("shape", "rank", "dtype", "options"), [CASES[10], CASES[13]], ids=str)
def test_a_step_that_ends_in_parts_is_the_torch_version(
    shape: tuple[int, int], rank: int, dtype: torch.dtype, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of matrices whose smaller dimension is long; higher ranks are among the cases above."""
    monkeypatch.setattr(fused, "finishes", lambda *_: False)
    check_same(*both(shape, dtype, LDAdamOptions(rank=rank, lr=1e-2, **options)))


@pytest.mark.parametrize("shape", [(40, 70), (64, 40)])
def test_an_error_in_the_gradient_stays_there(shape: tuple[int, int]) -> None:
    options = LDAdamOptions(rank=4, lr=1e-2, error_feedback="grad")
    before, expected, got = both(shape, BF16, options, n=1)
    check_same(before, expected, got)
    assert got[1][0].data_ptr() == got[2]["error"].data_ptr() and not torch.equal(got[1][0], before[1][0])


@pytest.mark.parametrize(
    ("products", "error", "bound"), [("tf32x3", "fp32", 2e-5), ("tf32", "8bit", 1e-2), ("bf16", "4bit", 0.1)]
)
def test_less_precise_products_cost_what_the_rule_says(
    products: str, error: str, bound: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(PRODUCTS_VARIABLE, products)
    (start, _, _), (expected, _, _), (got, _, _) = both(
        (64, 128), FP32, LDAdamOptions(rank=16, lr=1e-2, error_feedback=error), n=1
    )
    off = max(distance(y, x, w) for w, x, y in zip(start, expected, got, strict=True))
    assert off <= bound and (products == "tf32x3" or off > 2e-5)


@pytest.mark.parametrize(
    ("products", "shape", "error"), [("tf32", (32, 64), "8bit"), ("bf16", (32, 64), "4bit"), ("bf16", (64, 32), "none")]
)
def test_simulated_products_are_those_of_the_kernels(
    products: str, shape: tuple[int, int], error: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With which ``benchmarks/convergence.py`` trains wherever it runs."""
    monkeypatch.setenv(PRODUCTS_VARIABLE, products)
    options = LDAdamOptions(rank=4, lr=1e-2, error_feedback=error)
    start, exact, got = both(shape, FP32, options)
    simulated = copied(start, options)
    RoundedProducts(products).update_(*simulated, 3, options)
    tensors = [(*each, 0.0) for each in zip(*([s["exp_avg"]] for s in (got[2], simulated[2], exact[2])), strict=True)]
    tensors += list(zip(got[0], simulated[0], exact[0], start[0], strict=True))
    for kernels, torchs, float32, before in tensors:
        # some operands may round to the other side
        off, moved = distance(torchs, kernels, before), distance(float32, kernels, before)
        assert off <= min(1e-4, moved / 10)


@pytest.mark.parametrize(
    ("products", "error", "bound"), [("ieee", "fp32", 1e-5), ("tf32x3", "fp32", 3e-5), ("tf32", "8bit", 2e-2)]
)
def test_fused_steps_keep_to_the_float64_transcription(
    products: str, error: str, bound: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(PRODUCTS_VARIABLE, products)
    start, options = normal(24, 64), LDAdamOptions(rank=4, error_feedback=error, weight_decay=0.1, lr=1e-2)
    weight = torch.nn.Parameter(start.clone())
    optimizer = LDAdam([weight], **vars(options))
    reference = ReferenceLDAdam(start.double().cpu().numpy(), rank=4, weight_decay=0.1)
    fused_steps, step_ = [], fused._step_
    monkeypatch.setattr(fused, "_step_", lambda *given: (fused_steps.append(given), step_(*given)))
    for gradient in drifting_gradients((24, 64), 12, seed=1):
        weight.grad = torch.tensor(gradient, device=DEVICE)
        optimizer.step()
        reference.step(gradient, options.lr)
    off = distance(weight.detach().cpu(), torch.tensor(reference.W), start.cpu())
    assert len(fused_steps) == 11 and off <= bound


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize(
    ("shape", "error"), [((48, 128), "4bit"), ((128, 64), "8bit"), ((40, 70), "fp32"), ((24, 40), "4bit")]
)
def test_what_is_not_finite_goes_where_it_goes_in_torch(shape: tuple[int, int], error: str, value: float) -> None:
    options = LDAdamOptions(rank=4, error_feedback=error)
    before = matrices(shape, FP32, options)
    before[1][1][7, 3] = value
    expected, got = copied(before, options), copied(before, options)
    ldadam_update_.torch_version(*expected, 3, options)
    fused.later_step_(*got, 3, options)
    assert got[0][0].isfinite().all() and not got[0][1].isfinite().all()
    assert torch.equal(got[0][1].isfinite(), expected[0][1].isfinite())
    for key in expected[2].keys() - {"error_codes"}:
        assert torch.equal(got[2][key].isfinite(), expected[2][key].isfinite()), key


def test_blocks_without_an_error_and_of_one_value(monkeypatch: pytest.MonkeyPatch) -> None:
    """A gradient of zero leaves zeros; what the quantizer holds exactly stays exact."""
    options = LDAdamOptions(rank=4, error_feedback="4bit")
    W, g, state = matrices((64, 128), FP32, options)
    for tensor in (*g, *state.values()):
        tensor.zero_()
    before = [w.clone() for w in W]
    fused.later_step_(W, g, state, 3, options)
    assert all(map(torch.equal, W, before))
    assert all((state[key] == 0).all() for key in state if key != "basis")


def test_each_of_a_batch_is_what_it_is_alone_and_from_run_to_run(monkeypatch: pytest.MonkeyPatch) -> None:
    options = LDAdamOptions(rank=16, error_feedback="4bit")  # whose products a CPU rounds alike
    given = matrices((32, 64), BF16, options, n=3)
    runs = [copied(given, options) for _ in range(3)]
    fused.later_step_(*runs[0], 3, options)
    monkeypatch.setattr(fused, "MOST_FACTOR_BYTES", 1)
    fused.later_step_(*runs[1], 3, options)
    monkeypatch.undo()
    for i in range(3):
        W, g, state = runs[2]
        monkeypatch.setenv(PRODUCTS_VARIABLE, "ieee")
        fused.later_step_(
            W[i : i + 1], g[i : i + 1], {key: value[i : i + 1] for key, value in state.items()}, 3, options
        )
    for other in runs[1:]:
        assert all(map(torch.equal, runs[0][0], other[0]))
        assert all(torch.equal(runs[0][2][key], other[2][key]) for key in other[2])


def test_weights_and_gradients_at_any_address() -> None:
    options = LDAdamOptions(rank=4, error_feedback="4bit")
    given = matrices((64, 128), BF16, options, n=1)
    expected, got = copied(given, options), copied(given, options)
    flat = [torch.zeros(64 * 128 + 1, dtype=BF16, device=DEVICE) for _ in range(2)]
    odd = [buffer[1:].view(64, 128).copy_(tensor[0]) for buffer, tensor in zip(flat, got[:2], strict=True)]
    fused.later_step_(*expected, 3, options)
    fused.later_step_([odd[0]], [odd[1]], got[2], 3, options)
    assert torch.equal(odd[0], expected[0][0])
    assert all(torch.equal(got[2][key], expected[2][key]) for key in got[2])


def test_what_kernels_do_not_serve_takes_the_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the backend was asked for: the parts are its own."""
    options = LDAdamOptions(rank=4, error_feedback="4bit")
    before = matrices((20, 64), FP32, options)
    assert fused._why_not(*before, 1, options) is not None
    monkeypatch.setitem(dispatch._VERSIONS, ("ldadam_update_", "triton"), (None, fused._why_not))
    ldadam_update_(*before, 1, options)
    for names in (["W", "g"], ["g", "W"]):
        W, g, state = matrices((20, 64), FP32, options)
        mixed = {"W": [W[0], W[1].bfloat16()], "g": g} if names[0] == "W" else {"W": W, "g": [g[0], g[1].bfloat16()]}
        assert "dtypes" in fused._why_not(mixed["W"], mixed["g"], state, 3, options)


LaunchCount = Callable[..., int]


@pytest.mark.skipif(EMULATED, reason="counts in the interpreter")
def test_launches_do_not_grow_with_the_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.utils._python_dispatch import TorchDispatchMode
    from triton.runtime.interpreter import GridExecutor

    launches: list[str] = []
    computed: list[str] = []
    stock, inside = GridExecutor.__call__, []

    def launch(self: Any, *args: Any, **kwargs: Any) -> Any:
        launches.append(self.fn.__name__)
        inside.append(self)
        try:
            return stock(self, *args, **kwargs)
        finally:
            inside.pop()

    class Counting(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if not inside and not func.is_view:  # the interpreter copies what it is given
                computed.append(func.name())
            return func(*args, **(kwargs or {}))

    monkeypatch.setattr(GridExecutor, "__call__", launch)
    counts = []
    for n in (2, 8):
        W, g, state = matrices((20, 64), BF16, options := LDAdamOptions(rank=4), n=n)
        launches.clear()
        computed.clear()
        with Counting():
            ldadam_update_(W, g, state, 3, options)
        counts.append((len(launches), len(computed)))
    # torch only allocates
    assert counts[0] == counts[1] and counts[0][0] == 4, (counts, launches)
    assert {name.split(".")[0] for name in computed} == {"aten::new_empty", "aten::empty_like"}, computed


def test_the_precision_goes_by_the_storage_of_the_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(PRODUCTS_VARIABLE)
    rule = {
        (error, rank): precision_of_products(error, rank)
        for error in ("4bit", "8bit", "fp32", "none")
        for rank in (16, 128)
    }
    assert rule == {
        ("4bit", 16): "tf32", ("4bit", 128): "bf16", ("8bit", 16): "tf32", ("8bit", 128): "tf32",
        ("fp32", 16): "tf32x3", ("fp32", 128): "tf32x3", ("none", 16): "tf32x3", ("none", 128): "tf32x3",
    }  # fmt: skip
    monkeypatch.setenv(PRODUCTS_VARIABLE, "tf64")
    with pytest.raises(ValueError, match="HF_LOWMEM_OPTIM_PRODUCTS='tf64' names no precision: set it to one of ieee, "):
        precision_of_products("4bit", 16)


@pytest.mark.parametrize("scale", [1e24, 1e36])
def test_gradients_whose_squares_overflow_leave_all_finite(scale: float) -> None:
    W, g, state = matrices((32, 64), FP32, LDAdamOptions(rank=4))
    for t in range(3, 6):
        fused.later_step_(W, [each * scale for each in g], state, t, LDAdamOptions(rank=4))
        assert all(value.float().isfinite().all() for value in (*W, *state.values()))
