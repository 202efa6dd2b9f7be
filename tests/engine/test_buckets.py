"""Equal tensors, whose state is stacked: each comes out as if it were alone, to the last bit on a CPU."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Collection, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_lowmem_optim import OPTIMIZERS, LDAdam
from hf_lowmem_optim.engine.buckets import allocate_stacked
from hf_lowmem_optim.spec import TensorSpec
from tests.optimizers.cases import assert_equal, assert_same_state, sizes_of_batches, through_a_file

#: Of one size and several shapes; of odd sizes; a vector.
SHAPES = (
    [(32, 48)] * 7 + [(48, 32)] * 3 + [(16, 4, 4, 4)] * 2 + [(33, 20)] * 3 + [(20, 33)] * 2 + [(32, 48, 1)] + [(80,)]
)
SPARSE = {"density": 0.1, "block_size": 64, "window": 3}
MICROADAM: dict[str, Any] = {**SPARSE, "min_compress_size": 100}
SETTINGS: list[tuple[str, dict[str, Any]]] = [
    ("ldadam", {}),
    ("ldadam", {"rank": 1}),
    ("ldadam", {"error_feedback": "8bit", "weight_decay": 0.1}),
    ("ldadam", {"error_feedback": "param", "state_dtype": "param"}),
    ("ldadam", {"error_feedback": "grad"}),
    ("ldadam", {"error_feedback": "none"}),
    ("ldadam", {"stochastic_rounding": True}),
    ("ldadam", {"rank": None, "dense_state": "fp32"}),
    ("ldadam", {"weight_rounding": "stochastic"}),
    ("ldadam", {"weight_rounding": "compensated"}),
    ("microadam", {**MICROADAM, "weight_rounding": "compensated"}),
    ("dct_adamw", {}),
    ("dct_adamw", {"error_feedback": "fp32", "update_interval": 2, "transform": "fft", "state_dtype": "param"}),
    ("lordo", {"sync_every": 2}),
    ("trion", {}),
    ("trion", {"rank": 100, "state_dtype": "param"}),
    ("microadam", MICROADAM),
    ("microadam", {**MICROADAM, "alpha": 0.5, "stochastic_rounding": True, "weight_decay": 0.1}),
    ("sparse_mfac", {**SPARSE, "scope": "tensor", "momentum": 0.5}),
    ("sparse_mfac", {**SPARSE, "scope": "tensor", "window": 4}),  # systems that one batch solves
    ("sparse_ggt", SPARSE),
    ("dash", {"block_size": 16, "precondition_frequency": 2}),
    ("lowrank_mfac", {"rank": 4, "window": 4}),
    ("lowrank_mfac", {"rank": 2, "window": 3, "scope": "tensor", "error_feedback": "4bit"}),
]


@pytest.fixture
def sizes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    return sizes_of_batches(monkeypatch)


def weights_of(dtype: torch.dtype = torch.float32, shapes: list[tuple[int, ...]] = SHAPES) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]


def train(
    optimizers: list[Any], weights: list[nn.Parameter], steps: range, absent: Collection[tuple[int, int]] = ()
) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for index, weight in enumerate(weights):
            grad = torch.randn(weight.shape, generator=generator).to(weight.dtype)
            weight.grad = None if (step, index) in absent else grad
        for optimizer in optimizers:
            optimizer.step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("name", "hyper"), SETTINGS, ids=str)
def test_a_tensor_does_not_notice_the_others(
    name: str, hyper: dict[str, Any], dtype: torch.dtype, sizes: list[int]
) -> None:
    """Also when one has its first gradient late, and others miss steps. Those of different groups are not together."""
    if "weight_rounding" in hyper and dtype == torch.float32:
        pytest.skip("nothing is rounded")
    hyper = {"rank": 4, **hyper} if name in ("ldadam", "dct_adamw", "lordo", "trion") else hyper
    together, apart = weights_of(dtype), weights_of(dtype)
    build = OPTIMIZERS[name].optimizer_class
    one, other = build(together, **hyper), build([{"params": [weight]} for weight in apart], **hyper)
    absent = {(0, 3), (1, 3), (2, 1), (3, 5), (3, 6)}
    train([one], together, range(5), absent)
    batched = max(sizes, default=0)
    if name == "microadam":
        assert batched == 17  # of any shapes, the vector is too small
    elif name in ("sparse_mfac", "sparse_ggt"):
        assert batched == 18
    elif hyper.get("rank") == 4 or name in ("trion", "dash"):
        assert batched == (1 if hyper.get("error_feedback") == "grad" else 6)
    else:  # products with vectors
        assert batched <= 1
    sizes.clear()
    train([other], apart, range(5), absent)
    assert set(sizes) <= {1}
    assert_equal(together, apart)
    found, expected = one.state_dict()["state"], other.state_dict()["state"]
    for index, state in expected.items():
        assert found[index]["step"] == state["step"]
        for key, value in state.items():
            if key.startswith("shared_"):  # a sum over all tensors, in another order
                torch.testing.assert_close(found[index][key], value, rtol=1e-13, atol=1e-10)
            elif isinstance(value, Tensor):  # also in their layout
                assert torch.equal(found[index][key], value) and found[index][key].dtype == value.dtype
                assert found[index][key].stride() == value.stride() and value.is_contiguous()


EQUAL: list[tuple[int, ...]] = [(32, 48)] * 5


def is_stacked(optimizer: Any, weights: list[nn.Parameter], key: str) -> bool:
    parts = [optimizer.state[weight][key] for weight in weights]
    distances = {b.data_ptr() - a.data_ptr() for a, b in itertools.pairwise(parts)}
    return len(distances) == 1 and len({part.untyped_storage().data_ptr() for part in parts}) == 1


def reload(optimizer: LDAdam, weights: list[nn.Parameter]) -> tuple[LDAdam, list[nn.Parameter]]:
    """Through a file, as training does, in which what is shared lies once."""
    saved = through_a_file(optimizer.state_dict())
    storages = {
        v.untyped_storage().data_ptr(): v.untyped_storage().nbytes()
        for s in saved["state"].values()
        for v in s.values()
        if isinstance(v, Tensor)
    }
    assert sum(storages.values()) < 5 * 48 * 32 * 4 * 2
    again = LDAdam(weights, rank=4)
    again.load_state_dict(saved)
    return again, weights


def as_separate_tensors(optimizer: LDAdam, weights: list[nn.Parameter]) -> tuple[LDAdam, list[nn.Parameter]]:
    """As after a gather, or a checkpoint of a layout without stacks."""
    saved = optimizer.state_dict()
    for index, state in saved["state"].items():
        saved["state"][index] = {k: v.clone() if isinstance(v, Tensor) else v for k, v in state.items()}
    again = LDAdam(weights, rank=4)
    again.load_state_dict(saved)
    return again, weights


def copied(optimizer: LDAdam, weights: list[nn.Parameter]) -> tuple[LDAdam, list[nn.Parameter]]:
    return copy.deepcopy((optimizer, weights))


@pytest.mark.parametrize("restore", [reload, as_separate_tensors, copied])
def test_state_is_stacked_again_after_a_load_and_in_a_copy(restore: Any, sizes: list[int]) -> None:
    straight, other = weights_of(shapes=EQUAL), weights_of(shapes=EQUAL)
    first, second = (LDAdam(weights, rank=4) for weights in (straight, other))
    train([first], straight, range(6))
    train([second], other, range(3))
    again, weights = restore(second, other)
    before = copy.deepcopy(second)
    assert_same_state(again, second)
    sizes.clear()
    train([again], weights, range(3, 6))
    assert set(sizes) == {5}
    assert all(is_stacked(again, weights, key) for key in ("basis", "exp_avg", "error_codes", "error_lo"))
    assert_equal(straight, weights)
    assert_same_state(first, again)
    if restore is copied:  # apart from the original
        assert_same_state(second, before)


@pytest.mark.parametrize("shape", [(33, 20), (7,), (1, 1), (16, 16)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8, torch.float64], ids=str)
def test_stacked_parts_are_aligned_zeros_and_do_not_overlap(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    spec = TensorSpec(shape, dtype, "part")
    states = allocate_stacked({"part": spec}, 5, torch.device("cpu"))
    parts = [state["part"] for state in states]
    assert all(part.shape == shape and part.dtype == dtype and part.is_contiguous() for part in parts)
    assert all(part.data_ptr() % 64 == 0 and not part.any() for part in parts)
    for index, part in enumerate(parts):
        part.fill_(index + 1)
    assert all((part == index + 1).all() for index, part in enumerate(parts))
    (lone,) = allocate_stacked({"part": spec}, 1, torch.device("cpu"))
    assert lone["part"].untyped_storage().nbytes() == spec.stored_bytes


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("name", "hyper"),
    [
        ("ldadam", {"rank": None}),
        ("ldadam", {"rank": None, "dense_state": "fp32"}),
        ("microadam", MICROADAM),
        ("sparse_mfac", SPARSE),
        ("sparse_mfac", {**SPARSE, "scope": "tensor", "momentum": 0.5}),
        ("sparse_ggt", SPARSE),
    ],
    ids=str,
)
def test_the_number_of_threads_changes_nothing(name: str, hyper: dict[str, Any], dtype: torch.dtype) -> None:
    """Above what one thread or one slice of the dense rule takes as well."""
    shapes = [(48, 200), (200, 48), (40, 40), (40, 40), (96, 70), (33,), (7, 3, 3, 3), (5,)]
    shapes += [(530, 525)] if hyper.get("rank", 0) is None or name == "microadam" else []
    results = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        weights = weights_of(dtype, shapes)
        optimizer = OPTIMIZERS[name].optimizer_class(weights, lr=1e-2, **hyper)
        train([optimizer], weights, range(4))
        assert torch.get_num_threads() == count
        tensors = [v for entry in optimizer.state.values() for v in entry.values() if isinstance(v, Tensor)]
        results.append([*weights, *tensors])
    for other in results[1:]:
        assert_equal(results[0], other)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize(("name", "rank"), [("ldadam", 4), ("ldadam", 16), ("lowrank_mfac", 2)])
def test_products_depend_on_the_number_of_threads_by_their_rounding_only(name: str, rank: int) -> None:
    """BLAS and LAPACK add up in an order that depends on it: relative to the way travelled."""
    shapes = [(48, 200), (200, 48), (40, 40), (96, 70)]
    ends = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        weights = weights_of(shapes=shapes)
        lr = 0.1 if name == "ldadam" else 10.0  # far above the rounding of the weights
        optimizer = OPTIMIZERS[name].optimizer_class(weights, lr=lr, rank=rank, error_feedback="fp32")
        train([optimizer], weights, range(4))
        ends.append([weight.detach() for weight in weights])
    for start, first, *others in zip(weights_of(shapes=shapes), *ends, strict=True):
        for other in others:
            assert (other - first).norm() <= 1e-5 * (first - start).norm()
