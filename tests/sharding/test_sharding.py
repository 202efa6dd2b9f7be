"""Sharded parameters, in several processes that share one start: what they do is in ``jobs.py``."""

from __future__ import annotations

from typing import Any

import pytest

from tests.sharding.processes import launch

#: What is done, and by how many processes.
JOBS = [
    ("save", 2),
    ("resume", 1),
    ("resume", 2),
    ("resume", 4),
    ("resume_plain", 1),
    ("steps_from_a_rate_of_zero", 2),
    ("refused", 1),
    ("fsdp2", 2),
    ("placements", 4),
    ("tensor_parallel", 4),
    ("traffic", 2),
    ("awkward", 2),
    ("misaligned", 2),
]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, int], list[Any]]:
    """Return what each process of each job returned."""
    jobs = [(f"tests.sharding.jobs:{name}", world) for name, world in JOBS]
    return dict(zip(JOBS, launch(jobs, tmp_path_factory.mktemp("sharding"), timeout=600), strict=True))


def test_every_optimizer_computes_what_one_process_does_and_resumes_on_any_number(results: Any) -> None:
    cases = results["save", 2][0]
    assert len(cases) >= 9 and {*results["resume", 2][0]} == {*cases}
    for job in (("save", 2), ("resume", 1), ("resume", 2), ("resume", 4), ("resume_plain", 1)):
        assert all(each == results[job][0] for each in results[job])
        assert {name for name in cases if not name.endswith(" even")} <= {*results[job][0]}, job
    assert {"ldadam even", "sparse_mfac even", "microadam even"} <= {*results["resume", 4][0]}


def test_all_processes_count_a_first_step_at_a_rate_of_zero_alike(results: Any) -> None:
    assert results["steps_from_a_rate_of_zero", 2] == [[3], [3]]


def test_placements_and_refusals(results: Any) -> None:
    for job in (("refused", 1), ("fsdp2", 2), ("placements", 4), ("tensor_parallel", 4)):
        assert results[job] == [job[1]] * job[1]


def test_the_log_says_once_which_blocks_would_be_aligned_and_what_old_versions_of_torch_do(results: Any) -> None:
    for gaps, *told in results["misaligned", 2]:
        assert "2 processes do not divide all dimensions of the optimizer's state evenly" in gaps
        assert told == [
            "blocks of 128 entries straddle the parts that 2 processes have of tensors of shape (6, 64): these are "
            "gathered at every step; block_size=64 would need no communication"
        ]


def test_what_cannot_be_orthonormalized_is_gathered_by_all(results: Any) -> None:
    """The first step always; later ones where a sketch has no r directions, or a process has numbers that are none."""
    here, there = results["awkward", 2]
    assert here == there
    zero, of_rank_one, huge, not_finite = here
    assert zero == huge == [2, 2, 2, 2] and of_rank_one[:3] == [2, 2, 2] and not_finite == [2, 0, 2, 2]


def test_a_step_sends_what_the_formulas_say(results: Any) -> None:
    """What is counted is what is planned, and that is what can be computed by hand, for the paths and no other."""
    r, p, q, entries = 4, 64, 96, 3 * 64 * 96
    # of two matrices the smaller dimension is cut, of one the larger; U or both moments whole, and three sums
    sums = 4 * (2 * r * q + p * r) + 8 * 2 * r * r + 4 * 2 * (r * (2 * r + q) + 1)
    by_hand = {
        "ldadam": ({"collective": 3}, 4 * (2 * 2 * r * q + p * r) + 2 * sums),
        "sparse_mfac": ({"aligned": 3}, 2 * 3 * 4 * 8),  # a row of the window for each tensor
        "microadam": ({"aligned": 3}, 0),
    }
    calls = {
        "ldadam": {"all_gather": 1, "all_reduce": 3},
        "sparse_mfac": {"all_gather": 1},
        "microadam": {},
        "lowrank_mfac": {"all_to_all_single": 2, "all_gather": 1},
        "trion": {"all_to_all_single": 2},
    }
    here, there = results["traffic", 2]
    for name, (counted, _, planned) in here.items():
        assert there[name][2] == planned
        assert counted == calls[name] and sum(counted.values()) == planned.calls
        assert abs(here[name][1] + there[name][1] - planned.total_bytes) <= 8 * 2 * 3 * 8, name  # padding
        if name in by_hand:
            assert (planned.tensors, planned.total_bytes) == by_hand[name]
        else:
            assert planned.sent_bytes["gathered"] > 3 * 4 * entries // 2  # the gradient once, weights twice, and state
