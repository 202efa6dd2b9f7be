"""Updates in the backward pass: ``layerwise(AnyOptimizer)`` updates a parameter as soon as its gradient is there.

The gradient is then freed, so that the gradients never exist all at once. The update is the normal mode's, bit for bit,
and so is the state (to rounding for LDAdam on a GPU, whose normal mode updates matrices of one shape together): a
checkpoint of one mode resumes in the other. Clipping by the norm of all gradients and gradient scaling, which need all
gradients at once, are unavailable; so is a system over all parameters (``scope="model"``).

FSDP2 calls the hooks of a sharded parameter with its part of the averaged gradient, so this works there as well, for an
optimizer that is built from the sharded parameters; elsewhere several processes are refused.

Gradient accumulation puts the gradients of all micro-batches but the last into the error feedback of a compressed
tensor, exact up to its quantization, or where the method says (Trion's into the momentum); a tensor without one, or
a sharded one, accumulates in ``param.grad`` as always. ``step()`` ends a step: it updates what has a gradient left, and
computes ``grad_norm``.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, Protocol, TypeVar, cast

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from hf_lowmem_optim.engine.buckets import TensorUpdate, batches
from hf_lowmem_optim.engine.checks import describe_parameter
from hf_lowmem_optim.engine.error_feedback import add_residual, save_residual_
from hf_lowmem_optim.engine.hooks import GradientHooks, refuse_several_processes, waits_for_shards
from hf_lowmem_optim.engine.method import Method
from hf_lowmem_optim.engine.options import POSITIVE, option
from hf_lowmem_optim.engine.sharding.layout import local_of, sharded_dims
from hf_lowmem_optim.spec import TensorSpec

__all__ = ["BackwardMode", "Host", "Layerwise", "LayerwiseMode", "check_accumulation", "layerwise"]

#: Micro-batches of a step that have seeds of their own for stochastic rounding.
_SEEDS_PER_STEP = 1 << 20
#: Entries of a half-precision gradient that a CPU converts to float32 at a time to measure it.
_SLICE_ENTRIES = 1 << 15


class Host(Protocol):
    """What a mode asks of its optimizer."""

    method: ClassVar[Method]
    param_groups: list[dict[str, Any]]
    state: Any

    def _update_(self, live: Sequence[tuple[int, Tensor, dict[str, Any]]]) -> None:
        """Update parameters that have a gradient."""

    def _checked_rule(self, param: Tensor, group: dict[str, Any]) -> None:
        """Refuse a gradient or a state that the parameter's rule cannot serve."""

    def _prepared(self, param: Tensor, group: dict[str, Any]) -> tuple[bool, dict[str, TensorSpec], dict[str, Any]]:
        """Return whether a parameter is compressed, the specs of its state, and the state, allocated if need be."""


class BackwardMode:
    """What the modes share that act on gradients during the backward pass; the normal mode has none of it."""

    def __init__(self, host: Host) -> None:
        self._host = weakref.ref(host)
        self.hooks = GradientHooks(cast("Optimizer", host), self)
        #: Whether parameters are to be watched once they are sharded.
        self.waits = False

    @property
    def host(self) -> Host:
        """The optimizer."""
        host = self._host()
        assert host is not None
        return host

    def on_gradient(self, param: Tensor) -> None:
        """Act on a gradient that has just been completed; autograd calls this."""
        raise NotImplementedError

    def has_more(self, param: Tensor) -> bool:
        """Return whether a part of the parameter's gradient of this step is in its state already."""
        return False

    def check_save(self, what: str) -> None:
        """Refuse to save or copy the state in the middle of a step, if that is not whole; ``what`` begins the error."""

    def remove_hooks(self) -> None:
        """Go over to the normal mode."""
        self.hooks.remove()


class LayerwiseMode(BackwardMode):
    """Updates a parameter when its gradient is complete; see the head of this file."""

    def __init__(self, host: Host) -> None:
        super().__init__(host)
        self.grad_norm: Tensor | None = None
        self.peak_gradient_bytes = 0
        self.is_last_micro_batch: Callable[[], bool] | None = None
        self.accumulating = False
        # index of its group, and of itself among all parameters
        self._place_of: dict[int, tuple[int, int]] = {}
        self._micro_batches: dict[int, int] = {}
        self._updated: set[int] = set()
        self._held: dict[int, int] = {}
        # and those of this process's parts, by mesh and the dimensions over which they are split
        self._norms: list[Tensor] = []
        self._part_norms: dict[tuple[Any, tuple[int, ...]], list[Tensor]] = {}

    def watch(self, index: int) -> None:
        """Watch the parameters of a group.

        Raises:
            NotImplementedError: There are several processes, and a parameter is not sharded.
        """
        groups, name = self.host.param_groups, self.host.method.name
        params = groups[index]["params"]
        self.waits = waits_for_shards(params)
        if self.waits:
            return
        if any(not hasattr(param, "placements") for param in params):
            instead = f"use {name.removesuffix('_layerwise')!r}, or build it from the parameters that FSDP2 has sharded"
            refuse_several_processes(f"optim={name!r}", instead, params)
        before = sum(len(group["params"]) for group in groups[:index])
        self._place_of.update((id(param), (index, place)) for place, param in enumerate(params, before))
        self.hooks.add(params)

    def on_gradient(self, param: Tensor) -> None:
        """Use a gradient that has just been completed, and free it."""
        group_index, place = self._place_of[id(param)]
        group, grad = self.host.param_groups[group_index], param.grad
        if grad is None:
            return
        self.host._checked_rule(param, group)
        self._held[id(param)] = local_of(grad).nbytes
        self.peak_gradient_bytes = max(self.peak_gradient_bytes, sum(self._held.values()))
        if id(param) in self._updated:
            raise RuntimeError(
                f"{describe_parameter(param, group)} gets a second gradient in one step, after its update. Several "
                "backward passes a step need `with optimizer.accumulating():` around all but the last, and step() "
                "after it; one that failed needs step() as well; a layer used repeatedly under gradient checkpointing "
                "needs use_reentrant=False. If another optimizer trains the model now, first call remove_hooks() of "
                f"this {type(self.host).__name__}"
            )
        if self.accumulating or (self.is_last_micro_batch is not None and not self.is_last_micro_batch()):
            self._put_aside(param, group)
            return
        self._measure_and_clip(param, group)
        self.host._update_([(place, param, group)])
        param.grad = None
        del self._held[id(param)]
        self._micro_batches.pop(id(param), None)
        self._updated.add(id(param))

    def _put_aside(self, param: Tensor, group: dict[str, Any]) -> None:
        """Keep a part of the step's gradient: in the error feedback, or where torch accumulates it anyway."""
        grad = param.grad
        assert grad is not None
        compressed, specs, state = self.host._prepared(param, group)
        if not compressed or hasattr(param, "placements"):
            return
        check_accumulation(group)
        put_aside_ = self.host.method.put_aside_
        if put_aside_ is None and not ("error" in specs or "error_codes" in specs):
            return
        self._norms.append(_norm(grad))
        number = self._micro_batches.get(id(param), 0)
        # ξ ← ξ + g: the next update's a is then that of the sum of both gradients
        fmt = specs["error_codes"].format if "error_codes" in specs else None
        seed = (state["step"] + 1) * _SEEDS_PER_STEP + number if group.get("stochastic_rounding") else None
        update = TensorUpdate(param, grad, state, self.host.method.options_of(group), state["step"])
        for batch in batches([update], whole=False):
            if put_aside_ is not None:
                put_aside_(batch.g, batch.state, seed, update.options)
            else:
                save_residual_(batch.state, add_residual(batch.g, batch.state, fmt), fmt, seed=seed)
        self._micro_batches[id(param)] = number + 1
        param.grad = None
        del self._held[id(param)]

    def _measure_and_clip(self, param: Any, group: Mapping[str, Any]) -> None:
        """Note the norm of a gradient, and scale it down if asked to, without waiting for the device."""
        assert param.grad is not None
        grad = local_of(param.grad)
        norm = _norm(grad)
        place = (param.device_mesh, sharded_dims(param.placements)) if hasattr(param, "placements") else None
        (self._norms if place is None else self._part_norms.setdefault(place, [])).append(norm)
        if group["clip_tensor_norm"] is not None:
            norm = norm if place is None else _norm_of_parts(*place, [norm])
            # torch.nn.utils.clip_grad_norm_'s factor
            grad.mul_((group["clip_tensor_norm"] / (norm + 1e-6)).clamp(max=1.0).to(grad.dtype))

    def before_step(self) -> None:
        """Take up what has a gradient left, and what only earlier micro-batches reached."""
        if self.waits:  # sharded by now, but nobody said so: from the next step on
            for index in range(len(self.host.param_groups)):
                self.watch(index)
        left = 0
        for group in self.host.param_groups:
            for param in group["params"]:
                if id(param) in self._micro_batches and param.grad is None:
                    param.grad = torch.zeros_like(param)
                if param.grad is not None:
                    self.host._checked_rule(param, group)
                    left += local_of(param.grad).nbytes
                    self._measure_and_clip(param, group)
        self.peak_gradient_bytes = max(self.peak_gradient_bytes, left)

    def after_step(self) -> None:
        """Free the gradients of accumulation, and compute the norm of all."""
        for group in self.host.param_groups:
            for param in group["params"]:
                if id(param) in self._micro_batches:
                    param.grad = None
        self._norms += [_norm_of_parts(*place, norms) for place, norms in self._part_norms.items()]
        if self._norms:
            first = self._norms[0].device
            self.grad_norm = torch.linalg.vector_norm(torch.stack([norm.to(first) for norm in self._norms]))
        self.after_load()

    def has_more(self, param: Tensor) -> bool:
        """Return whether micro-batches are in the error already: a zero gradient is then the rest of them."""
        return id(param) in self._micro_batches

    def abandon_step(self) -> int:
        """Forget a step whose backward pass failed half-way; return how many gradients were used already."""
        used = len(self._updated | self._micro_batches.keys())
        self.after_load()
        return used

    def after_load(self) -> None:
        """Begin a new step."""
        for finished in (self._norms, self._part_norms, self._updated, self._micro_batches, self._held):
            finished.clear()

    def check_zero_grad(self) -> None:
        """Refuse to drop gradients that are in the weights or in the errors already."""
        if self._micro_batches:
            raise RuntimeError(
                "zero_grad() in the middle of gradient accumulation cannot take back the gradients that are in the "
                "error feedback already; call step() first"
            )
        if self._updated:
            raise RuntimeError(
                f"zero_grad() before step() cannot take back the updates that the backward pass has made to "
                f"{len(self._updated)} of {len(self._place_of)} tensors. Call step() first, also to go on after a "
                "backward pass that failed half-way; for gradients alone, without updates, use torch.autograd.grad()"
            )

    def refuse_scaler(self) -> None:
        """Refuse a gradient scaler, which looks at all gradients before any is used."""
        name = self.host.method.name
        raise RuntimeError(
            f"optim={name!r} cannot be stepped by a gradient scaler (fp16): the scaled gradients were used during the "
            f"backward pass already. Train in bfloat16 (bf16=True), or use {name.removesuffix('_layerwise')!r}"
        )


def _norm(tensor: Tensor) -> Tensor:
    """Return the norm in float32; a CPU would first convert the whole of a half-precision tensor."""
    if tensor.dtype == torch.float32 or tensor.device.type != "cpu" or tensor.dim() == 0 or tensor.numel() == 0:
        whole: Tensor = torch.linalg.vector_norm(tensor, dtype=torch.float32)
        return whole
    rows = max(1, _SLICE_ENTRIES // max(1, tensor[0].numel()))
    slices = (tensor[start : start + rows] for start in range(0, len(tensor), rows))
    parts = [torch.linalg.vector_norm(part, dtype=torch.float32) for part in slices]
    norm: Tensor = torch.linalg.vector_norm(torch.stack(parts))
    return norm


def _norm_of_parts(mesh: Any, dims: Sequence[int], norms: Sequence[Tensor]) -> Tensor:
    """Return the norm of sharded tensors together, from the norms of this process's parts."""
    squares: Tensor = torch.linalg.vector_norm(torch.stack(list(norms))).square()
    for dim in dims:
        torch.distributed.all_reduce(squares, group=mesh.get_group(dim))
    return squares.sqrt()


def check_accumulation(options: Mapping[str, Any]) -> None:
    """Raise ValueError for options with which layer-wise mode cannot put a gradient aside until the rest comes."""
    if options["clip_tensor_norm"] is not None:
        raise ValueError(
            f"clip_tensor_norm={options['clip_tensor_norm']!r} cannot be combined with gradient accumulation: the "
            "whole gradient of a tensor is never there to be measured. Leave one of the two out"
        )
    if options.get("error_feedback") == "none":
        raise ValueError(
            "error_feedback='none' cannot be combined with gradient accumulation in layer-wise mode: gradients "
            "accumulate in the error, and there is none. Use error_feedback='4bit', or the normal mode"
        )
    if options.get("alpha"):
        raise ValueError(
            f"alpha={options['alpha']!r} cannot be combined with gradient accumulation in layer-wise mode: gradients "
            "accumulate in the error, of which a part would reach the weights uncompressed. Use alpha=0, or the "
            "normal mode"
        )


class Layerwise:
    """What a layer-wise optimizer has beside the normal one: see :func:`layerwise`.

    Attributes:
        normal: The optimizer of the normal mode.
    """

    normal: ClassVar[type[Any]]
    _backward: LayerwiseMode

    @property
    def grad_norm(self) -> Tensor | None:
        """Norm of all gradients of the last step before clipping, float32 scalar; None before the first.

        With accumulation, of the pieces as they came: the root of the sum of their squares.
        """
        return self._backward.grad_norm

    @property
    def peak_gradient_bytes(self) -> int:
        """The most that ``param.grad`` of all parameters took together while a hook ran."""
        return self._backward.peak_gradient_bytes

    @property
    def is_last_micro_batch(self) -> Callable[[], bool] | None:
        """Asked, if it is not None, whether the gradient that comes completes the step.

        In the Trainer it is accelerate's answer; loops of your own use :meth:`accumulating`.
        """
        return self._backward.is_last_micro_batch

    @is_last_micro_batch.setter
    def is_last_micro_batch(self, ask: Callable[[], bool] | None) -> None:
        self._backward.is_last_micro_batch = ask

    @contextmanager
    def accumulating(self) -> Iterator[None]:
        """Add to the gradients of the step in the backward passes within this context, and update nothing.

        Example:
            >>> for micro_batch in micro_batches[:-1]:
            ...     with optimizer.accumulating():
            ...         loss(micro_batch).backward()
            >>> loss(micro_batches[-1]).backward()
            >>> optimizer.step()
        """
        before, self._backward.accumulating = self._backward.accumulating, True
        try:
            yield
        finally:
            self._backward.accumulating = before

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle by the normal class: this one is made by a function."""
        return _empty, (self.normal,), self.__getstate__()  # type: ignore[attr-defined, unused-ignore]


def _empty(normal: type[Any]) -> Any:
    made: Any = layerwise(normal)
    return made.__new__(made)


class _LayerwiseChecks:
    """The checks that layer-wise mode adds to the options of a method."""

    def check(self) -> None:
        """Refuse what needs all gradients at once."""
        super().check()  # type: ignore[misc]
        if getattr(self, "error_feedback", None) == "grad":
            raise ValueError(
                "error_feedback='grad' keeps the error in the gradients, which layer-wise mode frees; use "
                "error_feedback='4bit', or the normal mode"
            )
        if getattr(self, "scope", None) == "model":
            raise ValueError(
                "scope='model' needs the gradients of all parameters at once, which layer-wise mode never has; use "
                "scope='tensor', or the normal mode"
            )


_T = TypeVar("_T", bound=type[Any])
#: The layer-wise classes made so far, by the normal one.
_MADE: dict[type[Any], Any] = {}


def layerwise(optimizer_class: _T) -> _T:
    """Make the layer-wise version of an optimizer: a class with the same options, and ``clip_tensor_norm``.

    A parameter is updated in the backward pass as soon as its gradient is there, which is then freed; ``step()`` ends
    the step.

    Args:
        optimizer_class: A subclass of :class:`~hf_lowmem_optim.engine.optimizer.LowMemoryOptimizer`.

    Returns:
        The class, the same one for every call; its name in the registry ends in ``_layerwise``.

    Raises:
        NotImplementedError: The method must have all gradients when it steps.

    Example:
        >>> optimizer = layerwise(LDAdam)(model.parameters(), lr=1e-3, rank=16)
        >>> loss.backward()  # updates the parameters
        >>> optimizer.step()  # ends the step
    """
    if optimizer_class in _MADE:
        return cast("_T", _MADE[optimizer_class])
    normal: Method = optimizer_class.method
    if normal.replicated is not None:
        raise NotImplementedError(f"{normal.name!r} has no layer-wise mode: {normal.replicated}")
    clip = option(
        None,
        "Scale the gradient of each tensor down to this norm if it is larger. A group may set its own. Not with "
        "gradient accumulation.",
        within=POSITIVE,
        none="leave gradients as they are",
    )
    fields: list[tuple[str, Any, Any]] = [("clip_tensor_norm", float | None, clip)]
    if "scope" in normal.options.defaults():  # a common system is not to be had
        metadata = next(f.metadata for f in dataclasses.fields(normal.options) if f.name == "scope")
        scope = dataclasses.field(default="tensor", metadata=metadata)
        fields.append(("scope", normal.options.types()["scope"], scope))
    bases = (_LayerwiseChecks, normal.options)
    options = dataclasses.make_dataclass(f"{normal.options.__name__}Layerwise", fields, bases=bases, frozen=True)
    name = f"{normal.name}_layerwise"
    method = dataclasses.replace(normal, name=name, options=options, layerwise=True, serves_flat=False)
    doc = (
        f"{optimizer_class.__name__} that updates each parameter in the backward pass, as soon as its gradient is "
        f"there.\n\nSee :func:`layerwise`, and :class:`{optimizer_class.__name__}` for the method."
    )
    body = {"__doc__": doc, "__module__": __name__, "method": method, "normal": optimizer_class}
    made = _MADE[optimizer_class] = type(f"{optimizer_class.__name__}Layerwise", (Layerwise, optimizer_class), body)
    return cast("_T", made)
