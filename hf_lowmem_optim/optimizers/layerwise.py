"""Layer-wise mode: a parameter is updated in the backward pass as soon as its gradient is there, which is then freed.

So the gradients never exist all at once. The update is the normal mode's, bit for bit, and so is the state (to rounding
for LDAdam on a GPU, whose normal mode updates matrices of one shape together): a checkpoint of one mode resumes in the
other. What needs all gradients at once is not to be had: clipping by their global
norm, and a gradient scaler, which wants to look at all of them before any is used.

Gradient accumulation puts the gradients of all micro-batches but the last into the error feedback of a compressed
tensor, exact up to its quantization; a dense tensor accumulates in ``param.grad`` as always. ``step()`` ends a step: it
updates what has a gradient left, and computes :attr:`Layerwise.grad_norm`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from hf_lowmem_optim.compression.workspace import Workspace
from hf_lowmem_optim.optimizers.base import LowMemoryOptimizer
from hf_lowmem_optim.optimizers.hooks import GradientHooks, refuse_several_processes
from hf_lowmem_optim.optimizers.ldadam import LDAdam, ldadam_accumulate_
from hf_lowmem_optim.optimizers.microadam import MicroAdam, microadam_accumulate_
from hf_lowmem_optim.optimizers.parameters import check_gradient, describe_parameter

__all__ = ["LDAdamLayerwise", "Layerwise", "MicroAdamLayerwise"]

#: Micro-batches of a step that have seeds of their own for stochastic rounding.
_SEEDS_PER_STEP = 1 << 20
_SLICE_ENTRIES = 1 << 15


class Layerwise(LowMemoryOptimizer):
    """What the layer-wise optimizers share.

    Args:
        params: As in the normal mode.
        lr: Learning rate; what counts is its value when a gradient comes.
        clip_tensor_norm: Scale the gradient of each tensor down to this norm if it is larger; None leaves it. A group
            may set its own. Not with gradient accumulation.
        **hyper: Every other argument of the normal mode.

    Attributes:
        normal: The optimizer of the normal mode.
        accumulate_function: ``(grad, state, *, seed, workspace, **hyper) -> None`` adds a gradient to the error.
        accumulation_keys: The hyper-parameters that it takes.
        grad_norm: Norm of all gradients of the last step before clipping, float32 scalar; None before the first. With
            accumulation, of the pieces as they came: the root of the sum of their squares.
        peak_gradient_bytes: The most that ``param.grad`` of all parameters took together while a hook ran.
        is_last_micro_batch: Asked, if it is not None, whether the gradient that comes completes the step. In the
            Trainer it is accelerate's answer; loops of your own use :meth:`accumulating`.

    Raises:
        NotImplementedError: There are several processes, or a parameter is sharded.
    """

    layerwise: ClassVar[bool] = True
    normal: ClassVar[type[LowMemoryOptimizer]]
    accumulate_function: ClassVar[Callable[..., None]]
    accumulation_keys: ClassVar[tuple[str, ...]]

    def __init__(
        self, params: ParamsT, lr: float = 1e-3, *, clip_tensor_norm: float | None = None, **hyper: Any
    ) -> None:
        given = {"lr": lr, "clip_tensor_norm": clip_tensor_norm, **hyper}
        self._start()
        # not that of the normal mode, which has a signature of its own
        LowMemoryOptimizer.__init__(self, params, {**self.default_hyperparameters(), **given})

    def _start(self) -> None:
        """Set up what lives beside parameters and state."""
        self.grad_norm: Tensor | None = None
        self.peak_gradient_bytes = 0
        self.is_last_micro_batch: Callable[[], bool] | None = None
        self._hooks = GradientHooks(self, "_on_gradient")
        # index of its group, and of itself among all parameters
        self._place_of: dict[int, tuple[int, int]] = {}
        self._accumulating = False
        self._micro_batches: dict[int, int] = {}
        self._updated: set[int] = set()
        self._held: dict[int, int] = {}
        self._norms: list[Tensor] = []

    # ---------------------------------------------------------------------------------------------- description

    @classmethod
    def default_hyperparameters(cls) -> dict[str, Any]:
        """Those of the normal mode, and ``clip_tensor_norm``."""
        return {**cls.normal.default_hyperparameters(), "clip_tensor_norm": None}

    @classmethod
    def hyperparameter_types(cls) -> dict[str, Any]:
        """Those of the normal mode, and ``clip_tensor_norm``."""
        return {**cls.normal.hyperparameter_types(), "clip_tensor_norm": float | None}

    @classmethod
    def check_own(cls, hyper: Mapping[str, Any]) -> None:
        """Check what the normal mode checks, and ``clip_tensor_norm``."""
        cls.normal.check_own(hyper)
        if hyper.get("error_feedback") == "grad":
            raise ValueError(
                "error_feedback='grad' keeps the error in the gradients, which layer-wise mode frees; use "
                f"error_feedback='4bit', or optim={cls.normal.name!r}"
            )
        limit = hyper["clip_tensor_norm"]
        if limit is not None and (
            isinstance(limit, bool) or not isinstance(limit, (int, float)) or not 0 < limit < math.inf
        ):
            raise ValueError(f"clip_tensor_norm={limit!r} must be a number > 0, or None to leave gradients as they are")

    @classmethod
    def needs_one_process(cls, group: Mapping[str, Any]) -> str | None:
        """Why a group cannot be trained by several processes."""
        return "layer-wise mode uses a gradient before the processes have averaged it"

    @classmethod
    def check_accumulation(cls, hyper: Mapping[str, Any]) -> None:
        """Refuse settings with which a gradient cannot be put aside until the rest of it comes.

        Raises:
            ValueError: The message says which setting and why.
        """
        if hyper["clip_tensor_norm"] is not None:
            raise ValueError(
                f"clip_tensor_norm={hyper['clip_tensor_norm']!r} cannot be combined with gradient accumulation: the "
                "whole gradient of a tensor is never there to be measured. Leave one of the two out"
            )
        if hyper.get("error_feedback") == "none":
            raise ValueError(
                "error_feedback='none' cannot be combined with gradient accumulation in layer-wise mode: gradients "
                "accumulate in the error, and there is none. Use error_feedback='4bit', or the normal mode"
            )
        if hyper.get("alpha"):
            raise ValueError(
                f"alpha={hyper['alpha']!r} cannot be combined with gradient accumulation in layer-wise mode: gradients "
                "accumulate in the error, of which a part would reach the weights uncompressed. Use alpha=0, or the "
                "normal mode"
            )

    # --------------------------------------------------------------------------------------------- construction

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group and watch its parameters; see the normal mode."""
        super().add_param_group(param_group)
        self._watch(len(self.param_groups) - 1)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if not hasattr(self, "_hooks"):  # a copy, made without __init__
            self._start()
            for index in range(len(self.param_groups)):
                self._watch(index)

    def _watch(self, index: int) -> None:
        params = self.param_groups[index]["params"]
        refuse_several_processes(type(self).__name__, f"use {self.normal.name!r}", params)
        before = sum(len(group["params"]) for group in self.param_groups[:index])
        self._place_of.update((id(param), (index, place)) for place, param in enumerate(params, before))
        self._hooks.add(params)

    def remove_hooks(self) -> None:
        """Go over to the normal mode: from now on ``step()`` updates everything."""
        super().remove_hooks()
        self._hooks.remove()

    # ------------------------------------------------------------------------------------------------------ step

    @contextmanager
    def accumulating(self) -> Iterator[None]:
        """Within this context a backward pass adds to the gradients of the step and updates nothing.

        Example:
            >>> for micro_batch in micro_batches[:-1]:
            ...     with optimizer.accumulating():
            ...         loss(micro_batch).backward()
            >>> loss(micro_batches[-1]).backward()
            >>> optimizer.step()
        """
        before, self._accumulating = self._accumulating, True
        try:
            yield
        finally:
            self._accumulating = before

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """End the step: update what has a gradient left, and what only earlier micro-batches reached.

        Args:
            closure: Must be None.

        Raises:
            TypeError: A closure was given.
        """
        if closure is not None:
            raise TypeError(
                f"{type(self).__name__} updates during loss.backward(), so step() takes no closure; compute the loss "
                "before step()"
            )
        left = 0
        for group in self.param_groups:
            for param in group["params"]:
                if id(param) in self._micro_batches and param.grad is None:
                    param.grad = torch.zeros_like(param)
                if param.grad is not None:
                    left += param.grad.numel() * param.grad.element_size()
                    self._measure_and_clip(param, group)
        self.peak_gradient_bytes = max(self.peak_gradient_bytes, left)
        # not super().step(), around which torch would run the step hooks once more
        self._update_all_()
        for group in self.param_groups:
            for param in group["params"]:
                if id(param) in self._micro_batches:
                    param.grad = None
        if self._norms:
            first = self._norms[0].device
            self.grad_norm = torch.linalg.vector_norm(torch.stack([norm.to(first) for norm in self._norms]))
        self._finish_step()

    def _finish_step(self) -> None:
        for finished in (self._norms, self._updated, self._micro_batches, self._held):
            finished.clear()

    def abandon_step(self) -> int:
        """Forget a step whose backward pass failed half-way (out of memory), so that a new one can begin.

        Returns:
            The number of parameters for which it came too late: their gradients of that step, or a part of them, have
            been used already. 0 where no step had begun.
        """
        used = len(self._updated | self._micro_batches.keys())
        self._finish_step()
        for group in self.param_groups:
            for param in group["params"]:
                param.grad = None
        return used

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear what gradients there are, as in torch.

        Raises:
            RuntimeError: Gradients of this step were used already, or a part of them is in the error feedback.
        """
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
        super().zero_grad(set_to_none)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict as the normal mode does; what the step had begun is forgotten."""
        super().load_state_dict(state_dict)
        self._finish_step()

    def _is_probe(self, param: Tensor, group: Mapping[str, Any]) -> bool:
        """As in the normal mode; where micro-batches are in the error already, a zero gradient is the rest of them."""
        return id(param) not in self._micro_batches and super()._is_probe(param, group)

    def _on_gradient(self, param: Tensor) -> None:
        """Use a gradient that has just been completed; autograd calls this."""
        group_index, place = self._place_of[id(param)]
        group = self.param_groups[group_index]
        grad = param.grad
        if grad is None:
            return
        check_gradient(self, param, group)
        self._held[id(param)] = grad.numel() * grad.element_size()
        self.peak_gradient_bytes = max(self.peak_gradient_bytes, sum(self._held.values()))
        if id(param) in self._updated:
            raise RuntimeError(
                f"{describe_parameter(param, group)} gets a second gradient in one step, after its update. Several "
                "backward passes a step need `with optimizer.accumulating():` around all but the last, and step() "
                "after it; one that failed needs step() as well; a layer used repeatedly under gradient checkpointing "
                "needs use_reentrant=False"
            )
        if self._accumulating or (self.is_last_micro_batch is not None and not self.is_last_micro_batch()):
            self._put_aside(param, group)
            return
        self._measure_and_clip(param, group)
        self._update_one_(param, group, place)
        param.grad = None
        del self._held[id(param)]
        self._micro_batches.pop(id(param), None)
        self._updated.add(id(param))

    def _put_aside(self, param: Tensor, group: dict[str, Any]) -> None:
        """Keep a part of the step's gradient: in the error feedback, or where torch accumulates it anyway."""
        if not self.compresses(param.shape, group):
            return
        self.check_accumulation(group)
        grad, state = param.grad, self._state_of(param, group)
        assert grad is not None
        self._norms.append(_norm(grad))
        number = self._micro_batches.get(id(param), 0)
        type(self).accumulate_function(
            self.view_for_update(grad),
            state,
            seed=(state["step"] + 1) * _SEEDS_PER_STEP + number,
            workspace=Workspace(),
            **{key: group[key] for key in self.accumulation_keys},
        )
        self._micro_batches[id(param)] = number + 1
        param.grad = None
        del self._held[id(param)]

    def _measure_and_clip(self, param: Tensor, group: Mapping[str, Any]) -> None:
        """Note the norm of a gradient, and scale it down if asked to, without waiting for the device."""
        assert param.grad is not None
        norm = _norm(param.grad)
        self._norms.append(norm)
        if group["clip_tensor_norm"] is not None:
            # torch.nn.utils.clip_grad_norm_'s factor
            param.grad.mul_((group["clip_tensor_norm"] / (norm + 1e-6)).clamp(max=1.0).to(param.grad.dtype))

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """What a gradient scaler asks first."""
        raise RuntimeError(
            f"{type(self).__name__} cannot be stepped by a gradient scaler (fp16): the scaled gradients were used "
            f"during the backward pass already. Train in bfloat16 (bf16=True), or use {self.normal.name!r}"
        )


def _norm(tensor: Tensor) -> Tensor:
    """Norm in float32; a CPU would first convert the whole of a half-precision tensor."""
    if tensor.dtype == torch.float32 or tensor.device.type != "cpu" or tensor.dim() == 0:
        whole: Tensor = torch.linalg.vector_norm(tensor, dtype=torch.float32)
        return whole
    rows = max(1, _SLICE_ENTRIES // max(1, tensor[0].numel()))
    slices = (tensor[start : start + rows] for start in range(0, len(tensor), rows))
    parts = [torch.linalg.vector_norm(part, dtype=torch.float32) for part in slices]
    norm: Tensor = torch.linalg.vector_norm(torch.stack(parts))
    return norm


class LDAdamLayerwise(Layerwise, LDAdam):
    """:class:`~hf_lowmem_optim.optimizers.ldadam.LDAdam` in layer-wise mode; see :class:`Layerwise`.

    Example:
        >>> optimizer = LDAdamLayerwise(model.parameters(), lr=1e-3, rank=16)
        >>> loss.backward()  # updates the parameters
        >>> optimizer.step()  # ends the step
    """

    name: ClassVar[str] = "ldadam_layerwise"
    normal = LDAdam
    accumulate_function = staticmethod(ldadam_accumulate_)
    accumulation_keys: ClassVar[tuple[str, ...]] = ("stochastic_rounding",)


class MicroAdamLayerwise(Layerwise, MicroAdam):
    """:class:`~hf_lowmem_optim.optimizers.microadam.MicroAdam` in layer-wise mode; see :class:`Layerwise`.

    Example:
        >>> optimizer = MicroAdamLayerwise(model.parameters(), lr=1e-4)
        >>> loss.backward()  # updates the parameters
        >>> optimizer.step()  # ends the step
    """

    name: ClassVar[str] = "microadam_layerwise"
    normal = MicroAdam
    accumulate_function = staticmethod(microadam_accumulate_)
    accumulation_keys: ClassVar[tuple[str, ...]] = ("quant_block_size", "bits", "stochastic_rounding")
