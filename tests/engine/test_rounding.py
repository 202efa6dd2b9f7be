"""Stochastic rounding against the definition: one of the two neighbours, in the mean the value itself."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hf_lowmem_optim.engine.rounding import StochasticRounding

NARROW = [torch.bfloat16, torch.float16]
CPU = torch.device("cpu")


def rounded(x: Tensor, dtype: torch.dtype, seed: int = 0) -> Tensor:
    out = torch.empty(x.shape, dtype=dtype)
    StochasticRounding(seed, CPU).round_(out, x)
    return out


@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_every_value_of_the_narrow_dtype_stays(dtype: torch.dtype) -> None:
    everything = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    for seed in range(3):
        assert torch.equal(rounded(everything.float(), dtype, seed).nan_to_num(nan=-7), everything.nan_to_num(nan=-7))


@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_the_result_is_a_neighbour_and_the_mean_is_the_value(dtype: torch.dtype) -> None:
    """Values of all sizes, the subnormal numbers of float16 included; probabilities from float64 arithmetic."""
    draws, count = 4000, 64
    generator = torch.Generator().manual_seed(1)
    exponents = torch.linspace(-27, 14, count)
    x = torch.randn(count, generator=generator) * 2.0**exponents
    results = rounded(x.expand(draws, count).contiguous(), dtype).double()

    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype).double()
    grid = every[every.isfinite()].unique()
    above = torch.searchsorted(grid, x.double())
    low, high = grid[above - 1], grid[above]
    assert ((results == low) | (results == high)).all()
    share = (x.double() - low) / (high - low)
    deviation = (share * (1 - share) / draws).sqrt()
    assert ((results == high).double().mean(0) - share).abs().le(5 * deviation + 1e-12).all()


def test_the_seed_decides_and_nothing_else() -> None:
    x = torch.randn(100_000, generator=torch.Generator().manual_seed(0))
    before = torch.get_rng_state()
    first = rounded(x, torch.bfloat16, seed=5)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(3)
    assert torch.equal(first, rounded(x, torch.bfloat16, seed=5))
    # neighbouring seeds: where there is a choice, half of the choices differ at random
    differing = (first != rounded(x, torch.bfloat16, seed=6)).float().mean()
    # two independent draws differ with probability 2p(1 − p), p uniform: a third
    assert abs(differing - 1 / 3) < 0.01


def test_layout_does_not_matter() -> None:
    x = torch.randn(300, 200)
    out = torch.empty(200, 300, dtype=torch.bfloat16).T
    StochasticRounding(3, CPU).round_(out, x)
    assert torch.equal(out, rounded(x, torch.bfloat16, seed=3))
    scalar = rounded(torch.tensor(1.001), torch.float16)
    assert scalar.shape == () and abs(scalar.item() - 1.001) < 2**-10


@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_subnormal_numbers_that_count_as_zero_do_no_harm(dtype: torch.dtype) -> None:
    x = torch.tensor([0.0, -0.0, 1e-40, 2.0**-126, 1.0, -3.0])
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor has no such mode")
    try:
        result = rounded(x, dtype)
    finally:
        torch.set_flush_denormal(False)
    assert result.isfinite().all()
    assert result[:2].tolist() == [0.0, 0.0] and result[4:].tolist() == [1.0, -3.0]
