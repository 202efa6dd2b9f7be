"""Hooks that act on a parameter's gradient when it is complete, in the middle of the backward pass.

A hook lives with its parameter. It knows its owner by a weak reference only, so that neither keeps the other alive, and
goes when the owner goes.
"""

from __future__ import annotations

import logging
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer
from torch.utils.weak import WeakIdKeyDictionary

__all__ = [
    "GradientHooks",
    "is_hooked",
    "refuse_several_processes",
    "sharded_later",
    "take_over",
    "waits_for_shards",
]

logger = logging.getLogger(__name__)

#: The hook of each parameter that has one, and whose it is: two optimizers must not both act on one gradient.
_HOOKED = WeakIdKeyDictionary()


class Owner(Protocol):
    """Whoever wants to be told."""

    def on_gradient(self, param: Tensor) -> None:
        """Act on the gradient of a parameter that autograd has just completed."""


class GradientHooks:
    """The hooks of one optimizer.

    Args:
        optimizer: The optimizer, with which the hooks go.
        owner: Is told of every gradient.
    """

    def __init__(self, optimizer: Optimizer, owner: Owner) -> None:
        self._owner, self._optimizer = weakref.ref(owner), weakref.ref(optimizer)
        self._handles: list[Any] = []
        weakref.finalize(optimizer, _remove_all, self._handles)

    def add(self, parameters: Iterable[Tensor]) -> None:
        """Watch parameters; those that are frozen stay without. Another optimizer's hook is taken off."""
        owner, optimizer = self._owner, self._optimizer()
        assert optimizer is not None
        trained = [parameter for parameter in parameters if parameter.requires_grad]
        take_over(trained, optimizer)

        def call(parameter: Tensor) -> None:
            told = owner()
            if told is not None:
                with torch.no_grad():
                    told.on_gradient(parameter)

        for parameter in trained:
            if not is_hooked(parameter):
                handle = parameter.register_post_accumulate_grad_hook(call)  # type: ignore[no-untyped-call]
                _HOOKED[parameter] = handle, self._optimizer
                self._handles.append(handle)

    def __bool__(self) -> bool:
        """Return whether there are hooks that :meth:`remove` has not taken off."""
        return bool(self._handles)

    def remove(self) -> None:
        """Take the hooks off."""
        _remove_all(self._handles)


def is_hooked(parameter: Tensor) -> bool:
    """Return whether an optimizer watches a parameter."""
    if parameter not in _HOOKED:
        return False
    handle, _ = _HOOKED[parameter]
    hooks = handle.hooks_dict_ref()
    return hooks is not None and handle.id in hooks


def take_over(parameters: Iterable[Tensor], optimizer: Optimizer) -> None:
    """Take the hooks of other optimizers off: from now on only ``optimizer`` acts on the gradients."""
    others: Counter[str] = Counter()
    for parameter in parameters:
        if is_hooked(parameter) and _HOOKED[parameter][1]() is not optimizer:
            handle, other = _HOOKED[parameter]
            handle.remove()
            others[type(other()).__name__] += 1
    for name, count in others.items():
        logger.warning(
            "%d parameters had hooks of another optimizer that is still there (%s); from now on only this %s acts on "
            "their gradients",
            *(count, name, type(optimizer).__name__),
        )


def _remove_all(handles: list[Any]) -> None:
    for handle in handles:
        handle.remove()
    handles.clear()


def refuse_several_processes(what: str, instead: str, parameters: Iterable[Tensor]) -> None:
    """Refuse a method that sees a gradient before the processes have exchanged theirs.

    Raises:
        NotImplementedError: There are several processes, or a parameter is sharded.
    """
    distributed = torch.distributed
    several = distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1
    if several or any(hasattr(parameter, "placements") for parameter in parameters):
        raise NotImplementedError(
            f"{what} acts on a gradient during the backward pass, before DDP or FSDP has averaged it over the "
            f"processes; {instead}, or train in one process"
        )


_sharded_later = ContextVar("_sharded_later", default=False)


@contextmanager
def sharded_later(is_so: bool) -> Iterator[None]:
    """Build an optimizer whose parameters FSDP2 will split, and replace, after that: there is nothing to watch yet."""
    token = _sharded_later.set(is_so)
    try:
        yield
    finally:
        _sharded_later.reset(token)


def waits_for_shards(parameters: Iterable[Tensor]) -> bool:
    """Return whether parameters are still to be split."""
    return _sharded_later.get() and not any(hasattr(parameter, "placements") for parameter in parameters)
