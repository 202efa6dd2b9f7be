"""What fits into a budget: the largest rank or window, and which other settings are small enough."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin

from hf_lowmem_optim.engine.optimizer import LowMemoryOptimizer
from hf_lowmem_optim.memory.plan import Groups, plan_groups, plan_temporaries

__all__ = ["MAX_WINDOW", "BudgetSearch"]

MAX_WINDOW = 1024
"""The widest window that is looked at: the widest that the papers use."""

SIZE_KEYS = ("rank", "window")
"""Hyper-parameters that scale the state, wherever an optimizer has them."""


@dataclass(frozen=True)
class BudgetSearch:
    """A search among the settings of one optimizer for one model."""

    optimizer_class: type[LowMemoryOptimizer]
    groups: Groups  # at the settings asked for; which parameters are targeted is taken from them
    num_shards: int = 1  # as in plan_groups
    num_processes: int = 1  # with several, settings that need a single one are not looked at

    def added_bytes(self, changes: Mapping[str, Any]) -> int:
        """Return the bytes of state and temporaries with some hyper-parameters of the targeted groups changed.

        ``dense_state`` changes in all groups.
        """
        of_dense = {key: value for key, value in changes.items() if key == "dense_state"}
        groups = [{**group, **(changes if self._is_targeted(group) else of_dense)} for group in self.groups]
        state = plan_groups(self.optimizer_class, groups, num_shards=self.num_shards)
        return state.total_bytes + plan_temporaries(self.optimizer_class, groups, num_shards=self.num_shards)

    def largest(self, allowed_bytes: int) -> dict[str, int]:
        """Return the largest value within ``allowed_bytes`` of each hyper-parameter that scales the state.

        A rank is looked for below the smaller dimension of every matrix that is compressed now, so that all of them
        stay compressed; a window up to :data:`MAX_WINDOW`. 0 says that not even 1 fits.
        """
        return {
            key: _bisect(lambda value, key=key: self.added_bytes({key: value}) <= allowed_bytes, limit)  # type: ignore[misc]
            for key, limit in self._limits()
        }

    def smaller(self) -> Iterator[tuple[dict[str, Any], int]]:
        """Yield changes of the settings with the bytes they lead to.

        First every other choice of a hyper-parameter of few choices (``error_feedback="none"``), then the least rank
        and window, then all of that together.
        """
        method, now = self.optimizer_class.method, self._settings()
        kinds, best = method.options.types(), dict[str, Any]()
        for key in (key for key in method.shaping if get_origin(kinds[key]) is Literal):
            sizes = {
                choice: self._size_if_valid({key: choice}) for choice in get_args(kinds[key]) if choice != now[key]
            }
            valid = {choice: size for choice, size in sizes.items() if size is not None}
            yield from (({key: choice}, size) for choice, size in valid.items())
            if valid and min(valid.values()) < self.added_bytes({}):
                best[key] = min(valid, key=lambda choice: valid[choice])
        for key, _ in self._limits():
            yield {key: 1}, self.added_bytes({key: 1})
            best[key] = 1
        together = self._size_if_valid(best)
        if len(best) > 1 and together is not None:
            yield best, together

    def _settings(self) -> Mapping[str, Any]:
        """Return the hyper-parameters of the targeted groups, or of any group if there is none."""
        return next((group for group in self.groups if self._is_targeted(group)), self.groups[0])

    def _is_targeted(self, group: Mapping[str, Any]) -> bool:
        return not self.optimizer_class.method.is_dense(group)

    def _size_if_valid(self, changes: Mapping[str, Any]) -> int | None:
        """Return the bytes with the changes, None where the optimizer refuses them together."""
        method, settings = self.optimizer_class.method, self._settings()
        values = {key: settings[key] for key in method.options.defaults()}
        try:
            method.check({**values, **changes}, self.optimizer_class.__name__)
        except (TypeError, ValueError):
            return None
        if self.num_processes > 1 and method.needs_one_process({**settings, **changes}, sharded=self.num_shards > 1):
            return None
        return self.added_bytes(changes)

    def _limits(self) -> Iterator[tuple[str, int]]:
        """Yield the hyper-parameters that scale the state, with the largest value to look at."""
        method = self.optimizer_class.method
        targeted = []
        for group in filter(self._is_targeted, self.groups):
            options = method.options_of(group)
            targeted += [(p.shape[1:] if options.is_stack(p.shape) else p.shape, group) for p in group["params"]]
        matrices = [(shape, group) for shape, group in targeted if len(shape) >= 2]
        compressed = [shape for shape, group in matrices if method.compresses(shape, group)]
        sides = [min(shape[0], math.prod(shape[1:])) for shape in compressed or [shape for shape, _ in matrices]]
        limits = {"rank": min(sides, default=1) - 1, "window": MAX_WINDOW}
        yield from ((key, limits[key]) for key in SIZE_KEYS if targeted and key in method.shaping and limits[key] >= 1)


def _bisect(fits: Callable[[int], bool], limit: int) -> int:
    """Return the largest value in 1 … ``limit`` that fits, 0 if 1 does not; ``fits`` turns false once."""
    low, high = 0, limit + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
