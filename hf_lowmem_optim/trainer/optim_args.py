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
import types
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Union, get_args, get_origin

from hf_lowmem_optim.engine.optimizer import LowMemoryOptimizer
from hf_lowmem_optim.engine.options import nearest, shown

if TYPE_CHECKING:
    from transformers import TrainingArguments

__all__ = ["hyperparameters_from_text", "hyperparameters_from_training_args", "parse_optim_args", "split_optim_args"]

_FIELDS = {"lr": "learning_rate", "weight_decay": "weight_decay", "eps": "adam_epsilon"}
"""Hyper-parameters that are fields of TrainingArguments, and only that."""

_BETAS = ("beta1", "beta2")
_MORE = dict.fromkeys(("lr_ratio", "dense_lr_ratio", *_BETAS), float)
"""What ``optim_args`` may set besides the options of the optimizer: arguments of ``OptimizerFactory``, the betas."""

_BOOLEANS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}


def hyperparameters_from_training_args(
    args: TrainingArguments, optimizer_class: type[LowMemoryOptimizer]
) -> dict[str, Any]:
    """Collect the hyper-parameters that training arguments set, as keyword arguments for ``OptimizerFactory``.

    This module's docstring says which value wins.

    Raises:
        ValueError: ``optim_args`` is malformed, or has an unknown, doubled or mistyped entry.
    """
    defaults = {field.name: field.default for field in dataclasses.fields(args)}
    beta1, beta2, eps = (
        None if getattr(args, name) == defaults[name] else getattr(args, name)
        for name in ("adam_beta1", "adam_beta2", "adam_epsilon")
    )
    hyper = hyperparameters_from_text(args.optim_args, optimizer_class, (beta1, beta2))
    if eps is not None:
        hyper["eps"] = eps
    return {"lr": args.learning_rate, "weight_decay": args.weight_decay, **hyper}


def hyperparameters_from_text(
    text: str | None, optimizer_class: type[LowMemoryOptimizer], betas: tuple[float | None, float | None] = (None, None)
) -> dict[str, Any]:
    """Collect the hyper-parameters that ``optim_args`` sets, as keyword arguments for ``OptimizerFactory``.

    Args:
        text: As in :func:`parse_optim_args`, which checks it.
        optimizer_class: The optimizer.
        betas: Those that were set elsewhere, None for the optimizer's own; the text wins.
    """
    hyper = parse_optim_args(text, optimizer_class)
    given = [hyper.pop(key, beta) for key, beta in zip(_BETAS, betas, strict=True)]
    if given != [None, None]:
        own = optimizer_class.method.options.defaults()["betas"]
        hyper["betas"] = tuple(default if beta is None else beta for beta, default in zip(given, own, strict=True))
    return hyper


def split_optim_args(
    text: str | None, classes: Mapping[str, type[LowMemoryOptimizer]]
) -> tuple[dict[str, str], dict[str, list[str]]]:
    """Share ``optim_args`` out to several optimizers: each gets the entries that it knows.

    Returns:
        The text for each; and by entry those that do not know it. An entry that none of them knows goes to all, which
        will refuse it.
    """
    texts, unknown = dict.fromkeys(classes, ""), dict[str, list[str]]()
    for entry in (text or "").split(",") if (text or "").strip() else []:
        key = entry.partition("=")[0].strip()
        knowing = [name for name, each in classes.items() if key in _MORE or key in each.method.options.types()]
        for name in knowing or classes:
            texts[name] += f",{entry}" if texts[name] else entry
        if knowing and len(knowing) < len(classes):
            unknown[entry.strip()] = [name for name in classes if name not in knowing]
    return texts, unknown


def parse_optim_args(text: str | None, optimizer_class: type[LowMemoryOptimizer]) -> dict[str, Any]:
    """Parse ``optim_args``, typed by the options of the optimizer.

    Args:
        text: For example ``"rank=8, error_feedback=none"``; None and ``""`` are no arguments.
        optimizer_class: The optimizer.

    Returns:
        Values by name; the betas under ``"beta1"`` and ``"beta2"``.

    Raises:
        ValueError: An entry is not ``key=value``, its key is unknown, doubled or belongs to a field of
            TrainingArguments, or its value has another type. The message names entry and remedy.
    """
    options = optimizer_class.method.options.types()
    allowed = {key: kind for key, kind in {**options, **_MORE}.items() if key != "betas" and key not in _FIELDS}
    where = f"optim_args={shown(text)}"
    parsed: dict[str, Any] = {}
    for entry in (text or "").split(",") if (text or "").strip() else []:
        key, separator, value = (part.strip() for part in entry.partition("="))
        if key == "betas":
            raise ValueError(f"{where}: write beta1=…,beta2=… instead of betas=…, commas separate the entries here")
        if not separator or not key or "=" in value:
            counts = [key for key, kind in allowed.items() if _without_none(kind) is int]
            example = f"{counts[0]}=8" if counts else "beta1=0.9"
            raise ValueError(f"{where}: {shown(entry.strip())} is not of the form key=value, such as {example}")
        if key in _FIELDS:
            raise ValueError(f"{where}: set {key} with TrainingArguments({_FIELDS[key]}=…), not in optim_args")
        if key not in allowed:
            raise ValueError(
                f"{where}: {optimizer_class.__name__} has no argument {shown(key)}{nearest(key, allowed)} "
                f"(optim_args may set: {', '.join(allowed)})"
            )
        if key in parsed:
            raise ValueError(f"{where}: {key!r} is given twice; keep one")
        try:
            parsed[key] = _parse(value, allowed[key])
        except (ValueError, KeyError):
            raise ValueError(f"{where}: {key}={shown(value)} is not {_describe(allowed[key])}") from None
    return parsed


def _without_none(kind: Any) -> Any:
    """Return ``T`` for the annotation ``T | None``, and any other as it is."""
    if get_origin(kind) not in (Union, types.UnionType):
        return kind
    return next(option for option in get_args(kind) if option is not type(None))


def _parse(value: str, kind: Any) -> Any:
    """Read ``value`` as the annotated type ``kind``; ValueError or KeyError if it is not one."""
    single = _without_none(kind)
    if single is not kind and value.lower() == "none":
        return None
    if single in (int, float):
        return single(value)
    return _BOOLEANS[value.lower()] if single is bool else {str(choice): choice for choice in get_args(single)}[value]


def _describe(kind: Any) -> str:
    """Return the annotated type in words."""
    single = _without_none(kind)
    words = {int: "an int", float: "a float", bool: "true or false"}
    text = words.get(single) or f"one of {', '.join(map(str, get_args(single)))}"
    return text if single is kind else f"{text} or none"
