"""The comparison's rules: how rates are tried and chosen, what a run is, and what an interrupted comparison redoes."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import convergence
import pytest
import torch
from convergence import bracket, parse_entry, resumable, train, tune_and_report
from convergence_peers import build_optimizer, parse_settings, split_parameters
from convergence_plots import plot_convergence
from convergence_results import ConvergenceRow, RunStore, read_rows
from convergence_tables import convergence_table, rates_table
from convergence_tasks import Task, split_held_out
from hypothesis import given
from hypothesis import strategies as st
from results import load_run
from torch import Tensor, nn

from tests.trainer.tiny_models import tiny_llama

Run = Callable[[str, float, int, str], ConvergenceRow]

#: Where each fake optimizer is best on the validation set, and on the test set.
BEST = {"adamw": (1e-3, 4e-3), "ldadam:rank=16": (9e-3, 1e-3), "galore": (2e-4, 2e-4)}
STARTS = {"adamw": 1e-3, "ldadam:rank=16": 1e-3, "galore": 1e-3}


def fake_run(entry: str, lr: float, seed: int, held_out: str) -> ConvergenceRow:
    """A loss that is a parabola in the logarithm of the rate, a little off for every seed."""
    best = BEST[entry][held_out == "test"]
    loss = 1 + 0.1 * len(entry) + math.log2(lr / best) ** 2 + 0.01 * seed * len(entry)
    return ConvergenceRow("fake", entry, lr, seed, 300, "fp32", held_out, loss, loss, 0.5, 80, 10, 1.0, [2.0, loss])


@given(optimum=st.floats(-6.9, 6.9), start=st.floats(-1, 1), diverges_above=st.floats(0.5, 3))
def test_the_grid_grows_until_the_best_rate_has_worse_neighbours(
    optimum: float, start: float, diverges_above: float
) -> None:
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


def test_a_loss_that_only_falls_is_not_taken_for_bracketed() -> None:
    with pytest.raises(RuntimeError, match=r"best rate 0\.256 is an edge"):
        bracket(lambda lr: 1 / lr, 1e-3)


def test_rates_are_chosen_on_the_validation_set_and_reported_on_the_test_set_with_other_seeds() -> None:
    calls = []

    def run(entry: str, lr: float, seed: int, held_out: str) -> ConvergenceRow:
        calls.append((entry, lr, seed, held_out))
        return fake_run(entry, lr, seed, held_out)

    chosen = tune_and_report(run, STARTS, 0, (1, 2))
    # the nearest of the grid to the validation set's optimum; the test set would have chosen otherwise
    assert chosen == pytest.approx({"adamw": 1e-3, "ldadam:rank=16": 8e-3, "galore": 2.5e-4})
    assert {call[2:] for call in calls if call[3] == "validation"} == {(0, "validation")}
    reported = [call for call in calls if call[3] == "test"]
    assert reported == [(entry, chosen[entry], seed, "test") for seed in (1, 2) for entry in STARTS]
    assert calls[-len(reported) :] == reported
    with pytest.raises(ValueError, match="--tune-seed 1"):
        tune_and_report(run, STARTS, 1, (1, 2))


def test_an_interrupted_comparison_goes_on_where_it_was(tmp_path: Path) -> None:
    def compare(path: Path, stop_after: int) -> list[tuple[str, float, int, str]]:
        calls: list[tuple[str, float, int, str]] = []

        def train_one(entry: str, lr: float, seed: int, held_out: str) -> ConvergenceRow:
            if len(calls) == stop_after:
                raise KeyboardInterrupt
            calls.append((entry, lr, seed, held_out))
            return fake_run(entry, lr, seed, held_out)

        tune_and_report(resumable(RunStore(path, "fake", 300, "fp32"), train_one), STARTS, 0, (1, 2, 3))
        return calls

    whole = compare(tmp_path / "whole.json", 1000)
    with pytest.raises(KeyboardInterrupt):
        compare(tmp_path / "parts.json", 7)
    assert compare(tmp_path / "parts.json", 1000) == whole[7:]
    assert compare(tmp_path / "parts.json", 0) == []
    assert load_run(tmp_path / "parts.json").rows == load_run(tmp_path / "whole.json").rows
    assert [row.lr for row in read_rows(load_run(tmp_path / "parts.json"))] == [lr for _, lr, _, _ in whole]


def test_a_file_of_several_processes_becomes_that_of_the_one_which_asks_for_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def compare(arguments: str, entries: dict[str, float], note: str = "") -> tuple[str, str]:
        monkeypatch.setattr("sys.argv", ["benchmarks/convergence.py", *arguments.split()])
        store = RunStore(tmp_path / "r.json", "fake", 300, "fp32", note)
        tune_and_report(resumable(store, fake_run), entries, 0, (1,))
        store.finish()
        saved = load_run(tmp_path / "r.json")
        return saved.command.replace("python benchmarks/convergence.py ", ""), saved.note

    first, second = ({name: 1e-3} for name in ("adamw", "galore"))
    assert compare("first", first, "beside others") == ("first", "beside others")
    assert compare("second", second) == ("first\nsecond", "beside others")
    assert compare("both", {**second, **first}) == ("both", "beside others")
    rows = load_run(tmp_path / "r.json").rows
    (tmp_path / "r.json").unlink()
    compare("both", {**second, **first})
    assert rows == load_run(tmp_path / "r.json").rows


@pytest.mark.parametrize("other", [{"task": "another"}, {"steps": 301}, {"precision": "bf16"}])
def test_figures_of_other_circumstances_do_not_enter_a_file(other: dict[str, object], tmp_path: Path) -> None:
    settings = {"task": "fake", "steps": 300, "precision": "fp32"}
    RunStore(tmp_path / "r.json", **settings).add(fake_run("adamw", 1e-3, 0, "test"))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"another settings.*choose another file"):
        RunStore(tmp_path / "r.json", **{**settings, **other})  # type: ignore[arg-type]


def test_the_tables_have_the_mean_and_spread_of_paired_runs() -> None:
    rows: list[ConvergenceRow] = []

    def run(entry: str, lr: float, seed: int, held_out: str) -> ConvergenceRow:
        rows.append(fake_run(entry, lr, seed, held_out))
        return rows[-1]

    tune_and_report(run, STARTS, 0, (1, 2, 3))
    losses = {e: [r.held_out_loss for r in rows if r.entry == e and r.held_out == "test"] for e in STARTS}
    ratios = [100 * (a / b - 1) for a, b in zip(losses["galore"], losses["adamw"], strict=True)]
    mean, spread = statistics.mean(losses["galore"]), statistics.stdev(losses["galore"])
    table = convergence_table(rows).splitlines()
    galore = [cell.strip() for cell in next(line for line in table if line.startswith("| galore")).split("|")[1:-1]]
    assert galore[:4] == ["galore", "0.00025", "0.000125, 0.00025, 0.0005, 0.001, 0.002", "1, 2, 3"]
    assert galore[5:7] == [
        f"{mean:.3f} ± {spread:.3f}",
        f"{statistics.mean(ratios):+.1f} ± {statistics.stdev(ratios):.1f}",
    ]
    assert galore[-2:] == ["8.00", "1"]
    assert rates_table(rows).count("**") == 2 * len(STARTS)


def test_the_picture_shows_every_optimizer_of_one_task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures = pytest.importorskip("matplotlib.figure")
    seen: dict[str, list[Any]] = {}

    def look(figure: Any, path: Path) -> None:
        seen["labels"] = [text.get_text() for text in figure.legends[0].get_texts()]
        seen["rates"] = [list(line.get_xdata()) for line in figure.axes[0].lines]
        seen["curves"] = [list(line.get_ydata()) for line in figure.axes[1].lines]

    monkeypatch.setattr(figures.Figure, "savefig", look)
    store = RunStore(tmp_path / "r.json", "fake", 300, "fp32")
    tune_and_report(resumable(store, fake_run), STARTS, 0, (1, 3))
    run = load_run(tmp_path / "r.json")
    plot_convergence(run, tmp_path / "r.png")
    assert seen["labels"] == list(STARTS)
    assert [rates[0] for rates in seen["rates"]] == pytest.approx([5e-4, 1e-3, 1.25e-4])
    # the mean of the seeds' curves
    assert seen["curves"][0] == pytest.approx([2.0, fake_run("adamw", 1e-3, 2, "test").held_out_loss])
    many = [{**row, "entry": f"{row['entry']}:rank={rank}"} for rank in range(8) for row in run.rows]
    plot_convergence(dataclasses.replace(run, rows=many), tmp_path / "many.png")
    assert len(seen["curves"]) == 8 * len(STARTS)  # more than there are colours
    with pytest.raises(ValueError, match="one task; there are runs of another, fake"):
        plot_convergence(dataclasses.replace(run, rows=[*run.rows, {**run.rows[0], "task": "another"}]), tmp_path / "r")


class Regression(nn.Module):
    """y = w·x with the answer (1, 1, 1, 1), in the form of a transformers classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 2)

    def forward(self, x: Tensor, labels: Tensor) -> SimpleNamespace:
        logits = self.linear(x)
        return SimpleNamespace(loss=nn.functional.cross_entropy(logits, labels), logits=logits)


def regression_task(scale: float) -> Task:
    def batches(seed: int, count: int) -> list[dict[str, Tensor]]:
        generator = torch.Generator().manual_seed(seed)
        x = scale * torch.randn(count, 8, 4, generator=generator)
        return [{"x": b, "labels": (b.sum(-1) > 0).long()} for b in x]

    return Task("fake", Regression, batches, {"validation": batches(100, 2), "test": batches(101, 2)})


def test_a_run_is_the_loop_that_users_have() -> None:
    task, steps, lr = regression_task(3.0), 20, 0.1
    row = train(task, "adamw", lr, 3, steps, "test", "fp32")
    torch.manual_seed(3)
    model = Regression()
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.0)
    losses, norms = [], []
    for step, batch in enumerate(task.batches(3, steps)):
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
    held_out = [model(**batch) for batch in task.held_out["test"]]
    assert row.train_loss == pytest.approx(statistics.mean(losses), rel=1e-5)
    assert row.held_out_loss == pytest.approx(statistics.mean(out.loss.item() for out in held_out), rel=1e-5)
    right = [(out.logits.argmax(-1) == b["labels"]) for out, b in zip(held_out, task.held_out["test"], strict=True)]
    assert row.accuracy == torch.cat(right).float().mean().item()
    assert row.curve == pytest.approx([statistics.mean(losses[:10]), statistics.mean(losses[10:])], abs=1e-4)
    assert (row.state_bytes, row.parameters) == (2 * 4 * 10 + 2 * 4, 10)  # two moments and two step counts


def test_a_run_that_diverges_stops_and_is_never_chosen() -> None:
    task = regression_task(1.0)

    def explode(seed: int, count: int) -> list[dict[str, Tensor]]:
        batches = regression_task(1.0).batches(seed, count)
        batches[4]["x"] = batches[4]["x"] * math.inf
        return batches

    row = train(dataclasses.replace(task, batches=explode), "adamw", 0.1, 0, 20, "validation", "fp32")
    assert row.held_out_loss == math.inf
    assert len(row.curve) == 1


def test_low_rank_peers_compress_what_ours_do() -> None:
    model = tiny_llama()
    matrices, others = split_parameters(model, 4)
    ours = build_optimizer("ldadam:rank=4,error_feedback=none", model, 1e-3)
    by_rank = {group["rank"]: {id(p) for p in group["params"]} for group in ours.param_groups}
    assert {id(p) for p in matrices} == by_rank[4]
    assert {id(p) for p in (*matrices, *others)} == {id(p) for p in model.parameters()}
    assert len(matrices) == 14


@pytest.mark.parametrize(
    "entry", ["adamw:dense_lr_ratio=4", "ldadam:rank=4,dense_lr_ratio=4", "lowrank_mfac:dense_lr_ratio=4"]
)
def test_the_dense_parameters_can_have_a_rate_of_their_own(entry: str) -> None:
    model = tiny_llama()
    matrices = {id(p) for p in split_parameters(model)[0]}
    optimizer = build_optimizer(entry, model, 1e-3)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert rates == {id(p): 1e-3 if id(p) in matrices else 4e-3 for p in model.parameters()}


def test_entries_are_strict() -> None:
    assert parse_entry("ldadam:rank=16@4e-3") == ("ldadam:rank=16", 4e-3)
    assert parse_entry("adamw") == ("adamw", 1e-3)
    defaults = {"rank": 128, "scale": 0.25, "proj": "random"}
    assert parse_settings("galore", "rank=16,scale=1", defaults) == {"rank": 16, "scale": 1.0, "proj": "random"}
    with pytest.raises(ValueError, match="galore has no setting 'rnak'; there are rank, scale, proj"):
        parse_settings("galore", "rnak=16", defaults)
    for entry in ("adamx", "adamw:eps=1"):
        with pytest.raises(ValueError, match="known are adamw, adamw_8bit, galore, apollo, ldadam"):
            build_optimizer(entry, nn.Linear(2, 2), 1e-3)


def test_the_held_out_sets_share_nothing() -> None:
    sets = split_held_out(range(10))
    assert sorted((*sets["validation"], *sets["test"])) == list(range(10))
    assert sets["validation"] == [0, 3, 6, 9]


def test_tables_need_results(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["convergence.py", "pretrain", "--table"])
    with pytest.raises(SystemExit):
        convergence.main()
    assert "--results is None" in capsys.readouterr().err
