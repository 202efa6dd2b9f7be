"""Figures that the planner's advice quotes, against the results that they come from."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

import pytest

from hf_lowmem_optim.memory.budget import COSTS
from hf_lowmem_optim.memory.learning_rates import FACTORS, LearningRate, learning_rates
from hf_lowmem_optim.memory.measure import StateReport

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"


def rows(name: str, entry: str, held_out: str) -> list[dict[str, Any]]:
    every = json.loads((RESULTS / f"convergence_{name}.json").read_text())["rows"]
    return [row for row in every if row["entry"] == entry and row["held_out"] == held_out]


def best_rate(name: str, entry: str) -> float:
    """The rate of the smallest loss on the validation set."""
    return min(rows(name, entry, "validation"), key=lambda row: row["held_out_loss"])["lr"]


def test_the_factors_of_learning_rates_are_those_of_the_best_rates() -> None:
    entries = {"ldadam": "ldadam:rank=16", "microadam": "microadam"}
    assert entries.keys() == FACTORS.keys()
    for optimizer, entry in entries.items():
        found = tuple(best_rate(name, entry) / best_rate(name, "adamw") for name in ("finetune", "pretrain"))
        assert found == FACTORS[optimizer]
    assert all(f"convergence_{name}.json" in LearningRate.source for name in ("finetune", "pretrain"))
    with pytest.raises(TypeError, match=r"adamw_lr=.1e-5. is a str"):
        learning_rates([], "1e-5")  # type: ignore[arg-type]
    rate, other = learning_rates(["ldadam_layerwise", "trion"], 1e-5)
    assert (rate.fine_tuning, rate.from_scratch) == FACTORS["ldadam"]
    assert other.fine_tuning is other.from_scratch is None


def test_a_measured_state_prints_as_a_table() -> None:
    report = StateReport({"basis": 1024, "dense": 3 * 2**20}, (), 2**20)
    expected = ["State of 1,048,576 parameters: 3 B/param", "  basis       1 KiB", "  dense       3 MiB"]
    assert str(report).splitlines() == [*expected, "  all         3 MiB", "  AdamW fp32  8 MiB"]
    assert str(StateReport({}, (), 0)).startswith("State of 0 parameters\n")


def test_the_costs_are_those_measured() -> None:
    adamw, eight_bit = (
        {row["seed"]: row["held_out_loss"] for row in rows("finetune", name, "test")}
        for name in ("adamw", "adamw_8bit")
    )
    percent = [100 * (eight_bit[seed] / adamw[seed] - 1) for seed in adamw]
    assert f"{statistics.mean(percent):.1f} % ± {statistics.stdev(percent):.1f} %" in COSTS["dense_state=8bit"]
    (wide,) = rows("trials", "ldadam:rank=32,dense_lr_ratio=4", "test")
    narrow = next(r for r in rows("pretrain", "ldadam:rank=16,dense_lr_ratio=4", "test") if r["seed"] == wide["seed"])
    more = 100 * (narrow["held_out_loss"] / wide["held_out_loss"] - 1)
    assert f"rank=16 ended {more:.1f} % above rank=32" in COSTS["rank"]
