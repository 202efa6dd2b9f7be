"""``error_feedback="grad"``: the error is kept between steps in the buffer of the gradient itself.

Between two steps ``state[param]["error"]`` holds ξ, and ``param.grad`` is None, so that nothing that zeroes gradients
reaches it. When a backward pass has accumulated a fresh gradient g, a hook adds g to ξ and makes that buffer
``param.grad``; the fresh one is freed, so that there is one buffer a parameter, and for a moment one gradient. Further
backward passes of the step accumulate into the buffer. ``step()`` uses g + ξ, leaves the new ξ in its place, and sets
``param.grad`` to None.

Once g is in, ξ alone cannot be had back. So the hook notes that it has acted, and whatever would go on without this
gradient, or act on it before all of it is there, is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from hf_lowmem_optim.optimizers.base import LowMemoryOptimizer
from hf_lowmem_optim.optimizers.hooks import GradientHooks, is_hooked, refuse_several_processes
from hf_lowmem_optim.optimizers.parameters import check_gradient, describe_parameter

__all__ = ["ErrorInGradient"]

_INSTEAD = "use another error_feedback, such as '4bit'"
_LOST = (
    "with error_feedback='grad' a gradient that was added to the error cannot be taken out again. Call step() after "
    "every backward pass that has reached it; or abandon_step(), which leaves it in the error, for later steps to use; "
    f"or {_INSTEAD}"
)


class ErrorInGradient(LowMemoryOptimizer):
    """Base of the optimizers that offer ``error_feedback="grad"``, for all parameters or for some groups.

    With that setting, for the parameters that are compressed:

    - ``param.grad`` holds gradient plus error between backward pass and ``step()``, and clipping by norm and a logged
      norm see that; ``step()`` sets it to None, so that a tensor which the next backward pass does not reach is skipped
      and keeps its error. The buffer stays in memory also where gradients would be freed.
    - ξ is in the parameter's dtype, and so is the sum g + ξ.
    - A gradient set by hand is left alone, and added to the error in ``step()``.
    - A gradient cannot be dropped: ``zero_grad()`` between backward pass and ``step()``, and whatever else replaces or
      zeroes ``param.grad`` there, raises ``RuntimeError``, at once or in the next backward pass or ``step()``. What is
      written into it in place right before ``step()`` counts as clipping, zeros too. Before the first step there is no
      error, and nothing is refused.
    - A gradient scaler (fp16), several processes (DDP, FSDP), layer-wise mode and ``backward(create_graph=True)`` are
      refused.
    """

    #: None as long as no group has the setting.
    _error_hooks: GradientHooks | None = None
    #: Version of the error's buffer after the hook, for the parameters that it has acted on in this step.
    _added: dict[int, int]
    #: Index of the group of each watched parameter.
    _error_group: dict[int, int]

    # --------------------------------------------------------------------------------------------- construction

    @classmethod
    def keeps_error_in_gradient(cls, param: Tensor, group: Mapping[str, Any]) -> bool:
        """Whether the error of a parameter in a group is kept in its gradient."""
        return group["error_feedback"] == "grad" and cls.compresses(param.shape, group)

    @classmethod
    def needs_one_process(cls, group: Mapping[str, Any]) -> str | None:
        """Why a group cannot be trained by several processes; None if it can."""
        if group["error_feedback"] != "grad":
            return super().needs_one_process(group)
        return "error_feedback='grad' uses a gradient before the processes have averaged it"

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group and watch its parameters where the error is kept in the gradient.

        Args:
            param_group: ``"params"`` and overrides, as in torch.

        Raises:
            NotImplementedError: The error is kept in the gradient, and there are several processes.
            TypeError: As in :class:`~hf_lowmem_optim.optimizers.base.LowMemoryOptimizer`.
            ValueError: As there.
        """
        super().add_param_group(param_group)
        self._watch_errors(len(self.param_groups) - 1)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if self._error_hooks is None:  # a copy, made without __init__
            for index in range(len(self.param_groups)):
                self._watch_errors(index)

    @property
    def has_errors_in_gradients(self) -> bool:
        """Whether the error of any parameter is kept in its gradient."""
        return self._error_hooks is not None

    def _watch_errors(self, index: int) -> None:
        """Watch the parameters of a group whose error is kept in the gradient."""
        group = self.param_groups[index]
        params = [param for param in group["params"] if self.keeps_error_in_gradient(param, group)]
        if not params:
            return
        refuse_several_processes("error_feedback='grad'", _INSTEAD, params)
        if self._error_hooks is None:
            self._error_hooks, self._added, self._error_group = GradientHooks(self, "_add_to_error"), {}, {}
        self._error_group.update((id(param), index) for param in params)
        self._error_hooks.add(params)

    # ------------------------------------------------------------------------------------------------- gradients

    def _add_to_error(self, param: Tensor) -> None:
        """Put a gradient that a backward pass has accumulated into the error's buffer; autograd calls this."""
        state = self.state.get(param)
        if not state or state["step"] == 0:
            return  # there is no error yet
        if id(param) in self._added:
            # autograd accumulated into the buffer, which counts as one change of it
            self._check_added(param, changes=1)
            self._added[id(param)] = state["error"]._version
            return
        group = self._group_with(param)
        self._check_fresh(param, group)
        if param.grad is not None and param.grad.requires_grad:
            raise RuntimeError(
                f"{describe_parameter(param, group)} has a gradient that is part of a graph (create_graph=True), which "
                f"error_feedback='grad' would cut off; {_INSTEAD}"
            )
        self._merge(param, state["error"])

    def _merge(self, param: Tensor, error: Tensor) -> None:
        """ξ ← ξ + g, in the buffer that becomes the gradient."""
        buffer = error.view(param.shape)
        buffer.add_(param.grad)  # type: ignore[arg-type]
        param.grad = buffer
        self._added[id(param)] = error._version

    def _check_fresh(self, param: Tensor, group: Mapping[str, Any]) -> None:
        """Refuse a gradient that cannot be added to the error."""
        check_gradient(self, param, group)
        grad = param.grad
        assert grad is not None
        if grad.dtype != param.dtype:
            raise RuntimeError(
                f"{describe_parameter(param, group)} is {param.dtype} with a gradient of {grad.dtype}; "
                f"error_feedback='grad' needs both to be one buffer: {_INSTEAD}"
            )

    def _check_added(self, param: Tensor, *, changes: int | None = None) -> None:
        """Check that the gradient to which the error was added is still there, and was changed as often as said."""
        error = self.state[param]["error"]
        is_there = param.grad is not None and param.grad.data_ptr() == error.data_ptr()
        if is_there and (changes is None or error._version == self._added[id(param)] + changes):
            return
        what = "zeroed or changed in place between two backward passes of a step" if is_there else "replaced or dropped"
        raise RuntimeError(
            f"the gradient of {describe_parameter(param, self._group_with(param))} was {what} after it had been added "
            f"to the error (a skipped step, zero_grad?); {_LOST}"
        )

    def _group_with(self, param: Tensor) -> dict[str, Any]:
        return self.param_groups[self._error_group[id(param)]]

    # ------------------------------------------------------------------------------------------------------ step

    def _update_all_(self) -> None:
        """Add the gradients that no hook has seen to their errors, update, and leave the error in the buffers."""
        if self._error_hooks is None:
            super()._update_all_()
            return
        used = self._collect_errors()
        super()._update_all_()
        for param in used:
            param.grad = None
        self._added.clear()

    def _collect_errors(self) -> list[Tensor]:
        """Bring gradient and error together; return the parameters whose gradient this is."""
        used = [
            (param, group)
            for group in self.param_groups
            for param in group["params"]
            if (param.grad is not None or id(param) in self._added) and self.keeps_error_in_gradient(param, group)
        ]
        refuse_several_processes("error_feedback='grad'", _INSTEAD, [param for param, _ in used])
        # all checks come before the first change
        for param, group in used:
            if id(param) in self._added:
                self._check_added(param)
            else:
                self._check_fresh(param, group)
        for param, group in used:
            if id(param) in self._added:
                continue
            self._merge(param, self._state_of(param, group)["error"])
            if not is_hooked(param):  # frozen until now
                assert self._error_hooks is not None
                self._error_hooks.add([param])
        return [param for param, _ in used]

    def abandon_step(self) -> int:
        """Go on without ``step()`` after a backward pass that failed half-way: its gradients stay in the errors.

        Returns:
            The number of parameters whose gradient is in the error; later steps will use it. Other gradients are
            dropped.
        """
        used = 0 if self._error_hooks is None else len(self._added)
        if self._error_hooks is not None:
            self._added.clear()
        for group in self.param_groups:
            for param in group["params"]:
                param.grad = None
        return used

    def remove_hooks(self) -> None:
        """Stop adding gradients to errors during the backward pass; ``step()`` does it then."""
        super().remove_hooks()
        if self._error_hooks is not None:
            self._error_hooks.remove()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear what gradients there are, as in torch.

        Raises:
            RuntimeError: The error is in some of them.
        """
        self._refuse_if_added("zero_grad() would drop a gradient: ")
        super().zero_grad(set_to_none)

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """What a gradient scaler asks first."""
        if self._error_hooks is not None:
            raise RuntimeError(
                "error_feedback='grad' cannot be stepped by a gradient scaler (fp16): the scaled gradient was added to "
                f"the error, which is not scaled. Train in bfloat16 (bf16=True), or {_INSTEAD}"
            )
        return False

    # ---------------------------------------------------------------------------------------------------- resume

    def state_dict(self) -> dict[str, Any]:
        """Return the state as torch does, the error included.

        Raises:
            RuntimeError: A step has begun: what would be saved is error plus gradient.
        """
        self._refuse_if_added("the state cannot be saved between backward pass and step(): ")
        return super().state_dict()

    def __getstate__(self) -> dict[str, Any]:
        self._refuse_if_added("the optimizer cannot be copied between backward pass and step(): ")
        return super().__getstate__()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict; a step that has begun is given up, and its gradients dropped.

        Args:
            state_dict: What :meth:`state_dict` gave.

        Raises:
            ValueError: As in :class:`~hf_lowmem_optim.optimizers.base.LowMemoryOptimizer`.
        """
        super().load_state_dict(state_dict)
        if self._error_hooks is None:
            return
        for group in self.param_groups:
            for param in group["params"]:
                if id(param) in self._added:
                    param.grad = None
        self._added.clear()

    def _refuse_if_added(self, what: str) -> None:
        if self._error_hooks is not None and self._added:
            raise RuntimeError(f"{what}{_LOST}")
