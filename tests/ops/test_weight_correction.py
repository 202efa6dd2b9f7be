"""Narrow weights with corrections: every pair of them, and float32 values of all sizes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_lowmem_optim import OPTIMIZERS
from hf_lowmem_optim.ops.sparse_window import foreach_window_descend_, foreach_window_update_
from hf_lowmem_optim.ops.weight_correction import CORRECTION, join_weights, split_weights_
from hf_lowmem_optim.ops.window import SparseWindow
from tests.ops.backends import BACKENDS, BF16, FAST, FP16, FP32, QUIET, Use, same

pytestmark = QUIET
NARROW = [BF16, FP16]


def every(dtype: torch.dtype) -> Tensor:
    """Every number of a narrow dtype, [65536]."""
    return torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)


def split(value: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    weight = torch.full(value.shape, torch.nan, dtype=dtype, device=value.device)
    correction = torch.full(value.shape, 77, dtype=torch.int8, device=value.device)
    split_weights_([weight], [correction], [value])
    return weight, correction


def join(weight: Tensor, correction: Tensor) -> Tensor:
    return join_weights([weight], [correction])[0]


def distance(value: Tensor, dtype: torch.dtype) -> Tensor:
    """The distance of the two weights between which a value lies, float64."""
    kind = torch.finfo(dtype)
    exponent = torch.frexp(value.double().abs().clamp(min=kind.smallest_normal)).exponent - 1
    return kind.eps * torch.exp2(exponent.double())


@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_every_pair_is_a_number_of_its_own(dtype: torch.dtype) -> None:
    """Joined and split, each is what it was; a weight with corrections ascends evenly to the next one."""
    weight, smallest = every(dtype), torch.finfo(dtype).smallest_normal
    ascending = weight[weight.isfinite() & (weight >= 0) & ~weight.signbit()]
    for sign, corrections in ((1, range(-128, 128)), (-1, (-128, -1, 0, 127))):
        before = torch.full((len(ascending),), -torch.inf, dtype=torch.float64)
        for each in corrections:
            w = ascending * sign
            c = torch.full(w.shape, each, dtype=torch.int8)
            c[0] = max(each, 0)  # beside 0 there is nothing below
            value = join(w, c)
            again = split(value, dtype)
            assert same(again[0], w) and torch.equal(again[1], c)
            magnitude = sign * value.double()
            assert (magnitude[1:] > before[1:]).all()
            away = (magnitude - ascending.double()).abs()
            assert (away <= distance(ascending, dtype) * (abs(each) / 256)).all()
            normal = ascending.double() > smallest
            below = distance(value, dtype)
            assert torch.equal(away[normal], (below * (abs(each) / 256))[normal])
            before = magnitude
        assert (before[:-1] < ascending[1:].double()).all()


@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_a_value_is_its_nearest_pair(dtype: torch.dtype) -> None:
    """Of all exponents, exact to 2^-9 of the distance of weights; those of few bits are exact."""
    generator = torch.Generator().manual_seed(0)
    kind = torch.finfo(dtype)
    exponents = torch.linspace(-148, 127, 400_000) if dtype == BF16 else torch.linspace(-35, 16, 400_000)
    value = torch.randn(400_000, generator=generator) * torch.exp2(exponents)
    value = value[value.abs() < kind.max * (1 - kind.eps)]
    weight, correction = split(value, dtype)
    unit = distance(value, dtype)
    joined = join(weight, correction)
    assert ((joined.double() - value.double()).abs() <= unit * 2**-9).all()
    assert ((weight.double() - value.double()).abs() <= unit * (0.5 + 2**-9)).all()
    assert ((weight == value.to(dtype)) | ((weight.double() - value.double()).abs() >= unit * (0.5 - 2**-9))).all()
    assert same(split(joined, dtype)[0], weight) and torch.equal(split(joined, dtype)[1], correction)
    bits = 16 if dtype == BF16 else 19
    short = value.view(torch.int32) & -(1 << 24 - bits)
    few = short.view(FP32)[value.abs() >= kind.smallest_normal]
    assert len(few) > 1e5 and torch.equal(join(*split(few, dtype)), few)


@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_what_is_not_finite_has_no_correction(dtype: torch.dtype) -> None:
    kind = torch.finfo(dtype)
    too_large = kind.max * (1 + kind.eps * 0.5)
    special = torch.tensor([torch.inf, -torch.inf, torch.nan, too_large, -too_large, -0.0])
    weight, correction = split(special, dtype)
    assert same(weight, special.to(dtype)) and not correction.any()
    # whatever lies beside it
    for stale in (-128, 127):
        assert same(join(weight, torch.full_like(correction, stale))[:5], weight[:5].float())
    largest = torch.tensor([kind.max, -kind.max], dtype=dtype)
    assert join(largest, torch.full((2,), 127, dtype=torch.int8)).isfinite().all()
    zeros = join(torch.tensor([0.0, -0.0], dtype=dtype), torch.full((2,), -128, dtype=torch.int8))
    assert not zeros.any() and zeros.signbit().tolist() == [False, True]


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_kernels_give_the_bits_of_the_torch_version(dtype: torch.dtype, backend: str, use: Use) -> None:
    """Several tensors, odd sizes and layouts, every weight with two corrections."""
    generator = torch.Generator().manual_seed(0)
    weights = [every(dtype), every(dtype)[4:].reshape(-1, 3).t(), every(dtype)[:0], every(dtype)[9:42]]
    corrections = [torch.randint(-128, 128, w.shape, generator=generator).to(torch.int8) for w in weights]
    bits = [torch.randint(-(2**31), 2**31, w.shape, generator=generator) for w in weights]
    values = [b.to(torch.int32).view(FP32) for b in bits]
    scales = [torch.randint(-32, 18, w.shape, generator=generator) for w in weights]
    values[1] = torch.randn(values[1].shape, generator=generator) * torch.exp2(scales[1])
    expected = join_weights.torch_version(weights, corrections)
    device = use(backend)
    there = [[each.to(device).clone() for each in tensors] for tensors in (weights, corrections, values)]
    joined = join_weights(*there[:2])
    assert all(map(same, joined, expected)) and all(each.is_contiguous() for each in joined)
    assert not there[0][1].is_contiguous()
    split_weights_.torch_version(weights, corrections, values)
    split_weights_(*there)
    assert all(map(same, there[0], weights)) and all(map(same, there[1], corrections))


#: Each kernel that updates weights, with and without weight decay.
UPDATES: dict[str, tuple[str, dict[str, Any]]] = {
    "microadam": ("microadam", {"window": 2, "weight_decay": 0.0}),
    "microadam, decay": ("microadam", {"window": 2}),
    "microadam, long window": ("microadam", {"window": 18, "weight_decay": 0.0}),
    "microadam, long window and decay": ("microadam", {"window": 18}),
    "microadam, alpha": ("microadam", {"window": 2, "alpha": 0.25}),
    "sparse_mfac": ("sparse_mfac", {"window": 2, "weight_decay": 0.0}),
    "sparse_mfac, decay and scope": ("sparse_mfac", {"window": 2, "scope": "tensor"}),
    "sparse_mfac, momentum": ("sparse_mfac", {"window": 2, "momentum": 0.5}),
    "ldadam": ("ldadam", {"rank": 4}),
    "ldadam, no error": ("ldadam", {"rank": 4, "error_feedback": "none"}),
    "ldadam, rank beyond one launch": ("ldadam", {"rank": 33, "error_feedback": "8bit"}),
    "lowrank_mfac": ("lowrank_mfac", {"rank": 3, "window": 2}),
    "lowrank_mfac, momentum": ("lowrank_mfac", {"rank": 3, "window": 2, "momentum": 0.5}),
}
FEW = [(24, 128), (13, 40), (96,)]
MORE = [(24, 128), (80, 64), (8, 3, 3, 3), (2, 16, 64), (10,)]


def compensated(name: str, dtype: torch.dtype, device: str, **options: Any) -> tuple[list[nn.Parameter], Any]:
    """Weights, few where the interpreter takes long, one of them transposed; and their optimizer."""
    generator, sparse = torch.Generator().manual_seed(0), name in ("microadam", "sparse_mfac")
    shapes = FEW if sparse or "momentum" in options else FEW + MORE
    weights = [torch.randn(shape, generator=generator) for shape in shapes]
    weights.append(torch.randn(24, 64, generator=generator).t())
    params = [nn.Parameter(weight.to(device, dtype)) for weight in weights]
    if sparse:
        options |= {"block_size": 1024, "density": 0.02} | ({"min_compress_size": 96} if name == "microadam" else {})
    how = {"lr": 1e-2, "weight_decay": 0.1, "weight_rounding": "compensated", "stacked": True, **options}
    return params, OPTIMIZERS[name].optimizer_class(params, **how)


@pytest.mark.parametrize("backend", FAST[:1])
@pytest.mark.parametrize(("case", "dtype"), zip(UPDATES, NARROW * len(UPDATES), strict=False))
def test_an_update_with_corrections_is_that_of_float32_copies(
    case: str, dtype: torch.dtype, backend: str, use: Use
) -> None:
    """To the bit: weights, corrections and state. A case has one of the dtypes."""
    name, options = UPDATES[case]
    check_corrections(name, dtype, use(backend), [options] * 3)


@pytest.mark.parametrize("backend", FAST[:1])
def test_an_option_that_copies_weights_may_change(backend: str, use: Use) -> None:
    alphas = [{"window": 2, "alpha": alpha} for alpha in (0.25, 0.25, 0.0, 0.25)]
    check_corrections("microadam", BF16, use(backend), alphas)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("weight_decay", [0.0, 0.25])
def test_operations_on_windows_write_corrections(weight_decay: float, backend: str, use: Use) -> None:
    """Of several tensors at once, as they write float32 weights that are split."""
    device, generator = use(backend), torch.Generator().manual_seed(0)

    def some(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    weights = [some(numel).bfloat16().to(device) for numel in (128, 100)]
    corrections = [(some(len(weight)) * 40).clamp(-128, 127).to(device, torch.int8) for weight in weights]
    indices = torch.arange(6, dtype=torch.int16, device=device).view(3, 2)
    windows = [
        SparseWindow(indices.repeat(1, 2).contiguous(), some(3, 4).to(device), len(weight), 64, 2) for weight in weights
    ]
    factors = torch.rand(2, 3, generator=generator).to(device)
    for operation, given in ((foreach_window_update_, factors), (foreach_window_descend_, factors[0].contiguous())):
        expected = [[each.clone() for each in tensors] for tensors in (weights, corrections)]
        values = join_weights.torch_version(*expected)
        operation(values, windows, given, lr=0.5, weight_decay=weight_decay)
        split_weights_.torch_version(*expected, values)
        operation(weights, windows, given, lr=0.5, weight_decay=weight_decay, corrections=corrections)
        assert all(map(same, weights, expected[0])) and all(map(same, corrections, expected[1]))


@pytest.mark.parametrize("backend", FAST[:1])
def test_a_memo_keeps_launches_with_corrections_apart(backend: str, use: Use) -> None:
    device, memo = use(backend), dict[str, Any]()
    indices = torch.arange(4, dtype=torch.int16, device=device)[None]
    window = SparseWindow(indices, torch.ones(1, 4, dtype=BF16, device=device), 64, 64, 4)
    weight, correction = torch.ones(64, dtype=BF16, device=device), torch.zeros(64, dtype=torch.int8, device=device)
    for corrections in (None, [correction]):
        foreach_window_update_(
            [weight], [window], torch.ones(2, 1, device=device), lr=0.01, memo=memo, corrections=corrections
        )
    assert correction[:4].all() and not correction[4:].any()


@pytest.mark.parametrize("backend", [*FAST, pytest.param("reference")])
def test_only_kernels_take_corrections(backend: str, use: Use) -> None:
    """A GPU without Triton gets float32 copies in runs of bounded size, as the plan has them."""
    device, method = torch.device(use(backend)), OPTIMIZERS["microadam"].optimizer_class.method
    assert method.takes_corrections(method.options(), device) == (backend == "triton")
    if backend == "reference":
        assert not method.takes_corrections(method.options(), torch.device("cuda"))
    assert method.takes_corrections(method.options(), torch.device("meta"))


def check_corrections(name: str, dtype: torch.dtype, device: str, options: list[dict[str, Any]]) -> None:
    """Take steps with the options of each."""
    runs = [compensated(name, dtype, device, **options[0]) for _ in range(2)]
    (params, optimizer), (others, copying) = runs
    copying.method = replace(copying.method, corrected=None)
    for seed, changed in enumerate(options):
        generator = torch.Generator().manual_seed(seed)
        grads = [torch.randn(param.shape, generator=generator).to(device, dtype) for param in params]
        for each, own in runs:
            own.param_groups[0].update(changed)
            for param, grad in zip(each, grads, strict=True):
                param.grad = grad
            own.step()
        for param, other in zip(params, others, strict=True):
            assert same(param.detach(), other.detach())
            state, expected = optimizer.state[param], copying.state[other]
            assert state.keys() == expected.keys() and state[CORRECTION].any()
            assert all(same(state[key], value) for key, value in expected.items() if torch.is_tensor(value))
