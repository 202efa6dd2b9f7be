"""Small matrices that are updated together come out as if each were alone, to the last bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from hf_lowmem_optim import LDAdam
from hf_lowmem_optim.compression.workspace import Workspace
from hf_lowmem_optim.optimizers import batches
from hf_lowmem_optim.optimizers import ldadam as ldadam_module

SHAPES = [(32, 48)] * 7 + [(48, 32)] * 3 + [(16, 4, 4, 4)] * 2 + [(33, 20)] * 2 + [(80,)]


def train(optimizers: list[LDAdam], weights: list[nn.Parameter], steps: int) -> None:
    generator = torch.Generator().manual_seed(1)
    for step in range(steps):
        for index, weight in enumerate(weights):
            grad = torch.randn(weight.shape, generator=generator).to(weight.dtype)
            # one tensor misses a step: its count differs from then on
            weight.grad = None if (step, index) == (2, 1) else grad
        for optimizer in optimizers:
            optimizer.step()


def weights_of(dtype: torch.dtype) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in SHAPES]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "hyper",
    [
        {},
        {"error_feedback": "8bit", "weight_decay": 0.1},
        {"error_feedback": "param", "state_dtype": "param"},
        {"error_feedback": "grad"},
        {"error_feedback": "none"},
        {"error_feedback": "4bit", "stochastic_rounding": True},
    ],
    ids=str,
)
def test_a_matrix_does_not_notice_the_others(
    hyper: dict[str, Any], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    together_sizes: list[int] = []
    original = batches.update_stacked_

    def counted(update_: Any, updates: list[Any], shape: tuple[int, int], workspace: Workspace) -> None:
        together_sizes.append(len(updates))
        original(update_, updates, shape, workspace)

    monkeypatch.setattr(ldadam_module, "update_stacked_", counted)
    together, alone = weights_of(dtype), weights_of(dtype)
    one = LDAdam(together, rank=4, **hyper)
    each = [LDAdam([weight], rank=4, **hyper) for weight in alone]
    train([one], together, 5)
    assert set(together_sizes) == (set() if hyper.get("stochastic_rounding") else {7, 6, 3, 2})
    together_sizes.clear()
    train(each, alone, 5)
    assert not together_sizes
    for a, b, optimizer in zip(together, alone, each, strict=True):
        assert torch.equal(a, b)
        for key, value in one.state[a].items():
            other = optimizer.state[b][key]
            assert torch.equal(value, other) if isinstance(value, Tensor) else value == other


def test_matrices_of_one_size_and_different_shapes() -> None:
    shapes = [(32, 64), (32, 64, 1, 1), (32, 16, 4), (32, 64)]
    together, alone = ([nn.Parameter(torch.ones(shape)) for shape in shapes] for _ in range(2))
    one, each = LDAdam(together, rank=4), [LDAdam([weight], rank=4) for weight in alone]
    train([one], together, 3)
    train(each, alone, 3)
    assert all(torch.equal(a, b) for a, b in zip(together, alone, strict=True))


@given(st.lists(st.tuples(st.sampled_from([None, "a", "b"]), st.integers(1, 1 << 18)), max_size=30))
def test_chunks_hold_everything_once_and_stay_within_the_limit(items: list[tuple[str | None, int]]) -> None:
    numbered = list(enumerate(items))
    sizes = {"a": 50_000, "b": 1 << 18}
    chunks = batches.chunks_by_key(
        numbered, lambda item: item[1][0], lambda item: sizes.get(item[1][0], item[1][1]), lambda _: 1 << 18
    )
    assert sorted(item for chunk in chunks for item in chunk) == numbered
    for chunk in chunks:
        keys = {key for _, (key, _) in chunk}
        assert len(keys) == 1
        assert len(chunk) == 1 or (None not in keys and sum(sizes[key] for _, (key, _) in chunk) <= 1 << 18)
