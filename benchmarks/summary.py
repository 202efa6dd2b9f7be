"""Tables by which a user chooses: what an optimizer costs, which rate to start with, what fits, what can be set.

The first two are made from the result files of several benchmarks; bytes are those that the planner computes.
"""

from __future__ import annotations

import dataclasses
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch
from results import Row, load_run
from tables import by_entry, markdown_table

from hf_lowmem_optim import OPTIMIZERS, ModelOptions, Options, plan_memory
from hf_lowmem_optim.memory.baselines import BASELINES, ParameterFacts, plan_baseline
from hf_lowmem_optim.memory.table import bytes_per_parameter, llama_2_7b_tensors


@dataclass(frozen=True)
class _Subject:
    """An optimizer under its names in convergence.py, in step_time.py and in the planner."""

    title: str
    entry: str
    timed: str
    planned: str | None


_SUBJECTS = (
    _Subject("`adamw_torch_fused`, the Trainer's default", "adamw", "torch AdamW fused", "adamw_torch_fused"),
    _Subject("8-bit AdamW (bitsandbytes)", "adamw_8bit", "bitsandbytes AdamW8bit", "adamw_8bit"),
    _Subject("GaLore, rank 16", "galore:rank=16", "galore-torch rank=16", None),
    _Subject("APOLLO, rank 16", "apollo:rank=16", "apollo-torch rank=16", None),
    _Subject("`ldadam`, rank 16", "ldadam:rank=16", "ldadam rank=16", "ldadam"),
    _Subject("`microadam`", "microadam", "microadam", "microadam"),
    _Subject("`sparse_mfac`", "sparse_mfac", "sparse_mfac", "sparse_mfac"),
    _Subject("`lowrank_mfac`", "lowrank_mfac", "lowrank_mfac", "lowrank_mfac"),
    _Subject("`sparse_ggt`", "sparse_ggt", "sparse_ggt", "sparse_ggt"),
)


def choice_table(results: Path) -> str:
    """Return what each optimizer costs in bytes, loss and time, a dash where it was not measured."""
    losses = [_losses(load_run(results / f"convergence_{task}.json").rows) for task in ("finetune", "pretrain")]
    minilm = [row for row in load_run(results / "step_time.json").rows if row["shapes"] == "minilm"]
    on_gpu = load_run(results / "step_time_gpu_large.json")
    times = [_times(minilm), _times(on_gpu.rows)]
    cells = [
        [subject.title, _bytes(subject.planned), *(loss.get(subject.entry) for loss in losses)]
        + [time.get(subject.timed) for time in times]
        for subject in _SUBJECTS
    ]
    columns = ["optimizer", "B/param", "loss, fine-tuning", "loss, from scratch", "time, CPU"]
    columns.append(f"time, {on_gpu.machine['gpu'].removeprefix('NVIDIA ')}")
    return markdown_table(columns, cells)


def _losses(rows: Sequence[Row]) -> dict[str, str]:
    """Return by entry how far the test loss lies from AdamW's, each at its best rate, paired by seed."""
    runs = {entry: rows for (entry, _), rows in by_entry(rows, "test").items()}
    adamw = {row["seed"]: row["held_out_loss"] for row in runs["adamw"]}
    ratios = {
        entry: [100 * (row["held_out_loss"] / adamw[row["seed"]] - 1) for row in rows] for entry, rows in runs.items()
    }
    found = {entry: f"{statistics.mean(r):+.1f} % ± {statistics.stdev(r):.1f}" for entry, r in ratios.items()}
    return found | {"adamw": "0"}


def _times(rows: Sequence[Row]) -> dict[str, str]:
    """Return by optimizer the time of ``step()`` over that of torch's fused AdamW."""
    return {row["optimizer"]: f"{row['ratio_to_fused']:.1f} ×" for row in rows if row.get("ratio_to_fused") is not None}


def _bytes(name: str | None) -> float | None:
    """Return the bytes of state per parameter of Llama-2-7B in bfloat16, as planned."""
    if name is None:
        return None
    if name in OPTIMIZERS:
        return bytes_per_parameter(OPTIMIZERS[name], torch.bfloat16)
    linear, dense = llama_2_7b_tensors()
    facts = [ParameterFacts(shape, torch.bfloat16, matrix=True) for shape in linear.values()]
    facts += [ParameterFacts(shape, torch.bfloat16, embedding=key == "embed") for key, shape in dense.items()]
    plan = plan_baseline(BASELINES[name], [facts])
    return plan.total_bytes / plan.num_parameters


_TASKS = {"finetune": "Fine-tuning an encoder (MiniLM-L6, reviews)", "pretrain": "From scratch (Llama of 3.3 M, text)"}
_RATED = {
    "ldadam": "ldadam:rank=16",
    "microadam": "microadam",
    "8-bit AdamW": "adamw_8bit",
    "GaLore": "galore:rank=16",
    "APOLLO": "apollo:rank=16",
}


def learning_rate_table(results: Path) -> str:
    """Return the best rate of those tried for each optimizer and task, and how many times AdamW's that is."""
    cells = []
    for task, title in _TASKS.items():
        run = load_run(results / f"convergence_{task}.json")
        best = _best_rates(run.rows)
        row = [title, run.settings["steps"], _rate(best["adamw"])]
        for entry in _RATED.values():
            row.append(f"**{_rate(best[entry])}** (× {best[entry] / best['adamw']:g})" if entry in best else None)
        cells.append(row)
    return markdown_table(["task", "steps", "AdamW", *(f"`{n}`" if n in OPTIMIZERS else n for n in _RATED)], cells)


def _best_rates(rows: Sequence[Row]) -> Mapping[str, float]:
    """Return by entry the rate of least loss on the validation set."""
    best: dict[str, tuple[float, float]] = {}
    for (entry, rate), runs in by_entry(rows, "validation").items():
        best[entry] = min(best.get(entry, (float("inf"), rate)), (runs[0]["held_out_loss"], rate))
    return {entry: rate for entry, (_, rate) in best.items()}


def _rate(rate: float) -> str:
    """Return a rate as it is typed: 2.5e-4."""
    digits, power = f"{rate:.3e}".split("e")
    return f"{float(digits):g}e{int(power)}"


_FITTED = ("llama-3.2-3b", "mistral-7b", "llama-3.1-8b")
_BATCH: dict[str, Any] = {"seq_len": 2048, "batch_size": 1, "checkpointing": True}


def fit_table(_: Path) -> str:
    """Return what full fine-tuning of some models takes as planned, and LoRA with AdamW beside it."""
    theirs, ours, eight = ["adamw_torch_fused", "adamw_8bit"], ["ldadam", "ldadam_layerwise"], "dense_state=8bit"
    cells = []
    for model in _FITTED:
        plans = [
            plan_memory(model, [*theirs, *ours], optim_args=eight, options=ModelOptions(**_BATCH)),
            plan_memory(model, theirs[:1], options=ModelOptions(lora="r=16,target=all-linear", **_BATCH)),
        ]
        totals = [plan.total_bytes(row) for plan in plans for row in plan.optimizers]
        cells.append([f"`{model}`", *(None if total is None else f"{total / 2**30:.1f}" for total in totals)])
    names = [*(f"`{name}`" for name in theirs), *(f"`{name}`, {eight}" for name in ours), "LoRA r=16, AdamW"]
    return markdown_table(["model", *names], cells)


def option_table(options: type[Options], _: Path) -> str:
    """Return what a class of options adds to what all methods have, or changes of it."""
    common = {} if options is Options else {field.name: field.default for field in dataclasses.fields(Options)}
    cells = []
    for field in dataclasses.fields(options):
        if common.get(field.name, dataclasses.MISSING) != field.default:
            cells.append(
                [f"`{field.name}`", f"`{field.default!r}`", _allowed(options, field), _plain(field.metadata["help"])]
            )
    return markdown_table(["option", "default", "allowed", "what it is"], cells)


def _plain(text: str) -> str:
    """Return a help without the roles of docstrings; a bar would end the cell."""
    return re.sub(r":\w+:`~?(?:\w+\.)*(\w+)`", r"`\1`", text).replace("|", r"\|")


def _allowed(options: type[Options], field: dataclasses.Field[object]) -> str:
    """Return the values that an option may have, in words."""
    kind = options.types()[field.name]
    kinds = [each for each in get_args(kind) or (kind,) if each is not type(None)]
    within, none = field.metadata["within"], field.metadata["none"]
    words = [within.text if within else "True, False" if kinds == [bool] else ", ".join(f"`{k!r}`" for k in kinds)]
    if none:
        words.append(f"`None`: {none}")
    if field.metadata["shapes_state"]:
        words.append("fixed for a run")
    return "; ".join(words).replace("|", r"\|")
