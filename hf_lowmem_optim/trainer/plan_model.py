"""``plan_memory``: what training a model takes with each optimizer, before anything is loaded.

For an optimizer of this package the factory builds the very optimizer that training would use, on a model without
weights, and its state is summed from the specs that it would allocate from.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from hf_lowmem_optim.engine.options import nearest
from hf_lowmem_optim.memory.baselines import BASELINES, ParameterFacts, plan_baseline
from hf_lowmem_optim.memory.budget import BudgetSearch
from hf_lowmem_optim.memory.byte_sizes import format_bytes, parse_bytes
from hf_lowmem_optim.memory.plan import compressed_bytes_per_parameter, plan_groups, plan_temporaries
from hf_lowmem_optim.memory.plan_types import MemoryPlan, OptimizerPlan, Suggestion
from hf_lowmem_optim.memory.weights import Processes, WeightReport, plan_weights
from hf_lowmem_optim.registry import OPTIMIZERS, get_entry
from hf_lowmem_optim.trainer.factory import OptimizerFactory
from hf_lowmem_optim.trainer.model_source import ModelOptions, Source, open_model
from hf_lowmem_optim.trainer.optim_args import hyperparameters_from_text
from hf_lowmem_optim.trainer.param_groups import (
    COMPRESSED,
    EMBEDDING,
    TargetModules,
    build_param_groups,
    place_parameters,
)

__all__ = ["plan_memory"]


def plan_memory(
    model: Source,
    optim: str | Sequence[str] | None = None,
    *,
    optim_args: str | None = None,
    target_modules: TargetModules = None,
    options: ModelOptions | None = None,
    gpus: int = 1,
    sharding: str = "ddp",
    budget: str | int | None = None,
) -> MemoryPlan:
    """Plan the memory of a training run: weights, gradients, optimizer state and what ``step()`` allocates.

    Activations are not in it: they depend on the batch. What a step allocates is that of a GPU, or of the device that a
    live model is on.

    Args:
        model: A preset (``"llama-2-7b"``), a model directory, a ``config.json``, a configuration, or a live model with
            its adapters and frozen parts.
        optim: Optimizers of this package, or references (``"adamw_8bit"``); all by default.
        optim_args: Hyper-parameters for them, ``"rank=32"``, as in ``TrainingArguments.optim_args``; needs ``optim``.
        target_modules: What is compressed, as in ``TrainingArguments.optim_target_modules``.
        options: Dtype, LoRA, frozen parts and quantization of a model that is not live.
        gpus: Number of processes, a GPU each; all figures are for one of them.
        sharding: ``"ddp"`` or ``"fsdp"``.
        budget: Bytes that one process may take, ``"24GiB"``.

    Returns:
        The plan.

    Raises:
        FileNotFoundError: A path does not exist.
        TypeError: An argument has the wrong type.
        ValueError: An argument is wrong for this model; or nothing fits into the budget, then the message has the least
            that training takes and what would help.

    Example:
        >>> plan = plan_memory("llama-2-7b", "ldadam", optim_args="rank=32", budget="48GiB")
        >>> plan["ldadam"].state.total_bytes
    """
    names = _optimizer_names(optim, optim_args)
    request = _Request(
        model, names, optim_args, target_modules, options or ModelOptions(), Processes(gpus, sharding), len(names) == 1
    )
    if budget is None:
        return request.plan()
    return request.plan_within(parse_bytes(budget))


def _optimizer_names(optim: str | Sequence[str] | None, optim_args: str | None) -> list[str]:
    """Return the optimizers to plan for."""
    if optim is None:
        if optim_args:
            raise ValueError(f"optim_args={optim_args!r} needs optim: say which optimizer they are for")
        return [*OPTIMIZERS, *BASELINES]
    names = [optim] if isinstance(optim, str) else list(optim)
    known = [*OPTIMIZERS, *BASELINES]
    for name in names:
        if name not in known:
            raise ValueError(f"optim={name!r} cannot be planned{nearest(str(name), known)} ({', '.join(known)})")
        if optim_args and name in BASELINES:
            raise ValueError(f"optim_args={optim_args!r} cannot be given for {name}, a reference with fixed settings")
    if not names:
        raise ValueError("optim=[] names no optimizer")
    return names


@dataclass(frozen=True)
class _Request:
    """What was asked of :func:`plan_memory`."""

    source: Source
    names: list[str]
    optim_args: str | None
    target_modules: TargetModules
    options: ModelOptions
    processes: Processes
    strict: bool
    """Whether an optimizer that cannot be used is an error: it was the only one asked for."""

    def plan(self, budget: int | None = None) -> MemoryPlan:
        """Plan every optimizer."""
        opened = open_model(self.source, self.options)
        weights = plan_weights(opened.model, self.processes, opened.quantized)
        left = None if budget is None else budget - sum(weights.weight_bytes.values())
        searches: dict[str, BudgetSearch] = {}
        rows = []
        for name in self.names:
            if name in OPTIMIZERS:
                rows.append(self._registered(name, opened.model, weights, left, searches))
            else:
                rows.append(self._reference(name, opened.model))
        plan = MemoryPlan(opened.source, opened.description, self.processes, weights, tuple(rows), budget)
        if budget is None:
            return plan
        return replace(plan, suggestions=tuple(_setting_suggestions(plan, searches, self.optim_args)))

    def plan_within(self, budget: int) -> MemoryPlan:
        """Plan, and find what to change where the budget is not met.

        Raises:
            ValueError: Nothing that was looked at fits.
        """
        plan = self.plan(budget)
        if any(plan.fits(row) for row in plan.optimizers) or any(s.fits for s in plan.suggestions):
            return plan
        least = min(
            [
                *((plan.total_bytes(row) or 0, row.name) for row in plan.optimizers if row.state and not row.problem),
                *((s.total_bytes, s.change) for s in plan.suggestions),
            ],
            default=(plan.weights.total_bytes, "weights and gradients alone"),
        )
        message = (
            f"budget={format_bytes(budget)}: nothing fits. The least for {plan.source} ({plan.description}) is "
            f"{format_bytes(least[0])} with {least[1]}; weights and gradients alone take "
            f"{format_bytes(plan.weights.total_bytes)}"
        )
        remedies = sorted(self._model_suggestions(plan, budget), key=lambda s: (not s.fits, -s.total_bytes * s.fits))
        for remedy in remedies:
            message += (
                f"\n  {'fits' if remedy.fits else 'not yet'}: {format_bytes(remedy.total_bytes)}  {remedy.change}"
            )
        raise ValueError(message)

    def _registered(
        self, name: str, model: nn.Module, weights: WeightReport, left: int | None, searches: dict[str, BudgetSearch]
    ) -> OptimizerPlan:
        """Plan one of our optimizers, built as training builds it; ``left`` is the budget less the weights."""
        entry, hyper = get_entry(name), hyperparameters_from_text(self.optim_args, get_entry(name).optimizer_class)
        row = OptimizerPlan(name, True, entry.summary, {}, None)
        try:
            optimizer, placements = OptimizerFactory(name, self.target_modules, **hyper).build(model)
        except ValueError as error:
            if self.strict:
                raise
            return replace(row, problem=str(error))
        groups, shards = optimizer.param_groups, self.processes.num_shards
        gradient_bytes = _one_gradient(groups) if optimizer.method.layerwise else None
        allowed = None if left is None else left - sum((gradient_bytes or weights.gradient_bytes).values())
        search = BudgetSearch(type(optimizer), groups, shards, self.processes.gpus)
        problem = None
        if shards > 1 and any(p.rule == COMPRESSED for p in placements):
            problem = "compressed tensors cannot be sharded yet: the first step under FSDP says so"
        elif shards > 1 and (optimizer.defaults["dense_state"], optimizer.defaults["weight_rounding"]) != _SHARDABLE:
            problem = "dense_state and weight_rounding cannot be sharded: the first step under FSDP says so"
        single = next(filter(None, (optimizer.method.needs_one_process(group) for group in groups)), None)
        if self.processes.gpus > 1 and single is not None:
            problem = f"{single}: it trains in one process"
        if problem is None and allowed is not None:
            searches[name] = search
        return replace(
            row,
            settings={key: optimizer.defaults[key] for key in optimizer.method.shaping},
            state=plan_groups(type(optimizer), groups, num_shards=shards),
            temporary_bytes=plan_temporaries(type(optimizer), groups),
            compressed_bytes_per_parameter=compressed_bytes_per_parameter(type(optimizer), groups),
            problem=problem,
            largest={} if problem or allowed is None else search.largest(allowed),
            gradient_bytes=gradient_bytes,
        )

    def _reference(self, name: str, model: nn.Module) -> OptimizerPlan:
        """Plan an optimizer that is not ours."""
        reference = BASELINES[name]
        groups = _reference_groups(model, self.target_modules)
        everything = [facts for group in groups for facts in group]
        temporaries = reference.temporaries
        return OptimizerPlan(
            name,
            False,
            reference.summary,
            {},
            plan_baseline(reference, groups, num_shards=self.processes.num_shards),
            None if temporaries is None else -(-temporaries(everything) // self.processes.num_shards),
        )

    def _model_suggestions(self, plan: MemoryPlan, budget: int) -> Iterator[Suggestion]:
        """Try other ways to load or share the model, each with the optimizer that takes the least."""
        lora = self.options.lora or "r=16,target=all-linear"
        alternatives: list[tuple[str, ModelOptions, Processes]] = []
        if not isinstance(self.source, nn.Module):
            if "float32" in plan.weights.dtypes and not self.options.lora:
                alternatives.append(("--dtype bf16", replace(self.options, dtype="bf16"), self.processes))
            if not self.options.lora:
                alternatives.append((f"--lora {lora}", replace(self.options, lora=lora), self.processes))
            if not self.options.quantize:
                smallest = replace(self.options, lora=lora, quantize="4bit")
                alternatives.append((f"--lora {lora} --quantize 4bit", smallest, self.processes))
        for gpus in (2, 4, 8):
            if gpus > self.processes.num_shards:
                alternatives.append((f"--gpus {gpus} --sharding fsdp", self.options, Processes(gpus, "fsdp")))
        for change, options, processes in alternatives:
            changed = replace(self, options=options, processes=processes, strict=False).plan()
            totals = {
                row.name: total
                for row in changed.optimizers
                if row.problem is None and (total := changed.total_bytes(row)) is not None
            }
            if totals:
                best = min(totals, key=lambda name: totals[name])
                yield Suggestion(f"{change} (with {best})", totals[best], totals[best] <= budget)


#: Values of ``dense_state`` and ``weight_rounding`` that sharded parameters may have.
_SHARDABLE = ("param", "nearest")


def _one_gradient(groups: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """Return the gradients that exist at once in layer-wise mode: the largest one."""
    sizes = (param.numel() * param.element_size() for group in groups for param in group["params"])
    return {"largest gradient": max(sizes)}


def _reference_groups(model: nn.Module, target_modules: TargetModules) -> list[list[ParameterFacts]]:
    """Return the parameters in the groups of the Trainer's own optimizers: decaying or not."""
    placements = place_parameters(model, target_modules, lambda parameter, settings: COMPRESSED)
    groups = build_param_groups(placements, ("dense", True), 1.0)
    by_parameter = {id(placement.parameter): placement for placement in placements}
    facts: dict[bool, list[ParameterFacts]] = {True: [], False: []}
    for group in groups:
        for _, parameter in group["params"]:
            placement = by_parameter[id(parameter)]
            facts[placement.decays].append(
                ParameterFacts(tuple(parameter.shape), parameter.dtype, placement.targeted, placement.rule == EMBEDDING)
            )
    return [group for group in facts.values() if group]


def _setting_suggestions(
    plan: MemoryPlan, searches: dict[str, BudgetSearch], optim_args: str | None
) -> Iterator[Suggestion]:
    """Find for each optimizer that does not fit the least change of settings that does, else the smallest."""
    for row in plan.optimizers:
        if row.name not in searches or plan.fits(row):
            continue
        found = [
            Suggestion(_as_arguments(row.name, changes, optim_args), plan.held_bytes(row) + size, False)
            for changes, size in searches[row.name].smaller()
        ]
        found = [replace(s, fits=s.total_bytes <= (plan.budget_bytes or 0)) for s in found]
        fitting = [s for s in found if s.fits]
        if fitting:
            yield fitting[0]
        elif found:
            yield min(found, key=lambda s: s.total_bytes)


def _as_arguments(name: str, changes: dict[str, Any], optim_args: str | None) -> str:
    """Write a change of settings, beside those that were given, as on the command line."""
    given = dict(entry.split("=") for entry in (optim_args or "").replace(" ", "").split(",") if entry)
    settings = {**given, **changes}
    return f"--optim {name} --optim-args {','.join(f'{key}={value}' for key, value in settings.items())}"
