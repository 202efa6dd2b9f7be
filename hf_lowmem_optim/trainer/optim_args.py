"""From ``TrainingArguments`` to an optimizer's hyper-parameters, strictly.

``optim_args`` is a string, ``"rank=8,error_feedback=none"``. Every key must be one of the optimizer's own arguments
(or ``beta1``, ``beta2``), or the factory's ``lr_ratio`` or ``dense_lr_ratio``, and every value of that argument's type;
nothing is ignored.

Which value wins where two places can set it:

- learning rate and weight decay are ``TrainingArguments.learning_rate`` and ``weight_decay``;
- betas: ``beta1=``/``beta2=`` in ``optim_args``, else ``adam_beta1``/``adam_beta2`` if they differ from the defaults
  of the arguments' class, else the optimizer's own (its paper's) defaults. Those fields come filled with Adam's values,
  so their default says nothing about the user's wish;
- eps: ``adam_epsilon`` if it differs from its default, else the optimizer's own.
"""

from __future__ import annotations

import dataclasses
import logging
import types
from typing import TYPE_CHECKING, Any, Literal, Union, get_args, get_origin

from hf_lowmem_optim.engine.optimizer import LowMemoryOptimizer
from hf_lowmem_optim.engine.options import nearest

if TYPE_CHECKING:
    from transformers import TrainingArguments

__all__ = ["hyperparameters_from_text", "hyperparameters_from_training_args", "parse_optim_args"]

logger = logging.getLogger(__name__)

_FIELDS = {"lr": "learning_rate", "weight_decay": "weight_decay", "eps": "adam_epsilon"}
"""Hyper-parameters that are fields of TrainingArguments, and only that."""

FACTORY_ARGUMENTS: dict[str, Any] = {"lr_ratio": float, "dense_lr_ratio": float}
"""Arguments of ``OptimizerFactory``, of every optimizer therefore, that ``optim_args`` may set as well."""

_BETAS = ("beta1", "beta2")
_BOOLEANS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}


def hyperparameters_from_training_args(
    args: TrainingArguments, optimizer_class: type[LowMemoryOptimizer]
) -> dict[str, Any]:
    """Collect the hyper-parameters that training arguments set for an optimizer.

    Args:
        args: The training arguments; this module's docstring says which value wins.
        optimizer_class: The optimizer.

    Returns:
        Keyword arguments for ``OptimizerFactory``; what is not set is left out.

    Raises:
        ValueError: ``optim_args`` is malformed, or has an unknown, doubled or mistyped entry.
    """
    defaults = optimizer_class.method.options.defaults()
    betas = (_field_if_changed(args, "adam_beta1"), _field_if_changed(args, "adam_beta2"))
    hyper = hyperparameters_from_text(args.optim_args, optimizer_class, betas)
    epsilon = _field_if_changed(args, _FIELDS["eps"])
    if "eps" in defaults and epsilon is not None:
        hyper["eps"] = epsilon
    for owner, field in (("betas", "adam_beta1"), ("betas", "adam_beta2"), ("eps", "adam_epsilon")):
        value = _field_if_changed(args, field)
        if owner not in defaults and value is not None:
            logger.warning("%s has no %s: %s=%r has no effect", optimizer_class.__name__, owner, field, value)
    return {"lr": args.learning_rate, "weight_decay": args.weight_decay, **hyper}


def hyperparameters_from_text(
    text: str | None,
    optimizer_class: type[LowMemoryOptimizer],
    betas: tuple[float | None, float | None] = (None, None),
) -> dict[str, Any]:
    """Collect the hyper-parameters that ``optim_args`` sets, for use with or without training arguments.

    Args:
        text: As in :func:`parse_optim_args`.
        optimizer_class: The optimizer.
        betas: Those that were set elsewhere, None for the optimizer's own; the text wins.

    Returns:
        Keyword arguments for ``OptimizerFactory``; what is not set is left out.

    Raises:
        ValueError: As :func:`parse_optim_args`.
    """
    hyper = parse_optim_args(text, optimizer_class)
    given = [hyper.pop(key, beta) for key, beta in zip(_BETAS, betas, strict=True)]
    own = optimizer_class.method.options.defaults().get("betas")
    if own is not None and given != [None, None]:
        hyper["betas"] = tuple(default if beta is None else beta for beta, default in zip(given, own, strict=True))
    return hyper


def parse_optim_args(text: str | None, optimizer_class: type[LowMemoryOptimizer]) -> dict[str, Any]:
    """Parse ``optim_args``, typed by the signature of the optimizer.

    Args:
        text: For example ``"rank=8, error_feedback=none"``; None and ``""`` are no arguments.
        optimizer_class: The optimizer.

    Returns:
        Values by name; the betas under ``"beta1"`` and ``"beta2"``.

    Raises:
        ValueError: An entry is not ``key=value``, its key is unknown, doubled or belongs to a field of
            TrainingArguments, or its value has another type. The message names entry and remedy.
    """
    allowed = {**optimizer_class.method.options.types(), **FACTORY_ARGUMENTS}
    if "betas" in allowed:
        del allowed["betas"]
        allowed.update(dict.fromkeys(_BETAS, float))
    settable = [key for key in allowed if key not in _FIELDS]
    parsed: dict[str, Any] = {}
    for entry in (text or "").split(",") if (text or "").strip() else []:
        key, separator, value = (part.strip() for part in entry.partition("="))
        where = f"optim_args={text!r}"
        if key == "betas" and "beta1" in allowed:
            raise ValueError(f"{where}: write beta1=…,beta2=… instead of betas=…, commas separate the entries here")
        if not separator or not key or "=" in value:
            raise ValueError(f"{where}: {entry.strip()!r} is not of the form key=value, such as {_example(allowed)}")
        if key in _FIELDS and key in allowed:
            raise ValueError(f"{where}: set {key} with TrainingArguments({_FIELDS[key]}=…), not in optim_args")
        if key not in allowed:
            raise ValueError(
                f"{where}: {optimizer_class.__name__} has no argument {key!r}{nearest(key, settable)} "
                f"(optim_args may set: {', '.join(settable)})"
            )
        if key in parsed:
            raise ValueError(f"{where}: {key!r} is given twice; keep one")
        try:
            parsed[key] = _parse(value, allowed[key])
        except ValueError:
            raise ValueError(f"{where}: {key}={value!r} is not {_describe(allowed[key])}") from None
    return parsed


def _field_if_changed(args: TrainingArguments, name: str) -> Any:
    """Return a field of the arguments, or None where it equals the default of their class."""
    default = next(field.default for field in dataclasses.fields(args) if field.name == name)
    value = getattr(args, name)
    return None if value == default else value


def _example(allowed: dict[str, Any]) -> str:
    """Return an entry that would be right."""
    integers = [key for key, kind in allowed.items() if kind is int or int in get_args(kind)]
    return f"{integers[0]}=8" if integers else "beta1=0.9"


def _parse(value: str, kind: Any) -> Any:
    """Read ``value`` as the annotated type ``kind``; ValueError if it is not one."""
    if get_origin(kind) in (Union, types.UnionType):
        options = get_args(kind)
        if type(None) in options and value.lower() == "none":
            return None
        for option in options:
            if option is not type(None):
                try:
                    return _parse(value, option)
                except ValueError:
                    continue
        raise ValueError(value)
    if kind in (int, float):
        return kind(value)
    choices = _BOOLEANS if kind is bool else {str(choice): choice for choice in get_args(kind)}
    key = value.lower() if kind is bool else value
    if key not in choices:
        raise ValueError(value)
    return choices[key]


def _describe(kind: Any) -> str:
    """Return the annotated type in words."""
    if get_origin(kind) in (Union, types.UnionType):
        return " or ".join("none" if option is type(None) else _describe(option) for option in get_args(kind))
    if get_origin(kind) is Literal:
        return "one of " + ", ".join(map(str, get_args(kind)))
    return {int: "an int", float: "a float", bool: "true or false"}.get(
        kind, f"a value for {kind} (use OptimizerFactory)"
    )
