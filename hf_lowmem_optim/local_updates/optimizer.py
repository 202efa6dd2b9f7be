"""Local updates: workers take K steps of any optimizer on their own data, then average, for slow links between them.

On each worker, t = 1, 2, …:

    W, m, v ← a step of the optimizer with the worker's own gradient
    t mod K = 0, on all workers:    W ← mean W          or the outer step: outer.py
    t mod K_m = 0:                  m ← mean m          K_m = K_v = K: local Adam
    t mod K_v = 0:                  v ← mean v          K_m = 3K, K_v = 6K: DES-LOC's periods
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.optim import Optimizer

from hf_lowmem_optim.engine.averaging import (
    SyncedOptimizer,
    average_,
    check_agreement,
    check_finite,
    fingerprint,
    num_workers,
    refuse_scaler,
    warn_of_equal_gradients,
)
from hf_lowmem_optim.engine.checks import describe_parameter
from hf_lowmem_optim.engine.optimizer import LowMemoryOptimizer
from hf_lowmem_optim.engine.options import COUNT, check_number
from hf_lowmem_optim.local_updates.outer import OuterNesterov

__all__ = ["LocalUpdates", "find_local_updates"]

_SAVED = "local_updates"
_PARAMS, _MOMENTS = "params", "moments"
_SENT = {"fp32": None, "bf16": torch.bfloat16}


class _Entry(NamedTuple):
    """A parameter that is trained, and its state by what becomes of it at a sync."""

    name: str
    param: Tensor
    averaged: dict[str, Tensor]
    numbers: dict[str, float]
    own: list[str]


class LocalUpdates(Optimizer):
    """Steps an optimizer on each worker alone, and averages the workers every K steps.

    Every worker must step equally often. Averaged are the weights, and the moments of the AdamW rule: of this package's
    optimizers those of tensors that take the dense rule, of torch's all state in the shape of its parameter. The rest
    stays each worker's own: windows of gradients, bases, errors, moments in a basis. Then no worker's state is that of
    all, and it cannot be saved.

    DistributedDataParallel would average gradients at every step all the same:
    :class:`~hf_lowmem_optim.LocalUpdatesCallback` switches that off in a Trainer,
    :func:`~hf_lowmem_optim.keep_gradients_local` in a loop of your own. One process alone has nobody to average with,
    and takes the optimizer's steps.

    Attributes:
        optimizer: The optimizer that steps.
        periods: Steps from one average to the next, of ``"params"``, and of ``"moments"`` or keys of the state.
        outer: The outer step, or None.
        outer_state: The outer step's state of each parameter.
        num_steps: Steps so far.
        communicated_bytes: Bytes that this worker has put into all-reduces of weights and moments: entries times bytes
            of each as sent.

    Args:
        optimizer: Any optimizer of this package but a layer-wise one, or of torch, such as ``torch.optim.AdamW``.
        sync_every: K; or a period for each of what is averaged:
            ``{"params": 16, "exp_avg": 48, "exp_avg_sq": 96}``. What is not named stays each worker's own.
        average: What is averaged every K steps; without ``"moments"`` the weights only.
        outer: The outer step, ``OuterNesterov(lr=0.7, momentum=0.9)``; None for the plain mean.
        sync_dtype: What is sent: ``"fp32"``, or ``"bf16"`` for half of the bytes. The latter needs an outer step, which
            sends displacements, unless the weights have 16 bits themselves.
        process_group: The workers; None for all processes.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: An argument is out of range, or the optimizer's weights or state cannot be averaged as asked.
        NotImplementedError: The optimizer steps during the backward pass.

    Example:
        >>> optimizer = LocalUpdates(torch.optim.AdamW(model.parameters(), lr=1e-3), sync_every=16)
    """

    def __init__(
        self,
        optimizer: Optimizer,
        sync_every: int | Mapping[str, int] = 16,
        *,
        average: Sequence[str] = ("params", "moments"),
        outer: OuterNesterov | None = None,
        sync_dtype: Literal["fp32", "bf16"] = "fp32",
        process_group: Any = None,
    ) -> None:
        if not isinstance(optimizer, Optimizer):
            raise TypeError(f"LocalUpdates steps a torch optimizer, not {optimizer!r}")
        if isinstance(optimizer, SyncedOptimizer):
            raise ValueError(f"{type(optimizer).__name__} averages its workers by itself: use it without LocalUpdates")
        if outer is not None and not isinstance(outer, OuterNesterov):
            raise TypeError(f"outer={outer!r} is a {type(outer).__name__}; it must be OuterNesterov(...) or None")
        if sync_dtype not in _SENT:
            raise ValueError(f"sync_dtype={sync_dtype!r} is unknown; it must be one of {', '.join(_SENT)}")
        self.optimizer = optimizer
        self.periods = _periods(sync_every, average)
        self.outer, self.sync_dtype, self.process_group = outer, sync_dtype, process_group
        self.num_steps = self.communicated_bytes = 0
        self.outer_state: dict[Tensor, dict[str, Tensor]] = {}
        self._synced = dict.fromkeys(self.periods, 0)
        self._begun = False
        self._check_groups()
        # what torch's constructor sets up beside groups and state, which are the optimizer's
        super().__setstate__({})

    # ---------------------------------------------------------------------------------------- as a torch optimizer

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]  # torch has an attribute
        """The optimizer's groups."""
        return self.optimizer.param_groups

    @property
    def state(self) -> Any:  # type: ignore[override]  # torch has an attribute
        """The optimizer's state."""
        return self.optimizer.state

    @property
    def defaults(self) -> dict[str, Any]:  # type: ignore[override]  # torch has an attribute
        """A copy of the optimizer's defaults."""
        return dict(self.optimizer.defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the optimizer, on all workers alike; see there."""
        self.optimizer.add_param_group(param_group)
        self._check_groups()
        self._begun = False

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients, as in torch."""
        self.optimizer.zero_grad(set_to_none=set_to_none)

    def __getstate__(self) -> dict[str, Any]:
        # without hooks, as in torch, and without a scheduler's step, which is bound to the optimizer that is copied
        return {key: v for key, v in vars(self).items() if key != "step" and not key.startswith("_optimizer_")}

    def __repr__(self) -> str:
        outer = "" if self.outer is None else f", outer={self.outer}"
        return f"LocalUpdates(sync_every={self.periods}{outer}) of {self.optimizer!r}"

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """What a gradient scaler asks first."""
        refuse_scaler(self.process_group)
        return False

    # ---------------------------------------------------------------------------------------------------- stepping

    @_disable_dynamo
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Take a step of the optimizer, and average what is due.

        Args:
            closure: Recomputes the loss and the gradients, as in torch.

        Returns:
            What the closure returned.

        Raises:
            ValueError: The workers are not set up alike, or no state has a key that ``sync_every`` names.
            RuntimeError: A worker has NaN or infinity in what is due. Nothing has been averaged then.
            NotImplementedError: A parameter is sharded.
        """
        first = not self._begun
        if first:
            self._begin()
        loss = self.optimizer.step(closure) if closure is not None else self.optimizer.step()
        self.num_steps += 1
        if first:
            self._check_first_step()
            self._begun = True
        self._sync([key for key, period in self.periods.items() if self.num_steps % period == 0])
        return loss

    @property
    def sync_every(self) -> int:
        """Steps after which everything has been averaged: the least common multiple of the periods."""
        return math.lcm(*self.periods.values())

    @property
    def steps_since_sync(self) -> int:
        """Steps since everything was averaged."""
        return self.num_steps - min(self._synced.values())

    def sync(self) -> None:
        """Average now what has not been averaged after the last step: at the end, or before a checkpoint.

        All workers must call it after the same step.

        Raises:
            ValueError: The workers have not had gradients of the same parameters.
            RuntimeError: A worker has NaN or infinity in what is due. Nothing has been averaged then.
        """
        self._sync([key for key, step in self._synced.items() if step < self.num_steps])

    @torch.no_grad()
    def _sync(self, due: Sequence[str]) -> None:
        if not due:
            return
        group, dtype, entries = self.process_group, _SENT[self.sync_dtype], list(self._entries())
        weights = {entry.name: entry.param for entry in entries if _PARAMS in due}
        moments = {
            f"{key} of {entry.name}": moment
            for entry in entries
            for key, moment in entry.averaged.items()
            if self._period_of(key) in due
        }
        if num_workers(group) > 1:
            lines = [f"{name} {tuple(tensor.shape)} {tensor.dtype}" for name, tensor in {**weights, **moments}.items()]
            lines += [f"{key}={number!r} of {entry.name}" for entry in entries for key, number in entry.numbers.items()]
            check_agreement("\n".join([f"step {self.num_steps}", *lines]), group)
            check_finite([*weights.values(), *moments.values()], [*weights, *moments], group)
        if self.outer is None:
            self.communicated_bytes += average_(list(weights.values()), group, dtype=dtype)
        else:
            self.communicated_bytes += self.outer.step_(list(weights.values()), self.outer_state, group, dtype)
        self.communicated_bytes += average_(list(moments.values()), group, dtype=dtype)
        self._synced.update(dict.fromkeys(due, self.num_steps))

    # ------------------------------------------------------------------------------------------------------ checks

    def _check_groups(self) -> None:
        """Refuse optimizers and options with which averages would be wrong."""
        inner, ours = self.optimizer, isinstance(self.optimizer, LowMemoryOptimizer)
        if isinstance(inner, LowMemoryOptimizer) and inner.method.layerwise:
            raise NotImplementedError(
                f"LocalUpdates averages in step(), but {type(inner).__name__} steps during the backward pass: use the "
                "normal mode"
            )
        for group in self.param_groups:
            params = [param for param in group["params"] if param.requires_grad]
            if ours and group["weight_rounding"] == "compensated" and any(p.dtype.itemsize == 2 for p in params):
                raise ValueError(
                    "weight_rounding='compensated' keeps 8 bits of each weight apart, which LocalUpdates does not "
                    "average with it. Use float32 weights, or weight_rounding='stochastic'"
                )
            if ours and group["dense_state"] == "8bit" and self.periods.keys() != {_PARAMS}:
                raise ValueError(
                    "dense_state='8bit' keeps moments in codes, which LocalUpdates does not average. Use "
                    "dense_state='fp32', or average=('params',) to leave each worker its own"
                )
            if self.sync_dtype == "bf16" and self.outer is None and any(p.dtype.itemsize > 2 for p in params):
                raise ValueError(
                    "sync_dtype='bf16' would round weights of more than 16 bits at every sync. Add "
                    "outer=OuterNesterov(1.0, 0.0), which sends what they moved instead, or use sync_dtype='fp32'"
                )

    def _begin(self) -> None:
        """Compare the workers, and take the anchors."""
        for entry in self._entries():
            if hasattr(entry.param, "placements"):
                raise NotImplementedError(
                    f"{entry.name} is sharded (DTensor): LocalUpdates averages whole weights, as under DDP"
                )
        if num_workers(self.process_group) > 1:
            check_agreement("\n".join(self._setup()), self.process_group)
        if self.outer is not None:
            for entry in self._entries():
                if entry.param not in self.outer_state:
                    self.outer_state[entry.param] = self.outer.start(entry.param)

    def _setup(self) -> Iterator[str]:
        """Yield, in lines, what must be equal on all workers from the start."""
        yield f"sync_every={self.periods}"
        yield f"outer={self.outer}, sync_dtype={self.sync_dtype}, {self.num_steps} steps so far"
        for index, group in enumerate(self.param_groups):
            options = {key: value for key, value in group.items() if key not in (_PARAMS, "param_names")}
            plain = {key: float(value) if isinstance(value, Tensor) else value for key, value in options.items()}
            yield f"{type(self.optimizer).__name__} with group {index}: {plain}"
        weights_are_equal = self._synced[_PARAMS] == self.num_steps
        for entry in self._entries():
            what = f"{entry.name} {tuple(entry.param.shape)} {entry.param.dtype}"
            # between two syncs a group may be added, of which no weight has been trained
            fresh = weights_are_equal or not self.optimizer.state.get(entry.param)
            yield f"{what}, bits adding up to {fingerprint(entry.param)}" if fresh else what

    def _check_first_step(self) -> None:
        """Look for the keys that are to be averaged, and at the gradients, which somebody may have averaged."""
        entries = list(self._entries())
        found = {key for entry in entries for key in entry.averaged}
        if unknown := self.periods.keys() - {_PARAMS, _MOMENTS} - found:
            raise ValueError(
                f"sync_every names {', '.join(sorted(unknown))}, but {type(self.optimizer).__name__} has "
                f"{', '.join(sorted(found)) or 'nothing'} to average beside the weights"
            )
        gradients = [entry.param.grad for entry in entries if entry.param.grad is not None]
        warn_of_equal_gradients(gradients, self.process_group)

    # ------------------------------------------------------------------------------------------------------- state

    def _entries(self) -> Iterator[_Entry]:
        """Yield the parameters that are trained; their state is there once they have had a gradient."""
        inner = self.optimizer
        for index, group in enumerate(self.param_groups):
            names = group.get("param_names") or [f"parameter {place}" for place in range(len(group["params"]))]
            for name, param in zip(names, group["params"], strict=True):
                if not param.requires_grad:
                    continue
                compressed = isinstance(inner, LowMemoryOptimizer) and inner.method.compresses(param.shape, group)
                entry = _Entry(f"{name} of group {index}", param, {}, {}, [])
                # `get`, because looking must not create entries
                for key, value in (inner.state.get(param) or {}).items():
                    one = isinstance(value, Tensor) and value.numel() == 1 < param.numel()
                    if key == "step" or (not compressed and (one or isinstance(value, (int, float)))):
                        entry.numbers[key] = float(value)
                    elif _has_mean(value) and value.shape == param.shape and not compressed:
                        entry.averaged[key] = value
                    elif value is not None:
                        entry.own.append(key)
                yield entry

    def _period_of(self, key: str) -> str | None:
        """Return under which name of the periods a key of the state is averaged; None for each worker's own."""
        return key if key in self.periods else _MOMENTS if _MOMENTS in self.periods else None

    def own_state(self) -> str | None:
        """Return, as a clause, what each worker has of its own; None if all are equal after a sync."""
        if isinstance(inner := self.optimizer, LowMemoryOptimizer):
            for group in self.param_groups:
                for param in group["params"]:
                    if param.requires_grad and inner.method.compresses(param.shape, group):
                        keys = ", ".join(inner.method.state_specs(param, group))
                        return f"{keys} of {describe_parameter(param, group)} is each worker's own"
        for entry in self._entries():
            if own := [*entry.own, *(key for key in entry.averaged if self._period_of(key) is None)]:
                return f"{', '.join(own)} of {entry.name} is each worker's own"
        return None

    def state_dict(self) -> dict[str, Any]:
        """Return the optimizer's state with the place in the schedule and the outer step's state.

        Raises:
            RuntimeError: The workers are not equal: between two syncs, or because each has state of its own.
        """
        if num_workers(self.process_group) > 1 and self.num_steps:
            if self.steps_since_sync:
                raise RuntimeError(
                    f"state cannot be saved {self.steps_since_sync} steps after a sync, when each worker has its own. "
                    f"Save after a multiple of sync_every={self.sync_every} steps, or call sync() on all workers before"
                )
            if (own := self.own_state()) is not None:
                raise RuntimeError(
                    f"state cannot be saved: {own}. Save the model only (save_only_model=True in TrainingArguments), "
                    "or use an optimizer all of whose state is averaged, such as AdamW"
                )
        outer = [dict(self.outer_state.get(param, {})) for group in self.param_groups for param in group["params"]]
        saved = {"num_steps": self.num_steps, "synced": dict(self._synced), "outer": outer}
        return {**self.optimizer.state_dict(), _SAVED: saved}

    def _fault_of_saved(self, saved: Any, params: Sequence[Tensor]) -> str | None:
        """Return what is wrong with the part of a state that LocalUpdates wrote, as a clause; None if nothing is."""
        if not isinstance(saved, Mapping) or saved.keys() != {"num_steps", "synced", "outer"}:
            return f"{_SAVED!r} must be a dict of num_steps, synced and outer"
        synced, states = saved["synced"], saved["outer"]
        if not isinstance(synced, Mapping) or not all(map(_is_count, [saved["num_steps"], *synced.values()])):
            return "'num_steps' and what 'synced' has must be ints from 0"
        if not isinstance(states, list) or len(states) != len(params):
            return f"'outer' must be a list for this optimizer's {len(params)} parameters"
        for param, state in zip(params, states, strict=True):
            if not state:
                continue
            if self.outer is None:
                return "it was saved with an outer step; build LocalUpdates with outer=OuterNesterov(...)"
            found = {key: (tuple(v.shape), v.dtype) for key, v in dict(state).items() if _has_mean(v)}
            expected = {key: (spec.shape, spec.dtype) for key, spec in self.outer.specs(param).items()}
            if found != expected or len(state) != len(found):
                return f"the outer step's state is that of other parameters: {found}, and this optimizer's {expected}"
        return None

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what :meth:`state_dict` gave; all workers load the same, and may be more or fewer than before.

        State that the optimizer saved without LocalUpdates begins the schedule anew.

        Raises:
            ValueError: The outer step's state does not fit, or the optimizer refuses the rest.
        """
        params = [param for group in self.param_groups for param in group["params"]]
        saved = state_dict.get(_SAVED, {"num_steps": 0, "synced": {}, "outer": [{} for _ in params]})
        if fault := self._fault_of_saved(saved, params):
            raise ValueError(f"LocalUpdates cannot load this state: {fault}")
        outer = {param: state for param, state in zip(params, saved["outer"], strict=True) if state}
        self.optimizer.load_state_dict({key: value for key, value in state_dict.items() if key != _SAVED})
        self.outer_state = {
            param: {key: tensor.to(param.device, copy=True) for key, tensor in state.items()}
            for param, state in outer.items()
        }
        self.num_steps = int(saved["num_steps"])
        self._synced = {key: int(saved["synced"].get(key, self.num_steps)) for key in self.periods}
        self._begun = False


def _is_count(value: Any) -> bool:
    """Return whether a saved value counts steps."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _has_mean(value: Any) -> bool:
    """Return whether a part of a state is one of numbers, not of codes."""
    return type(value) is Tensor and value.is_floating_point()


def find_local_updates(optimizer: Optimizer) -> LocalUpdates | None:
    """Return the LocalUpdates inside wrappers such as accelerate's; None if there is none."""
    inner: Any = optimizer
    while isinstance(inner, Optimizer) and not isinstance(inner, LocalUpdates):
        inner = getattr(inner, "optimizer", None)
    return inner if isinstance(inner, LocalUpdates) else None


def _periods(sync_every: int | Mapping[str, int], average: Sequence[str]) -> dict[str, int]:
    """Return the period of everything that is averaged."""
    chosen = (average,) if isinstance(average, str) else tuple(average)
    if _PARAMS not in chosen or not {*chosen} <= {_PARAMS, _MOMENTS}:
        raise ValueError(f"average={average!r} must be ('params',) or ('params', 'moments')")
    if not isinstance(sync_every, Mapping):
        check_number("sync_every", sync_every, COUNT)
        return dict.fromkeys(chosen, sync_every)
    for key, period in sync_every.items():
        check_number(f"sync_every[{key!r}]", period, COUNT)
    if _PARAMS not in sync_every:
        raise ValueError(f"sync_every={dict(sync_every)!r} lacks 'params': the weights must be averaged")
    if _MOMENTS not in chosen and len(sync_every) > 1:
        raise ValueError(f"sync_every={dict(sync_every)!r} names more than average={average!r}")
    return dict(sync_every)
