"""What fits into a budget: the largest rank or window, and which other settings are smaller, and what they cost."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from hf_lowmem_optim.engine.optimizer import LowMemoryOptimizer
from hf_lowmem_optim.memory.plan import Groups, plan_groups, plan_temporaries

__all__ = ["COSTS", "MAX_WINDOW", "BudgetSearch", "Rung"]

MAX_WINDOW = 1024
"""The widest window that is looked at: the widest that the papers use."""

SIZE_KEYS = ("rank", "window")
"""Hyper-parameters that scale the state, wherever an optimizer has them."""

COSTS = {
    "layerwise": (
        "no quality: the same updates, each in the backward pass. Needs max_grad_norm=0 and no fp16; not DDP"
    ),
    "dense_state=8bit": (
        "little: AdamW's moments in 8 bits for what is not compressed (extra bitsandbytes). With all moments in 8 bits "
        "AdamW ended 4.0 % ± 4.6 % above its test loss (fine-tuning, three seeds)"
    ),
    "error_feedback=4bit": (
        "none that three seeds could show: losses equal to 0.001 with an error in float32 and in 4 bits"
    ),
    "checkpointing": "no quality: layers are computed twice, about a third more time",
    "batch": "no quality: smaller batches, with as many more gradient_accumulation_steps",
    "sharding": "no quality: more GPUs",
    "dtype": (
        "little with weight_rounding=stochastic, which kept the loss of float32 weights; without it small updates are "
        "lost"
    ),
    "rank": "a smaller part of each gradient in a step: rank=16 ended 3.5 % above rank=32 (from scratch, one trial)",
    "window": "gradients are forgotten sooner; not measured",
    "state_dtype=param": "moments in the weights' dtype, a visible loss in the second moment where that is bfloat16",
    "error_feedback=none": "much: what compression leaves out of a step is lost for good; not measured",
    "lora": "adapters alone are trained, a different model; not measured here",
    "qlora": "adapters on weights rounded to 4 bits; not measured here",
}
"""What a change costs, the least loss of quality first; the tests hold the figures against benchmarks/results."""

#: Values of options that make the state smaller, in the order of :data:`COSTS`; sizes have no value of their own.
_RUNGS = (("dense_state", "8bit"), ("error_feedback", "4bit"), *((key, None) for key in SIZE_KEYS))
_RUNGS += (("state_dtype", "param"), ("error_feedback", "none"))
_COSTLY = ("rank", "window", "state_dtype=param", "error_feedback=none")


@dataclass(frozen=True)
class Rung:
    """Settings that take less: all changes so far, what the last of them costs (a key of COSTS), and the total."""

    changes: Mapping[str, Any]
    cost: str
    total_bytes: int


def _sum(state: int, temporary: int) -> int:
    return state + temporary


@dataclass(frozen=True)
class BudgetSearch:
    """A search among the settings of one optimizer for one model."""

    optimizer_class: type[LowMemoryOptimizer]
    groups: Groups  # at the settings asked for; which parameters are targeted is taken from them
    num_shards: int = 1  # as in plan_groups
    num_processes: int = 1  # with several, settings that need a single one are not looked at
    total: Callable[[int, int], int] = _sum  # of what is to be within a budget, given state and temporaries
    # the groups with other hyper-parameters, where these decide what is targeted
    rebuild: Callable[[Mapping[str, Any]], Groups] | None = None

    def total_bytes(self, changes: Mapping[str, Any]) -> int:
        """Return the total with some hyper-parameters of the targeted groups changed; ``dense_state`` in all groups."""
        of_dense = {key: value for key, value in changes.items() if key == "dense_state"}
        return self._total([{**group, **(changes if self._is_targeted(group) else of_dense)} for group in self.groups])

    def _total(self, groups: Groups) -> int:
        state = plan_groups(self.optimizer_class, groups, num_shards=self.num_shards)
        return self.total(state.total_bytes, plan_temporaries(self.optimizer_class, groups, num_shards=self.num_shards))

    def _with(self, changes: Mapping[str, Any]) -> int:
        """Return the total with changed hyper-parameters that may also decide what is targeted."""
        return self.total_bytes(changes) if self.rebuild is None else self._total(self.rebuild(changes))

    def largest(self, allowed_bytes: int) -> dict[str, int]:
        """Return the largest value within ``allowed_bytes`` of each hyper-parameter that scales the state.

        A rank is looked for below the smaller dimension of every matrix that is compressed now, so that all of them
        stay compressed; a window up to :data:`MAX_WINDOW`. 0 says that not even 1 fits. What fits at any value is not
        in it.
        """
        # mypy finds no type for the default that binds the key
        found = {
            key: _bisect(lambda value, key=key: self.total_bytes({key: value}) <= allowed_bytes, limit)  # type: ignore[misc]
            for key, limit in self._limits().items()
        }
        return {key: value for key, value in found.items() if value < self._limits()[key]}

    def ladder(self, allowed_bytes: int) -> Iterator[Rung]:
        """Yield settings that take less and less, what costs the least quality first, up to the first that fits.

        A rank or window is the largest that fits, but at least a quarter of what it was. What costs quality and saves
        less than 2 % is left out, unless it fits.
        """
        changes, here, total = dict[str, Any](), self, self._with({})
        value: Any
        for key, value in _RUNGS:
            now = {**here._settings(), **changes}.get(key)
            cost = f"{key}={value}"
            if value is None and key in here._limits() and isinstance(now, int) and now > 1:
                value, cost = self._largest_within(allowed_bytes, changes, key, now), key
            smaller = {**changes, key: value}
            if total <= allowed_bytes or value in (None, now) or (size := self._size_if_valid(smaller)) is None:
                continue
            # what costs quality must be worth it
            if size <= allowed_bytes or size < total - (total // 50 if cost in _COSTLY else 0):
                changes, total = smaller, size
                here = self if self.rebuild is None else replace(self, groups=self.rebuild(changes))
                yield Rung(dict(changes), cost, total)

    def _largest_within(self, allowed_bytes: int, changes: Mapping[str, Any], key: str, now: int) -> int:
        """Return the largest value below ``now`` that fits, a quarter of it if none does."""
        least = max(1, now // 4)
        return least + _bisect(
            lambda more: self._with({**changes, key: least + more}) <= allowed_bytes,
            now - 1 - least,
        )

    def _settings(self) -> Mapping[str, Any]:
        """Return the hyper-parameters of the targeted groups, or of any group if there is none."""
        return next((group for group in self.groups if self._is_targeted(group)), self.groups[0])

    def _is_targeted(self, group: Mapping[str, Any]) -> bool:
        return not self.optimizer_class.method.is_dense(group)

    def _size_if_valid(self, changes: Mapping[str, Any]) -> int | None:
        """Return the total with the changes, None where the optimizer has no such option or refuses them together."""
        method, settings = self.optimizer_class.method, self._settings()
        if not changes.keys() <= method.options.defaults().keys():
            return None
        values = {key: settings[key] for key in method.options.defaults()}
        try:
            method.check({**values, **changes}, self.optimizer_class.__name__)
        except (TypeError, ValueError):
            return None
        sharded = self.num_shards > 1
        if self.num_processes > 1 and method.needs_one_process({**settings, **changes}, sharded=sharded):
            return None
        return self._with(changes)

    def _limits(self) -> dict[str, int]:
        """Return the hyper-parameters that scale the state, with the largest value to look at."""
        method, sides, targeted = self.optimizer_class.method, list[int](), False
        for group in filter(self._is_targeted, self.groups):
            options = method.options_of(group)
            for param in group["params"]:
                shape = param.shape[1:] if options.is_stack(param.shape) else param.shape
                if method.compresses(shape, group):
                    targeted = True
                    sides += [min(shape[0], math.prod(shape[1:]))] if len(shape) >= 2 else []
        limits = {"rank": min(sides, default=1) - 1, "window": MAX_WINDOW}
        return {key: limits[key] for key in SIZE_KEYS if targeted and key in method.shaping and limits[key] >= 1}


def _bisect(fits: Callable[[int], bool], limit: int) -> int:
    """Return the largest value in 1 … ``limit`` that fits, 0 if 1 does not; ``fits`` turns false once."""
    low, high = 0, limit + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
