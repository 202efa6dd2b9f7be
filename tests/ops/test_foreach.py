"""Operations on several tensors at once: to the bit what one tensor after the other gives."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_lowmem_optim.ops.block_quant import Quantized
from hf_lowmem_optim.ops.block_topk import TopK, foreach_block_topk_, kept_per_block, window_specs
from hf_lowmem_optim.ops.sparse_window import (
    SparseWindow,
    WindowStep,
    foreach_window_descend_,
    foreach_window_gram_rows,
    foreach_window_update_,
)
from hf_lowmem_optim.spec import QuantFormat
from tests.ops.backends import BACKENDS, BF16, FP16, FP32, QUIET, device_of, empty_quantized

pytestmark = QUIET

WINDOW, DENSITY = 2, 0.1
#: Entries, size of the blocks, dtype: from less than a block to many blocks.
TENSORS = [(130, 64, FP32), (5, 64, BF16), (64, 64, FP32), (130, 128, FP16), (300, 256, BF16), (1, 64, FP32)]


@dataclass
class SparseState:
    """One tensor, and what MicroAdam keeps for it."""

    param: Tensor
    grad: Tensor
    error: Quantized
    rows: SparseWindow

    @staticmethod
    def make(numel: int, block_size: int, dtype: torch.dtype, seed: int, device: str) -> SparseState:
        generator = torch.Generator().manual_seed(seed)
        param, grad = (torch.randn(numel, generator=generator).to(device, dtype) for _ in range(2))
        specs = window_specs(numel, window=WINDOW, density=DENSITY, block_size=block_size)
        state = {name: spec.allocate(device) for name, spec in specs.items()}
        rows = SparseWindow(
            **state, numel=numel, block_size=block_size, kept_per_block=kept_per_block(block_size, DENSITY)
        )
        return SparseState(param, grad, empty_quantized(numel, QuantFormat(4, 16), device), rows)

    def topk(self, row: int) -> TopK:
        rows = self.rows
        return TopK(rows.indices, rows.values, row, self.grad, self.error, rows.block_size, DENSITY, 0.75, seed=row)

    def step(self, weights: Tensor) -> WindowStep:
        return WindowStep(self.param, self.rows, weights, lr=1e-2, weight_decay=0.1, eps=1e-8)

    def tensors(self) -> list[Tensor]:
        error = self.error
        return [self.param, self.rows.indices, self.rows.values, error.codes, error.lo, error.hi]


def make_all(device: str) -> list[SparseState]:
    return [SparseState.make(*spec, seed, device) for seed, spec in enumerate(TENSORS)]


def moment_weights(device: str) -> Tensor:
    return torch.tensor([[0.5, 0.25], [0.1, 0.2]], device=device)


def run(groups: list[list[SparseState]], device: str) -> list[Tensor]:
    """Steps of MicroAdam and descents along the window, one call for each group; returns all that came out."""
    weights, products = moment_weights(device), []
    for number, row in enumerate((0, 1, 0)):
        for group in groups:
            foreach_block_topk_([one.topk(row) for one in group])
        # a row counts when it has been written: until then its indices do not ascend
        written = weights * (torch.arange(WINDOW, device=device) <= number)
        for group in groups:
            foreach_window_update_([one.step(written) for one in group])
        rows = [foreach_window_gram_rows([one.rows for one in group], row) for group in groups]
        products.append(torch.cat(rows))
        for group in groups:
            foreach_window_descend_([one.step(written[0].contiguous()) for one in group])
    return [*products, *(tensor for group in groups for one in group for tensor in one.tensors())]


@pytest.mark.parametrize("backend", BACKENDS)
def test_together_is_one_by_one(backend: str, use: Callable[[str], str]) -> None:
    device, threads = use(backend), torch.get_num_threads()
    together, alone = run([make_all(device)], device), run([[one] for one in make_all(device)], device)
    assert len(together) == 3 + 6 * len(TENSORS)
    assert all(map(torch.equal, together, alone))
    assert torch.get_num_threads() == threads


OPERATIONS: dict[str, Callable[[list[SparseState]], Any]] = {
    "top-k": lambda all_: foreach_block_topk_([one.topk(0) for one in all_]),
    "update": lambda all_: foreach_window_update_([one.step(moment_weights(one.param.device.type)) for one in all_]),
    "descend": lambda all_: foreach_window_descend_([one.step(moment_weights("cpu")[0]) for one in all_]),
    "gram rows": lambda all_: foreach_window_gram_rows([one.rows for one in all_], 0),
}


@pytest.mark.parametrize("operation", OPERATIONS)
def test_tensors_of_several_devices_are_refused(operation: str) -> None:
    here, there = SparseState.make(*TENSORS[0], 0, "cpu"), SparseState.make(*TENSORS[0], 0, "meta")
    with pytest.raises(ValueError, match=r"on meta, (but another tensor is|that of another tensor) on cpu"):
        OPERATIONS[operation]([here, there])
    if operation != "gram rows":
        OPERATIONS[operation]([])
    else:
        with pytest.raises(ValueError, match="windows must be at least one"):
            OPERATIONS[operation]([])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("operation", ["top-k", "update", "descend"])
@pytest.mark.parametrize("at", [0, 3, 5])
def test_one_bad_tensor_leaves_all_as_they_are(
    operation: str, at: int, backend: str, use: Callable[[str], str]
) -> None:
    device = use(backend)
    states, untouched = make_all("cpu"), make_all("cpu")
    assert device_of(backend) == device
    if operation == "top-k":
        states[at].grad = states[at].grad.double()
    else:
        states[at].param = states[at].param.double()
    with pytest.raises((TypeError, ValueError), match=r"(grad|param) must be (one of )?.*float64"):
        OPERATIONS[operation](states)
    for number, (one, other) in enumerate(zip(states, untouched, strict=True)):
        if number != at:
            assert all(map(torch.equal, one.tensors(), other.tensors()))
