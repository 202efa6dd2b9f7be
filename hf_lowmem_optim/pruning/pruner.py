"""I-OBS while fine-tuning (arXiv 2408.17163, NeurIPS 2024): ``optimizer.step(); pruner.step()``.

The optimizer takes the step θ⁺ ← θ − lr·F⁻¹g, and every so many steps the pruner projects: it chooses the ⌊s·n⌋ of n
prunable entries that are least worth keeping, sets them to zero, and moves the others to where that costs least by the
optimizer's own Fisher matrix (``projection.py``). Between projections what is pruned stays zero; at a projection all
entries compete again. The mask is no state: what is pruned is exactly zero.
"""

from __future__ import annotations

import logging
import math
import weakref
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from hf_lowmem_optim.engine.buckets import split_state
from hf_lowmem_optim.engine.checks import describe_parameter
from hf_lowmem_optim.engine.coupled import Scope
from hf_lowmem_optim.engine.optimizer import LowMemoryOptimizer
from hf_lowmem_optim.engine.options import shown
from hf_lowmem_optim.ops.weight_correction import CORRECTION
from hf_lowmem_optim.optimizers.preconditioned import PreconditionedOptions
from hf_lowmem_optim.pruning.projection import (
    Member,
    Projection,
    gram_of,
    move_,
    saliency_of,
    sums_of,
    weights_of_rows,
)
from hf_lowmem_optim.pruning.rows import rows_of
from hf_lowmem_optim.pruning.schedule import PruningSchedule, ScheduleKind
from hf_lowmem_optim.pruning.support import (
    Bits,
    NotFiniteError,
    count_to_prune,
    lowest_of_all,
    lowest_of_each,
)

__all__ = ["IOBSPruner", "Saliency", "named_parameters"]

logger = logging.getLogger(__name__)

Saliency = Literal["magnitude", "obs"]

#: Rows that an entry of G needs, at least: below, products of rows are not those of the gradients.
_LEAST_ROWS = 4
#: An explicit λ below this part of F's mean diagonal, with which the correction may do harm.
_SMALL_DAMPING = 0.01

#: The pruner of an optimizer, as long as both are there.
_pruner_of: weakref.WeakKeyDictionary[Optimizer, weakref.ref[IOBSPruner]] = weakref.WeakKeyDictionary()


class _NotFinite(Exception):
    """A system cannot be projected."""


class _Slot(NamedTuple):
    """Where a member's mask is kept: its parameter, and its place if that is a stack."""

    param: Tensor
    place: int | None


class IOBSPruner:
    """Prunes the weights that an optimizer trains, by the curvature that it knows.

    At call n of :meth:`step` with begin ≤ n ≤ end and (n − begin) divisible by ``every`` it projects on the sparsity

        s(n) = sparsity + (initial_sparsity − sparsity)·(1 − (n − begin)/(end − begin))³       (``"cubic"``)

    Prunable are tensors of two and more dimensions that the optimizer trains and compresses (for other optimizers than
    this package's: that it trains), but for those of ``exclude``. Embeddings and output heads of a model belong there;
    :class:`~hf_lowmem_optim.IOBSPruningCallback` finds them. The correction moves all tensors of a system, biases too.

    Attributes:
        num_steps: n, the calls so far.
        schedule: When it projects, and on which sparsity.

    Args:
        optimizer: ``SparseMFAC``, ``LowRankMFAC`` or ``SparseGGT``; any optimizer for ``saliency="magnitude"`` with
            ``correction=False``.
        sparsity: s, in [0, 1): exactly ⌊s·n⌋ of n entries are pruned in the end. 0.5, or what ``pattern`` says.
        initial_sparsity: Of the first projection, at ``begin``.
        pattern: (N, M): N of each M neighbours of the last dimension are kept, in the end.
        begin: The first call at which it may project.
        end: The last.
        every: Calls from a projection to the next.
        schedule: ``"cubic"``, or ``"constant"`` for ``sparsity`` from the first projection on.
        saliency: ``"magnitude"``, |θ|; or ``"obs"``, θ²/[F⁻¹]ᵢᵢ.
        correction: Move the kept entries to where the pruned ones are missed least.
        damping: λ of F = λI + GᵀG/m. ``"auto"`` is the mean diagonal of GᵀG/m, with which windows of stochastic
            gradients did best; None the optimizer's own.
        scope: ``"model"`` for one Fisher matrix and one threshold over all tensors, ``"tensor"`` for one of each
            tensor; None for the optimizer's.
        exclude: Parameters that stay dense, or names of parameters, or parts of names (whole words between dots).

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: An argument is out of range; the optimizer has no window; it has a pruner already; nothing can be
            pruned; or a last dimension is not divisible by M.
        NotImplementedError: A parameter is sharded.

    Example:
        >>> optimizer = SparseMFAC(model.named_parameters(), lr=1e-3, window=32, density=0.25)
        >>> pruner = IOBSPruner(optimizer, sparsity=0.9, begin=100, end=1000, every=100, exclude=["lm_head"])
        >>> loss.backward()
        >>> optimizer.step()
        >>> pruner.step()
    """

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        sparsity: float | None = None,
        initial_sparsity: float = 0.0,
        pattern: Sequence[int] | None = None,
        begin: int = 0,
        end: int = 1000,
        every: int = 100,
        schedule: ScheduleKind = "cubic",
        saliency: Saliency = "magnitude",
        correction: bool = True,
        damping: float | Literal["auto"] | None = "auto",
        scope: Scope | None = None,
        exclude: Sequence[str | Tensor] = (),
    ) -> None:
        inner = getattr(optimizer, "optimizer", optimizer)  # accelerate wraps it
        self._optimizer: Optimizer = inner
        self.schedule = PruningSchedule(sparsity, initial_sparsity, pattern, begin, end, every, schedule)
        self._saliency, self._correction, self._damping = saliency, correction, damping
        self._check_arguments()
        self._window = self._find_window()
        own = "model" if self._window is None else self._window.scope
        self._scope = own if scope is None else scope
        self._check_scope(own)
        self._exclude = _excluded(inner, exclude)
        self._bits: dict[_Slot, Bits] = {}
        self._told = False
        self.num_steps = 0
        self._check_members()
        other = _pruner_of.get(inner)
        if other is not None and other() is not None:
            raise ValueError(
                f"this {type(inner).__name__} has a pruner already, and two would undo each other's masks: call "
                "remove() of the first, or leave one of two IOBSPruningCallbacks out"
            )
        _pruner_of[inner] = weakref.ref(self)

    # ------------------------------------------------------------------------------------------------------- checks

    def _check_arguments(self) -> None:
        if self._saliency not in ("magnitude", "obs"):
            raise ValueError(f"saliency={shown(self._saliency)} is not one of 'magnitude', 'obs'")
        if not isinstance(self._correction, bool):
            raise TypeError(f"correction={shown(self._correction)} must be True or False")
        damping: Any = self._damping
        if damping is None or (isinstance(damping, str) and damping == "auto"):
            return
        if isinstance(damping, bool) or not isinstance(damping, (int, float, str)):
            raise TypeError(f"damping={shown(damping)} must be a float > 0, 'auto', or None for the optimizer's")
        if isinstance(damping, str) or not 0 < damping < math.inf:
            raise ValueError(f"damping={damping!r} must be a float > 0, 'auto', or None for the optimizer's")

    def _find_window(self) -> PreconditionedOptions | None:
        """Return the options with which the optimizer keeps its window; None if it has none."""
        optimizer, who = self._optimizer, type(self._optimizer).__name__
        if not isinstance(optimizer, Optimizer):
            raise TypeError(f"{who} is not a torch optimizer")
        found: Any = None
        if isinstance(optimizer, LowMemoryOptimizer):
            groups = [group for group in optimizer.param_groups if not optimizer.method.is_dense(group)]
            found = optimizer.method.options_of(groups[0]) if groups else None
            if self._damping is None and optimizer.method.name == "sparse_ggt":
                raise ValueError(f"the damping of {who} is no λ of a Fisher matrix: set damping='auto' or a number")
        if not isinstance(found, PreconditionedOptions):
            if self._correction or self._saliency == "obs":
                raise ValueError(
                    f"{who} has no window of gradients, of which I-OBS makes its Fisher matrix: train with sparse_mfac "
                    "or lowrank_mfac, or set saliency='magnitude' and correction=False, which any optimizer can do"
                )
            return None
        density = getattr(found, "density", 1.0)
        if (self._correction or self._saliency == "obs") and found.window * density < _LEAST_ROWS:
            logger.warning(
                "window=%d × density=%g is %.2g gradients for an entry: products of such sparse gradients are not "
                "those of the gradients, and a correction by them may be worse than none. For pruning take window=32 "
                "to 64, density=0.25 or more, and damping='auto'",
                *(found.window, density, found.window * density),
            )
        return found

    def _check_scope(self, own: str) -> None:
        if self._scope not in ("model", "tensor"):
            raise ValueError(f"scope={shown(self._scope)} is not one of 'model', 'tensor'")
        if self._window is not None and own == "tensor" and self._scope == "model":
            raise ValueError(
                "scope='model' needs a window over all tensors, but the optimizer has scope='tensor': leave the "
                "pruner's scope out, or build the optimizer with scope='model'"
            )

    def _check_members(self) -> None:
        """Check every tensor that is to be pruned, and that there is one."""
        found = False
        for param, group, name in self._trained():
            if hasattr(param, "placements"):
                raise NotImplementedError(
                    f"{name} is sharded (DTensor): there is no threshold over all shards yet. Prune in one process "
                    "or under DDP"
                )
            if not self._is_prunable(param, group):
                continue
            found = True
            pattern = self.schedule.pattern
            if pattern is not None and param.shape[-1] % pattern[1]:
                raise ValueError(
                    f"the last dimension of {name}, {param.shape[-1]}, is not divisible by the {pattern[1]} of "
                    f"pattern={pattern}: exclude it"
                )
        if not found:
            raise ValueError(
                f"{type(self._optimizer).__name__} trains no matrix that could be pruned: what is frozen (LoRA's base "
                "model), excluded, an adapter, an embedding or in a dense group stays as it is"
            )

    # ------------------------------------------------------------------------------------------------------ members

    def _trained(self) -> Iterator[tuple[Tensor, dict[str, Any], str]]:
        for group in self._optimizer.param_groups:
            for param in group["params"]:
                if param.requires_grad and param.numel():
                    yield param, group, describe_parameter(param, group)

    def _in_system(self, group: Mapping[str, Any]) -> bool:
        optimizer = self._optimizer
        return not (isinstance(optimizer, LowMemoryOptimizer) and optimizer.method.is_dense(group))

    def _is_prunable(self, param: Tensor, group: Mapping[str, Any]) -> bool:
        return param.dim() >= 2 and id(param) not in self._exclude and self._in_system(group)

    def _systems(self) -> Iterator[tuple[list[_Slot], list[Member]]]:
        """Yield the tensors of each system, with the window as it is now."""
        slots: list[_Slot] = []
        members: list[Member] = []
        for param, group, name in self._trained():
            if not self._in_system(group):
                continue
            prunable = self._is_prunable(param, group)
            state: Mapping[str, Any] = self._optimizer.state.get(param) or {}
            options: Any = self._window
            if self._window is not None and isinstance(self._optimizer, LowMemoryOptimizer):
                options = self._optimizer.method.options_of(group)
            stacked = options is not None and options.is_stack(param.shape)
            parts: list[tuple[int | None, Tensor, Mapping[str, Any]]] = [(None, param.detach(), state)]
            if stacked:
                states = split_state(state) if state else [{}] * len(param)
                parts = [(i, *part) for i, part in enumerate(zip(param.detach(), states, strict=True))]
            for index, part, own in parts:
                rows = None if options is None else rows_of(own, part.shape, options)
                slots.append(_Slot(param, index))
                members.append(Member(name, part, rows, own.get(CORRECTION), prunable))
                if self._scope == "tensor" and prunable:
                    yield slots[-1:], members[-1:]
        if self._scope == "model":
            yield slots, members

    # --------------------------------------------------------------------------------------------------------- step

    @torch.no_grad()
    def step(self) -> Projection | None:
        """Project if it is time to; else keep at zero what is pruned. Call it after ``optimizer.step()``.

        Returns:
            What the projection did; None if there was none. A projection by numbers that are not finite is left out,
            with an error in the log.
        """
        self.num_steps += 1
        n = self.num_steps
        if not self.schedule.projects_at(n):
            for slot in self._bits:
                self._clear_(slot)
            return None
        sparsity, done = self.schedule.sparsity_at(n), []
        for slots, members in self._systems():
            try:
                done.append(self._project_(slots, members, sparsity))
            except _NotFinite as error:
                logger.error("no projection at step %d: %s. What was pruned before stays so", n, error)
                for slot in slots:
                    self._clear_(slot)
        if not done:
            return None
        num_pruned, num_prunable, changed = (sum(counts) for counts in zip(*[each[:3] for each in done], strict=True))
        if not num_prunable:  # all of it is frozen by now
            return None
        loss = None if self._window is None else sum(each[3] for each in done)
        return Projection(n, num_pruned / num_prunable, num_pruned, changed, loss)

    def _project_(
        self, slots: Sequence[_Slot], members: Sequence[Member], sparsity: float
    ) -> tuple[int, int, int, float]:
        """Project a system; return how many entries are pruned, of how many, how many came back, and the loss."""
        pruned, w, loss = self._choose(members, sparsity), None, 0.0
        if self._window is not None:
            m = self._window.window
            sums = sums_of(members, pruned, m)
            if not math.isfinite(float(sums.K.sum() + sums.h.sum()) + sums.squares + sums.pruned_squares):
                raise _NotFinite("the window of gradients has entries that are not finite")
            damping = self._damping_of(sums.squares / (m * sums.numel))
            if self._correction:
                w = weights_of_rows(sums, damping)
                loss = 0.5 * damping * (sums.pruned_squares + float(sums.h @ w))
            else:
                loss = 0.5 * (damping * sums.pruned_squares + float(sums.h @ sums.h) / m)
        count = sum(int(mask.sum()) for mask in pruned if mask is not None)
        changed = 0
        for slot, mask in zip(slots, pruned, strict=True):
            if mask is not None:
                if slot in self._bits:
                    changed += int((self._bits[slot].unpack() & ~mask).sum())
                self._bits[slot] = Bits.pack(mask)
        if count:  # else nothing changes, to the bit
            move_(members, pruned, w)
        return count, sum(member.param.numel() for member in members if member.prunable), changed, loss

    def _choose(self, members: Sequence[Member], sparsity: float) -> list[Tensor | None]:
        """Choose the entries to prune: flat masks, None for tensors that stay dense."""
        factor = self._factor(members) if self._saliency == "obs" else None
        prunable = [member for member in members if member.prunable]
        try:
            if self.schedule.pattern is not None:
                count, of = self.schedule.count_of_each(sparsity), self.schedule.pattern[1]
                chosen = [lowest_of_each(saliency_of(member, factor), count, of) for member in prunable]
            else:
                count = count_to_prune(sparsity, sum(member.param.numel() for member in prunable))
                chosen = lowest_of_all([partial(saliency_of, member, factor) for member in prunable], count)
        except NotFiniteError as error:
            raise _NotFinite("the weights have entries that are not finite") from error
        masks = iter(chosen)
        return [next(masks) if member.prunable else None for member in members]

    def _factor(self, members: Sequence[Member]) -> Tensor:
        """Return L with LLᵀ = mλI + GGᵀ."""
        assert self._window is not None
        gram, m = gram_of(members, self._window.window), self._window.window
        if not bool(torch.isfinite(gram).all()):
            raise _NotFinite("the window of gradients has entries that are not finite")
        mean_diagonal = float(gram.trace()) / (m * sum(member.param.numel() for member in members))
        gram.diagonal().add_(m * self._damping_of(mean_diagonal))
        factor: Tensor = torch.linalg.cholesky(gram)
        return factor

    def _damping_of(self, mean_diagonal: float) -> float:
        """Return λ for a system, from the mean diagonal of its GᵀG/m."""
        assert self._window is not None
        if self._damping == "auto":
            return mean_diagonal or 1.0  # without a gradient every λ gives the same
        damping = self._damping
        if damping is None:  # the optimizer's, as it is now
            damping = next(group["damping"] for group in self._optimizer.param_groups if self._in_system(group))
        if self._correction and damping < _SMALL_DAMPING * mean_diagonal and not self._told:
            self._told = True
            logger.warning(
                "damping=%g is far below %.3g, the mean diagonal of the Fisher matrix: with a window of stochastic "
                "gradients the correction may then do harm. damping='auto' takes that mean",
                *(damping, mean_diagonal),
            )
        return damping

    def _clear_(self, slot: _Slot) -> None:
        """Set to zero what is pruned of a tensor, or of a matrix of a stack."""
        if (bits := self._bits.get(slot)) is None:
            return
        weights = slot.param.detach()
        correction = (self._optimizer.state.get(slot.param) or {}).get(CORRECTION)
        if slot.place is not None:
            weights, correction = weights[slot.place], None if correction is None else correction[slot.place]
        Member("", weights, None, correction, True).clear_(bits.unpack())

    # ------------------------------------------------------------------------------------------------------- resume

    @torch.no_grad()
    def resume(self, num_steps: int) -> None:
        """Go on after some calls of an earlier run: what is exactly zero in a prunable tensor is pruned.

        Args:
            num_steps: ``num_steps`` of then; weights and optimizer must have been loaded.
        """
        self.num_steps = num_steps
        self._bits.clear()
        if self.schedule.sparsity_after(num_steps) == 0:
            return
        for slots, members in self._systems():
            for slot, member in zip(slots, members, strict=True):
                if member.prunable:
                    self._bits[slot] = Bits.pack(member.param.reshape(-1) == 0)

    def num_zeros(self) -> tuple[int, int]:
        """Return how many prunable entries are exactly zero now, and how many are to be in the end."""
        zeros = wanted = 0
        for _, members in self._systems():
            prunable = [member.param for member in members if member.prunable]
            zeros += sum(int((param == 0).sum()) for param in prunable)
            wanted += count_to_prune(self.schedule.target, sum(param.numel() for param in prunable))
        return zeros, wanted

    def remove(self) -> None:
        """Let the optimizer have another pruner; what is pruned is no longer kept at zero."""
        self._bits.clear()
        _pruner_of.pop(self._optimizer, None)


def _excluded(optimizer: Optimizer, exclude: Sequence[str | Tensor]) -> set[int]:
    """Return the ids of the parameters that are excluded."""
    if isinstance(exclude, (str, Tensor)):
        exclude = [exclude]
    groups = [zip(group.get("param_names", ()), group["params"], strict=False) for group in optimizer.param_groups]
    names = [entry for entry in exclude if not isinstance(entry, Tensor)]
    found = named_parameters(names, [pair for group in groups for pair in group])
    return {id(entry) for entry in (*exclude, *found) if isinstance(entry, Tensor)}


def named_parameters(entries: Sequence[str], named: Sequence[tuple[str, Tensor]]) -> list[Tensor]:
    """Return the parameters that entries name: by their names, or by whole words of them.

    Raises:
        TypeError: An entry is no name.
        ValueError: An entry names no parameter.
    """
    chosen: list[Tensor] = []
    for entry in entries:
        if not isinstance(entry, str) or not entry:
            raise TypeError(f"exclude has {shown(entry)}, which is no parameter and no name of one")
        found = [param for name, param in named if f".{entry}." in f".{name}."]
        if not found:
            hint = "" if named else ": the optimizer knows no names. Build it from model.named_parameters()"
            raise ValueError(f"exclude: {shown(entry)} names no parameter{hint}")
        chosen += found
    return chosen
