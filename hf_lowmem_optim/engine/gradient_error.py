"""``error_feedback="grad"``: the error is kept between steps in the buffer of the gradient itself.

Between two steps ``state[param]["error"]`` holds ξ, in the parameter's dtype, and ``param.grad`` is None, so that
nothing that zeroes gradients reaches it. When a backward pass has accumulated a gradient g, a hook adds g to ξ, makes
that buffer ``param.grad``, and frees g; further backward passes of the step accumulate into the buffer. ``step()`` uses
g + ξ, leaves the new ξ in its place, and sets ``param.grad`` to None. A gradient set by hand is added in ``step()``.

So clipping by norm and a logged norm see gradient plus error, a tensor that a backward pass does not reach keeps its
error, and the buffer stays in memory also where gradients would be freed.

Once g is in, ξ alone cannot be had back. So the hook notes that it has acted, and a gradient can no longer be dropped:
``zero_grad()`` between backward pass and ``step()``, and whatever else replaces or zeroes ``param.grad`` there, raises
``RuntimeError``, at once or in the next backward pass or ``step()``. What is written into it in place right before
``step()`` counts as clipping, zeros too. Before the first step there is no error, and none of that is refused. A
gradient scaler (fp16), several processes (DDP, FSDP), layer-wise mode and ``backward(create_graph=True)`` are refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from hf_lowmem_optim.engine.backward import BackwardMode, Host
from hf_lowmem_optim.engine.checks import check_tensor, describe_parameter
from hf_lowmem_optim.engine.hooks import is_hooked, refuse_several_processes
from hf_lowmem_optim.engine.method import Method

__all__ = ["GradientErrors"]

_INSTEAD = "use another error_feedback, such as '4bit'"
_LOST = (
    "with error_feedback='grad' a gradient that was added to the error cannot be taken out again. Call step() after "
    "every backward pass that has reached it; or abandon_step(), which leaves it in the error, for later steps to use; "
    f"or {_INSTEAD}"
)


class GradientErrors(BackwardMode):
    """Adds gradients to the errors of one optimizer, for all or for some groups; see the head of this file."""

    def __init__(self, host: Host) -> None:
        super().__init__(host)
        # version of the error's buffer after the hook, for the parameters that it has acted on in this step
        self._added: dict[int, int] = {}
        # index of the group of each watched parameter
        self._group_index: dict[int, int] = {}
        self._used: list[Tensor] = []

    @staticmethod
    def serves(method: Method, group: Mapping[str, Any]) -> bool:
        """Return whether a group keeps an error in its gradients."""
        grad = group.get("error_feedback") == "grad"
        return grad and any(method.compresses(param.shape, group) for param in group["params"])

    def watch(self, index: int) -> None:
        """Watch the parameters of a group whose error is kept in the gradient; refuse several processes."""
        group = self.host.param_groups[index]
        params = [param for param in group["params"] if self._keeps_error(param, group)]
        if not params:
            return
        refuse_several_processes("error_feedback='grad'", _INSTEAD, params)
        self._group_index.update((id(param), index) for param in params)
        self.hooks.add(params)

    def _keeps_error(self, param: Tensor, group: Mapping[str, Any]) -> bool:
        return group["error_feedback"] == "grad" and self.host.method.compresses(param.shape, group)

    # ------------------------------------------------------------------------------------------------- gradients

    def on_gradient(self, param: Tensor) -> None:
        """Put a gradient that a backward pass has accumulated into the error's buffer."""
        state = self.host.state.get(param)
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
        check_tensor(param, group, None, rule=(True, {}), optimizer=self.host)
        grad = param.grad
        assert grad is not None
        if grad.dtype != param.dtype:
            raise RuntimeError(
                f"{describe_parameter(param, group)} is {param.dtype} with a gradient of {grad.dtype}; "
                f"error_feedback='grad' needs both to be one buffer: {_INSTEAD}"
            )

    def _check_added(self, param: Tensor, *, changes: int | None = None) -> None:
        """Check that the gradient to which the error was added is still there, and was changed as often as said."""
        error = self.host.state[param]["error"]
        is_there = param.grad is not None and param.grad.data_ptr() == error.data_ptr()
        if is_there and (changes is None or error._version == self._added[id(param)] + changes):
            return
        what = "zeroed or changed in place between two backward passes of a step" if is_there else "replaced or dropped"
        raise RuntimeError(
            f"the gradient of {describe_parameter(param, self._group_with(param))} was {what} after it had been added "
            f"to the error (a skipped step, zero_grad?); {_LOST}"
        )

    def _group_with(self, param: Tensor) -> dict[str, Any]:
        return self.host.param_groups[self._group_index[id(param)]]

    # ------------------------------------------------------------------------------------------------------ step

    def before_step(self) -> None:
        """Bring gradients and errors together."""
        used = [
            (param, group)
            for group in self.host.param_groups
            for param in group["params"]
            if (param.grad is not None or id(param) in self._added) and self._keeps_error(param, group)
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
            self._merge(param, self.host._prepared(param, group)[2]["error"])
            if not is_hooked(param):  # frozen until now
                self.hooks.add([param])
        self._used = [param for param, _ in used]

    def after_step(self) -> None:
        """Leave the errors in their buffers, which are nobody's gradient now."""
        for param in self._used:
            param.grad = None
        self._used = []
        self._added.clear()

    def abandon_step(self) -> int:
        """Leave the gradients of a step that failed in the errors, for later steps; return how many there are."""
        used = len(self._added)
        self._added.clear()
        return used

    def check_zero_grad(self) -> None:
        """Refuse to drop gradients that are in the errors already."""
        self.check_save("zero_grad() would drop a gradient: ")

    def check_save(self, what: str) -> None:
        """Refuse to save or copy error plus gradient."""
        if self._added:
            raise RuntimeError(f"{what}{_LOST}")

    def refuse_scaler(self) -> None:
        """Refuse a gradient scaler."""
        raise RuntimeError(
            "error_feedback='grad' cannot be stepped by a gradient scaler (fp16): the scaled gradient was added to "
            f"the error, which is not scaled. Train in bfloat16 (bf16=True), or {_INSTEAD}"
        )

    def after_load(self) -> None:
        """Give a step up that has begun, and drop its gradients."""
        for group in self.host.param_groups:
            for param in group["params"]:
                if id(param) in self._added:
                    param.grad = None
        self._added.clear()
