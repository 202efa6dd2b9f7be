"""Settings of single parameters: ``overrides`` by module name, LoRA+'s learning rate for B, that of the dense rule."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from hf_lowmem_optim.engine.optimizer import LowMemoryOptimizer
from hf_lowmem_optim.engine.options import shown
from hf_lowmem_optim.trainer.param_groups import (
    COMPRESSED,
    NOT_WORTH,
    GivenGroup,
    Placement,
    compile_regex,
    matching_modules,
)

__all__ = ["Overrides", "check_overrides", "check_overrides_apply", "own_settings", "scale_dense_rates"]

Overrides = Mapping[str, Mapping[str, Any]]
"""Hyper-parameters by module name, part of a name or regex."""

_OF_DENSE = ("dense_state", "dense_lr_ratio", "betas", "eps")
_DENSE_KEYS = (*_OF_DENSE, "lr", "weight_decay", "clip_tensor_norm", "weight_rounding")
"""Hyper-parameters that the dense rule reads."""


@dataclass(frozen=True)
class OwnSettings:
    """Parameters whose settings are not those of all, by id: their own settings, and the override that matches them."""

    values: dict[int, dict[str, Any]] = field(default_factory=dict)
    entries: dict[int, str] = field(default_factory=dict)
    with_rate: set[int] = field(default_factory=set)  # those whose learning rate an override or a given group sets

    def with_value(self, key: str, off: Any) -> set[int]:
        """Return ids of the parameters to which an override gives ``key`` a value other than ``off``."""
        return {parameter for parameter, values in self.values.items() if values.get(key, off) != off}


def check_overrides(overrides: Any, optimizer_class: type[LowMemoryOptimizer], hyper: Mapping[str, Any]) -> None:
    """Check overrides of hyper-parameters by themselves, before there is a model.

    Raises:
        TypeError: They are no mapping of mappings, or a key or a type is wrong.
        ValueError: An entry is empty or no regex, or a value is out of range.
    """
    if overrides is None:
        return
    if not isinstance(overrides, Mapping):
        raise TypeError(f'overrides={shown(overrides)} must be a dict such as {{"mlp": {{"lr": 1e-3}}}}')
    for entry, values in overrides.items():
        where = f"overrides[{shown(entry)}]"
        if not isinstance(entry, str) or not isinstance(values, Mapping):
            raise TypeError(
                f'{where}={shown(values)}: write a module\'s name and a dict, such as {{"mlp": {{"lr": 1e-3}}}}'
            )
        if not entry or not values:
            raise ValueError(f"{where}={shown(values)} is empty; name a module and what differs for it")
        compile_regex(entry, where)
        try:
            optimizer_class.method.check({**hyper, **values}, optimizer_class.__name__)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{where}: {error}") from error


def own_settings(
    model: nn.Module,
    overrides: Overrides | None,
    lr_ratio: float | None,
    lr: float,
    given: Sequence[GivenGroup] | None = None,
) -> OwnSettings:
    """Find which parameters have settings of their own: of the first override that matches, times LoRA+'s ratio for B.

    Before those come the settings of the group that a parameter was given in.

    Raises:
        ValueError: An entry matches nothing, or nothing that an earlier one does not, or there is no B.
    """
    own = OwnSettings()
    for group in given or ():
        own.values.update((id(parameter), dict(group.settings)) for _, parameter in group.params)
    for entry, values in (overrides or {}).items():
        modules = matching_modules(model, [entry], f"overrides[{shown(entry)}]", lambda m: m.parameters(recurse=False))
        matched = {id(p) for m in modules.values() for p in m.parameters(recurse=False) if p.requires_grad}
        added = matched - own.entries.keys()
        if not added:
            earlier = ", ".join(map(shown, sorted({own.entries[parameter] for parameter in matched})))
            raise ValueError(
                f"overrides[{shown(entry)}] has no effect: the first entry that matches a module holds, and all that "
                f"this one matches are taken by {earlier}; put {shown(entry)} before"
            )
        own.values.update((p, dict(sorted({**own.values.get(p, {}), **values}.items()))) for p in added)
        own.entries.update((parameter, entry) for parameter in added)
    own.with_rate.update(parameter for parameter, values in own.values.items() if "lr" in values)
    if lr_ratio is not None:
        _scale_lora_b(model, own.values, lr_ratio, lr)
    return own


def _scale_lora_b(model: nn.Module, own: dict[int, dict[str, Any]], lr_ratio: float, lr: float) -> None:
    """Multiply the learning rate of LoRA's B matrices, which start at zero.

    Not of ``lora_embedding_B``: peft starts an embedding's adapter with A at zero instead.
    """
    matrices = [p for name, p in model.named_parameters() if p.requires_grad and "lora_B" in name.split(".")]
    if not matrices:
        raise ValueError(
            f"lr_ratio={lr_ratio!r} is for the B matrices of LoRA, but {type(model).__name__} has no trainable lora_B; "
            "leave it out, or add the adapter before the optimizer is made"
        )
    own.update((id(p), _with_rate(own.get(id(p), {}), lr_ratio, lr)) for p in matrices)


def scale_dense_rates(
    placements: Sequence[Placement], own: OwnSettings, ratio: float | None, lr: float
) -> list[Placement]:
    """Multiply the learning rate of what takes the dense rule, except where an override or a given group sets it.

    Raises:
        ValueError: Nothing is compressed, or nothing is left to have another rate.
    """
    if ratio is None:
        return list(placements)
    scaled = [p.rule != COMPRESSED and id(p.parameter) not in own.with_rate for p in placements]
    where = f"dense_lr_ratio={ratio!r} has no effect"
    if not any(scaled):
        raise ValueError(f"{where}: nothing without a rate of its own takes the dense rule; leave it out")
    if all(scaled):
        raise ValueError(
            f"{where}: nothing is compressed: all rates would change alike, so set the learning rate itself"
        )
    return [
        replace(p, settings=_with_rate(p.settings, ratio, lr)) if dense else p
        for p, dense in zip(placements, scaled, strict=True)
    ]


def _with_rate(settings: Mapping[str, Any], ratio: float, lr: float) -> dict[str, Any]:
    return dict(sorted({**settings, "lr": ratio * settings.get("lr", lr)}.items()))


def check_overrides_apply(
    overrides: Overrides | None,
    own: OwnSettings,
    placements: Sequence[Placement],
    optimizer_class: type[LowMemoryOptimizer],
) -> None:
    """Refuse an override that none of the parameters it is for makes use of."""
    for entry, values in (overrides or {}).items():
        concerned = [p for p in placements if own.entries.get(id(p.parameter)) == entry]
        found = next(_without_effect(values, concerned, optimizer_class), None)
        if found is not None:
            key, reason = found
            raise ValueError(f"overrides[{shown(entry)}]: {key}={shown(values[key])} has no effect: {reason}")


def _without_effect(
    values: Mapping[str, Any], concerned: Sequence[Placement], optimizer_class: type[LowMemoryOptimizer]
) -> Iterator[tuple[str, str]]:
    """Yield the keys of an override that nothing it is for makes use of, and why."""
    if values.get("weight_decay") and not any(p.decays for p in concerned):
        yield "weight_decay", "biases and norms do not decay, and nothing else matches"
    if all(p.rule == COMPRESSED for p in concerned):
        only_dense = ("dense_state",) if optimizer_class.method.adam_like else _OF_DENSE
        for key in (key for key in only_dense if key in values):
            yield key, "it is for the dense rule, and all that it matches is compressed"
    if values.get("stacked") and all(p.parameter.ndim != 3 for p in concerned):
        yield "stacked", "nothing that it matches has three dimensions"
    if values.get("weight_rounding") == "stochastic" and all(p.parameter.dtype == torch.float32 for p in concerned):
        yield "weight_rounding", "all weights that it matches are float32"
    if not any(p.targeted or p.rule == NOT_WORTH for p in concerned):
        switch, off = optimizer_class.method.switch
        if values.get(switch, off) != off:
            yield switch, "nothing that it matches is compressed"
        hint = f"; give it a {switch} as well" * (switch not in values)
        for key in (key for key in values if key not in (*_DENSE_KEYS, switch)):
            yield key, f"nothing that it matches is compressed{hint}"
