"""What a step allocates for a moment beside the state, as the allocator saw it, stays within what a method declares."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_lowmem_optim import OPTIMIZERS, measure_state, plan_optimizer
from hf_lowmem_optim.memory.plan import plan_temporaries
from hf_lowmem_optim.ops import gram
from hf_lowmem_optim.ops.gram import ggt_weights, mfac_weights
from hf_lowmem_optim.optimizers import LowMemoryOptimizer
from tests.memory.allocator import peak_bytes

#: The constant in every bound on a CPU; the tensors are chosen so that one more copy of the largest does not fit in.
CONSTANT_BYTES = 2**24
WIDE, TALL = (1536, 3072), (3072, 1536)
SMALL = (*[(160, 192)] * 7, (24, 4, 3, 3), (30,), ())

STORED = ("fp32", "bf16", "8bit", "4bit")
#: Sparse GGT stores its error as sparse M-FAC does.
ERRORS: dict[str, tuple[str, ...]] = {**dict.fromkeys(("sparse_mfac", "lowrank_mfac"), STORED), "sparse_ggt": ("8bit",)}
ERRORS["ldadam"] = ("param", *STORED, "grad", "none")
OTHERS: dict[str, tuple[dict[str, Any], ...]] = {
    "ldadam": ({"state_dtype": "param", "rank": 64}, {"stochastic_rounding": True}),
    "dct_adamw": (
        {"state_dtype": "param", "rank": 700, "error_feedback": "fp32"},
        {"transform": "matmul", "dct_type": 2, "stochastic_rounding": True},
    ),
    "trion": ({}, {"state_dtype": "param", "transform": "matmul"}),
    "microadam": ({}, {"alpha": 0.5, "stochastic_rounding": True, "bits": 8}),
    "sparse_mfac": ({"momentum": 0.9, "weight_decay": 0.1},),
    "lowrank_mfac": ({"momentum": 0.9, "weight_decay": 0.1}, {"rank": 16, "window": 64}),
    "sparse_ggt": ({"momentum": 0.9},),
}
ROUNDED: dict[str, Any] = {"weight_rounding": "stochastic"}
COMPENSATED: dict[str, Any] = {"weight_rounding": "compensated"}


GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


def steps() -> Iterator[Any]:
    """Yield name, options, dtype, backend, device, shapes: what each method may be told, and what is far from usual."""
    for name, entry in OPTIMIZERS.items():
        base = name.removesuffix("_layerwise")
        settings = [{"error_feedback": error} for error in ERRORS.get(base, ())] + [*OTHERS.get(base, ({},)), ROUNDED]
        layerwise = entry.optimizer_class.method.layerwise
        if layerwise:  # the updates are the same ones
            settings = [{}, ROUNDED]
        # of many options each meets one dtype; a method meets both in either version
        many = layerwise or len(settings) > 3
        for number, options in enumerate(settings):
            for dtype in (torch.bfloat16,) if options == ROUNDED else (torch.float32, torch.bfloat16):
                versions = {((number // 2 if many else number) + (dtype == torch.float32)) % 2}
                if options == ROUNDED:
                    versions = {0} if layerwise else {0, 1}
                elif many and number % 2 != (dtype == torch.float32):
                    versions = set()
                if 1 in versions:
                    yield name, options, dtype, "reference", "cpu", [*SMALL, WIDE, *SMALL[:2]]
                if 0 in versions:
                    yield name, options, dtype, "", "cpu", [*SMALL, TALL, *SMALL[:2]]
                for shapes in ([(1024, 512)] * 20, [WIDE, *SMALL], [TALL, *SMALL]):
                    yield pytest.param(name, options, dtype, "", "cuda", shapes, marks=GPU)
    # the first step's singular value decomposition is the exact one, and factors are as large as the matrix
    for shape in ((1024, 1024), (768, 1536), (1536, 768)):
        for rank in (min(shape) // 2, min(shape) - 1):
            yield "ldadam", {"rank": rank}, torch.float32, "", "cpu", [shape]
            yield "ldadam", {"rank": rank, "state_dtype": "param"}, torch.bfloat16, "", "cpu", [shape]
    # few rows of many entries
    for rank, shape in ((1, (18, 80_000)), (4, (24, 400_000)), (16, (200_000, 40))):
        yield "ldadam", {"rank": rank}, torch.float32, "", "cpu", [shape]
    for rank in (400, 512):
        yield "trion", {"rank": rank}, torch.bfloat16, "", "cpu", [(9216, 512)]
    yield "dct_adamw", {"basis": "identity"}, torch.bfloat16, "", "cpu", [WIDE]
    yield "dct_adamw", {"rank": 1000, "state_dtype": "param"}, torch.bfloat16, "", "cpu", [(1024, 1024), (30, 30)]
    for error in ("param", "8bit"):
        yield "ldadam", {"error_feedback": error}, torch.bfloat16, "reference", "cpu", [TALL]
    # of a stack, one matrix after the other, small ones together
    for name, options in (("ldadam", {}), ("ldadam", {"error_feedback": "grad"}), ("lowrank_mfac", {})):
        for shapes in ([(3, *WIDE)], [(40, 160, 192), (3, *TALL)]):
            yield name, {"stacked": True, **options}, torch.float32, "", "cpu", shapes
            yield name, {"stacked": True, **options, **ROUNDED}, torch.bfloat16, "", "cpu", shapes
    for name in ("ldadam", "microadam", "sparse_mfac"):
        yield name, COMPENSATED, torch.bfloat16, "", "cpu", [*SMALL, WIDE, *SMALL[:2]]
    for name in ("ldadam", "microadam", "sparse_mfac", "lowrank_mfac"):
        for shapes in ([WIDE, *SMALL], [(30_000_000,)]):
            options = {"window": 2} | COMPENSATED if name == "lowrank_mfac" else COMPENSATED
            yield pytest.param(name, options, torch.bfloat16, "", "cuda", shapes, marks=GPU)
    # a wide window has a large system
    for name in ("lowrank_mfac", "sparse_mfac", "sparse_ggt"):
        for scope in ("model", "tensor"):
            yield name, {"window": 900, "scope": scope}, torch.float32, "", "cpu", [(64, 96), (30,)]
    # the dense rule works in slices
    for stored in ("param", "fp32", "8bit"):
        options = {"rank": None, "dense_state": stored}
        for dtype, rounded in ((torch.float32, {}), *[(torch.bfloat16, each) for each in ({}, ROUNDED, COMPENSATED)]):
            yield "ldadam", options | rounded, dtype, "", "cpu", [*SMALL, WIDE, WIDE]


def label(value: Any) -> str:
    """Of a list of shapes the largest."""
    return str(max(value, key=math.prod)) if isinstance(value, list) else str(value)


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
    layerwise, device = optimizer.method.layerwise, weights[0].device

    def backward() -> None:
        for weight, gradient in zip(weights, gradients, strict=True):
            if layerwise:
                _Gradient.apply(weight, gradient).backward()
            else:
                weight.grad = gradient.clone()

    def step() -> None:
        # with the gradients, so that the count knows those that a step frees
        backward()
        optimizer.step()

    found, kept = [], plan_optimizer(optimizer).total_bytes
    for number in range(steps):
        if in_gradient and number > 0:
            # the buffers of the gradients are there, and the fresh gradients are gone before the updates begin
            backward()
            found.append(peak_bytes(optimizer.step, device))
        else:
            held = max if layerwise else sum
            found.append(peak_bytes(step, device) - held(w.nbytes for w in weights) - (0 if number else kept))
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
    assert 1.1 * CONSTANT_BYTES < gradient.nbytes <= peak_bytes(lambda: (gradient * 2).sum()) < 1.1 * gradient.nbytes


@pytest.mark.parametrize(("name", "options", "dtype", "backend", "device", "shapes"), steps(), ids=label)
def test_a_step_stays_within_its_bound(
    name: str, options: dict[str, Any], dtype: torch.dtype, backend: str, device: str, shapes: Any, monkeypatch: Any
) -> None:
    monkeypatch.setenv("HF_LOWMEM_OPTIM_BACKEND", backend)
    if options.get("dense_state") == "8bit":
        pytest.importorskip("bitsandbytes")
    if device == "cuda":
        scratch(build(name, options, dtype, *shapes, device=device))  # libraries take their workspaces once
    optimizer = build(name, options, dtype, *shapes, device=device)
    assert max(scratch(optimizer)) <= bound(optimizer)
    assert "dense_state" not in options or bound(optimizer) == CONSTANT_BYTES


@pytest.mark.parametrize(
    ("name", "options", "dtype"),
    [
        ("ldadam", {}, torch.float32),
        ("ldadam", {}, torch.bfloat16),
        ("ldadam", ROUNDED, torch.bfloat16),
        ("dct_adamw", {}, torch.float32),
        ("trion", {"state_dtype": "param"}, torch.bfloat16),
        ("lowrank_mfac", {}, torch.float32),
        ("lowrank_mfac", ROUNDED, torch.bfloat16),
        ("microadam", ROUNDED, torch.bfloat16),
        ("microadam", COMPENSATED, torch.bfloat16),
        ("ldadam", COMPENSATED, torch.bfloat16),
        ("sparse_mfac", {"momentum": 0.9}, torch.float32),
        ("sparse_ggt", {"momentum": 0.9, **ROUNDED}, torch.bfloat16),
    ],
)
def test_the_bound_is_hardly_above_its_constant_and_the_truth(name: str, options: Any, dtype: torch.dtype) -> None:
    optimizer = build(name, options, dtype, WIDE)
    assert bound(optimizer) <= 1.1 * max(scratch(optimizer)) + CONSTANT_BYTES


@pytest.mark.parametrize("shape", [WIDE, (512,), (3, 5)], ids=str)
def test_an_update_in_place_takes_the_constant(shape: tuple[int, ...]) -> None:
    assert bound(build("microadam", {}, torch.bfloat16, shape)) == CONSTANT_BYTES
    assert bound(build("ldadam", {"rank": None, **ROUNDED}, torch.bfloat16, shape)) == CONSTANT_BYTES


@pytest.mark.parametrize("dependent", [False, True])
@pytest.mark.parametrize("solver", [mfac_weights, ggt_weights])
@pytest.mark.parametrize("window", [100, 200])
@pytest.mark.parametrize("systems", [1, 2])
def test_solving_a_system_takes_six_copies(
    systems: int, solver: Callable[..., Tensor], dependent: bool, window: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of several one more. Also where gradients repeat, as a GPU takes for granted; there are some vectors, too."""
    rows = torch.randn(systems, window, 300, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    rows[:, 1] = rows[:, 0] if dependent else rows[:, 1]
    batch = rows @ rows.mT
    grams, products = list(batch.clone()), [batch[:, 3].clone()]
    monkeypatch.setattr(gram, "_CPU_BYTES", batch.nbytes)
    if dependent:
        monkeypatch.setattr(gram, "_READABLE", ())
    weights = functools.partial(solver, damping=1e-5)
    peak = peak_bytes(lambda: gram.update_systems_(grams, 3, products, None, weights))
    assert batch.nbytes < peak <= (6 if systems == 1 else 7) * batch.nbytes + 16 * 8 * window * systems


def test_systems_are_solved_a_bounded_number_at_a_time() -> None:
    """Parameters on no device count as on a GPU, where 16 MiB of them are."""
    method, size = OPTIMIZERS["sparse_ggt"].optimizer_class.method, 8 * 64**2
    options = {**method.options.defaults(), "window": 64}
    one, three, many, common = (
        method.scratch_bytes([{**options, "scope": scope, "params": [torch.empty(8, 8, device="meta")] * count}])
        for scope, count in (("tensor", 1), ("tensor", 3), ("tensor", 600), ("model", 600))
    )
    assert one == common
    assert three - one == (3 * 7 - 6) * size
    assert many - one == 7 * 2**24 - 6 * size


def test_tensors_that_one_call_serves_count_together() -> None:
    """Parameters on no device count as on a GPU: a first step serves some at once, a later one needs all factors."""
    matrix, large = (torch.empty(shape, device="meta") for shape in ((1024, 1024), (2048, 2049)))
    method = OPTIMIZERS["ldadam"].optimizer_class.method
    one, two, eight, many, largest = (
        method.scratch_bytes([{**method.options.defaults(), "params": params}])
        for params in ([matrix], [matrix] * 2, [matrix] * 8, [matrix] * 90, [large] * 90)
    )
    assert two - one == 4 * (1024**2 + 6 * 3 * 16 * 1024)
    assert eight - one == 7 * (two - one)
    constant = one - (two - one)
    assert many - constant == 90 * 4 * 6 * 3 * 16 * 1024 > eight - constant
    assert largest - constant == 90 * 4 * 6 * 16 * (2048 + 2 * 2049) > 4 * 2048 * 2049
