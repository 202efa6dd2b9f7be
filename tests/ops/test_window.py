"""Geometric grids: torch against their formula in float64, and what has no place on them. Backends: test_foreach.py."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from hf_lowmem_optim.ops.block_topk import fault_of_window, foreach_block_topk_, window_specs
from hf_lowmem_optim.ops.sparse_window import window_combine_
from hf_lowmem_optim.ops.window import Grids, SparseWindow, decode, encode, windows_of
from hf_lowmem_optim.pruning.rows import SparseRows
from tests.reference.window_values import geometric


def stored(x: Tensor, bits: int) -> Tensor:
    codes, lo, step = encode(x, bits)
    assert 0 <= int(codes.min()) <= int(codes.max()) < 1 << bits
    return decode(codes, lo[:, None], step[:, None], bits)


@pytest.mark.parametrize(
    ("name", "errors"), [("normal", (1e-6, 4e-4)), ("laplace", (3e-6, 1e-3)), ("standard_t", (2e-5, 6e-3))]
)
def test_the_largest_of_a_block_are_kept_to_so_much(name: str, errors: tuple[float, float]) -> None:
    """Of 1 % of 4096: the squared error relative to the values, and the formula to 1e-6 of each."""
    rng = np.random.default_rng(0)
    drawn = getattr(rng, name)(*((3,) if name == "standard_t" else ()), size=(50, 4096))
    order = np.argsort(-np.abs(drawn), axis=1)[:, :41]
    values = np.take_along_axis(drawn, order, 1).astype(np.float32)
    for bits, most in zip((8, 4), errors, strict=True):
        found = stored(torch.from_numpy(values), bits).double().numpy()
        expected = np.stack([geometric(row.astype(np.float64), bits) for row in values])
        np.testing.assert_allclose(found, expected, rtol=1e-6)
        error = np.square(found - values).sum() / np.square(values).sum()
        assert most / 5 < error < most


def test_what_has_no_place_on_a_grid() -> None:
    inf, nan = math.inf, math.nan
    rows = [
        ([2.0, -2.0, 2.0, 2.0], [2.0, -2.0, 2.0, 2.0]),  # hi = lo
        ([0.0, -0.0, 0.0, 0.0], [0.0, -0.0, 0.0, 0.0]),
        ([0.0, 3.0, -5.0, 1e-40], [0.0, 3.0, -5.0, 0.0]),
        ([1.0, -inf, nan, 7.0], [1.0, -inf, inf, 7.0]),
        ([inf, 0.0, -1.0, 1e-45], [inf, 0.0, -1.0, 0.0]),
        ([inf, nan, 0.0, 1e-39], [inf, inf, 0.0, 0.0]),
        ([3.4028235e38, -(2.0**-126), 0.0, 0.0], [3.4028235e38, -(2.0**-126), 0.0, 0.0]),  # as wide as there is
        ([1.0, 1.0000001, 1.0, 1.0], [1.0, 1.0000001, 1.0, 1.0]),
    ]
    for bits in (8, 4):
        for row, expected in rows:
            found = stored(torch.tensor([row]), bits)[0]
            want = torch.tensor(expected)
            torch.testing.assert_close(found, want, rtol=2e-5, atol=0.0)
            signed = ~torch.tensor(row).isnan()  # of NaN the sign is anybody's
            assert torch.equal(found.signbit()[signed], want.signbit()[signed])
    # zero is zero whatever else the block keeps, and an equal block is exact
    assert stored(torch.tensor([rows[2][0]]), 4)[0, 0] == 0 and torch.equal(
        stored(torch.tensor([[2.5, -2.5]]), 4), torch.tensor([[2.5, -2.5]])
    )


@pytest.mark.parametrize("value_dtype", ["8bit", "4bit"])
def test_a_window_of_codes_is_read_as_it_was_written(value_dtype: str) -> None:
    """What is kept and what is left make up the gradient, and pruning reads the same rows as the optimizers."""
    numel, block_size, density = 300, 128, 0.1
    specs = window_specs(numel, window=2, density=density, block_size=block_size, value_dtype=value_dtype)
    state = {key: spec.allocate("cpu") for key, spec in specs.items()}
    (window,) = windows_of({key: [part] for key, part in state.items()}, [numel], block_size, density)
    grad, error = torch.randn(numel, generator=torch.Generator().manual_seed(0)), torch.zeros(numel)
    foreach_block_topk_([grad], [window], [error], row=1, density=density)
    row = torch.zeros(numel)
    window_combine_(row, window, torch.tensor([0.0, 1.0]))
    assert int((row != 0).sum()) == specs["indices"].shape[1]
    torch.testing.assert_close(row + error, grad, rtol=1e-6, atol=0.0)
    read = torch.cat([piece for _, piece in SparseRows(window).pieces()], 1)
    assert torch.equal(read.float(), torch.stack([torch.zeros(numel), row]))
    assert fault_of_window(state, numel, block_size, density) is None
    for key, number in (("value_lo", math.nan), ("value_lo", 1e-45), ("value_step", math.inf), ("value_step", 1e3)):
        damaged = {**state, key: torch.where(state[key] != 0, number, 0.0)}
        fault = fault_of_window(damaged, numel, block_size, density)
        assert fault is not None and "grid" in fault
    state["indices"][0, -1] = 300 if value_dtype == "8bit" else 0x0FFF
    fault = fault_of_window(state, numel, block_size, density)
    assert fault is not None and "for blocks of 44 entries" in fault


def test_contradictions_are_refused() -> None:
    indices, lo = torch.zeros(2, 5, dtype=torch.int16), torch.zeros(2, 1)
    for says, error, values, grids in (
        ("uint8 with grids", TypeError, torch.zeros(2, 5), Grids(lo, lo)),
        ("bfloat16 or float32", TypeError, torch.zeros(2, 5, dtype=torch.uint8), None),
        ("bfloat16 or float32", TypeError, None, None),
        ("lo must be float32", TypeError, None, Grids(lo.double(), lo)),
        (r"step must be contiguous and of shape \[2, 1\]", ValueError, None, Grids(lo, torch.zeros(2, 2))),
    ):
        with pytest.raises(error, match=says):
            SparseWindow(indices, values, 100, 100, 5, grids).check()
    with pytest.raises(ValueError, match="block_size=8192 does not fit value_dtype='4bit'"):
        window_specs(10_000, window=2, density=0.1, block_size=8192, value_dtype="4bit")
