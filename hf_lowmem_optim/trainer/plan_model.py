"""``plan_memory``: what training a model takes with each optimizer, before anything is loaded.

For an optimizer of this package the factory builds the very optimizer that training would use, on a model without
weights, and its state is summed from the specs that it would allocate from.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from types import NoneType
from typing import Any

from torch import nn

from hf_lowmem_optim.engine.method import Method
from hf_lowmem_optim.engine.options import nearest, shown
from hf_lowmem_optim.engine.sharding.traffic import StepTraffic, step_traffic
from hf_lowmem_optim.engine.workers import WorkerOptimizer, sync_bytes
from hf_lowmem_optim.memory.baselines import BASELINES, ParameterFacts, plan_baseline
from hf_lowmem_optim.memory.budget import COSTS, BudgetSearch
from hf_lowmem_optim.memory.byte_sizes import parse_bytes, parse_reserve
from hf_lowmem_optim.memory.communication import SyncTraffic
from hf_lowmem_optim.memory.plan import Groups, compressed_bytes_per_parameter, plan_groups, plan_temporaries
from hf_lowmem_optim.memory.plan_types import MemoryPlan, OptimizerPlan, Suggestion
from hf_lowmem_optim.memory.weights import Processes, plan_weights
from hf_lowmem_optim.registry import OPTIMIZERS, get_entry
from hf_lowmem_optim.trainer.factory import OptimizerFactory
from hf_lowmem_optim.trainer.model_source import ModelOptions, OpenedModel, Source, open_model
from hf_lowmem_optim.trainer.optim_args import hyperparameters_from_text, split_optim_args
from hf_lowmem_optim.trainer.param_groups import COMPRESSED, EMBEDDING, TargetModules, place_parameters
from hf_lowmem_optim.words import check_type

__all__ = ["plan_memory", "reference_groups", "shown_on_terminal"]

#: With more optimizers a plan has only the suggestions that fit, and this many.
_FEW, _MOST_SUGGESTIONS = 3, 6
_ORDER = list(COSTS)


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
    reserve: str | int | None = None,
) -> MemoryPlan:
    """Plan the memory of a training run: weights, gradients, optimizer state and what ``step()`` allocates.

    Activations depend on the batch: they are estimated where ``options`` has a ``seq_len``, else left out. What a step
    allocates is that of a GPU, or of the device that a live model is on.

    Args:
        model: A preset (``"llama-2-7b"``) or its id on the hub, a model directory, a ``config.json``, a configuration,
            or a live model with its adapters and frozen parts.
        optim: Optimizers of this package, or references (``"adamw_8bit"``); all by default.
        optim_args: Hyper-parameters for them, ``"rank=32"``, as in ``TrainingArguments.optim_args``; needs ``optim``.
            Each optimizer gets those that it knows.
        target_modules: What is compressed, as in ``TrainingArguments.optim_target_modules``.
        options: Dtype, LoRA, frozen parts, quantization and batch of a model that is not live.
        gpus: Number of processes, a GPU each; all figures are for one of them.
        sharding: ``"ddp"`` or ``"fsdp"``.
        budget: Bytes that one process may take, ``"24GiB"``. The plan then says what fits, and what to change where
            nothing does (``anything_fits`` is False): first what costs no quality.
        reserve: What of the budget stays free for what is not counted; by default a tenth, at least 1 GiB; 0 for none.

    Returns:
        The plan; ``print`` gives a table.

    Raises:
        FileNotFoundError: A path does not exist.
        TypeError: An argument has the wrong type.
        ValueError: An argument is wrong for this model.

    Example:
        >>> plan = plan_memory("llama-2-7b", "ldadam", optim_args="rank=32", budget="48GiB")
        >>> plan["ldadam"].state.total_bytes
    """
    check_type("optim", optim, (str, Sequence, NoneType), "a name or a list of names")
    check_type("optim_args", optim_args, (str, NoneType), "text such as 'rank=32'")
    check_type("options", options, (ModelOptions, NoneType), "ModelOptions(...)")
    names, processes = _optimizer_names(optim, optim_args), Processes(gpus, sharding)
    request = _Request(model, names, optim_args, target_modules, options or ModelOptions(), processes, len(names) == 1)
    if budget is None:
        if reserve is not None:
            raise ValueError(f"reserve={shown(reserve)} is a part of a budget: give that as well")
        return request.plan()
    allowed = parse_bytes(budget)
    return request.plan_within(allowed, parse_reserve(reserve, allowed))


def _optimizer_names(optim: str | Sequence[str] | None, optim_args: str | None) -> list[str]:
    """Return the optimizers to plan for."""
    known = [*OPTIMIZERS, *BASELINES]
    if optim is None:
        if optim_args:
            raise ValueError(f"optim_args={shown(optim_args)} needs optim: say which optimizer they are for")
        return known
    names = [optim] if isinstance(optim, str) else list(optim)
    for name in names:
        if name not in known and "," in str(name):
            raise ValueError(
                f"optim={shown(name)} names several optimizers: give a list, on a command line with spaces between them"
            )
        if name not in known:
            raise ValueError(f"optim={shown(name)} cannot be planned{nearest(str(name), known)} ({', '.join(known)})")
    if not names:
        raise ValueError("optim=[] names no optimizer")
    if optim_args and not OPTIMIZERS.keys() & names:
        raise ValueError(
            f"optim_args={shown(optim_args)} cannot be given for {', '.join(names)}: references with fixed settings"
        )
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

    def plan(self) -> MemoryPlan:
        """Plan every optimizer."""
        opened = open_model(self.source, self.options)
        return self._add_optimizers(self._frame(opened), opened, {})

    def plan_within(self, budget: int, reserve: int) -> MemoryPlan:
        """Plan, and find what to change where the budget is not met."""
        opened, searches = open_model(self.source, self.options), dict[str, BudgetSearch]()
        frame = replace(self._frame(opened), budget_bytes=budget, reserve_bytes=reserve)
        plan = self._add_optimizers(frame, opened, searches)
        found = [pair for row in plan.optimizers for pair in self._changes_of_settings(plan, row, opened, searches)]
        if not plan.anything_fits and not any(
            s.fits and _ORDER.index(cost) < _ORDER.index("dtype") for cost, s in found
        ):
            found += self._changes_of_the_model(plan)
            if find_spec("peft") is None:
                plan = replace(plan, notes=(*plan.notes, "Adapters were not tried: LoRA and QLoRA need peft."))
        found.sort(key=lambda pair: _ORDER.index(pair[0]))
        if len(self.names) > _FEW:
            found = [pair for pair in found if pair[1].fits][:_MOST_SUGGESTIONS]
        return replace(plan, suggestions=tuple(suggestion for _, suggestion in found))

    def _frame(self, opened: OpenedModel) -> MemoryPlan:
        """Plan all but the optimizers."""
        weights = plan_weights(opened.model, self.processes, opened.quantized)
        notes = [] if isinstance(self.source, nn.Module) else _notes_on_dtypes(opened.model, self.options)
        _, unknown = split_optim_args(self.optim_args, self._classes())
        notes += [f"{entry} is no option of {', '.join(names)}." for entry, names in unknown.items()]
        frame = MemoryPlan(opened.source, opened.description, self.processes, weights, ())
        if self.options.seq_len is not None:
            from hf_lowmem_optim.trainer.activations import plan_activations

            estimate, note = plan_activations(opened.model, self.options, opened.quantized)
            frame, notes = replace(frame, activation_bytes=estimate), [*notes, note]
        return replace(frame, notes=tuple(notes))

    def _classes(self) -> dict[str, Any]:
        return {name: OPTIMIZERS[name].optimizer_class for name in self.names if name in OPTIMIZERS}

    def _add_optimizers(self, frame: MemoryPlan, opened: OpenedModel, searches: dict[str, BudgetSearch]) -> MemoryPlan:
        registered = OPTIMIZERS.keys() & self.names
        groups = [] if registered == set(self.names) else reference_groups(opened.model, self.target_modules)
        texts, _ = split_optim_args(self.optim_args, self._classes())
        rows = [
            self._registered(name, texts[name], opened.model, frame, searches)
            if name in registered
            else self._reference(name, groups)
            for name in shown_on_terminal(self.names, "planning")
        ]
        return replace(frame, optimizers=tuple(rows))

    def _registered(
        self, name: str, text: str, model: nn.Module, frame: MemoryPlan, searches: dict[str, BudgetSearch]
    ) -> OptimizerPlan:
        """Plan one of our optimizers, built as training builds it."""
        entry = get_entry(name)
        hyper = hyperparameters_from_text(text, entry.optimizer_class)
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
        sharded = self.processes.sharding == "fsdp"
        single = next(filter(None, (method.needs_one_process(group, sharded=sharded) for group in groups)), None)
        instead = "in one process" if method.replicated is None else "under DDP"
        row = replace(
            row,
            settings=method.settings(optimizer.defaults),
            state=plan_groups(type(optimizer), groups, num_shards=shards),
            temporary_bytes=plan_temporaries(type(optimizer), groups, num_shards=shards),
            compressed_bytes_per_parameter=compressed_bytes_per_parameter(type(optimizer), groups),
            problem=f"{single}: it trains {instead}" if self.processes.gpus > 1 and single is not None else None,
            gradient_bytes={"largest gradient": largest} if method.layerwise and shards == 1 else None,
        )
        if row.problem is None and shards > 1:
            row = replace(row, traffic=_traffic(method, groups, shards))
        if row.problem is None and self.processes.gpus > 1 and isinstance(optimizer, WorkerOptimizer):
            sent = sync_bytes(method, groups)
            row = replace(row, sync=SyncTraffic.of(optimizer.sync_every, sent, self.processes.gpus))
        if row.problem is not None or frame.usable_bytes is None:
            return row

        def rebuild(changes: Mapping[str, Any]) -> Groups:
            return OptimizerFactory(name, self.target_modules, **{**hyper, **changes}).build(model)[0].param_groups

        total = partial(frame.sum_up, row)
        searches[name] = BudgetSearch(type(optimizer), groups, shards, self.processes.gpus, total, rebuild)
        return replace(row, largest=searches[name].largest(frame.usable_bytes))

    def _reference(self, name: str, groups: list[list[ParameterFacts]]) -> OptimizerPlan:
        """Plan an optimizer that is not ours."""
        reference, shards = BASELINES[name], self.processes.num_shards
        state, temporary_bytes = plan_baseline(reference, groups, num_shards=shards), None
        if reference.temporaries is not None:
            temporary_bytes = -(-reference.temporaries([facts for group in groups for facts in group]) // shards)
        return OptimizerPlan(name, False, reference.summary, {}, state, temporary_bytes)

    def _changes_of_settings(
        self, plan: MemoryPlan, row: OptimizerPlan, opened: OpenedModel, searches: dict[str, BudgetSearch]
    ) -> Iterator[tuple[str, Suggestion]]:
        """Yield what brings an optimizer that does not fit nearer to the budget: its layer-wise twin, then settings."""
        usable = plan.usable_bytes or 0
        twin = f"{row.name}_layerwise"
        if row.name not in searches or plan.fits(row) or twin in self.names:
            return
        name = row.name
        text = split_optim_args(self.optim_args, self._classes())[0][name]
        if twin in OPTIMIZERS:
            other = replace(self, strict=False)._registered(twin, text, opened.model, plan, searches)
            if other.problem is None and (total := plan.total_bytes(other)) is not None:
                name = twin
                yield "layerwise", _suggest("layerwise", _as_arguments(twin, {}, text), total, usable)
        for rung in searches[name].ladder(usable):
            yield rung.cost, _suggest(rung.cost, _as_arguments(name, rung.changes, text), rung.total_bytes, usable)

    def _changes_of_the_model(self, plan: MemoryPlan) -> Iterator[tuple[str, Suggestion]]:
        """Yield other ways to load, feed or share the model, each with an optimizer that fits, or takes the least."""
        usable = plan.usable_bytes or 0
        options, lora = self.options, self.options.lora or "r=16,target=all-linear"
        changes: list[tuple[str, str, ModelOptions]] = []
        also = ""
        if options.seq_len is not None and not options.checkpointing:
            # it costs no quality, so that all that follows has it, too
            options, also = replace(options, checkpointing=True), "--checkpointing "
            changes.append(("checkpointing", also.strip(), options))
        if options.batch_size > 1:
            changes.append(("batch", f"{also}--batch-size 1", replace(options, batch_size=1)))
        if "float32" in plan.weights.dtypes and not options.lora:
            changes.append(("dtype", f"{also}--dtype bf16", replace(options, dtype="bf16")))
        if find_spec("peft") is not None:
            if not options.lora:
                changes.append(("lora", f"{also}--lora {lora}", replace(options, lora=lora)))
            if not options.quantize:
                smallest = replace(options, lora=lora, quantize="4bit")
                changes.append(("qlora", f"{also}--lora {lora} --quantize 4bit", smallest))
        if not isinstance(self.source, nn.Module):
            for cost, change, other in changes:
                if (best := replace(self, options=other)._best(usable)) is not None:
                    yield cost, _suggest(cost, f"{change} --optim {best[0]}", best[1], usable)
        for gpus in (2, 4, 8):
            if gpus > self.processes.num_shards:
                best = replace(self, options=options, processes=Processes(gpus, "fsdp"))._best(usable)
                if best is not None:
                    change = f"{also}--gpus {gpus} --sharding fsdp --optim {best[0]}"
                    yield "sharding", _suggest("sharding", change, best[1], usable)
                if best is None or best[1] <= usable:
                    break

    def _best(self, usable: int) -> tuple[str, int] | None:
        """Return the first optimizer that fits, else the one that takes the least, and its total; twins come last."""
        ours = [name for name in self.names if name in OPTIMIZERS] or self.names
        names = ours if len(ours) <= _FEW else ["ldadam"]
        twins = [twin for name in names if (twin := f"{name}_layerwise") in OPTIMIZERS]
        plan = replace(self, names=list(dict.fromkeys([*names, *twins])), strict=False).plan()
        totals = [(row.name, plan.total_bytes(row)) for row in plan.optimizers if row.problem is None]
        known = [(name, total) for name, total in totals if total is not None]
        return next((pair for pair in known if pair[1] <= usable), min(known, key=lambda pair: pair[1], default=None))


def shown_on_terminal(names: Sequence[str], verb: str) -> Iterator[str]:
    """Yield names, and say on a terminal which one is being worked on; the line is gone at the end.

    Standard error that is a file, a pipe or a notebook gets nothing.
    """
    terminal, width = sys.stderr.isatty(), 0
    try:
        for number, name in enumerate(names, 1):
            if terminal:
                text = f"{verb} {name} ({number} of {len(names)})"
                print(f"\r{text:<{width}}", end="", file=sys.stderr, flush=True)
                width = len(text)
            yield name
    finally:
        if width:
            print(f"\r{'':<{width}}\r", end="", file=sys.stderr, flush=True)


def _suggest(cost: str, change: str, total: int, usable: int) -> Suggestion:
    return Suggestion(change, COSTS[cost], total, total <= usable)


def _notes_on_dtypes(model: nn.Module, options: ModelOptions) -> list[str]:
    """Return which of two ways to train in bfloat16 the plan is for: the other takes twice or half the bytes."""
    trained = {str(p.dtype).removeprefix("torch.") for p in model.parameters() if p.requires_grad}
    if options.lora or len(trained) != 1:
        return []
    (dtype,) = trained
    if dtype == "float32":
        return [
            "Weights, gradients and state are float32, as with bf16=True in TrainingArguments, which computes in "
            "bfloat16 and stores float32. A model loaded with dtype=torch.bfloat16 takes about half: --dtype bf16."
        ]
    return [
        f"Weights and gradients are {dtype}: load the model with dtype=torch.{dtype}, and give optim_args "
        "weight_rounding=stochastic or compensated where the rate is small. bf16=True in TrainingArguments does not do "
        "that: it keeps float32 weights, which take twice as much (--dtype fp32)."
    ]


def _traffic(method: Method, groups: Groups, num_shards: int) -> StepTraffic:
    """Return what a step sends; in layer-wise mode each tensor has calls of its own."""
    traffic = step_traffic(method, groups, num_shards)
    if not method.layerwise:
        return traffic
    alone = [[{**group, "params": [param]}] for group in groups for param in group["params"]]
    return replace(traffic, calls=sum(step_traffic(method, each, num_shards).calls for each in alone))


def reference_groups(model: nn.Module, target_modules: TargetModules) -> list[list[ParameterFacts]]:
    """Return the parameters in the groups of the Trainer's own optimizers: decaying or not."""
    facts: dict[bool, list[ParameterFacts]] = {True: [], False: []}
    for p in place_parameters(model, target_modules, lambda parameter, settings: COMPRESSED):
        shape, dtype = tuple(p.parameter.shape), p.parameter.dtype
        facts[p.decays].append(ParameterFacts(shape, dtype, p.targeted, p.rule == EMBEDDING))
    return [group for group in facts.values() if group]


def _as_arguments(name: str, changes: Mapping[str, Any], optim_args: str) -> str:
    """Write a change of settings, beside those that were given, as on the command line."""
    given = dict(entry.split("=") for entry in optim_args.replace(" ", "").split(",") if entry)
    settings = ",".join(f"{key}={value}" for key, value in {**given, **changes}.items())
    return f"--optim {name} --optim-args {settings}" if settings else f"--optim {name}"
