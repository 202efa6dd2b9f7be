"""Bytes read and written; the search for what fits, against trying every value."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_lowmem_optim import OPTIMIZERS
from hf_lowmem_optim.memory.budget import COSTS, MAX_WINDOW, BudgetSearch
from hf_lowmem_optim.memory.byte_sizes import format_bytes, parse_bytes, parse_reserve
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


def test_a_reserve_is_a_tenth_or_a_gibibyte() -> None:
    assert parse_reserve(None, 24 * 2**30) == 24 * 2**30 // 10
    assert parse_reserve(None, 4 * 2**30) == 2**30
    assert parse_reserve("0", 2**20) == parse_reserve(0, 2**20) == 0
    for reserve, budget in ((None, 2**30), ("2GiB", 2**31)):
        with pytest.raises(ValueError, match="leaves nothing of the budget"):
            parse_reserve(reserve, budget)


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
    assert finder.total_bytes({}) >= plan_groups(finder.optimizer_class, finder.groups).total_bytes
    assert finder.largest(2**60) == {}  # everything fits: no value to name
    none = finder.largest(0)
    # Dash has neither rank nor window, DCTAdamW's rank is above these matrices
    assert bool(none) != name.startswith(("dash", "dct_adamw"))
    for key, nothing in none.items():
        assert nothing == 0
        limit = 79 if key == "rank" else MAX_WINDOW
        for value in (1, 36, limit // 2):
            found = finder.largest(size := finder.total_bytes({key: value}))[key]
            assert found >= value
            assert finder.total_bytes({key: found}) <= size < finder.total_bytes({key: found + 1})


def test_nothing_is_proposed_where_nothing_is_compressed() -> None:
    """Adapters of rank 16 under LDAdam at rank 16: a rank of 15 would cost more, not less."""
    finder = search("ldadam")
    adapters = [torch.empty(16, 512, device="meta")]
    groups = [{**finder.groups[0], "params": adapters}]
    assert replace(finder, groups=groups).largest(0) == {}
    assert {rung.cost for rung in replace(finder, groups=groups).ladder(0)} <= {"dense_state=8bit"}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_ladder_goes_down_at_rising_cost_and_ends_at_what_fits(name: str) -> None:
    finder = replace(search(name), total=lambda state, _: state)
    rungs = list(finder.ladder(0))
    assert rungs
    costs, sizes = ([getattr(rung, key) for rung in rungs] for key in ("cost", "total_bytes"))
    assert [list(COSTS).index(cost) for cost in costs] == sorted(list(COSTS).index(cost) for cost in costs)
    assert sorted([finder.total_bytes({}), *sizes], reverse=True) == [finder.total_bytes({}), *sizes]
    for rung in rungs:
        assert finder.total_bytes(rung.changes) == rung.total_bytes
        finder.optimizer_class.method.check(rung.changes, name)
        # it stops where it fits
        assert list(finder.ladder(rung.total_bytes))[-1].total_bytes <= rung.total_bytes
    assert list(finder.ladder(finder.total_bytes({}))) == []


def test_a_rank_is_lowered_no_further_than_needed() -> None:
    finder = replace(search("ldadam"), total=lambda state, _: state)
    allowed = finder.total_bytes({**next(finder.ladder(0)).changes, "rank": 11})
    rung = list(finder.ladder(allowed))[-1]
    assert rung.cost == "rank" and rung.changes["rank"] == 11


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_storage_of_dense_moments_is_one_of_the_settings(name: str) -> None:
    """It changes in the groups that are not targeted, too, where it matters most."""
    finder = search(name)
    finder.groups[1]["params"].append(torch.empty(512, 100, device="meta"))
    sizes = [rung.total_bytes for rung in finder.ladder(0) if rung.cost == "dense_state=8bit"]
    temporaries = plan_temporaries(finder.optimizer_class, finder.groups)
    saved = 2 * 51200 * 3 - 2 * 4 * 200
    groups = [{**group, "dense_state": "8bit"} for group in finder.groups]
    assert sizes == [finder.total_bytes({"dense_state": "8bit"})]
    before, after = (plan_groups(finder.optimizer_class, each).total_bytes for each in (finder.groups, groups))
    # the vector of 8192 entries is dense in methods for matrices, a matrix where its sides are no larger than the rank
    method, entries = finder.optimizer_class.method, {(8192,): 8192, (96, 128): 12288, (128, 80): 10240}
    dense = [count for shape, count in entries.items() if not method.compresses(shape, finder.groups[0])]
    known = {"ldadam": 1, "lordo": 1, "trion": 1, "dash": 1, "dct_adamw": 3}
    assert len(dense) == known.get(name.removesuffix("_layerwise"), 0)
    assert before - after == saved + sum(2 * count * 3 - 2 * 4 * count // 256 for count in dense)
    assert finder.total_bytes({}) - sizes[0] >= before - after - temporaries
