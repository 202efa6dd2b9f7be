"""The fused operations of LowRankMFAC beside the torch version."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hf_lowmem_optim.engine.buckets import allocate_stacked
from hf_lowmem_optim.ops.low_rank import PRODUCTS_VARIABLE
from hf_lowmem_optim.optimizers import lowrank_mfac as method
from hf_lowmem_optim.optimizers.lowrank_mfac import LowRankMFACOptions, lowrank_mfac_state
from tests.ops.backends import BF16, DEVICE, FP16, FP32, INTERPRETED, ON_GPU, QUIET, Use, normal

fused = pytest.importorskip("hf_lowmem_optim.ops.triton.lowrank_mfac", exc_type=ImportError)
pytestmark = [*([] if INTERPRETED else ON_GPU), QUIET]

WINDOW = 3


@pytest.fixture(autouse=True)
def triton_in_full_precision(use: Use, monkeypatch: pytest.MonkeyPatch) -> None:
    use("triton")
    monkeypatch.setenv(PRODUCTS_VARIABLE, "ieee")


def stacked_state(shape: tuple[int, int], o: LowRankMFACOptions, n: int = 2) -> dict[str, Tensor]:
    specs = lowrank_mfac_state(shape, FP32, o)
    assert specs is not None and "left" in specs
    parts = allocate_stacked(specs, n, torch.device(DEVICE))
    return {key: torch.stack([part[key] for part in parts]) for key in specs}


def distance(got: Tensor, expected: Tensor) -> float:
    return ((got.double() - expected.double()).norm() / expected.double().norm()).item()


@pytest.mark.parametrize(
    ("shape", "rank", "dtype", "error"),
    [
        ((40, 64), 4, BF16, "4bit"),
        ((40, 64), 4, BF16, "fp32"),
        ((70, 128), 5, FP32, "8bit"),
        ((70, 128), 5, FP32, "bf16"),
        ((96, 64), 17, FP16, "4bit"),
        ((96, 64), 17, FP16, "8bit"),
        # blocks of the error go on in the next row
        ((21, 70), 4, FP32, "4bit"),
        ((21, 70), 4, FP32, "8bit"),
        ((21, 70), 4, FP32, "bf16"),
        ((21, 70), 4, FP32, "fp32"),
    ],
)
def test_a_fused_compression_is_the_torch_version(
    shape: tuple[int, int], rank: int, dtype: torch.dtype, error: str
) -> None:
    options = LowRankMFACOptions(rank=rank, window=WINDOW, error_feedback=error)
    expected = stacked_state(shape, options)
    start = normal(rank, shape[1], seed=1).expand(2, -1, -1)
    for row in range(WINDOW + 1):
        low = normal(shape[0], rank, seed=9) @ normal(rank, shape[1], seed=10)
        g = [(low + normal(*shape, seed=20 * row + i)).to(dtype) for i in range(2)]
        got = {key: value.clone() for key, value in expected.items()}
        for state, run in ((expected, method.lowrank_compress_.torch_version), (got, fused.compress_)):
            before = start if row == 0 else state["right"][:, (row - 1) % WINDOW]
            run(g, state, before, row % WINDOW, error)
    for key, value in expected.items():
        if key == "error_codes":
            assert (value != got[key]).double().mean() < 0.01
        else:
            assert distance(got[key], value) <= (4e-3 if value.dtype == BF16 else 1e-5), key


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize(("shape", "rank"), [((40, 64), 4), ((70, 33), 5), ((64, 48), 16)])
def test_a_fused_descent_is_the_torch_version(
    shape: tuple[int, int], rank: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = LowRankMFACOptions(rank=rank, window=WINDOW, lr=1e-2, weight_decay=0.1)
    state = stacked_state(shape, options)
    for seed, key in enumerate(("left", "right")):
        state[key].copy_(normal(*state[key].shape, seed=seed))
    weights = [normal(*shape, seed=5 + i).to(dtype) for i in range(2)]
    expected, got, one_by_one = ([weight.clone() for weight in weights] for _ in range(3))
    w = normal(2, WINDOW, seed=8)
    method.lowrank_descend_.torch_version(expected, state, w, options)
    fused.descend_by_factors_(got, state, w, options)
    monkeypatch.setattr(fused, "MOST_FACTOR_BYTES", 1)
    fused.descend_by_factors_(one_by_one, state, w, options)
    for start, x, y, z in zip(weights, expected, got, one_by_one, strict=True):
        assert torch.equal(y, z) and not torch.equal(x, start)
        assert ((y - x).abs() <= torch.finfo(dtype).eps * x.abs() + 1e-6 * (x - start).abs().max()).all()


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_vectors_descend_together_as_alone(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU's, a bounded number at a time; each has weights of its own."""
    options = LowRankMFACOptions(window=WINDOW, lr=1e-2, weight_decay=0.1)
    state, w = {"rows": normal(5, WINDOW, 12, seed=1)}, normal(5, WINDOW, seed=8)
    weights = [normal(4, 3, seed=2 + i).to(dtype) for i in range(5)]
    alone, together = ([weight.clone() for weight in weights] for _ in range(2))
    for weight, rows, own in zip(alone, state["rows"], w, strict=True):
        weight.copy_(weight.float() * (1 - 1e-3) - 1e-2 * (own @ rows).view(4, 3))
    monkeypatch.setattr(method, "_ALONE", ())
    monkeypatch.setattr(method, "most_tensors", lambda *_: 2)
    method.lowrank_descend_(together, state, w, options)
    for start, x, y in zip(weights, alone, together, strict=True):
        assert not torch.equal(x, start)
        torch.testing.assert_close(y, x, rtol=torch.finfo(dtype).eps, atol=1e-7)
