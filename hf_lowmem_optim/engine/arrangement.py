"""What a step found out about its tensors, so that the next one need not find it out again.

Between two steps of a run hardly anything changes but numbers: the same parameters have gradients, and weights and
state are where they were. An :class:`Arrangement` says how the tensors were checked and put together, and of what that
depends. Looking whether it still holds takes a fraction of what finding out takes, and on a GPU a step of many small
tensors is no faster than its Python.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from hf_lowmem_optim.engine.allocation import allocate_
from hf_lowmem_optim.engine.buckets import Part
from hf_lowmem_optim.engine.checks import check_flattened, check_tensor, has_storage
from hf_lowmem_optim.engine.coupled import check_agreement
from hf_lowmem_optim.engine.method import Method
from hf_lowmem_optim.engine.options import Options
from hf_lowmem_optim.engine.sharding.probe import without_gradient
from hf_lowmem_optim.spec import TensorSpec

__all__ = ["Arrangement", "Live", "Rule", "checked_rules", "probed_parameters", "remember_"]

#: Arrangements of several tensors that an optimizer keeps: training may alternate between sets of them.
_MOST = 4

#: A parameter that has a gradient: its place among all parameters, itself, its group.
Live = tuple[int, Tensor, dict[str, Any]]
#: Whether a parameter is compressed, and what its state is.
Rule = tuple[bool, dict[str, TensorSpec]]

_dtype, _shape = attrgetter("dtype"), attrgetter("shape")


@dataclass(slots=True)
class Arrangement:
    """How the tensors of a step are treated, for as long as these are the same and where they were.

    It has none of these tensors: one that was kept here would keep memory that somebody frees between two steps.

    Attributes:
        rules: Of each tensor.
        parts: How the compressed ones are put together.
        facts: Of what that depends.
    """

    rules: list[Rule]
    parts: list[Part]
    facts: list[Any]

    @classmethod
    def of(
        cls,
        live: Sequence[Live],
        states: Sequence[Mapping[str, Any]],
        options_of: Mapping[int, Options],
        method: Method,
        rules: list[Rule],
        parts: list[Part],
    ) -> Arrangement | None:
        """Return the arrangement of a step; None where it would not show that something has changed."""
        tensors = [value for state in states for value in state.values() if isinstance(value, Tensor)]
        plain = {type(p) for _, p, _ in live} <= {Parameter, Tensor} and {type(part) for part in tensors} <= {Tensor}
        return cls(rules, parts, _facts(live, states, options_of, method)) if plain else None

    def holds(
        self,
        live: Sequence[Live],
        states: Sequence[Mapping[str, Any]],
        options_of: Mapping[int, Options],
        method: Method,
    ) -> bool:
        """Return whether it is still right, and every gradient what a step can use as it is.

        Args:
            live: The tensors of a step.
            states: Their states, empty ones for those that have none.
            options_of: The options of each group, by its id.
            method: Whose they are.
        """
        for _, param, _ in live:
            grad = param.grad
            if (
                type(grad) is not Tensor
                or grad.layout != torch.strided
                or grad.dtype != param.dtype
                or grad.shape != param.shape
                or grad.device != param.device
                or grad.requires_grad
                or grad.is_neg()
                or grad._is_zerotensor()
                # a gradient may be expanded, or a slice
                or (
                    grad.untyped_storage().nbytes() < grad.storage_offset() * grad.itemsize + grad.nbytes
                    and not has_storage(grad)
                )
            ):
                return False
        return self.facts == _facts(live, states, options_of, method)


def remember_(
    known: dict[tuple[int, ...], Arrangement], places: tuple[int, ...], arrangement: Arrangement | None
) -> None:
    """Keep the arrangement of a step; of several tensors only the last few, for gradients may be of ever others.

    Args:
        known: The arrangements kept, by the places of their tensors among all parameters.
        places: Those of the step's.
        arrangement: None for nothing to keep.
    """
    known.pop(places, None)
    if arrangement is not None:
        several = [others for others in known if len(others) > 1] if len(places) > 1 else []
        if len(several) >= _MOST:
            del known[several[0]]
        known[places] = arrangement


def _facts(
    live: Sequence[Live], states: Sequence[Mapping[str, Any]], options_of: Mapping[int, Options], method: Method
) -> list[Any]:
    """Return which tensors there are, where, of which shape and dtype; and which of their counts are equal."""
    params = [param for _, param, _ in live]
    grads: list[Any] = [param.grad for param in params]
    values = [value for state in states for value in state.values()]
    parts = [value for value in values if type(value) is Tensor]
    counts = [state.get("step", 0) for state in states]
    # not those that a schedule changes
    names = *method.layout_options, *method.shared_options, *(method.corrected or ())
    return [
        *[getattr(options, name) for options in options_of.values() for name in names],
        *(len(params), len(values), len(parts)),
        *[id(group) for _, _, group in live],
        *map(id, params),
        *map(Tensor.data_ptr, params),
        *map(_dtype, params),
        # numbers: a thousand objects more have the garbage collector run
        *map(hash, map(_shape, params)),
        *map(Tensor.is_contiguous, params),
        *map(Tensor.is_contiguous, grads),
        *chain.from_iterable(states),
        *map(id, parts),
        *map(Tensor.data_ptr, parts),
        # in their storage, which several may share
        *map(Tensor.storage_offset, parts),
        *map(hash, map(_shape, parts)),
        *map(Tensor.is_contiguous, parts),
        *map(_dtype, parts),
        *map(dict(zip(counts, range(len(counts)), strict=True)).get, counts),
    ]


def checked_rules(optimizer: Any, live: Sequence[Live], options_of: Mapping[int, Options]) -> list[Rule]:
    """Return the rule of every tensor, once all have been checked and those without state have got theirs.

    Args:
        optimizer: The optimizer.
        live: The tensors of a step.
        options_of: As for :meth:`Arrangement.holds`.

    Raises:
        RuntimeError: As :func:`~hf_lowmem_optim.engine.checks.check_tensor`. Nothing has been changed then.
        NotImplementedError: Likewise.
        ValueError: Likewise.
    """
    method, state_of = optimizer.method, optimizer.state
    rules: list[Rule] = []
    rule_of: dict[tuple[Any, ...], Rule] = {}
    for _, param, group in live:
        kind = id(group), param.shape, param.dtype, type(param)
        if (rule := rule_of.get(kind)) is None:
            rule = rule_of[kind] = optimizer._rule(param, options_of[id(group)])
        check_tensor(param, group, state_of.get(param), rule=rule, optimizer=optimizer)
        rules.append(rule)
    members = list(zip(live, rules, strict=True))
    if method.shared_options and len(optimizer.param_groups) > 1:
        distinct = {id(group): vars(options_of[id(group)]) for (_, _, group), (compressed, _) in members if compressed}
        check_agreement(method, list(distinct.values()), type(optimizer).__name__)
    if fresh := [(p, (options_of[id(group)], *rule)) for (_, p, group), rule in members if not state_of.get(p)]:
        check_flattened(optimizer, optimizer._had_matrices)
        allocate_(state_of, fresh)
    return rules


def probed_parameters(optimizer: Any, live: Sequence[Live], options_of: Mapping[int, Options]) -> frozenset[int]:
    """Return the ids of parameters of which a wrapper only wants to know the layout of their state.

    torch.distributed.checkpoint probes fresh optimizers with lr = 0 and zero gradients: that allocates, but is no
    update and leaves no trace in the run.
    """
    still = [param for _, param, group in live if options_of[id(group)].lr == 0]
    first = [param for param in still if optimizer.state[param]["step"] == 0 and not optimizer._is_real(param)]
    return frozenset(without_gradient(first) if first else ())
