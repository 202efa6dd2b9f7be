"""The comparison's rules: how rates are tried and chosen, what a run is, and what an interrupted comparison redoes."""

from __future__ import annotations

import dataclasses
import math
import statistics
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from convergence import RunStore, bracket, parse_entry, train, tune_and_report
from convergence_tasks import Task
from hypothesis import given
from hypothesis import strategies as st
from results import Row, load_run
from torch import Tensor, nn

SETTINGS = {"task": "fake", "steps": 300, "dtype": "fp32"}
#: Where each fake optimizer is best on the validation set, and on the test set.
BEST = {"adamw": (1e-3, 4e-3), "ldadam:rank=16": (9e-3, 1e-3), "galore": (2e-4, 2e-4)}
STARTS = dict(parse_entry(text) for text in ("adamw", "ldadam:rank=16@1e-3", "galore@1e-3"))


def fake_run(entry: str, lr: float, seed: int, held_out: str) -> Row:
    """Return a loss that is a parabola in the logarithm of the rate, a little off for every seed."""
    best = BEST[entry][held_out == "test"]
    loss = 1 + 0.1 * len(entry) + math.log2(lr / best) ** 2 + 0.01 * seed * len(entry)
    row = {"entry": entry, "lr": lr, "seed": seed, "held_out": held_out}
    return {**row, "train_loss": loss, "held_out_loss": loss, "seconds": 1.0}


@given(optimum=st.floats(-6.9, 6.9), start=st.floats(-1, 1), diverges_above=st.floats(0.5, 3))
def test_a_grid_grows_until_the_best_has_worse_neighbours(optimum: float, start: float, diverges_above: float) -> None:
    def loss_at(lr: float) -> float:
        distance = math.log2(lr) - optimum
        return math.nan if distance > diverges_above else distance**2

    tried = bracket(loss_at, 2.0**start)
    best = min(tried, key=lambda lr: tried[lr])
    # within half a factor of two of the optimum: what diverges is further away
    assert abs(math.log2(best) - optimum) <= 0.5 + 1e-9
    assert tried[best / 2] >= tried[best] <= tried[best * 2]
    # no rate is skipped, and none is tried beyond what brackets the best and the start
    exponents = sorted(round(math.log2(lr) - start) for lr in tried)
    assert exponents == list(range(exponents[0], exponents[-1] + 1))
    assert len(tried) <= abs(round(math.log2(best) - start)) + 3
    with pytest.raises(RuntimeError, match=r"best rate 0\.256 is an edge"):
        bracket(lambda lr: 1 / lr, 1e-3)


def test_rates_are_chosen_on_validation_and_an_interrupted_comparison_goes_on(tmp_path: Path) -> None:
    calls: list[tuple[str, float, int, str]] = []

    def compare(path: Path, stop_after: int) -> dict[str, float]:
        calls.clear()

        def train_one(*run: str | float | int) -> Row:
            if len(calls) == stop_after:
                raise KeyboardInterrupt
            calls.append(run)  # type: ignore[arg-type]
            return fake_run(*run)  # type: ignore[arg-type]

        return tune_and_report(RunStore(path, SETTINGS).resumable(train_one), STARTS, 0, (1, 2))

    chosen = compare(tmp_path / "whole.json", 1000)
    # the nearest of the grid to the validation set's optimum; the test set would have chosen otherwise
    assert chosen == pytest.approx({"adamw": 1e-3, "ldadam:rank=16": 8e-3, "galore": 2.5e-4})
    assert {call[2:] for call in calls if call[3] == "validation"} == {(0, "validation")}
    assert calls[-6:] == [(entry, chosen[entry], seed, "test") for seed in (1, 2) for entry in STARTS]
    whole = list(calls)
    with pytest.raises(KeyboardInterrupt):
        compare(tmp_path / "parts.json", 7)
    assert compare(tmp_path / "parts.json", 1000) == chosen and calls == whole[7:]
    assert load_run(tmp_path / "parts.json").rows == load_run(tmp_path / "whole.json").rows
    with pytest.raises(ValueError, match=r"another settings.*choose another file"):
        RunStore(tmp_path / "parts.json", {**SETTINGS, "steps": 301})
    with pytest.raises(ValueError, match="--tune-seed 1"):
        tune_and_report(fake_run, STARTS, 1, (1, 2))


class Regression(nn.Linear):
    """A linear classifier in the form of transformers'."""

    def __init__(self) -> None:
        super().__init__(4, 2)

    def forward(self, x: Tensor, labels: Tensor) -> SimpleNamespace:  # type: ignore[override]
        logits = super().forward(x)
        return SimpleNamespace(loss=nn.functional.cross_entropy(logits, labels), logits=logits)


def batches(seed: int, count: int) -> list[dict[str, Tensor]]:
    x = 3 * torch.randn(count, 8, 4, generator=torch.Generator().manual_seed(seed))
    return [{"x": b, "labels": (b.sum(-1) > 0).long()} for b in x]


TASK = Task("fake", Regression, batches, {"validation": batches(100, 2), "test": batches(101, 2)})


def test_a_run_is_the_loop_that_users_have() -> None:
    steps, lr = 20, 0.1
    row = train(TASK, "adamw", lr, 3, steps, "test", "fp32")
    torch.manual_seed(3)
    model = Regression()
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.0)
    losses, norms = [], []
    for step, batch in enumerate(batches(3, steps)):
        # 5% of 20 steps of warm-up is one step at the full rate
        rate = lr if step == 0 else lr * 0.5 * (1 + math.cos(math.pi * (step - 1) / (steps - 1)))
        optimizer.param_groups[0]["lr"] = rate
        optimizer.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        norms.append(nn.utils.clip_grad_norm_(model.parameters(), 1.0).item())
        optimizer.step()
        losses.append(loss.item())
    assert min(norms) < 1 < max(norms)
    held_out = [model(**batch) for batch in TASK.held_out["test"]]
    assert row["train_loss"] == pytest.approx(statistics.mean(losses), rel=1e-5)
    assert row["held_out_loss"] == pytest.approx(statistics.mean(out.loss.item() for out in held_out), rel=1e-5)
    right = [(out.logits.argmax(-1) == b["labels"]) for out, b in zip(held_out, TASK.held_out["test"], strict=True)]
    assert row["accuracy"] == torch.cat(right).float().mean().item()
    assert row["curve"] == pytest.approx([statistics.mean(losses[:10]), statistics.mean(losses[10:])], abs=1e-4)
    assert (row["state_bytes"], row["parameters"]) == (2 * 4 * 10 + 2 * 4, 10)  # two moments and two step counts


def test_a_run_that_diverges_stops_and_is_never_chosen() -> None:
    def explode(seed: int, count: int) -> list[dict[str, Tensor]]:
        return [{**b, "x": b["x"] * (math.inf if i == 4 else 1)} for i, b in enumerate(batches(seed, count))]

    row = train(dataclasses.replace(TASK, batches=explode), "adamw", 0.1, 0, 20, "validation", "fp32")
    assert row["held_out_loss"] == math.inf and len(row["curve"]) == 1
