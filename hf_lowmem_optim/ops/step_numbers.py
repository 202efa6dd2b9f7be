"""Numbers that change from step to step, in a step that is recorded once and replayed: how they come about.

A CUDA graph repeats a step's launches with the arguments that they had. What changes (the count, the learning rate, and
all that follows from them) is a :class:`Number` while a step is recorded: Python's arithmetic with it builds a formula,
a launch or an operation gets a place on the device that holds its value, and before each replay all formulas are
computed anew, by the same operations on the host, and copied there. A comparison is decided as it is now, and noted: if
it comes out otherwise, the step has to be recorded again.

What can take no such number (``float()``, a factor in an operation of torch) raises TypeError: nothing that changes can
get into a recording unnoticed.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hf_lowmem_optim.ops.constants import to_device

__all__ = ["Formulas", "Number", "argument", "factor", "select", "selected"]

#: 16 bytes apart, as a kernel expects of every address it is compiled for.
_WORDS_APART = 4


class Formulas:
    """All numbers of a step that is recorded.

    Attributes:
        replays: Whether what is computed now is to be replayed, so that values are not written as they come about.
    """

    def __init__(self, device: torch.device, places: int = 1 << 16) -> None:
        """Prepare for so many numbers on the device.

        Args:
            device: Where the step is computed.
            places: Numbers that launches can take; int32 or float32.
        """
        self.replays = False
        self._words = torch.zeros(places, _WORDS_APART, dtype=torch.int32, device=device)
        self._known: dict[tuple[Any, ...], Number] = {}
        self._placed: list[Number] = []
        self._places: dict[Number, Tensor] = {}
        self._decided: dict[Number, bool] = {}

    def read(self, key: Any, function: Callable[[], Any]) -> Number:
        """Return the number that a function reads anew for each replay; the same one for the same key."""
        return self._number(("read", key), function, ())

    def formula(self, function: Callable[..., Any], *args: Any) -> Number:
        """Return a function of numbers; the same one for the same arguments."""
        key = function, *[arg if isinstance(arg, Number) else (type(arg), arg) for arg in args]
        return self._number(key, function, args)

    def decide(self, function: Callable[..., Any], *args: Any) -> bool:
        """Return a truth about numbers as it is now, which must stay so."""
        number = self.formula(function, *args)
        return self._decided.setdefault(number, bool(number.value))

    def _number(self, key: tuple[Any, ...], function: Callable[..., Any], args: tuple[Any, ...]) -> Number:
        number = self._known.get(key)
        if number is None:
            number = self._known[key] = Number(self, function, args)
            number.compute()
        return number

    def renew(self) -> bool:
        """Compute all numbers anew; return whether every comparison comes out as it did."""
        for number in self._known.values():  # each comes after those that it is made of
            number.compute()
        return all(number.value == was for number, was in self._decided.items())

    def write(self) -> None:
        """Copy the values to the device, without waiting for it."""
        if self._placed:
            words = np.zeros((len(self._placed), _WORDS_APART), np.int32)
            words[:, 0] = [_bits(number.value) for number in self._placed]
            self._words[: len(words)].copy_(to_device(torch.from_numpy(words), self._words.device))

    def place(self, number: Number) -> Tensor:
        """Return the place of a number on the device: int32 or float32 [1]."""
        place = self._places.get(number)
        if place is None:
            index = len(self._placed)
            if index == len(self._words):  # a step has a few dozen for each group and count
                raise NotImplementedError(f"more than {index} numbers of a recorded step change from step to step")
            word = self._words[index, :1]
            place = self._places[number] = word if isinstance(number.value, int) else word.view(torch.float32)
            self._placed.append(number)
            if not self.replays:
                place.fill_(number.value)
        return place


def _bits(value: float) -> int:
    return value if isinstance(value, int) else int(np.float32(value).view(np.int32))


class Number:
    """A number of a recorded step: see the head of this file.

    Attributes:
        formulas: Those it is one of.
        value: What it is in the step at hand.
    """

    __slots__ = ("_args", "_function", "formulas", "value")

    def __init__(self, formulas: Formulas, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
        self.formulas, self._function, self._args = formulas, function, args
        self.value: Any = None

    def compute(self) -> None:
        """Find the value for the step at hand, given those of the numbers it is made of."""
        self.value = self._function(*[arg.value if isinstance(arg, Number) else arg for arg in self._args])

    def place(self, kind: type[float] = float) -> Tensor:
        """Return where the device has it as a float or int: float32 or int32 [1]."""
        return self.formulas.place(self.formulas.formula(kind, self))

    def factor(self) -> Tensor:
        """Return it for an operation of torch: float32, without dimensions."""
        return self.place()[0]

    def index(self) -> Tensor:
        """Return it for an operation of torch that takes indices: int64 [1]."""
        return self.place(int).long()

    def table(self, numbers: Sequence[Any]) -> Tensor:
        """Return numbers beside it, float32."""
        return torch.cat([self.formulas.place(self.formulas.formula(float, number)) for number in numbers])

    __hash__ = object.__hash__

    def __repr__(self) -> str:
        return f"a number that changes from step to step (now {self.value!r})"

    def __neg__(self) -> Number:
        return self.formulas.formula(operator.neg, self)

    def __bool__(self) -> bool:
        return self.formulas.decide(operator.truth, self)


def _forward(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda self, *others: self.formulas.formula(function, self, *others)


def _reflected(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda self, other: self.formulas.formula(function, other, self)


def _decided(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda self, other: self.formulas.decide(function, self, other)


for _name in ("add", "sub", "mul", "truediv", "mod", "pow"):
    setattr(Number, f"__{_name}__", _forward(getattr(operator, _name)))
    setattr(Number, f"__r{_name}__", _reflected(getattr(operator, _name)))
for _name in ("lt", "le", "gt", "ge", "eq", "ne"):
    setattr(Number, f"__{_name}__", _decided(getattr(operator, _name)))


def argument(number: Any, kind: type[float] = float) -> Any:
    """Return what a launch takes for a number: itself as a float or int, or the place on the device that has it."""
    return number.place(kind) if isinstance(number, Number) else kind(number)


def factor(number: Any) -> Any:
    """Return what an operation of torch takes for a factor: the number, or a float32 tensor without dimensions."""
    return number.factor() if isinstance(number, Number) else number


def select(tensor: Tensor, dim: int, index: Any) -> Tensor:
    """Return ``tensor.select(dim, index)``, to be read: a copy if the index is a number of a recorded step."""
    if not isinstance(index, Number):
        return tensor.select(dim, index)
    return tensor.index_select(dim, index.index()).squeeze(dim)


@contextmanager
def selected(tensor: Tensor, dim: int, index: Any) -> Iterator[Tensor]:
    """Give ``tensor.select(dim, index)``, to be written as a whole; or what is then copied there."""
    if not isinstance(index, Number):
        yield tensor.select(dim, index)
        return
    part = torch.empty_like(tensor.select(dim, 0), memory_format=torch.contiguous_format)
    yield part
    tensor.index_copy_(dim, index.index(), part.unsqueeze(dim))
