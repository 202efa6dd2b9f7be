"""When is pruned, and how much."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from hf_lowmem_optim.engine.options import shown
from hf_lowmem_optim.pruning.support import check_pattern

__all__ = ["PruningSchedule", "ScheduleKind"]

ScheduleKind = Literal["cubic", "constant"]


@dataclass(frozen=True)
class PruningSchedule:
    """The steps at which is projected, and on which sparsity; see ``IOBSPruner`` for what the fields are.

    Attributes:
        target: The sparsity in the end: ``sparsity``, or what ``pattern`` says.

    Raises:
        TypeError: A value has the wrong type.
        ValueError: A value is out of range, or contradicts another one.
    """

    sparsity: float | None = None
    initial_sparsity: float = 0.0
    pattern: Sequence[int] | None = None
    begin: int = 0
    end: int = 1000
    every: int = 100
    kind: ScheduleKind = "cubic"
    target: float = field(init=False)

    def __post_init__(self) -> None:
        """Check everything."""
        pattern, target = check_pattern(self.pattern, self.sparsity)
        object.__setattr__(self, "pattern", pattern)
        object.__setattr__(self, "target", target)
        if self.kind not in ("cubic", "constant"):
            raise ValueError(f"schedule={shown(self.kind)} is not one of 'cubic', 'constant'")
        for name, least in (("begin", 0), ("end", 1), ("every", 1)):
            number = getattr(self, name)
            if isinstance(number, bool) or not isinstance(number, int):
                raise TypeError(f"{name}={shown(number)} must be an int")
            if number < least:
                raise ValueError(f"{name}={number} is out of range; it must be an int ≥ {least}")
        if self.end < self.begin:
            raise ValueError(f"end={self.end} is before begin={self.begin}")
        initial: object = self.initial_sparsity
        if isinstance(initial, bool) or not isinstance(initial, (int, float)):
            raise TypeError(f"initial_sparsity={shown(initial)} must be a float")
        if not 0 <= self.initial_sparsity <= target:
            raise ValueError(f"initial_sparsity={self.initial_sparsity!r} must be from 0 to sparsity={target:g}")
        if self.kind == "cubic" and (self.end - self.begin) % self.every:
            raise ValueError(
                f"end − begin = {self.end - self.begin} is not a multiple of every={self.every}: there would be no "
                f"projection at end={self.end}, where the sparsity is reached. Change one of the three"
            )
        if self.first > self.end:
            raise ValueError(f"begin={self.begin}, end={self.end} and every={self.every} leave no projection")

    @property
    def first(self) -> int:
        """The step of the first projection."""
        return self.begin or self.every

    def projects_at(self, n: int) -> bool:
        """Return whether there is a projection at step n."""
        return self.first <= n <= self.end and (n - self.begin) % self.every == 0

    def sparsity_at(self, n: int) -> float:
        """Return s(n)."""
        if self.kind == "constant" or n >= self.end:
            return self.target
        left = 1 - (n - self.begin) / (self.end - self.begin)
        return self.target + (self.initial_sparsity - self.target) * left**3

    def sparsity_after(self, n: int) -> float:
        """Return the sparsity of the last projection up to step n; 0 before the first."""
        last = self.begin + (min(n, self.end) - self.begin) // self.every * self.every
        return self.sparsity_at(last) if last >= self.first else 0.0

    def check_run(self, max_steps: int) -> None:
        """Raise ValueError if a run of so many steps ends before the sparsity is reached."""
        if self.first > max_steps:
            raise ValueError(
                f"the first projection, at step {self.first} (begin={self.begin}, every={self.every}), is beyond the "
                f"run's {max_steps} steps: it would prune nothing"
            )
        if self.kind == "cubic" and self.end > max_steps:
            raise ValueError(
                f"end={self.end} is beyond the run's {max_steps} steps: it would stop at a sparsity of "
                f"{self.sparsity_after(max_steps):.3g}, not {self.target:.3g}. Set end={max_steps} or less"
            )

    def count_of_each(self, sparsity: float) -> int:
        """Return how many of each M neighbours are pruned at a sparsity."""
        assert self.pattern is not None
        return min(self.pattern[1] - self.pattern[0], math.floor(sparsity * self.pattern[1] + 1e-9))
