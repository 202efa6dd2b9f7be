"""Error-feedback-compressed preconditioners (EFCP, arXiv 2306.06098): what M-FAC and GGT, sparse or low-rank, share.

Over all compressed tensors of the optimizer as one vector (``scope="model"``) or over each by itself (``"tensor"``),
with the window's rows as the m × D matrix G:

1. acc ← ξ + g
2. c ← C(acc);  ξ ← acc − c
3. row (t − 1) mod m of G ← c
4. row and column (t − 1) mod m of GGᵀ ← G c
5. u ← P⁻¹c = Gᵀw, with the weights w from GGᵀ alone (``preconditioners/``)
6. vel ← μ·vel + u                                            if μ > 0
7. W ← W·(1 − lr·weight_decay) − lr·(vel or u)

Lines 1 to 3 are each optimizer's own. Lines 4 and 5 see the tensors only through inner products, which add up.

| letter | state key             | shape  | dtype | bytes per parameter            |
|--------|-----------------------|--------|-------|--------------------------------|
| GGᵀ    | `gram`                | (m, m) | fp64  | 8·m² in all, or for each tensor |
| vel    | `velocity`            | W      | fp32  | 4 if μ > 0                     |
| t      | `step`                |        | int   |                                |

With ``scope="model"`` GGᵀ and t are in ``optimizer.state["shared"]``; a tensor that has no gradient in a step counts as
zero in that row and is not moved. With ``scope="tensor"`` they are in the tensor's own state.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, cast

import torch
from torch import Tensor

from hf_lowmem_optim.compression.rounding import rounding_bytes
from hf_lowmem_optim.compression.window import SparseRows, Window
from hf_lowmem_optim.compression.workspace import Workspace
from hf_lowmem_optim.kernels.sparse_steps import SparseSteps, SparseTensor, StepRule, sparse_steps
from hf_lowmem_optim.kernels.sparse_window import window_descend_
from hf_lowmem_optim.kernels.workers import one_thread
from hf_lowmem_optim.optimizers.adamw import adamw_state
from hf_lowmem_optim.optimizers.base import LowMemoryOptimizer
from hf_lowmem_optim.optimizers.dense import rounds_stochastically
from hf_lowmem_optim.optimizers.hyperparameters import (
    check_choice,
    check_positive,
    check_positive_int,
    check_unit_interval,
)
from hf_lowmem_optim.optimizers.pending import PendingUpdate, weight_to_update
from hf_lowmem_optim.optimizers.resume import SHARED, shared_device
from hf_lowmem_optim.optimizers.side_by_side import Job, run_jobs
from hf_lowmem_optim.optimizers.together import split_together
from hf_lowmem_optim.state import StepTemporaries, TensorSpec

__all__ = [
    "SCOPES",
    "PreconditionedOptimizer",
    "descent_temporaries",
    "gram_spec",
    "preconditioner_state",
    "system_bytes",
]

SCOPES = ("model", "tensor")
#: Matrices of the size of GGᵀ that solving a system takes: scaled copy, factor, their temporaries.
_SYSTEM_MATRICES = 3
_ERROR_FEEDBACK = ("fp32", "bf16", "8bit", "4bit")


def gram_spec(window: int) -> TensorSpec:
    """Describe the Gram matrix of a window of ``window`` rows."""
    return TensorSpec((window, window), torch.float64, "gram")


def preconditioner_state(shape: Sequence[int], *, window: int, momentum: float, scope: str) -> dict[str, TensorSpec]:
    """Describe the part of a compressed tensor's state that does not depend on the compression.

    Args:
        shape: Shape of the parameter.
        window: Rows of the window.
        momentum: Heavy-ball momentum; 0 needs no state.
        scope: One of :data:`SCOPES`.

    Returns:
        Specs by state key.
    """
    specs = {}
    if momentum > 0:
        specs["velocity"] = TensorSpec(tuple(shape), torch.float32, "velocity")
    if scope == "tensor":
        specs["gram"] = gram_spec(window)
    return specs


def descent_temporaries(shape: Sequence[int], dtype: torch.dtype) -> dict[str, int]:
    """Describe the buffers of lines 5 to 7, in bytes: u, and a float32 copy of a narrower parameter.

    Args:
        shape: Shape of the parameter.
        dtype: Dtype of the parameter.

    Returns:
        Bytes by the buffer's name.
    """
    dense = 4 * math.prod(shape)
    return {"direction": dense} if dtype == torch.float32 else {"direction": dense, "parameter": dense}


def system_bytes(window: int) -> int:
    """Bytes that solving the system of a window takes."""
    return _SYSTEM_MATRICES * gram_spec(window).nbytes


class PreconditionedOptimizer(LowMemoryOptimizer):
    """Base of the preconditioned optimizers: see the head of this file.

    Attributes:
        compress_function: ``(grad, state, *, row, step, group, workspace) -> None``: lines 1 to 3 for one tensor.
        sparse_function: ``(update) -> SparseTensor``: a tensor for lines 1 to 7 in the compiled loops of
            ``kernels/sparse_steps``, which take all tensors together; None where rows are not sparse.
        window_function: ``(state, shape, group) -> Window``: the tensor's window on the tensors of its state.
        weights_function: ``(gram, newest, *, damping) -> w``: line 5.
        shared_keys: Hyper-parameters on which all compressed groups must agree.
    """

    compress_function: ClassVar[Callable[..., None]]
    sparse_function: ClassVar[Callable[..., SparseTensor] | None] = None
    window_function: ClassVar[Callable[..., Window]]
    weights_function: ClassVar[Callable[..., Tensor]]
    shared_keys: ClassVar[tuple[str, ...]] = ("window", "damping", "scope")
    replaces_adamw: ClassVar[bool] = False

    # ---------------------------------------------------------------------------------------------- description

    @classmethod
    def check_own(cls, hyper: Mapping[str, Any]) -> None:
        """Check what all preconditioned optimizers have."""
        check_positive_int("window", hyper["window"])
        check_positive("damping", hyper["damping"])
        check_unit_interval("momentum", hyper["momentum"])
        check_choice("scope", hyper["scope"], SCOPES)
        check_choice("error_feedback", hyper["error_feedback"], _ERROR_FEEDBACK)

    @classmethod
    def compresses(cls, shape: Sequence[int], group: Mapping[str, Any]) -> bool:
        """Whether a tensor of this shape is in the preconditioner: every tensor of a group that did not opt out."""
        return group[cls.dense_key] is not None and 0 not in shape

    @classmethod
    def state_specs(cls, param: Tensor, group: Mapping[str, Any]) -> dict[str, TensorSpec]:
        """Describe the state of a parameter in a group; ``momentum`` may change in a run, the velocity follows it."""
        if not cls.compresses(param.shape, group):
            return adamw_state(param.shape, param.dtype, dense_state=group["dense_state"])
        return cls.state_function(param.shape, param.dtype, **{k: group[k] for k in (*cls.state_keys, "momentum")})

    @classmethod
    def step_temporaries(cls, param: Tensor, group: Mapping[str, Any], *, first: bool) -> StepTemporaries | None:
        """Describe what ``step()`` allocates besides state; with ``momentum`` it is not what it is without."""
        if not cls.compresses(param.shape, group) or cls.temporaries_function is None:
            return super().step_temporaries(param, group, first=first)
        hyper = {key: group[key] for key in (*cls.state_keys, "momentum")}
        described = cls.temporaries_function(param.shape, param.dtype, first=first, device=param.device, **hyper)
        if not rounds_stochastically(param, group):
            return described
        # the float32 copy that is rounded afterwards takes the place of that of line 7
        late = {name: nbytes for name, nbytes in described.late.items() if name != "parameter"}
        late_own = max(described.late_own, rounding_bytes(param.numel(), param.device))
        return replace(described, late={**late, "weight": 4 * param.numel()}, late_own=late_own)

    @classmethod
    def shared_specs(cls, groups: Sequence[Mapping[str, Any]]) -> dict[str, TensorSpec]:
        """Describe the Gram matrix of all parameters together; none if every tensor has its own."""
        for group in groups:
            if group["scope"] == "model" and any(cls.compresses(param.shape, group) for param in group["params"]):
                return {"gram": gram_spec(group["window"])}
        return {}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; it must agree with the others on :attr:`shared_keys`, unless it takes the dense rule.

        Args:
            param_group: ``"params"`` and overrides, as in torch.

        Raises:
            TypeError: A parameter is no float32, bfloat16 or float16 tensor, or an override has the wrong type.
            ValueError: A parameter is not a leaf, an override is out of range, or the group differs from another one
                in what they must share.
        """
        added = {**self.defaults, **param_group}
        self.check_hyperparameters({key: added[key] for key in self.defaults})
        self._check_agreement([*self.param_groups, added])
        super().add_param_group(param_group)

    @classmethod
    def _check_agreement(cls, groups: Sequence[Mapping[str, Any]]) -> None:
        """Refuse groups that cannot be in one preconditioner."""
        members = [group for group in groups if group[cls.dense_key] is not None]
        for group in members[1:]:
            for key in cls.shared_keys if members[0]["scope"] == "model" else ("scope",):
                if group[key] != members[0][key]:
                    raise ValueError(
                        f"{key}={group[key]!r} of a parameter group differs from {key}={members[0][key]!r} of another; "
                        f"all groups share one preconditioner. Give them the same {key}, opt the group out with "
                        f'{cls.dense_key}=None, or build {cls.__name__} with scope="tensor"'
                    )

    # ------------------------------------------------------------------------------------------------------ step

    def _update_compressed_(self, updates: Sequence[PendingUpdate], beside: Sequence[Job]) -> None:
        """Apply lines 1 to 7 to the tensors of this step: all in one system, or each in its own."""
        run_jobs(beside)
        if not updates:
            return
        self._check_agreement([update.group for update in updates])
        group, workspace = updates[0].group, Workspace()
        if group["scope"] == "tensor":

            def solve(update: PendingUpdate, workspace: Workspace) -> None:
                _check_window(update.state["gram"], update.group)
                self._solve_system_([update], update.state["gram"], update.state["step"], workspace)

            run_jobs([Job([update.param], functools.partial(solve, update)) for update in updates], workspace)
            return
        # torch, too, keeps what belongs to no parameter under a string
        shared = cast("dict[Any, dict[str, Any]]", self.state)[SHARED]
        if not shared:
            gram = gram_spec(group["window"]).allocate(shared_device(self.param_groups))
            shared.update(step=0, gram=gram)
        _check_window(shared["gram"], group)
        shared["step"] += 1
        self._clear_absent_(updates, (shared["step"] - 1) % group["window"])
        self._solve_system_(updates, shared["gram"], shared["step"], workspace)

    def _clear_absent_(self, updates: Sequence[PendingUpdate], row: int) -> None:
        """Set the row to zero in the windows of tensors that have no gradient in this step."""
        present = {id(update.state) for update in updates}
        for group in self.param_groups:
            for param in group["params"]:
                # `get`, because looking must not create entries
                state = self.state.get(param)
                if state and id(state) not in present and self.compresses(param.shape, group):
                    self._window(state, param, group).clear_(row)

    def _solve_system_(self, updates: Sequence[PendingUpdate], gram: Tensor, step: int, workspace: Workspace) -> None:
        """Do step number ``step`` of the system of these tensors."""
        window, damping = updates[0].group["window"], updates[0].group["damping"]
        row = (step - 1) % window
        light, heavy, others = self._split(updates)
        products: dict[int, Tensor] = {}

        @functools.cache
        def window_of(index: int) -> Window:
            return self._window(updates[index].state, updates[index].param, updates[index].group)

        def compress(index: int, workspace: Workspace) -> None:
            """Lines 1 to 3: the tensor's part of row (t − 1) mod m of G ← c; and its part of line 4."""
            update = updates[index]
            type(self).compress_function(
                update.grad, update.state, row=row, step=update.state["step"], group=update.group, workspace=workspace
            )
            products[index] = window_of(index).gram_row(row)

        def descend(index: int, workspace: Workspace) -> None:
            """Lines 5 to 7, given the weights of the rows."""
            with weight_to_update(updates[index], workspace) as param:
                _descend_(param, updates[index], window_of(index), weights.to(param.device), workspace)

        def run(function: Callable[[int, Workspace], None], indices: Sequence[int]) -> None:
            run_jobs([Job([updates[i].param], functools.partial(function, i)) for i in indices], workspace)

        run(compress, others)
        steps = [self._steps([updates[i] for i in indices], row) for indices in (light, heavy) if indices]
        parts = [*(products[index] for index in others), *(each.topk_gram_row_(window) for each in steps)]
        with one_thread():
            weights = self._weights(gram, row, parts, damping=damping)
        if light:
            steps[0].descend_(weights.to(updates[light[0]].param.device))
        run(descend, [*heavy, *others])

    def _split(self, updates: Sequence[PendingUpdate]) -> tuple[list[int], list[int], list[int]]:
        """Indices of tensors that go through compiled loops together, to the end or (with momentum) up to line 4.

        The third list has all others.
        """
        if type(self).sparse_function is None:
            return [], [], list(range(len(updates)))
        together, others = split_together(updates)
        heavy = {index for index in together if updates[index].group["momentum"] > 0}
        return [index for index in together if index not in heavy], sorted(heavy), others

    def _steps(self, updates: Sequence[PendingUpdate], row: int) -> SparseSteps:
        """A step of tensors that go together."""
        sparse_function = type(self).sparse_function
        assert sparse_function is not None
        rules: dict[int, StepRule] = {}
        calls = []
        for update in updates:
            group = update.group
            if id(group) not in rules:
                rules[id(group)] = StepRule(row, group["lr"], group["weight_decay"])
            if group["momentum"] == 0:
                update.state.pop("velocity", None)
            calls.append((sparse_function(update), rules[id(group)]))
        return sparse_steps(calls)

    @classmethod
    def _weights(cls, gram: Tensor, row: int, parts: Sequence[Tensor], *, damping: float) -> Tensor:
        """Lines 4 and 5: write row and column of GGᵀ, and return the weights in u ← Gᵀw."""
        # line 4: G c is a sum over tensors
        total = parts[0] if len(parts) == 1 else torch.stack([part.to(gram.device) for part in parts]).sum(dim=0)
        gram[row] = total
        gram[:, row] = total
        # line 5
        return cls.weights_function(gram, row, damping=damping).to(torch.float32)

    def _window(self, state: Mapping[str, Tensor], param: Tensor, group: Mapping[str, Any]) -> Window:
        return type(self).window_function(state, param.shape, group)


def _check_window(gram: Tensor, group: Mapping[str, Any]) -> None:
    """Refuse a window of another length than the state's, before a step of it is counted."""
    if gram.shape[0] != group["window"]:
        raise ValueError(
            f"window={group['window']!r}, but the state has {gram.shape[0]} rows: it cannot change in a run"
        )


def _descend_(param: Tensor, update: PendingUpdate, rows: Window, weights: Tensor, workspace: Workspace) -> None:
    """Apply lines 5 to 7 to one tensor, given the weights of its rows."""
    group = update.group
    if isinstance(rows, SparseRows) and group["momentum"] == 0 and param.is_contiguous():
        # u needs no memory of its own
        update.state.pop("velocity", None)
        window_descend_(param, rows.entries, weights, lr=group["lr"], weight_decay=group["weight_decay"])
        return
    # line 5: u ← Gᵀw
    direction = workspace.take("direction", (param.numel(),), param.device).zero_()
    rows.combine_(direction, weights)
    direction = direction.view(param.shape)
    # line 6: vel ← μ·vel + u
    if group["momentum"] > 0:
        if "velocity" not in update.state:
            update.state["velocity"] = torch.zeros(param.shape, dtype=torch.float32, device=param.device)
        direction = update.state["velocity"].mul_(group["momentum"]).add_(direction)
    else:
        update.state.pop("velocity", None)
    # line 7: computed in float32, rounded once
    wide = param
    if param.dtype != torch.float32:
        wide = workspace.take("parameter", param.shape, param.device).copy_(param)
    if group["weight_decay"] != 0:
        wide.mul_(1 - group["lr"] * group["weight_decay"])
    wide.add_(direction, alpha=-group["lr"])
    if wide is not param:
        param.copy_(wide)
