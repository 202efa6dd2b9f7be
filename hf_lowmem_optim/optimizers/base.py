"""What all optimizers of this package share: the loop over tensors, allocation, the dense rule, checks and resume.

A subclass names a state function, an update function and its own checks; everything else is written here once.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, get_type_hints, overload

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT

from hf_lowmem_optim.compression.rounding import rounding_bytes
from hf_lowmem_optim.compression.workspace import Workspace
from hf_lowmem_optim.optimizers.adamw import DENSE_STATES, adamw_state
from hf_lowmem_optim.optimizers.adamw8bit import require_bitsandbytes
from hf_lowmem_optim.optimizers.dense import (
    WEIGHT_ROUNDINGS,
    dense_batch_temporaries,
    dense_jobs,
    dense_temporaries,
    dense_update_,
    rounds_stochastically,
)
from hf_lowmem_optim.optimizers.hyperparameters import (
    as_plain,
    check_betas,
    check_choice,
    check_eps,
    check_lr,
    check_weight_decay,
    nearest,
)
from hf_lowmem_optim.optimizers.parameters import check_gradient, check_parameter, check_rounding
from hf_lowmem_optim.optimizers.pending import PendingUpdate, weight_to_update
from hf_lowmem_optim.optimizers.precision import full_precision
from hf_lowmem_optim.optimizers.resume import exact_load, pack_shared
from hf_lowmem_optim.optimizers.side_by_side import Job, run_jobs
from hf_lowmem_optim.state import StepTemporaries, TensorSpec

__all__ = ["LowMemoryOptimizer", "update_arguments"]

#: Parameters of an optimizer that have seeds of their own for stochastic rounding.
_MAX_PARAMETERS = 1 << 24


class LowMemoryOptimizer(Optimizer):
    """Base class: see :class:`~hf_lowmem_optim.optimizers.ldadam.LDAdam` for a subclass.

    State is allocated at a parameter's first gradient, so that building the optimizer costs nothing and sharding
    wrappers may still replace the parameters. Each tensor counts its own updates in ``state[param]["step"]``.

    Attributes:
        name: The optimizer's name in the registry and in ``TrainingArguments(optim=...)``.
        dense_key: The hyper-parameter whose ``None`` sends a group to the dense AdamW rule.
        state_keys: The hyper-parameters on which the shape of the state depends; they must be equal on resume.
        state_function: ``(shape, dtype, **hyper) -> dict[str, TensorSpec]``.
        temporaries_function: ``(shape, dtype, *, first, device, **hyper) -> StepTemporaries`` for one compressed
            tensor; None where what the update allocates is not described.
        supports_sharding: Whether compressed parameters may be sharded DTensors.
        layerwise: Whether it updates during the backward pass.
        replaces_adamw: Whether it is Adam with less state, so that AdamW is as good where compression saves nothing.
        update_function: ``(param, grad, state, *, step, workspace, **hyper) -> None`` for one compressed tensor.
    """

    name: ClassVar[str]
    dense_key: ClassVar[str]
    state_keys: ClassVar[tuple[str, ...]]
    state_function: ClassVar[Callable[..., dict[str, TensorSpec]]]
    temporaries_function: ClassVar[Callable[..., StepTemporaries] | None] = None
    supports_sharding: ClassVar[bool] = False
    layerwise: ClassVar[bool] = False
    replaces_adamw: ClassVar[bool] = True
    update_function: ClassVar[Callable[..., None]]

    #: False while the constructor runs.
    _complete = True

    def __init__(self, params: ParamsT, defaults: dict[str, Any]) -> None:
        defaults = {key: as_plain(value) for key, value in defaults.items()}
        self.check_hyperparameters(defaults)
        self._complete = False
        try:
            super().__init__(params, defaults)
            check_rounding(self.param_groups)
        except BaseException:
            # an exception that somebody keeps would keep the optimizer, too
            self.remove_hooks()
            raise
        self._complete = True

    def remove_hooks(self) -> None:
        """Take off the hooks that act on gradients during the backward pass; in the normal mode there are none."""

    # ---------------------------------------------------------------------------------------------- description

    @classmethod
    def default_hyperparameters(cls) -> dict[str, Any]:
        """Every hyper-parameter of the optimizer with its default."""
        parameters = list(inspect.signature(cls.__init__).parameters.values())[2:]
        return {p.name: p.default for p in parameters}

    @classmethod
    def hyperparameter_types(cls) -> dict[str, Any]:
        """The annotated type of every hyper-parameter."""
        types = get_type_hints(cls.__init__)
        return {key: types[key] for key in cls.default_hyperparameters()}

    @classmethod
    def check_hyperparameters(cls, hyper: Mapping[str, Any]) -> None:
        """Check values by themselves; what is missing counts as its default.

        Args:
            hyper: Hyper-parameters by name.

        Raises:
            TypeError: A name is unknown or a value has the wrong type.
            ValueError: A value is out of range.
        """
        defaults = cls.default_hyperparameters()
        for key in hyper:
            if key not in defaults:
                known = ", ".join(defaults)
                raise TypeError(f"{cls.__name__} has no argument {key!r}{nearest(key, defaults)} (it has: {known})")
        full = {**defaults, **hyper}
        check_lr(full["lr"])
        if "betas" in full:
            check_betas(full["betas"])
        if "eps" in full:
            check_eps(full["eps"])
        check_weight_decay(full["weight_decay"])
        check_choice("dense_state", full["dense_state"], DENSE_STATES)
        check_choice("weight_rounding", full["weight_rounding"], WEIGHT_ROUNDINGS)
        cls.check_own(full)

    @classmethod
    def check_own(cls, hyper: Mapping[str, Any]) -> None:
        """Check the hyper-parameters that only this optimizer has."""
        raise NotImplementedError

    @classmethod
    def compresses(cls, shape: Sequence[int], group: Mapping[str, Any]) -> bool:
        """Whether a tensor of this shape takes the compressed rule in this group."""
        raise NotImplementedError

    @classmethod
    def needs_one_process(cls, group: Mapping[str, Any]) -> str | None:
        """Why a group cannot be trained by several processes, as a clause for a message; None if it can."""
        return None

    @classmethod
    def view_for_update(cls, tensor: Tensor) -> Tensor:
        """The form in which the update function takes parameter and gradient; a copy where there is no such view."""
        return tensor if tensor.dim() == 2 else tensor.reshape(tensor.shape[0], -1)

    @classmethod
    def state_specs(cls, param: Tensor, group: Mapping[str, Any]) -> dict[str, TensorSpec]:
        """Describe the state of a parameter in a group: what will be, or was, allocated for it.

        Args:
            param: The parameter; only its shape and dtype matter.
            group: Its group, or any mapping with the hyper-parameters in :attr:`state_keys`.

        Returns:
            Specs by state key.
        """
        if not cls.compresses(param.shape, group):
            return adamw_state(param.shape, param.dtype, dense_state=group["dense_state"])
        return cls.state_function(param.shape, param.dtype, **{key: group[key] for key in cls.state_keys})

    @classmethod
    def shared_specs(cls, groups: Sequence[Mapping[str, Any]]) -> dict[str, TensorSpec]:
        """Describe the state that belongs to all parameters together, ``optimizer.state["shared"]``.

        Args:
            groups: The parameter groups, with ``"params"``.

        Returns:
            Specs by state key; empty for methods that treat each tensor by itself.
        """
        return {}

    @classmethod
    def step_temporaries(cls, param: Tensor, group: Mapping[str, Any], *, first: bool) -> StepTemporaries | None:
        """Describe what ``step()`` allocates besides state while it updates a parameter.

        Args:
            param: The parameter; its shape, dtype and device matter.
            group: Its group, or any mapping with the hyper-parameters in :attr:`state_keys`.
            first: Whether it is the parameter's first update.

        Returns:
            The description; None if the optimizer does not describe it.
        """
        if not cls.compresses(param.shape, group):
            return dense_temporaries(param, group)
        if cls.temporaries_function is None:
            return None
        hyper = {key: group[key] for key in cls.state_keys}
        described = cls.temporaries_function(param.shape, param.dtype, first=first, device=param.device, **hyper)
        if not rounds_stochastically(param, group):
            return described
        own = max(described.own, rounding_bytes(param.numel(), param.device))
        return replace(described, shared={**described.shared, "weight": 4 * param.numel()}, own=own)

    @classmethod
    def batch_temporaries(cls, groups: Sequence[Mapping[str, Any]]) -> StepTemporaries:
        """Describe what a step allocates for tensors that it updates together rather than one after the other.

        Args:
            groups: The parameter groups, with ``"params"``.

        Returns:
            The description.
        """
        together = StepTemporaries()
        for group in groups:
            dense = [param for param in group["params"] if not cls.compresses(param.shape, group)]
            together = together.largest(dense_batch_temporaries(dense, group))
        return together

    # --------------------------------------------------------------------------------------------- construction

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, with its own values of any hyper-parameter.

        Args:
            param_group: ``"params"`` and overrides, as in torch.

        Raises:
            TypeError: A parameter is no float32, bfloat16 or float16 tensor, or an override has the wrong type.
            ValueError: A parameter is not a leaf, or an override is out of range or has no effect.
            ImportError: ``dense_state="8bit"`` without bitsandbytes.
        """
        for key in param_group:
            hint = nearest(key, self.defaults, cutoff=0.75) if key not in self.defaults else ""
            if hint:
                raise TypeError(f"a parameter group has the unknown key {key!r}{hint}")
        param_group = {key: as_plain(value) if key in self.defaults else value for key, value in param_group.items()}
        self.check_hyperparameters({key: param_group.get(key, value) for key, value in self.defaults.items()})
        # torch itself turns generators into lists; it must not find them used up.
        params = param_group["params"]
        params = [params] if isinstance(params, Tensor) else params if isinstance(params, set) else list(params)
        for item in params:
            if isinstance(item, tuple):
                check_parameter(item[1], f"parameter {item[0]!r}", type(self).__name__)
            elif isinstance(item, Tensor):
                check_parameter(item, "a parameter", type(self).__name__)
        tensors = [each for each in (p[1] if isinstance(p, tuple) else p for p in params) if isinstance(each, Tensor)]
        if self._complete and "weight_rounding" in param_group:
            check_rounding([{**param_group, "params": tensors}])
        if param_group.get("dense_state", self.defaults["dense_state"]) == "8bit":
            require_bitsandbytes(tensors)
        super().add_param_group({**param_group, "params": params})

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            for key, value in self.defaults.items():
                group.setdefault(key, value)

    # ------------------------------------------------------------------------------------------------------ step

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update every parameter that has a gradient.

        Args:
            closure: Recomputes the loss and the gradients, as in torch.

        Returns:
            What the closure returned.

        Raises:
            RuntimeError: A gradient is sparse or complex. Nothing has been updated then.
            NotImplementedError: A parameter is a sharded DTensor, which its group's settings do not serve. Nothing has
                been updated then.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._update_all_()
        return loss

    def _update_all_(self) -> None:
        """Update every parameter that has a gradient."""
        params = [(param, group) for group in self.param_groups for param in group["params"]]
        live = [(index, param, group) for index, (param, group) in enumerate(params) if param.grad is not None]
        for _, param, group in live:
            check_gradient(self, param, group)
        with full_precision():
            compressed: list[PendingUpdate] = []
            dense: dict[int, list[PendingUpdate]] = {}
            changed: list[Tensor] = []
            for index, param, group in live:
                update = self._prepare(param, group, index)
                if update is None:
                    continue
                changed.append(param)
                if self.compresses(param.shape, group):
                    compressed.append(update)
                else:
                    dense.setdefault(id(group), []).append(update)
            _tell_autograd(changed)
            self._update_compressed_(compressed, [job for updates in dense.values() for job in dense_jobs(updates)])

    def _prepare(self, param: Tensor, group: dict[str, Any], index: int) -> PendingUpdate | None:
        """Allocate the state of a tensor at its first gradient and count the update; None if there is none to do.

        Wrappers probe fresh optimizers with lr = 0 and zero gradients to learn their state's layout
        (``torch.distributed.checkpoint``): that allocates, but is no update and leaves no trace in the run.
        ``index`` is the parameter's place among all of them.
        """
        grad, state = param.grad, self._state_of(param, group)
        assert grad is not None
        step = state["step"] + 1
        if step == 1 and self._is_probe(param, group):
            return None
        state["step"] = step
        seed = step * _MAX_PARAMETERS + index if rounds_stochastically(param, group) else None
        return PendingUpdate(param.detach(), grad.detach() if grad.requires_grad else grad, state, group, seed)

    def _is_probe(self, param: Tensor, group: Mapping[str, Any]) -> bool:
        """Whether a first gradient is there only for the layout of the state; see :meth:`_prepare`."""
        return group["lr"] == 0 and param.grad is not None and not param.grad.any()

    def _state_of(self, param: Tensor, group: Mapping[str, Any]) -> dict[str, Any]:
        """The state of a tensor, allocated if there is none yet."""
        state: dict[str, Any] = self.state[param]
        if not state:
            state["step"] = 0
            for key, spec in self.state_specs(param, group).items():
                # sharded as its parameter is, which then takes the dense rule
                sharded = hasattr(param, "placements")
                state[key] = torch.zeros_like(param, dtype=spec.dtype) if sharded else spec.allocate(param.device)
        return state

    def _update_one_(self, param: Tensor, group: dict[str, Any], index: int) -> None:
        """Update one tensor by itself; its gradient has been checked. ``index``: as for :meth:`_prepare`."""
        with full_precision():
            update = self._prepare(param, group, index)
            if update is None:
                return
            _tell_autograd([param])
            if self.compresses(param.shape, group):
                self._update_compressed_([update], [])
            else:
                dense_update_([update], workspace=Workspace())

    def _update_compressed_(self, updates: Sequence[PendingUpdate], beside: Sequence[Job]) -> None:
        """Apply the compressed rule, and do other jobs beside it; a method with global state overrides this."""
        run_jobs([*beside, *self._jobs(updates)])

    def _jobs(self, updates: Sequence[PendingUpdate]) -> list[Job]:
        """Cut the updates into jobs: a job each; a method that updates small tensors together overrides this."""
        return [Job([u.param], functools.partial(self._update_alone_, u)) for u in updates]

    def _update_alone_(self, update: PendingUpdate, workspace: Workspace) -> None:
        """Apply the compressed rule to one tensor."""
        group = update.group
        hyper = {key: group[key] for key in update_arguments(type(self).update_function)}
        with weight_to_update(update, workspace) as weight:
            view, grad = self.view_for_update(weight), self.view_for_update(update.grad)
            type(self).update_function(
                view, grad, update.state, step=update.state["step"], workspace=workspace, **hyper
            )
            if view is not weight and view.untyped_storage().data_ptr() != weight.untyped_storage().data_ptr():
                # A layout without such a view (a transposed or channels-last tensor): the update went to a copy.
                weight.copy_(view.view_as(weight))

    # ---------------------------------------------------------------------------------------------------- resume

    def state_dict(self) -> dict[str, Any]:
        """Return the state as torch does; what belongs to all parameters is in ``["param_groups"][0]["shared"]``."""
        return pack_shared(super().state_dict())

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict; tensors keep the dtypes in which they were saved.

        As in torch, the hyper-parameters of the groups are those that were saved.

        Args:
            state_dict: What :meth:`state_dict` gave, also after ``torch.load(weights_only=True)``.

        Raises:
            ValueError: It was written by another optimizer, for other parameters, or with another value of a
                hyper-parameter on which the shape of the state depends. Nothing has been changed then.
        """
        with exact_load(self):
            super().load_state_dict(state_dict)


def _tell_autograd(params: list[Tensor]) -> None:
    """Count a change, which fused and own kernels hide from autograd; a pass through an older graph must see it."""
    torch.autograd.graph.increment_version(params)


@functools.cache
def update_arguments(function: Callable[..., None]) -> list[str]:
    """Names of the hyper-parameters that an update function takes."""
    parameters = inspect.signature(function).parameters.values()
    return [p.name for p in parameters if p.kind is p.KEYWORD_ONLY and p.name not in ("step", "workspace")]
