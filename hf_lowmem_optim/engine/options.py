"""Hyper-parameters, declared once: type, default, range, help, and whether the shape of the state depends on them.

A method declares its own in a frozen dataclass derived from :class:`Options`. The constructor's signature and checks,
``optim_args``, ``overrides``, the command line's ``list`` and the comparison on resume all read that declaration.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import numpy as np
from torch import Tensor

from hf_lowmem_optim.words import check_type, nearest, shown

__all__ = [
    "COUNT",
    "FRACTION",
    "NOT_NEGATIVE",
    "POSITIVE",
    "UNIT",
    "DenseState",
    "Options",
    "Range",
    "WeightRounding",
    "as_plain",
    "check_number",
    "count_up_to",
    "nearest",
    "option",
    "shown",
]

DenseState = Literal["param", "fp32", "8bit"]
WeightRounding = Literal["nearest", "stochastic", "compensated"]

_O = TypeVar("_O", bound="Options")


@dataclass(frozen=True)
class Range:
    """The values that a number may have.

    Attributes:
        text: In words, with the type: ``"a float ≥ 0"``.
        contains: Tells whether a finite number is one of them.
    """

    text: str
    contains: Callable[[float], bool]


NOT_NEGATIVE = Range("a float ≥ 0", lambda x: x >= 0)
POSITIVE = Range("a float > 0", lambda x: x > 0)
UNIT = Range("a float in [0, 1)", lambda x: 0 <= x < 1)
FRACTION = Range("a float in (0, 1]", lambda x: 0 < x <= 1)
COUNT = Range("an int ≥ 1", lambda x: x >= 1)


def count_up_to(maximum: int) -> Range:
    """Return the range of the ints from 1 to ``maximum``."""
    return Range(f"an int from 1 to {maximum}", lambda x: 1 <= x <= maximum)


def option(
    default: Any, help: str, *, within: Range | None = None, none: str | None = None, shapes_state: bool = False
) -> Any:
    """Declare a hyper-parameter: the field of an :class:`Options` dataclass, whose annotation is its type.

    Args:
        default: Its default.
        help: What it is, in a sentence or two.
        within: The numbers allowed, for a number or a tuple of numbers. A ``Literal`` and ``bool`` need none.
        none: What ``None`` means, if that is allowed as well.
        shapes_state: Whether the shape or the dtype of the state depends on it: it is then fixed for a run.
    """
    metadata = {"help": help, "within": within, "none": none, "shapes_state": shapes_state}
    return dataclasses.field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Options:
    """What every method has; its checks run whenever an instance is made.

    Raises:
        TypeError: A value has the wrong type.
        ValueError: A value is out of range, or contradicts another one.
    """

    lr: float = option(1e-3, "Learning rate.", within=NOT_NEGATIVE)
    betas: tuple[float, float] = option((0.9, 0.999), "Decay rates of the moments, each in [0, 1).", within=UNIT)
    eps: float = option(1e-8, "Added to the root of the second moment.", within=POSITIVE)
    weight_decay: float = option(0.0, "Decoupled weight decay.", within=NOT_NEGATIVE)
    dense_state: DenseState = option(
        "param",
        "Storage of AdamW's moments where the dense rule applies: ``\"param\"`` (the parameter's dtype, as in torch), "
        '``"fp32"``, or ``"8bit"``, bitsandbytes\' blockwise quantization (the extra ``bitsandbytes``).',
        shapes_state=True,
    )
    weight_rounding: WeightRounding = option(
        "nearest",
        'How updated bfloat16 and float16 weights are rounded: ``"nearest"``; ``"stochastic"``, which keeps updates '
        "too small for the weight's dtype in the mean, seeded by step and parameter; or "
        '``"compensated"``, to nearest, with a correction of 8 bits in the state, one byte a parameter, so that '
        "updates apply to weights of 24 bits.",
    )
    stacked: bool = option(
        False,
        "Compress a parameter of three dimensions as a stack of matrices, each by itself, one for every entry of the "
        "first dimension (experts), instead of as the matrix (out, rest).",
        shapes_state=True,
    )

    @property
    def dense_lr(self) -> float:
        """The learning rate of AdamW where the dense rule applies; a method whose own rates are others overrides it."""
        return self.lr

    def __init_subclass__(cls) -> None:
        """Note the names, so that an option of one method in a group of another is recognized."""
        super().__init_subclass__()
        _KNOWN_NAMES.update(cls.__annotations__)

    def __post_init__(self) -> None:
        """Check every value by itself, and then together."""
        types = self.types()
        for field in dataclasses.fields(self):
            _check(field.name, getattr(self, field.name), types[field.name], field.metadata)
        self.check()

    def check(self) -> None:
        """Check what depends on several values; a method with such rules overrides this."""

    def is_stack(self, shape: Sequence[int]) -> bool:
        """Return whether a tensor of this shape is compressed as a stack of matrices."""
        return self.stacked and len(shape) == 3

    @classmethod
    @functools.cache
    def types(cls) -> Mapping[str, Any]:
        """Return the annotated type of every option."""
        hints = get_type_hints(cls)
        return MappingProxyType({field.name: hints[field.name] for field in dataclasses.fields(cls)})

    @classmethod
    @functools.cache
    def defaults(cls) -> Mapping[str, Any]:
        """Return every option with its default."""
        return MappingProxyType({field.name: field.default for field in dataclasses.fields(cls)})

    @classmethod
    @functools.cache
    def shaping(cls) -> tuple[str, ...]:
        """Return the options on which the shape of the state depends."""
        return tuple(field.name for field in dataclasses.fields(cls) if field.metadata["shapes_state"])

    @classmethod
    def help(cls) -> dict[str, str]:
        """Return what every option is, with its range."""
        texts = {}
        for field in dataclasses.fields(cls):
            text, within, none = (field.metadata[key] for key in ("help", "within", "none"))
            said = [within.text] if within is not None and field.name != "betas" else []
            said += [f"None: {none}"] if none is not None else []
            texts[field.name] = f"{text} ({'; '.join(said)})" if said else text
        return texts

    @classmethod
    def of(cls: type[_O], values: Mapping[str, Any], owner: str) -> _O:
        """Make options from values by name; what is missing has its default.

        Args:
            values: The values; numpy's scalars become Python's numbers.
            owner: Whose options they are, for the error.

        Raises:
            TypeError: A name is unknown or a value has the wrong type.
            ValueError: A value is out of range.
        """
        known = cls.defaults()
        for key in values:
            if key not in known:
                raise TypeError(
                    f"{owner} has no argument {shown(key)}{nearest(key, known)} (it has: {', '.join(known)})"
                )
        return cls(**{key: as_plain(value) for key, value in values.items()})


#: Names of all options of all methods.
_KNOWN_NAMES: set[str] = set(Options.__annotations__)


def check_group_keys(group: Mapping[str, Any], own: Iterable[str], owner: str) -> None:
    """Raise TypeError for keys of a parameter group that are options of another method, or misspelt ones of this one.

    What torch or another library adds to a group (``initial_lr``, ``param_names``, ``differentiable``) passes.
    """
    own = set(own)
    of_sam = {"rho"} if {"rho", "adaptive"} <= group.keys() else set()
    if of_sam & own:
        raise TypeError(
            f"a parameter group has the keys 'rho' and 'adaptive', which are SAM's: {owner} has an option rho as well, "
            "and would take SAM's radius for it. Use SAM with another optimizer"
        )
    for key in group:
        # schedulers keep max_lr, base_momentum and the like beside the option itself
        if key in own or key in of_sam or key == "params" or key.endswith(tuple(f"_{name}" for name in own)):
            continue
        hint = nearest(key, own, cutoff=0.75)
        if hint:
            raise TypeError(f"a parameter group has the unknown key {key!r}{hint}")
        if key in _KNOWN_NAMES:
            raise TypeError(
                f"a parameter group has the key {key!r}, which is an option of another method; {owner} has: "
                f"{', '.join(sorted(own))}"
            )


def as_plain(value: Any, *, tensors: bool = True) -> Any:
    """Return a numpy scalar as a Python number: it could be saved, but not loaded with ``weights_only=True``.

    Args:
        value: A value of an option, or several in a tuple or list; no option is nested deeper.
        tensors: Whether tensors of one entry become numbers as well.
    """
    if isinstance(value, (tuple, list)):
        return tuple([_number(each, tensors) for each in value])
    return _number(value, tensors)


def _number(value: Any, tensors: bool) -> Any:
    is_number = isinstance(value, np.generic) or (tensors and isinstance(value, Tensor) and value.numel() == 1)
    return value.item() if is_number else value


def _check(name: str, value: Any, kind: Any, metadata: Mapping[str, Any]) -> None:
    """Raise TypeError or ValueError, naming argument, value and what is right, if a value is none of those allowed."""
    if get_origin(kind) is Literal:
        choices = get_args(kind)
        if isinstance(value, bool) or value not in choices:
            hint = nearest(value, map(str, choices)) if isinstance(value, str) else ""
            raise ValueError(f"{name}={shown(value)} is not one of {', '.join(map(repr, choices))}{hint}")
    elif kind is bool:
        check_type(name, value, bool, "True or False")
    elif get_origin(kind) is tuple:
        if isinstance(value, str) or not isinstance(value, Sequence) or len(value) != len(get_args(kind)):
            raise TypeError(f"{name}={shown(value)} must be two floats in [0, 1), for example betas=(0.9, 0.99)")
        for index, number in enumerate(value):
            check_number(f"{name}[{index}]", number, metadata["within"])
    elif not (value is None and metadata["none"] is not None):
        check_number(name, value, metadata["within"], metadata["none"])


def check_number(name: str, value: Any, within: Range, none: str | None = None) -> None:
    """Raise TypeError or ValueError, naming argument, value and what is right, for a number that is not allowed."""
    expected = within.text if none is None else f"{within.text}, or None ({none})"
    kinds = (int,) if within.text.startswith("an int") else (int, float)
    if isinstance(value, Tensor) and value.numel() != 1:
        raise ValueError(f"Tensor {name} must be 1-element; it has the shape {tuple(value.shape)}")
    if isinstance(value, bool) or not isinstance(value, kinds):
        raise TypeError(f"{name}={shown(value)} is a {type(value).__name__}; it must be {expected}")
    if not isinstance(value, int) and not math.isfinite(value):
        raise ValueError(f"{name}={shown(value)} is not finite; it must be {expected}")
    if not within.contains(value) or value >= 2**63:  # which no tensor can have, nor a float64 exactly
        raise ValueError(f"{name}={shown(value)} is out of range; it must be {expected}")
