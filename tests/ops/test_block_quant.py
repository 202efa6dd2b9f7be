"""Block quantization: the backends against each other bit for bit, and all of them against what it promises."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hf_lowmem_optim.ops.block_quant import Quantized, dequantize_, dequantize_add_, quantize_
from hf_lowmem_optim.spec import QuantFormat
from tests.ops.backends import BF16, FAST, FP16, FP32, QUIET, Use, empty_quantized, same
from tests.reference import block_quant as paper

pytestmark = QUIET

FORMATS = [
    QuantFormat(),
    QuantFormat(4, 64, FP32),
    QuantFormat(8, 16),
    QuantFormat(4, 6, FP32),
    QuantFormat(8, 7, FP32),
]
TINY = 2.0**-149
NOISE = torch.randn(300, generator=torch.Generator().manual_seed(7))
AWKWARD = {
    "empty": torch.empty(0),
    "one": torch.tensor([-3.3]),
    "odd": NOISE[:65],
    "ragged": NOISE[:299],
    "sparse, with signed zeros": NOISE * (torch.arange(300) % 5 > 2) * -1.0,
    "constant": torch.full((130,), 1.0 / 3.0),
    "zeros": torch.cat([torch.zeros(70), torch.full((70,), -0.0)]),
    "half-way": torch.cat([torch.tensor([0.0, 15.0]), torch.arange(0, 126).float() / 2 % 15]),
    "last bit": (torch.full((128,), 1.0).view(torch.int32) + torch.arange(128, dtype=torch.int32) % 3).view(FP32),
    "bfloat16 boundary": torch.tensor([1.0, 1.00390625, 1.0078125, -1.0000001, 0.99999994, 2.9e-39] * 20),
    "subnormal": torch.arange(-60, 70).float() * TINY,
    "tiny range": torch.tensor([0.0, TINY, 2 * TINY, 7 * TINY] * 16),
    "half-precision range": torch.cat([NOISE[:65], torch.tensor([65504.0, 7e4, 6e-8, -3e-8]), NOISE[:65]]),
    "huge": NOISE / NOISE.abs().max() * 1.6e38,
    "overflowing range": torch.cat([torch.tensor([3e38, -3e38]), NOISE[:100]]),
    "beyond bfloat16": torch.cat([torch.tensor([3.4e38, 3.39e38]), NOISE[:100]]),
    "nan": torch.cat([NOISE[:3], torch.tensor([torch.nan]), NOISE[:200]]),
    "negative nan": torch.cat([NOISE[:70], torch.tensor([torch.nan]).neg(), NOISE[:9]]),
    "inf": torch.cat([torch.tensor([torch.inf]), NOISE[:150], torch.tensor([-torch.inf])]),
}


def poisoned(numel: int, fmt: QuantFormat, device: str = "cpu") -> Quantized:
    """A buffer full of garbage: whatever a call leaves unwritten shows."""
    stats = [torch.full((fmt.num_blocks(numel),), torch.nan, dtype=fmt.stat_dtype, device=device) for _ in range(2)]
    codes = torch.full((fmt.num_code_bytes(numel),), 0xA5, dtype=torch.uint8, device=device)
    return Quantized(codes, *stats, numel, fmt)


def round_trip(x: Tensor, fmt: QuantFormat, seed: int | None = None) -> tuple[Quantized, Tensor]:
    quantized, out = poisoned(x.numel(), fmt), torch.full((x.numel(),), torch.nan)
    quantize_(quantized, x, seed=seed)
    dequantize_(out, quantized)
    return quantized, out


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("name", AWKWARD)
def test_backends_agree_bit_for_bit(name: str, backend: str, use: Use) -> None:
    for number, fmt in enumerate(FORMATS):
        dtype = (FP32, BF16, FP16)[number % 3] if "half" in name or name in ("odd", "ragged") else FP32
        seed = (None, 11)[number % 2]
        results = []
        for which in ("reference", backend):
            on = use(which)
            x = AWKWARD[name].to(on, dtype)
            quantized, before = poisoned(x.numel(), fmt, on), x.clone()
            quantize_(quantized, x, seed=seed)
            assert same(x, before), "the source is left"
            plain = torch.full_like(x, torch.nan)
            dequantize_(plain, quantized, scale=-0.7)
            added = x.clone()
            dequantize_add_(added, quantized, scale=0.3)
            # onto another tensor, of another dtype and with another shape
            onto, sum_ = x.clone().unsqueeze(0), torch.full((x.numel(),), torch.nan, device=on)
            dequantize_add_(sum_, quantized, scale=0.3, onto=onto)
            assert same(onto[0], x)
            assert same(sum_.to(dtype), added), f"the sum of {fmt} and {dtype}"
            results.append((quantized.codes, quantized.lo, quantized.hi, plain, added, sum_))
        names = ("codes", "lo", "hi", "set", "added", "sum")
        for what, expected, got in zip(names, *results, strict=True):
            assert same(got, expected), f"{what} of {fmt} from {dtype}, seed {seed}"


ranges = st.tuples(st.integers(1, 200), st.floats(-30, 30), st.floats(-20, 20), st.integers(0, 2**31))


@settings(max_examples=80)
@given(ranges, st.sampled_from(FORMATS))
def test_error_is_at_most_half_a_step(spec, fmt):
    numel, log_scale, offset, seed = spec
    noise = torch.randn(numel, generator=torch.Generator().manual_seed(seed))
    x = (noise + offset) * 2.0**log_scale
    quantized, out = round_trip(x, fmt)
    lo, hi = (t.double().repeat_interleave(fmt.block_size)[:numel] for t in (quantized.lo, quantized.hi))
    assert torch.all(lo <= x) and torch.all(x <= hi)
    u = (hi - lo) / (2**fmt.bits - 1)
    rounding = 2.0**-23 * torch.maximum(lo.abs(), hi.abs())
    assert torch.all((x.double() - out.double()).abs() <= u / 2 + rounding)
    # the stored range is the least that contains the block: no wider than one unit of bfloat16 on either side
    least, greatest = x.min().item(), x.max().item()
    assert quantized.lo.min() >= least - abs(least) / 128 and quantized.hi.max() <= greatest + abs(greatest) / 128


@given(st.integers(1, 300), st.sampled_from(FORMATS), st.integers(0, 2**31))
def test_agrees_with_the_transcription(numel, fmt, seed):
    x = torch.randn(numel, generator=torch.Generator().manual_seed(seed))
    quantized, out = round_trip(x, fmt)
    codes, lo, hi = paper.quantize(x.numpy(), fmt.bits, fmt.block_size, fmt.stat_dtype == BF16)
    np.testing.assert_array_equal(quantized.lo.double().numpy(), lo)
    np.testing.assert_array_equal(quantized.hi.double().numpy(), hi)
    expected = paper.dequantize(codes, lo, hi, fmt.bits, fmt.block_size)
    np.testing.assert_allclose(out.double().numpy(), expected, atol=5e-7)
    np.testing.assert_array_equal(quantized.codes.numpy(), paper.pack(codes, fmt.bits))


@settings(max_examples=30)
@given(st.binary(min_size=8, max_size=60), st.sampled_from([4, 8]), st.sampled_from([None, 5]))
def test_data_on_the_grid_comes_back_exactly_and_so_do_the_bytes(data, bits, seed):
    fmt = QuantFormat(bits, 8, FP32)
    codes = torch.tensor(list(data), dtype=torch.uint8)
    numel = codes.numel() * 8 // bits
    lo = torch.full((fmt.num_blocks(numel),), -2.0)
    grid = Quantized(codes, lo, lo + (2**fmt.bits - 1) / 4, numel, fmt)  # u = 1/4
    x = torch.full((numel,), torch.nan)
    dequantize_(x, grid)
    if bits == 4:  # even index in the high nibble, odd in the low
        assert torch.equal(x[0::2], (codes >> 4) / 4 - 2) and torch.equal(x[1::2], (codes & 15) / 4 - 2)
    # with both ends of the range in each block, the block's own range is the grid's
    rows = [torch.cat([r, torch.tensor([-2.0, -2 + (2**fmt.bits - 1) / 4])]) for r in x.split(6)]
    x = torch.cat(rows)
    _, out = round_trip(x, fmt, seed)
    assert torch.equal(out, x)


def test_stochastic_rounding_is_unbiased_and_a_function_of_the_seed():
    x = torch.linspace(-1.0, 2.0, 64)
    fmt = QuantFormat(4, 64, FP32)
    u = 3.0 / 15
    outs = torch.stack([round_trip(x, fmt, seed)[1] for seed in range(1000)])
    assert torch.all((outs - x).abs() <= u * (1 + 1e-5))
    fraction = ((x + 1) / u) % 1
    sigma = u * (fraction * (1 - fraction) / len(outs)).sqrt()
    assert torch.all((outs.mean(0) - x).abs() <= 4.5 * sigma + u * 2**-15)
    assert torch.equal(round_trip(x, fmt, 9)[0].codes, round_trip(x, fmt, 9)[0].codes)
    # neighbouring entries and neighbouring seeds are uncorrelated
    centred = (outs - x)[:, 1:-1] / u
    assert abs((centred[:, 1:] * centred[:, :-1]).mean()) < 0.01 and abs((centred[1:] * centred[:-1]).mean()) < 0.01


def test_zero_and_constant_blocks():
    for fmt in FORMATS:
        out = torch.full((63,), torch.nan)
        dequantize_(out, empty_quantized(63, fmt))
        assert torch.equal(out, torch.zeros(63)), "so is state that was just allocated"
        _, out = round_trip(AWKWARD["zeros"], fmt)
        assert same(out, torch.zeros_like(out)), "zeros come back as +0"
    quantized, out = round_trip(AWKWARD["constant"], QuantFormat(4, 64, FP32))
    assert torch.equal(out, AWKWARD["constant"]) and not quantized.codes.any()


def test_a_block_that_is_not_finite_comes_back_as_nan_and_leaves_the_others():
    x = torch.ones(320)
    x[3], x[70], x[190], x[200], x[201] = torch.nan, torch.inf, -torch.inf, 3e38, -3e38
    quantized, out = round_trip(x, QuantFormat())
    assert out[:256].isnan().all() and torch.equal(out[256:], x[256:])
    assert not quantized.codes[:128].any() and quantized.lo[:4].isnan().all() and quantized.hi[:4].isnan().all()
    assert torch.allclose(round_trip(AWKWARD["huge"], QuantFormat())[1], AWKWARD["huge"], atol=1.2e37)


@pytest.mark.parametrize(
    ("says", "call"),
    [
        ("bits must be 4 or 8, got 3", lambda _: QuantFormat(3)),
        ("must be even for 4-bit", lambda _: QuantFormat(4, 7)),
        ("stat_dtype must be", lambda _: QuantFormat(4, 64, FP16)),
        ("source must have 100 entries, got 99", lambda good: quantize_(good, torch.zeros(99))),
        ("source must be one of .*got torch.float64", lambda good: quantize_(good, torch.zeros(100).double())),
        ("onto must have 100 entries, got 99", lambda g: dequantize_add_(torch.zeros(100), g, onto=torch.zeros(99))),
        ("out must be contiguous", lambda good: dequantize_(torch.zeros(100, 2)[:, 0], good)),
        (
            r"lo of 100 entries .* of shape \(2,\); got torch.float32",
            lambda good: quantize_(dataclasses.replace(good, lo=good.lo.float()), torch.zeros(100)),
        ),
    ],
)
def test_wrong_arguments_say_what_is_wrong(says, call):
    with pytest.raises(ValueError, match=says):
        call(poisoned(100, QuantFormat()))
