"""Calls an optimizer when a parameter's gradient is complete, in the middle of the backward pass.

A hook lives with its parameter. It knows the optimizer by a weak reference only, so that neither keeps the other alive,
and goes when the optimizer goes.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

__all__ = ["GradientHooks", "is_hooked", "refuse_several_processes"]

logger = logging.getLogger(__name__)

#: The hook of each parameter that has one: two optimizers must not both act on one gradient.
_HOOKED = WeakIdKeyDictionary()


class GradientHooks:
    """The hooks of one optimizer.

    Args:
        optimizer: Whose method is called.
        method: Name of its method ``(parameter) -> None``.
    """

    def __init__(self, optimizer: Any, method: str) -> None:
        self._optimizer = weakref.ref(optimizer)
        self._method = method
        self._handles: list[Any] = []
        weakref.finalize(optimizer, _remove_all, self._handles)

    def add(self, parameters: Iterable[Tensor]) -> None:
        """Watch parameters; those that are frozen stay without. A parameter's older hook is taken off."""
        call = _caller(self._optimizer, self._method)
        replaced = 0
        for parameter in parameters:
            if not parameter.requires_grad:
                continue
            if parameter in _HOOKED:
                replaced += is_hooked(parameter)
                _HOOKED[parameter].remove()
            handle = parameter.register_post_accumulate_grad_hook(call)  # type: ignore[no-untyped-call]
            _HOOKED[parameter] = handle
            self._handles.append(handle)
        if replaced:
            logger.warning(
                "%d parameters had the hooks of another optimizer, which is still there; from now on only the new %s "
                "acts on their gradients",
                replaced,
                type(self._optimizer()).__name__,
            )

    def remove(self) -> None:
        """Take the hooks off."""
        _remove_all(self._handles)


def is_hooked(parameter: Tensor) -> bool:
    """Whether an optimizer watches a parameter."""
    if parameter not in _HOOKED:
        return False
    handle = _HOOKED[parameter]
    hooks = handle.hooks_dict_ref()
    return hooks is not None and handle.id in hooks


def _caller(optimizer: weakref.ref[Any], method: str) -> Callable[[Tensor], None]:
    """The hook: a function that holds no more than the weak reference."""

    def call(parameter: Tensor) -> None:
        owner = optimizer()
        if owner is not None:
            with torch.no_grad():
                getattr(owner, method)(parameter)

    return call


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
