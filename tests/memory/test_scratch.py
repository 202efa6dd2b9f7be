"""What a step allocates for a moment beside the state, as the allocator saw it, stays within what a method declares."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_lowmem_optim import OPTIMIZERS, measure_state, plan_optimizer
from hf_lowmem_optim.memory.plan import plan_temporaries
from hf_lowmem_optim.ops.gram import ggt_weights, mfac_weights
from hf_lowmem_optim.optimizers import LowMemoryOptimizer
from tests.memory.allocator import peak_bytes

#: The constant in every bound on a CPU; the tensors are chosen so that one more copy of the largest does not fit in.
CONSTANT_BYTES = 2**24
WIDE, TALL = (1536, 3072), (3072, 1536)
SMALL = (*[(160, 192)] * 7, (24, 4, 3, 3), (30,), ())

ERRORS = {
    "ldadam": ("param", "fp32", "bf16", "8bit", "4bit", "grad", "none"),
    "sparse_mfac": ("fp32", "bf16", "8bit", "4bit"),
    "lowrank_mfac": ("fp32", "bf16", "8bit", "4bit"),
    "sparse_ggt": ("fp32", "bf16", "8bit", "4bit"),
}
OTHERS: dict[str, tuple[dict[str, Any], ...]] = {
    "ldadam": ({"state_dtype": "param", "rank": 64}, {"stochastic_rounding": True}),
    "microadam": ({}, {"alpha": 0.5, "stochastic_rounding": True, "bits": 8}),
    "sparse_mfac": ({"momentum": 0.9, "weight_decay": 0.1},),
    "lowrank_mfac": ({"momentum": 0.9, "weight_decay": 0.1}, {"rank": 16, "window": 64}),
    "sparse_ggt": ({"momentum": 0.9},),
}
ROUNDED: dict[str, Any] = {"weight_rounding": "stochastic"}


def cases() -> Iterator[Any]:
    """Yield name, options and dtype: what each method may be told, in the normal mode and the layer-wise one."""
    for name, entry in OPTIMIZERS.items():
        base = name.removesuffix("_layerwise")
        settings = [{"error_feedback": error} for error in ERRORS.get(base, ())] + [*OTHERS.get(base, ({},)), ROUNDED]
        if entry.optimizer_class.method.layerwise:  # the updates are the same ones
            settings = [{}, ROUNDED]
        for options in settings:
            for dtype in (torch.float32, torch.bfloat16):
                if options != ROUNDED or dtype == torch.bfloat16:
                    label = "-".join([name, *(f"{k}={v}" for k, v in options.items()), str(dtype)[6:]])
                    yield pytest.param(name, options, dtype, id=label)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Torch's profiler sees what the calling thread allocates; with one thread, that is all there is."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class _Gradient(torch.autograd.Function):
    """A function of a weight that has a given gradient, without activations."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, gradient: Tensor) -> Tensor:
        ctx.gradient = gradient
        return weight.new_zeros(())

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor, None]:
        return ctx.gradient.clone(), None


def scratch(optimizer: LowMemoryOptimizer, steps: int = 2) -> list[int]:
    """Return what each of the first steps allocates at most, without gradients and state."""
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    generator = torch.Generator(weights[0].device).manual_seed(0)
    gradients = [torch.randn(w.shape, generator=generator, device=w.device).to(w.dtype) for w in weights]
    in_gradient = any(group.get("error_feedback") == "grad" for group in optimizer.param_groups)

    def set_gradients() -> None:
        for weight, gradient in zip(weights, gradients, strict=True):
            weight.grad = gradient.clone()

    def step() -> None:
        # with the gradients, so that the count knows those that a step frees
        set_gradients()
        optimizer.step()

    def layerwise_step() -> None:
        for weight, gradient in zip(weights, gradients, strict=True):
            _Gradient.apply(weight, gradient).backward()
        optimizer.step()

    def peak(first: bool) -> int:
        device = weights[0].device
        if optimizer.method.layerwise:
            return peak_bytes(layerwise_step, device) - max(weight.nbytes for weight in weights)
        if in_gradient and not first:
            # the buffers of the gradients are there, and the fresh gradients are gone before the updates begin
            set_gradients()
            return peak_bytes(optimizer.step, device)
        return peak_bytes(step, device) - sum(weight.nbytes for weight in weights)

    found = []
    for number in range(steps):
        found.append(peak(number == 0) - (plan_optimizer(optimizer).total_bytes if number == 0 else 0))
        for weight in weights:
            weight.grad = None
    assert measure_state(optimizer) == plan_optimizer(optimizer)
    return found


def build(name: str, options: dict[str, Any], dtype: torch.dtype, *shapes: Any, device: str = "cpu") -> Any:
    weights = [nn.Parameter(torch.zeros(shape, dtype=dtype, device=device)) for shape in shapes]
    return OPTIMIZERS[name].optimizer_class(weights, **options)


def bound(optimizer: LowMemoryOptimizer) -> int:
    return plan_temporaries(type(optimizer), optimizer.param_groups)


def test_the_count_sees_a_temporary_of_the_size_of_the_gradient() -> None:
    gradient = torch.randn(WIDE)
    assert gradient.nbytes <= peak_bytes(lambda: (gradient * 2).sum()) < 1.1 * gradient.nbytes


@pytest.mark.parametrize(("backend", "largest"), [("reference", WIDE), (None, TALL)], ids=["reference", "default"])
@pytest.mark.parametrize(("name", "options", "dtype"), cases())
def test_a_step_stays_within_its_bound(
    name: str,
    options: dict[str, Any],
    dtype: torch.dtype,
    largest: tuple[int, int],
    backend: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if backend is not None:
        monkeypatch.setenv("HF_LOWMEM_OPTIM_BACKEND", backend)
    optimizer = build(name, options, dtype, *SMALL, largest, *SMALL[:2])
    assert max(scratch(optimizer)) <= bound(optimizer)
    assert 4 * largest[0] * largest[1] > 1.1 * CONSTANT_BYTES


@pytest.mark.parametrize(
    ("name", "options", "dtype"),
    [
        ("ldadam", {}, torch.float32),
        ("ldadam", {}, torch.bfloat16),
        ("ldadam", ROUNDED, torch.bfloat16),
        ("lowrank_mfac", {}, torch.float32),
        ("lowrank_mfac", ROUNDED, torch.bfloat16),
        ("microadam", ROUNDED, torch.bfloat16),
        ("sparse_mfac", {"momentum": 0.9}, torch.float32),
        ("sparse_ggt", {"momentum": 0.9, **ROUNDED}, torch.bfloat16),
    ],
)
def test_the_bound_is_no_more_than_its_constant_and_a_tenth_above(
    name: str, options: dict[str, Any], dtype: torch.dtype
) -> None:
    optimizer = build(name, options, dtype, WIDE)
    assert bound(optimizer) <= 1.1 * max(scratch(optimizer)) + CONSTANT_BYTES


@pytest.mark.parametrize("shape", [WIDE, (512,), (3, 5)], ids=str)
def test_an_update_in_place_takes_the_constant(shape: tuple[int, ...]) -> None:
    assert bound(build("microadam", {}, torch.bfloat16, shape)) == CONSTANT_BYTES
    assert bound(build("ldadam", {"rank": None, **ROUNDED}, torch.bfloat16, shape)) == CONSTANT_BYTES


@pytest.mark.parametrize("shape", [(1024, 1024), (768, 1536), (1536, 768)], ids=str)
@pytest.mark.parametrize("options", [{}, {"state_dtype": "param"}], ids=str)
def test_a_rank_near_the_dimensions(shape: tuple[int, int], options: dict[str, Any]) -> None:
    """The first step's singular value decomposition is the exact one, and factors are as large as the matrix."""
    dtype = torch.bfloat16 if options else torch.float32
    for rank in (min(shape) // 2, min(shape) - 1):
        optimizer = build("ldadam", {"rank": rank, **options}, dtype, shape)
        assert max(scratch(optimizer)) <= bound(optimizer)


@pytest.mark.parametrize(("rank", "shape"), [(1, (18, 80_000)), (4, (24, 400_000)), (16, (200_000, 40))], ids=str)
def test_few_rows_of_many_entries(rank: int, shape: tuple[int, int]) -> None:
    optimizer = build("ldadam", {"rank": rank}, torch.float32, shape)
    assert max(scratch(optimizer)) <= bound(optimizer)


@pytest.mark.parametrize("error_feedback", ["param", "8bit"])
def test_a_tall_matrix_in_torch(error_feedback: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_LOWMEM_OPTIM_BACKEND", "reference")
    optimizer = build("ldadam", {"error_feedback": error_feedback}, torch.bfloat16, TALL)
    assert max(scratch(optimizer)) <= bound(optimizer)


@pytest.mark.parametrize("dense_state", ["param", "fp32", "8bit"])
@pytest.mark.parametrize(
    ("dtype", "rounding"), [(torch.float32, "nearest"), (torch.bfloat16, "nearest"), (torch.bfloat16, "stochastic")]
)
def test_the_dense_rule_works_in_slices(dense_state: str, dtype: torch.dtype, rounding: str) -> None:
    if dense_state == "8bit":
        pytest.importorskip("bitsandbytes")
    options = {"rank": None, "dense_state": dense_state, "weight_rounding": rounding}
    optimizer = build("ldadam", options, dtype, *SMALL, WIDE, WIDE)
    assert max(scratch(optimizer)) <= bound(optimizer) == CONSTANT_BYTES


@pytest.mark.parametrize("name", ["lowrank_mfac", "sparse_mfac", "sparse_ggt"])
@pytest.mark.parametrize("scope", ["model", "tensor"])
def test_a_wide_window_has_a_large_system(name: str, scope: str) -> None:
    optimizer = build(name, {"window": 900, "scope": scope}, torch.float32, (64, 96), (30,))
    assert max(scratch(optimizer)) <= bound(optimizer)


@pytest.mark.parametrize("dependent", [False, True])
@pytest.mark.parametrize("solver", [mfac_weights, ggt_weights])
@pytest.mark.parametrize("window", [100, 200])
def test_solving_a_system_takes_six_copies(solver: Callable[..., Tensor], dependent: bool, window: int) -> None:
    """Also where gradients repeat, which M-FAC solves otherwise; there are some vectors, too."""
    rows = torch.randn(window, 300, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    rows[1] = rows[0] if dependent else rows[1]
    gram = rows @ rows.T
    peak = peak_bytes(lambda: solver(gram, 3, damping=1e-5))
    assert gram.nbytes < peak <= 6 * gram.nbytes + 16 * 8 * window


def test_tensors_that_one_call_serves_count_together() -> None:
    """Parameters on no device count as on a GPU, where a call may serve several of some size, and none of another."""
    matrix, large = (torch.empty(shape, device="meta") for shape in ((1024, 1024), (2048, 2049)))
    method = OPTIMIZERS["ldadam"].optimizer_class.method
    one, two, eight, many, largest = (
        method.scratch_bytes([{**method.options.defaults(), "params": params}])
        for params in ([matrix], [matrix] * 2, [matrix] * 8, [matrix] * 90, [large] * 90)
    )
    assert two - one == 4 * (1024**2 + 6 * 3 * 16 * 1024)
    assert (eight - one, many) == (7 * (two - one), eight)
    assert largest - one == 4 * (2048 * 2049 - 1024**2 + 6 * 16 * (2048 + 2 * 2049 - 3 * 1024))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("shapes", [((1024, 512),) * 20, (WIDE, *SMALL), (TALL, *SMALL)], ids=["many", "wide", "tall"])
@pytest.mark.parametrize(("name", "options", "dtype"), cases())
def test_a_step_on_a_gpu_stays_within_its_bound(
    name: str, options: dict[str, Any], dtype: torch.dtype, shapes: tuple[tuple[int, ...], ...]
) -> None:
    scratch(build(name, options, dtype, *shapes, device="cuda"))  # libraries take their workspaces once
    optimizer = build(name, options, dtype, *shapes, device="cuda")
    assert max(scratch(optimizer)) <= bound(optimizer)
