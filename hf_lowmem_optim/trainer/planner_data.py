"""What the planner's page shows: plans of models for many settings, computed here and only looked up there."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from importlib.resources import files
from importlib.util import find_spec
from typing import Any

from torch import nn

from hf_lowmem_optim.memory.baselines import BASELINES, plan_baseline
from hf_lowmem_optim.memory.learning_rates import FACTORS
from hf_lowmem_optim.memory.measure import StateReport
from hf_lowmem_optim.memory.plan import plan_groups, plan_temporaries
from hf_lowmem_optim.memory.plan_types import PLAN_SCHEMA
from hf_lowmem_optim.memory.weights import Processes, plan_weights
from hf_lowmem_optim.registry import OPTIMIZERS
from hf_lowmem_optim.trainer.factory import OptimizerFactory
from hf_lowmem_optim.trainer.model_source import ModelOptions, OpenedModel, Source, open_model
from hf_lowmem_optim.trainer.optim_args import hyperparameters_from_text
from hf_lowmem_optim.trainer.plan_model import plan_memory, reference_groups

__all__ = ["SETTINGS", "model_data", "page_of", "template_with"]

_SIZES = {
    "ldadam": [f"rank={rank}" for rank in (8, 16, 32, 128)],
    "microadam": [f"window=10,density={density}" for density in (0.01, 0.04)],
    "dct_adamw": ["rank=128"],
    "trion": ["rank=128"],
    "dash": [""],
    "sparse_mfac": ["window=32,density=0.01"],
    "lowrank_mfac": ["window=32,rank=4"],
    "sparse_ggt": ["window=32,density=0.01"],
}
SETTINGS: list[tuple[str, str]] = [
    (name, f"{size},dense_state={dense}".lstrip(","))
    for name, sizes in _SIZES.items()
    for size in sizes
    for dense in (("param", "8bit") if name in ("ldadam", "microadam") else ("param",))
]
SETTINGS += [(name, "") for name in BASELINES]
"""Optimizer and ``optim_args`` of everything that the page can show."""

GPUS = (1, 2, 8)
SEQ_LENS = (512, 2048, 4096)
_LORA = "r=16,target=all-linear"


def model_data(source: Source) -> dict[str, Any]:
    """Return all that the page shows of a model: each way to load it, with its plans and activations."""
    ways = []
    adapters = [("bf16", _LORA, (1,))] if find_spec("peft") is not None else []
    for dtype, lora, gpus in (("bf16", "", GPUS), ("fp32", "", (1,)), *adapters):
        options = ModelOptions(dtype=dtype, lora=lora or None)
        try:
            opened = open_model(source, options)
        except ValueError:
            if lora:  # peft has no adapters for the layers of some models: the page then offers none
                continue
            raise
        way = {"dtype": dtype, "lora": lora, "gpus": _plans(opened, gpus)}
        if lora:
            options = replace(options, quantize="4bit")
            way["quantized"] = dict(plan_memory(source, "adafactor", options=options).weights.weight_bytes)
        else:
            way["activations"] = dict(_activations(source, options))
        ways.append(way)
    opened = open_model(source, ModelOptions())
    return {"source": opened.source, "own": opened.description, "ways": ways}


def _plans(opened: OpenedModel, gpus: tuple[int, ...]) -> dict[str, dict[str, Any]]:
    """Return, by number of GPUs, weights, gradients and, for every setting, step and state by component."""
    found: dict[str, dict[str, Any]] = {}
    for count in gpus:
        weights = plan_weights(opened.model, Processes(count, "fsdp" if count > 1 else "ddp"))
        kinds = {"weights": dict(weights.weight_bytes), "gradients": dict(weights.gradient_bytes)}
        # one gradient at once, in layer-wise mode
        largest = max(p.nbytes for p in opened.model.parameters() if p.requires_grad)
        found[str(count)] = {**kinds, "largest_gradient": largest, "parameters": weights.num_parameters}
        # for each setting what a step allocates, in layer-wise mode too, and the state
        found[str(count)] |= {"layerwise_steps": [], "rows": []}
    for name, text in SETTINGS:
        for count, step, layerwise_step, state in _states(opened.model, name, text, gpus):
            # the keys of other optimizers' states say little
            parts = dict(state.component_bytes) if name in OPTIMIZERS else {"state": state.total_bytes}
            found[str(count)]["rows"].append([step, parts])
            found[str(count)]["layerwise_steps"].append(layerwise_step)
    return found


def _states(
    model: nn.Module, name: str, text: str, gpus: tuple[int, ...]
) -> Iterator[tuple[int, int | None, int | None, StateReport]]:
    """Yield, for each number of GPUs, what a step allocates, what it does in layer-wise mode, and the state."""
    if name in OPTIMIZERS:
        hyper = hyperparameters_from_text(text, OPTIMIZERS[name].optimizer_class)
        optimizer, _ = OptimizerFactory(name, **hyper).build(model)
        kind, groups, twin = type(optimizer), optimizer.param_groups, None
        if name in _layerwise():
            twin, _ = OptimizerFactory(f"{name}_layerwise", **hyper).build(model)
        for count in gpus:
            bound = plan_temporaries(kind, groups, num_shards=count)
            alone = None if twin is None else plan_temporaries(type(twin), twin.param_groups, num_shards=count)
            yield count, bound, alone, plan_groups(kind, groups, num_shards=count)
        return
    facts, baseline = reference_groups(model, None), BASELINES[name]
    every = [each for group in facts for each in group]
    for count in gpus:
        step = None if baseline.temporaries is None else -(-baseline.temporaries(every) // count)
        yield count, step, None, plan_baseline(baseline, facts, num_shards=count)


def _activations(source: Source, options: ModelOptions) -> Iterator[tuple[str, list[int]]]:
    """Yield, by tokens, the estimate without and with gradient checkpointing; nothing where there is none."""
    for seq_len in SEQ_LENS:
        ways = [replace(options, seq_len=seq_len, checkpointing=each) for each in (False, True)]
        try:
            plans = [plan_memory(source, "adafactor", options=way) for way in ways]
        except ValueError:  # no fused attention, or more tokens than positions: the page then offers none
            return
        yield str(seq_len), [plan.activation_bytes or 0 for plan in plans]


def _layerwise() -> list[str]:
    """Return the optimizers whose layer-wise versions the page offers: those with a state for each tensor alone."""
    return [name for name in _SIZES if OPTIMIZERS[name].optimizer_class.method.shared_state is None]


def page_of(models: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the page with the data of some models in it: one file that needs nothing else."""
    components: dict[str, int] = {}
    packed = {name: _packed(model, components) for name, model in models.items()}
    data = {"schema": PLAN_SCHEMA, "components": list(components), "settings": SETTINGS, "models": packed}
    data |= {"ours": list(OPTIMIZERS), "layerwise": _layerwise(), "rates": FACTORS}
    return template_with(json.dumps(data, separators=(",", ":")).replace("<", "\\u003c"))


def template_with(data: str) -> str:
    """Return the page around its data."""
    template = files("hf_lowmem_optim.memory").joinpath("planner_page.html").read_text(encoding="utf-8")
    return template.replace("/*DATA*/null", data)


def _packed(model: Mapping[str, Any], components: dict[str, int]) -> dict[str, Any]:
    """Return a model's data with each row as a list: step, component's number, bytes, component's number, bytes …"""
    ways = []
    for way in model["ways"]:
        gpus = {}
        for count, plans in way["gpus"].items():
            rows = []
            for step, state in plans["rows"]:
                numbered = ((components.setdefault(key, len(components)), size) for key, size in state.items())
                rows.append([step, *(number for pair in numbered for number in pair)])
            gpus[count] = {**plans, "rows": rows}
        ways.append({**way, "gpus": gpus})
    return {**model, "ways": ways}
