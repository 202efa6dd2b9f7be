"""Bytes read and written; the search for what fits, against trying every value."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_lowmem_optim import OPTIMIZERS
from hf_lowmem_optim.memory.budget import MAX_WINDOW, BudgetSearch
from hf_lowmem_optim.memory.byte_sizes import format_bytes, parse_bytes
from hf_lowmem_optim.memory.plan import plan_groups, plan_temporaries
from hf_lowmem_optim.spec import TensorSpec


@pytest.mark.parametrize(
    ("text", "count"), [("24GiB", 24 * 2**30), ("80 GB", 80 * 10**9), ("1.5 mib", 3 * 2**19), ("7B", 7), (12, 12)]
)
def test_bytes_are_read(text: str | int, count: int) -> None:
    assert parse_bytes(text) == count


@pytest.mark.parametrize("text", ["24", "GiB", "-1GiB", "0GiB", "24 gigs", "", 0, True])
def test_wrong_bytes(text: str | int) -> None:
    with pytest.raises(ValueError, match=r"budget=.*24GiB"):
        parse_bytes(text)


@given(st.integers(0, 2**45))
def test_written_bytes_are_read_back_to_three_digits(count: int) -> None:
    assert count == 0 or abs(parse_bytes(format_bytes(count)) - count) <= 0.005 * count


def test_shards_cover_the_tensor() -> None:
    spec = TensorSpec((10, 3), torch.float32, "error")
    assert spec.shard(4).shape == (3, 3)
    assert spec.shard(1) == spec
    assert TensorSpec((), torch.float32, "step").shard(8).nbytes == 4


def search(name: str) -> BudgetSearch:
    optimizer_class = OPTIMIZERS[name].optimizer_class
    method = optimizer_class.method
    compressed = [torch.empty(shape, device="meta") for shape in ((96, 128), (128, 80), (8192,))]
    dense = [torch.empty(50, 40, device="meta")]
    defaults = method.options.defaults()
    groups = [{**defaults, "params": compressed}, {**defaults, "params": dense, **dict([method.switch])}]
    return BudgetSearch(optimizer_class, groups)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_largest_rank_or_window_is_the_largest(name: str) -> None:
    finder = search(name)
    assert finder.added_bytes({}) >= plan_groups(finder.optimizer_class, finder.groups).total_bytes
    unlimited = finder.largest(2**60)
    assert unlimited, f"{name} has neither rank nor window"
    for key, limit in unlimited.items():
        assert limit == (79 if key == "rank" else MAX_WINDOW)
        values = range(1, limit + 1, 7)
        sizes = {value: finder.added_bytes({key: value}) for value in values}
        for value in (1, 36, values[-1]):
            found = finder.largest(sizes[value])[key]
            assert found >= value
            assert finder.added_bytes({key: found}) <= sizes[value]
            assert found == limit or finder.added_bytes({key: found + 1}) > sizes[value]
    assert set(finder.largest(0).values()) == {0}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_smaller_settings_are_sized_as_they_would_be_built(name: str) -> None:
    finder = search(name)
    changes = list(finder.smaller())
    assert changes
    assert min(size for _, size in changes) < finder.added_bytes({})
    for change, size in changes:
        assert finder.added_bytes(change) == size
        finder.optimizer_class.method.check(change, name)
    if finder.optimizer_class.method.layerwise:
        return
    # with several processes what needs a single one is left out, and nothing else
    choices = [change for change, _ in changes if change.get("error_feedback") != "grad"]
    together = [change for change, _ in replace(finder, num_processes=2).smaller()]
    assert all(change.get("error_feedback") != "grad" for change in together)
    assert [change for change in choices if len(change) == 1] == [change for change in together if len(change) == 1]
    assert (len(changes) > len(choices)) == (name == "ldadam")


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_storage_of_dense_moments_is_one_of_the_settings(name: str) -> None:
    """It changes in the groups that are not targeted, too, where it matters most."""
    finder = search(name)
    finder.groups[1]["params"].append(torch.empty(512, 100, device="meta"))
    sizes = [size for change, size in finder.smaller() if change == {"dense_state": "8bit"}]
    temporaries = plan_temporaries(finder.optimizer_class, finder.groups)
    saved = 2 * 51200 * 3 - 2 * 4 * 200
    groups = [{**group, "dense_state": "8bit"} for group in finder.groups]
    assert sizes == [finder.added_bytes({"dense_state": "8bit"})]
    before, after = (plan_groups(finder.optimizer_class, each).total_bytes for each in (finder.groups, groups))
    # the vector of 8192 entries is dense in methods for matrices, a matrix where its sides are no larger than the rank
    method, entries = finder.optimizer_class.method, {(8192,): 8192, (96, 128): 12288, (128, 80): 10240}
    dense = [count for shape, count in entries.items() if not method.compresses(shape, finder.groups[0])]
    assert len(dense) == {"ldadam": 1, "trion": 1, "dct_adamw": 3}.get(name.removesuffix("_layerwise"), 0)
    assert before - after == saved + sum(2 * count * 3 - 2 * 4 * count // 256 for count in dense)
    assert finder.added_bytes({}) - sizes[0] >= before - after - temporaries
