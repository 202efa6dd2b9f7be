"""Sharded parameters, in several processes that share one start: what they do is in ``jobs.py``."""

from __future__ import annotations

from pathlib import Path

from tests.sharding.processes import launch

JOBS = "tests.sharding.jobs"


def run(folder: Path, *jobs: tuple[str, int]) -> list[list[object]]:
    return launch([(f"{JOBS}:{name}", world) for name, world in jobs], folder, timeout=400)


def test_every_optimizer_computes_what_one_process_does_and_resumes_on_any_number(tmp_path: Path) -> None:
    jobs = [("save", 2), ("resume", 1), ("resume", 2), ("resume", 4), ("resume_plain", 1)]
    results = run(tmp_path, *jobs)
    cases = results[0][0]
    assert len(cases) >= 9 and all(each == cases for result in results for each in result)  # type: ignore[arg-type]


def test_placements_and_refusals(tmp_path: Path) -> None:
    """All processes count a first step at a rate of zero alike, too."""
    jobs = [("steps_from_a_rate_of_zero", 2), ("refused", 1), ("fsdp2", 2), ("placements", 4), ("tensor_parallel", 4)]
    counts, *others = run(tmp_path, *jobs)
    assert counts == [[3], [3]]
    assert others == [[world] * world for _, world in jobs[1:]]


def test_a_step_sends_what_the_readme_says(tmp_path: Path) -> None:
    """The gradient once, weights and state twice, less the half that is at home; M-FAC one table of rows as well."""
    here, there = run(tmp_path, ("traffic", 2))[0]
    for name in here:  # type: ignore[attr-defined]
        calls, *_ = here[name]  # type: ignore[index]
        state, sent = (sum(each[name][index] for each in (here, there)) for index in (2, 1))  # type: ignore[index]
        weights, table = 3 * 64 * 96 * 4, 0
        if name == "sparse_mfac":
            # GG^T is on every process
            table, state = 3 * 4 * 8, state - 2 * 4 * 4 * 8
        assert calls == ({"all_to_all_single": 2, "all_reduce": 1} if table else {"all_to_all_single": 2})
        assert abs(sent - (3 * weights + 2 * state) // 2 - 2 * table) <= 8 * 2 * 3 * 8  # padding
        assert 0.49 < here[name][2] / (state + 2 * table) < 0.52  # type: ignore[index]
