"""``plan_memory``: what training a model takes with each optimizer, before anything is loaded.

For an optimizer of this package the factory builds the very optimizer that training would use, on a model without
weights, and its state is summed from the specs that it would allocate from.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from hf_lowmem_optim.engine.method import Method
from hf_lowmem_optim.engine.options import nearest, shown
from hf_lowmem_optim.engine.sharding.traffic import StepTraffic, step_traffic
from hf_lowmem_optim.memory.baselines import BASELINES, ParameterFacts, plan_baseline
from hf_lowmem_optim.memory.budget import BudgetSearch
from hf_lowmem_optim.memory.byte_sizes import format_bytes, parse_bytes
from hf_lowmem_optim.memory.plan import Groups, compressed_bytes_per_parameter, plan_groups, plan_temporaries
from hf_lowmem_optim.memory.plan_types import MemoryPlan, OptimizerPlan, Suggestion
from hf_lowmem_optim.memory.weights import Processes, WeightReport, plan_weights
from hf_lowmem_optim.registry import OPTIMIZERS, get_entry
from hf_lowmem_optim.trainer.factory import OptimizerFactory
from hf_lowmem_optim.trainer.model_source import ModelOptions, Source, open_model
from hf_lowmem_optim.trainer.optim_args import hyperparameters_from_text
from hf_lowmem_optim.trainer.param_groups import COMPRESSED, EMBEDDING, TargetModules, place_parameters

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
    names, processes = _optimizer_names(optim, optim_args), Processes(gpus, sharding)
    request = _Request(model, names, optim_args, target_modules, options or ModelOptions(), processes, len(names) == 1)
    return request.plan() if budget is None else request.plan_within(parse_bytes(budget))


def _optimizer_names(optim: str | Sequence[str] | None, optim_args: str | None) -> list[str]:
    """Return the optimizers to plan for."""
    known = [*OPTIMIZERS, *BASELINES]
    if optim is None:
        if optim_args:
            raise ValueError(f"optim_args={shown(optim_args)} needs optim: say which optimizer they are for")
        return known
    names = [optim] if isinstance(optim, str) else list(optim)
    for name in names:
        if name not in known:
            raise ValueError(f"optim={shown(name)} cannot be planned{nearest(str(name), known)} ({', '.join(known)})")
        if optim_args and name in BASELINES:
            raise ValueError(
                f"optim_args={shown(optim_args)} cannot be given for {name}, a reference with fixed settings"
            )
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
        registered = OPTIMIZERS.keys() & self.names
        groups = [] if registered == set(self.names) else _reference_groups(opened.model, self.target_modules)
        rows = [
            self._registered(name, opened.model, weights, left, searches)
            if name in registered
            else self._reference(name, groups)
            for name in self.names
        ]
        plan = MemoryPlan(opened.source, opened.description, self.processes, weights, tuple(rows), budget)
        if budget is None:
            return plan
        return replace(plan, suggestions=tuple(_setting_suggestions(plan, searches, self.optim_args)))

    def plan_within(self, budget: int) -> MemoryPlan:
        """Plan, and find what to change where the budget is not met; ValueError if nothing that was looked at fits."""
        plan = self.plan(budget)
        if any(plan.fits(row) for row in plan.optimizers) or any(s.fits for s in plan.suggestions):
            return plan
        alone = plan.weights.total_bytes
        sizes = [(plan.total_bytes(row) or 0, row.name) for row in plan.optimizers if row.state and not row.problem]
        sizes += [(s.total_bytes, s.change) for s in plan.suggestions]
        least, with_what = min(sizes, default=(alone, "weights and gradients alone"))
        lines = [
            f"budget={format_bytes(budget)}: nothing fits. The least for {plan.source} ({plan.description}) is "
            f"{format_bytes(least)} with {with_what}; weights and gradients alone take {format_bytes(alone)}"
        ]
        remedies = sorted(self._model_suggestions(plan, budget), key=lambda s: (not s.fits, -s.total_bytes * s.fits))
        for s in remedies:
            lines.append(f"  {'fits' if s.fits else 'not yet'}: {format_bytes(s.total_bytes)}  {s.change}")
        raise ValueError("\n".join(lines))

    def _registered(
        self, name: str, model: nn.Module, weights: WeightReport, left: int | None, searches: dict[str, BudgetSearch]
    ) -> OptimizerPlan:
        """Plan one of our optimizers, built as training builds it; ``left`` is the budget less the weights."""
        entry, hyper = get_entry(name), hyperparameters_from_text(self.optim_args, get_entry(name).optimizer_class)
        row = OptimizerPlan(name, True, entry.summary, {}, None)
        try:
            optimizer, _ = OptimizerFactory(name, self.target_modules, **hyper).build(model)
        except ValueError as error:
            if self.strict:
                raise
            return replace(row, problem=str(error))
        groups, shards, method = optimizer.param_groups, self.processes.num_shards, optimizer.method
        # in layer-wise mode one gradient exists at once
        largest = max(param.nbytes for group in groups for param in group["params"])
        gradient_bytes = {"largest gradient": largest} if method.layerwise and shards == 1 else None
        allowed = None if left is None else left - sum((gradient_bytes or weights.gradient_bytes).values())
        search = BudgetSearch(type(optimizer), groups, shards, self.processes.gpus)
        problem = None
        single = next(filter(None, (method.needs_one_process(group, sharded=shards > 1) for group in groups)), None)
        if self.processes.gpus > 1 and single is not None:
            problem = f"{single}: it trains in one process"
        if problem is None and allowed is not None:
            searches[name] = search
        return replace(
            row,
            settings=method.settings(optimizer.defaults),
            state=plan_groups(type(optimizer), groups, num_shards=shards),
            temporary_bytes=plan_temporaries(type(optimizer), groups, num_shards=shards),
            compressed_bytes_per_parameter=compressed_bytes_per_parameter(type(optimizer), groups),
            problem=problem,
            largest={} if problem or allowed is None else search.largest(allowed),
            gradient_bytes=gradient_bytes,
            traffic=_traffic(method, groups, shards) if shards > 1 and problem is None else None,
        )

    def _reference(self, name: str, groups: list[list[ParameterFacts]]) -> OptimizerPlan:
        """Plan an optimizer that is not ours."""
        reference, shards = BASELINES[name], self.processes.num_shards
        state, temporary_bytes = plan_baseline(reference, groups, num_shards=shards), None
        if reference.temporaries is not None:
            temporary_bytes = -(-reference.temporaries([facts for group in groups for facts in group]) // shards)
        return OptimizerPlan(name, False, reference.summary, {}, state, temporary_bytes)

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
            totals = [(changed.total_bytes(row), row.name) for row in changed.optimizers if row.problem is None]
            known = [(total, name) for total, name in totals if total is not None]
            if known:
                least, best = min(known, key=lambda pair: pair[0])
                yield Suggestion(f"{change} (with {best})", least, least <= budget)


def _traffic(method: Method, groups: Groups, num_shards: int) -> StepTraffic:
    """Return what a step sends; in layer-wise mode each tensor has calls of its own."""
    traffic = step_traffic(method, groups, num_shards)
    if not method.layerwise:
        return traffic
    alone = [[{**group, "params": [param]}] for group in groups for param in group["params"]]
    return replace(traffic, calls=sum(step_traffic(method, each, num_shards).calls for each in alone))


def _reference_groups(model: nn.Module, target_modules: TargetModules) -> list[list[ParameterFacts]]:
    """Return the parameters in the groups of the Trainer's own optimizers: decaying or not."""
    facts: dict[bool, list[ParameterFacts]] = {True: [], False: []}
    for p in place_parameters(model, target_modules, lambda parameter, settings: COMPRESSED):
        shape, dtype = tuple(p.parameter.shape), p.parameter.dtype
        facts[p.decays].append(ParameterFacts(shape, dtype, p.targeted, p.rule == EMBEDDING))
    return [group for group in facts.values() if group]


def _setting_suggestions(
    plan: MemoryPlan, searches: dict[str, BudgetSearch], optim_args: str | None
) -> Iterator[Suggestion]:
    """Find for each optimizer that does not fit the least change of settings that does, else the smallest."""
    for row in plan.optimizers:
        if row.name not in searches or plan.fits(row):
            continue
        found = []
        for changes, size in searches[row.name].smaller():
            total = plan.held_bytes(row) + size
            fits = total <= (plan.budget_bytes or 0)
            found.append(Suggestion(_as_arguments(row.name, changes, optim_args), total, fits))
        # the first that fits, else the smallest
        yield from sorted(found, key=lambda s: 0 if s.fits else s.total_bytes)[:1]


def _as_arguments(name: str, changes: dict[str, Any], optim_args: str | None) -> str:
    """Write a change of settings, beside those that were given, as on the command line."""
    given = dict(entry.split("=") for entry in (optim_args or "").replace(" ", "").split(",") if entry)
    settings = {**given, **changes}
    return f"--optim {name} --optim-args {','.join(f'{key}={value}' for key, value in settings.items())}"
