"""What is remembered of a state: nothing that anybody moves, replaces or changes between two steps is missed."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_lowmem_optim import OPTIMIZERS
from hf_lowmem_optim.optimizers import LowMemoryOptimizer
from tests.ops.backends import DEVICE, FAST, QUIET, Use, device_of
from tests.optimizers.cases import assert_equal, assert_same_state

pytestmark = QUIET

SPARSE: dict[str, Any] = {"window": 3, "density": 0.1, "block_size": 64, "lr": 1e-2}
SETTINGS: list[tuple[str, dict[str, Any]]] = [
    ("microadam", {**SPARSE, "min_compress_size": 100}),
    ("sparse_mfac", {**SPARSE, "value_dtype": "8bit", "error_feedback": "bf16"}),
]
SHAPES = [(8, 16), (5, 24), (8, 16)]


def elsewhere(tensor: Tensor, offset: int = 0) -> Tensor:
    """A copy in other memory, whose address is no multiple of 16 for an odd offset."""
    room = torch.zeros(tensor.numel() + offset, dtype=tensor.dtype, device=tensor.device)
    return room[offset:].view(tensor.shape).copy_(tensor)


def tensors_of(state: dict[str, Any]) -> dict[str, Tensor]:
    return {key: part for key, part in state.items() if isinstance(part, Tensor)}


def replace_state(optimizer: LowMemoryOptimizer, weights: list[nn.Parameter]) -> None:
    """As after a trip to another device; what was there is written by others."""
    state = optimizer.state[weights[0]]
    for key, part in tensors_of(state).items():
        state[key] = elsewhere(part)
        part.fill_(1)


def move_state(optimizer: LowMemoryOptimizer, weights: list[nn.Parameter]) -> None:
    """The same tensors in other memory, also memory that is not aligned."""
    for part in tensors_of(optimizer.state[weights[1]]).values():
        before = part.data
        part.data = elsewhere(part, 1)
        before.fill_(1)


def swap_states(optimizer: LowMemoryOptimizer, weights: list[nn.Parameter]) -> None:
    """Two equal tensors exchange their memory."""
    first, second = (tensors_of(optimizer.state[weights[place]]) for place in (0, 2))
    for key in first.keys() & second.keys():
        kept = first[key].clone()
        first[key].data, second[key].data = second[key].data, first[key].data
        second[key].copy_(second[key].clone())
        second[key].copy_(first[key])
        first[key].copy_(kept)


def move_weights(optimizer: LowMemoryOptimizer, weights: list[nn.Parameter]) -> None:
    for weight in weights[:2]:
        before = weight.data
        weight.data = elsewhere(before, 1)
        before.fill_(1)


def load_what_was_saved(optimizer: LowMemoryOptimizer, weights: list[nn.Parameter]) -> None:
    saved = copy.deepcopy(optimizer.state_dict())
    for weight in weights:
        for part in tensors_of(optimizer.state[weight]).values():
            part.fill_(1)
    optimizer.load_state_dict(saved)


CHANGES: list[Callable[[LowMemoryOptimizer, list[nn.Parameter]], None]] = [
    replace_state,
    move_state,
    swap_states,
    move_weights,
    load_what_was_saved,
]


@pytest.mark.parametrize("backend", FAST[:1])
@pytest.mark.parametrize(("name", "options"), SETTINGS, ids=lambda value: value if isinstance(value, str) else "")
def test_a_step_finds_what_was_moved(name: str, options: dict[str, Any], backend: str, use: Use) -> None:
    """Each step in another way, with gradients at new places, aligned or not; and a state that no longer fits."""
    pairs = []
    for _ in range(2):
        generator = torch.Generator().manual_seed(0)
        starts = [torch.randn(shape, generator=generator).to(device_of(backend)) for shape in SHAPES]
        weights = [nn.Parameter(start.bfloat16()) for start in starts]
        pairs.append((OPTIMIZERS[name].optimizer_class(weights, **options), weights))
    (still, fixed), (optimizer, weights) = pairs
    kept = []
    for step in range(len(CHANGES) + 2):
        if step >= 2:
            CHANGES[step - 2](optimizer, weights)
        generator = torch.Generator().manual_seed(step)
        for a, b in zip(fixed, weights, strict=True):
            a.grad = torch.randn(a.shape, generator=generator).to(a)
            b.grad = elsewhere(a.grad, step % 3)
            kept.append(b.grad)  # the next ones lie elsewhere
        for each, backend_of_it in ((still, "reference"), (optimizer, backend)):
            use(backend_of_it)
            each.step()
        assert_equal(fixed, weights)
    assert_same_state(still, optimizer)
    indices = optimizer.state[weights[0]]["indices"]
    shape = indices.shape
    for other, strides in ((shape[::-1], (shape[0], 1)), (shape, (1, shape[0]))):  # of the same size, in the same place
        indices.as_strided_(other, strides)
        with pytest.raises(ValueError, match="'indices' "):
            optimizer.step()
        indices.as_strided_(shape, (shape[1], 1))
    indices.resize_(2, shape[1])
    with pytest.raises(ValueError, match="'indices' is"):
        optimizer.step()
    optimizer.state[weights[0]]["indices"] = indices.int()
    with pytest.raises(ValueError, match="'indices' is"):
        optimizer.step()
    indices = optimizer.state[weights[1]]["indices"]
    indices.data = indices.data.view(torch.float16)  # of the same size, in the same place
    optimizer.state.pop(weights[0])
    with pytest.raises(ValueError, match="'indices' is"):
        optimizer.step()


@pytest.mark.parametrize(("name", "options"), SETTINGS, ids=lambda value: value if isinstance(value, str) else "")
def test_what_is_remembered_keeps_no_state_alive(name: str, options: dict[str, Any], use: Use) -> None:
    """Whoever moves a state to the host wants its memory back at once."""
    use("reference")
    weight = nn.Parameter(torch.randn(16, 16, device=DEVICE))
    optimizer = OPTIMIZERS[name].optimizer_class([weight], **options)
    for _ in range(3):
        weight.grad = torch.randn_like(weight)
        optimizer.step()
    state = optimizer.state[weight]
    held = [weakref.ref(part) for part in tensors_of(state).values()]
    for key, part in tensors_of(state).items():
        state[key] = part.clone()
    del part
    assert held and all(reference() is None for reference in held)
    optimizer.step()


def test_a_stack_that_was_taken_apart_is_noticed(use: Use) -> None:
    """Tensors may be where they were, and no longer in one storage: numpy shares memory like that."""
    use("reference")
    pairs = []
    for _ in range(2):
        weights = [nn.Parameter(torch.randn(16, 32, generator=torch.Generator().manual_seed(n))) for n in range(3)]
        pairs.append((OPTIMIZERS["ldadam"].optimizer_class(weights, rank=4), weights))
    for step in range(4):
        for optimizer, weights in pairs:
            for weight in weights:
                weight.grad = torch.randn(weight.shape, generator=torch.Generator().manual_seed(step)) + weight.detach()
            if step == 2 and optimizer is pairs[1][0]:
                for part in [part for weight in weights for part in tensors_of(optimizer.state[weight]).values()]:
                    if part.dtype != torch.bfloat16:
                        part.data = torch.from_numpy(part.numpy())
            optimizer.step()
    assert_equal(pairs[0][1], pairs[1][1])
    assert_same_state(pairs[0][0], pairs[1][0])
