"""Loading a state dict exactly, after a check of everything in it.

torch casts every loaded state tensor to the dtype of its parameter (int16 indices, codes and float32 moments of
bfloat16 parameters included). Here the state passes through torch's own ``load_state_dict`` in wrappers that it does
not look into. A checkpoint is a file that people share: what it holds is compared with what the optimizer would
allocate, and with what its kernels take for granted, before anything is changed.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from hf_lowmem_optim.engine.buckets import SHARED_PREFIX, own_tensors, split_state
from hf_lowmem_optim.engine.checks import fault_of_tensor, has_storage
from hf_lowmem_optim.engine.coupled import SHARED_STEP, check_agreement
from hf_lowmem_optim.engine.method import Method
from hf_lowmem_optim.engine.options import Options, as_plain
from hf_lowmem_optim.engine.sharding.layout import as_indices, cut, is_at_rest, local_of, specs_at_rest
from hf_lowmem_optim.spec import TensorSpec

logger = logging.getLogger(__name__)

__all__ = ["exact_load", "fault_of_values"]

#: No run takes that many steps, and the seeds of a step are integers of 64 bits.
_MAX_STEPS = 1 << 38
#: Where versions before 0.2 kept what belongs to all parameters together: a key of the first parameter group.
_OLD_SHARED = "shared"
#: Options that older versions did not have, with the value that is what they did.
_ADDED_LATER = {"stacked": False, "value_dtype": "bf16"}


class _AsSaved:
    """Carries one parameter's saved state past torch's casts."""

    def __init__(self, state: Mapping[str, Any]) -> None:
        self.state = state


@contextmanager
def exact_load(optimizer: Any, method: Method) -> Iterator[None]:
    """Have ``Optimizer.load_state_dict`` check the state and keep it as it was saved, within this context.

    Our hooks run after the user's pre-hooks and before the user's post-hooks, so that those see what torch documents.
    """

    def wrap(_: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        who = type(optimizer).__name__
        _check_containers(state_dict, who)
        # in the order that the group has, so that what is saved again is the same
        later = {key: value for key, value in _ADDED_LATER.items() if key in method.options.defaults()}
        groups = [{**group, **later, **group} for group in state_dict["param_groups"]]
        state_dict = {**state_dict, "param_groups": groups}
        _check_groups(optimizer, method, state_dict["param_groups"])
        state_dict = _as_one_process(optimizer, method, _move_old_shared(optimizer, method, state_dict))
        _check_state(optimizer, method, state_dict)
        _tell_changed_options(optimizer, method, state_dict["param_groups"])
        return {**state_dict, "state": {key: _AsSaved(value) for key, value in state_dict["state"].items()}}

    def unwrap(_: Optimizer) -> None:
        optimizer.unchecked.clear()
        for group in optimizer.param_groups:
            for param in group["params"]:
                if param in optimizer.state:
                    saved = optimizer.state[param].state
                    optimizer.state[param] = loaded = _placed_entry(saved, param, method, group)
                    if any(hasattr(value, "placements") for value in saved.values()):
                        optimizer.unchecked.add(id(loaded))

    before = optimizer.register_load_state_dict_pre_hook(wrap)
    after = optimizer.register_load_state_dict_post_hook(unwrap, prepend=True)
    try:
        yield
    finally:
        before.remove()
        after.remove()


def _placed_entry(saved: Mapping[str, Any], param: Tensor, method: Method, group: Mapping[str, Any]) -> dict[str, Any]:
    """Return the checked state of one parameter where it belongs: on its device, or cut as the parameter is."""
    placed = {key: _placed(v, param.device) if isinstance(v, Tensor) else v for key, v in saved.items()}
    if hasattr(param, "placements"):
        compressed = method.compresses(param.shape, group)
        for key, value in own_tensors(placed).items():
            if not hasattr(value, "placements"):
                placed[key] = cut(value, param, compressed=compressed)
    return placed


def _placed(value: Tensor, device: torch.device) -> Tensor:
    """Return a checked tensor on a device, with the strides of a new one also where a dimension has one entry."""
    value = value.detach().to(device)
    return (
        value
        if value.stride() == torch.empty(value.shape, device="meta").stride()
        else value.clone(memory_format=torch.contiguous_format)
    )


def _check_containers(state_dict: Any, who: str) -> None:
    """Refuse what is no state dict of any optimizer."""
    state = state_dict.get("state") if isinstance(state_dict, Mapping) else None
    groups = state_dict.get("param_groups") if isinstance(state_dict, Mapping) else None
    if not isinstance(state, Mapping) or not isinstance(groups, list):
        raise TypeError(
            f"{who} cannot load this: a state dict has a dict 'state' and a list 'param_groups', as state_dict() gives "
            "them"
        )
    for index, group in enumerate(groups):
        if not isinstance(group, Mapping) or not isinstance(group.get("params"), list):
            raise TypeError(f"{who} cannot load this: param_groups[{index}] must be a dict with a list 'params'")
    known = [saved_id for group in groups for saved_id in group["params"]]
    try:
        unique = len(set(known)) == len(known)
    except TypeError:
        unique = False
    if not unique:
        raise ValueError(f"{who} cannot load this: 'params' of its groups must name every parameter once")
    for key, entry in state.items():
        if key not in known:
            raise ValueError(f"{who} cannot load this: state[{key!r}] belongs to no parameter of its groups")
        if not isinstance(entry, Mapping):
            raise TypeError(f"{who} cannot load this: state[{key!r}] is a {type(entry).__name__}, not a dict")


def _check_groups(optimizer: Optimizer, method: Method, saved_groups: list[dict[str, Any]]) -> None:
    """Refuse the groups of another optimizer, of another model, of a differently shaped state, or with bad options."""
    who = type(optimizer).__name__
    for saved in saved_groups:
        missing = [key for key in method.shaping if key not in saved]
        if missing:
            raise ValueError(
                f"{who} cannot load this state: its groups have no {missing[0]!r} (they have "
                f"{', '.join(sorted(map(str, set(saved) - {'params', 'param_names'})))}), so another optimizer wrote "
                f"it. Resume with that optimizer, or start {who} from the weights alone, without the old optimizer "
                "state"
            )
    own = optimizer.param_groups
    sizes, saved_sizes = ([len(g["params"]) for g in groups] for groups in (own, saved_groups))
    if sizes != saved_sizes:
        off, changed = method.switch[1], []
        for key in method.shaping:  # what is worth being compressed depends on them
            was, now = ({repr(group[key]) for group in groups} - {repr(off)} for groups in (saved_groups, own))
            if was and now and not was & now:
                changed.append(f"{key}={' or '.join(sorted(was))}, as it was saved")
        if any(group["stacked"] for group in own) and not any(group["stacked"] for group in saved_groups):
            changed.append(
                "experts as they were when it was saved: left out of optim_target_modules for dense ones, or with "
                "stacked=False in overrides for all as one matrix"
            )
        remedy = "; and ".join(changed) or "the same model, trainable parameters and target modules"
        raise ValueError(
            f"{who} cannot load this state: it was saved with groups of {saved_sizes} parameters, this optimizer has "
            f"{sizes}. Build it with {remedy}"
        )
    for index, (group, saved) in enumerate(zip(optimizer.param_groups, saved_groups, strict=True)):
        for key in method.shaping:
            if group[key] != as_plain(saved[key]):
                raise ValueError(
                    f"{who} cannot load this state: parameter group {index} was saved with {key}={saved[key]!r}, this "
                    f"optimizer has {key}={group[key]!r}. Build it with {key}={saved[key]!r} to resume"
                )
        try:
            _loaded_options(method, group, saved)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{who} cannot load this state: in parameter group {index}, {error}") from error
    try:
        # the saved options hold after the load
        loaded = [
            vars(_loaded_options(method, g, s)) for g, s in zip(optimizer.param_groups, saved_groups, strict=True)
        ]
        check_agreement(method, loaded, who)
    except ValueError as error:
        raise ValueError(f"{who} cannot load this state: {error}") from error


def _tell_changed_options(optimizer: Optimizer, method: Method, saved_groups: Sequence[Mapping[str, Any]]) -> None:
    """Warn of options with which this optimizer was built, and which those of the state replace; once for each."""
    changed: dict[tuple[str, str, str], list[str]] = {}
    for index, (group, saved) in enumerate(zip(optimizer.param_groups, saved_groups, strict=True)):
        told = {*method.options.defaults(), "initial_lr"} - {"lr", *method.shaping}  # a scheduler's state has the rate
        for key in sorted(told & saved.keys() & group.keys()):
            if as_plain(group[key]) != as_plain(saved[key]):
                changed.setdefault((key, repr(saved[key]), repr(group[key])), []).append(str(index))
    for (key, was, now), indices in changed.items():
        logger.warning(
            "training goes on with %s=%s, as it was saved; the %s=%s of this %s has no effect (parameter group%s %s)",
            *(key, was, key, now, type(optimizer).__name__, "s" * (len(indices) > 1), ", ".join(indices)),
        )


def _loaded_options(method: Method, group: Mapping[str, Any], saved: Mapping[str, Any]) -> Any:
    """Return the options that a group will have: those saved, which hold after the load."""
    return method.options_of({key: saved.get(key, group[key]) for key in method.options.defaults()})


def _move_old_shared(optimizer: Optimizer, method: Method, state_dict: dict[str, Any]) -> dict[str, Any]:
    """Put what older versions kept in the first group where it is now: the state of the first parameter concerned."""
    groups, shared = state_dict["param_groups"], None
    if groups:
        shared = groups[0].get(_OLD_SHARED)
    if shared is None:
        return state_dict
    first = {key: value for key, value in groups[0].items() if key != _OLD_SHARED}
    moved = {**state_dict, "param_groups": [first, *groups[1:]]}
    for group, saved_group in zip(optimizer.param_groups, groups, strict=True):
        for param, saved_id in zip(group["params"], saved_group["params"], strict=True):
            own = state_dict["state"].get(saved_id)
            if own and isinstance(shared, Mapping) and method.compresses(param.shape, group):
                packed = {f"{SHARED_PREFIX}{key}": value for key, value in shared.items()}
                return {**moved, "state": {**state_dict["state"], saved_id: {**own, **packed}}}
    raise ValueError(
        f"{type(optimizer).__name__} cannot load this state: param_groups[0][{_OLD_SHARED!r}] belongs to no parameter"
    )


def _as_one_process(optimizer: Optimizer, method: Method, state_dict: dict[str, Any]) -> dict[str, Any]:
    """View whole state that was sharded as one process has it: contiguous, and pairs of bytes as int16."""
    state = dict(state_dict["state"])
    for group, saved_group in zip(optimizer.param_groups, state_dict["param_groups"], strict=True):
        options = _loaded_options(method, group, saved_group)
        for param, saved_id in zip(group["params"], saved_group["params"], strict=True):
            specs = method.specs(param.shape, param.dtype, options)
            if saved := state.get(saved_id):
                whole = [k for k in specs if isinstance(saved.get(k), Tensor) and not hasattr(saved[k], "placements")]
                parts = {key: as_indices(_without_gaps(saved[key], specs[key]), specs[key]) for key in whole}
                state[saved_id] = {**saved, **parts}
    return {**state_dict, "state": state}


def _without_gaps(part: Tensor, spec: TensorSpec) -> Tensor:
    """Return a tensor of the right size contiguous: torch < 2.13 leaves gaps in what it puts together of shards."""
    is_readable = part.layout == torch.strided and part.nbytes == spec.stored_bytes and has_storage(part)
    return part.contiguous() if is_readable else part


def _check_state(optimizer: Optimizer, method: Method, state_dict: dict[str, Any]) -> None:
    """Compare every saved entry with what this optimizer would allocate for the same parameter."""
    who, homes, counts = type(optimizer).__name__, list[str](), [0]
    shared_specs, shared_step = method.shared_specs(optimizer.param_groups), 0
    for group, saved_group in zip(optimizer.param_groups, state_dict["param_groups"], strict=True):
        options = _loaded_options(method, group, saved_group)
        names = group.get("param_names") or saved_group["params"]
        for param, name, saved_id in zip(group["params"], names, saved_group["params"], strict=True):
            saved = state_dict["state"].get(saved_id)
            if not saved:
                continue
            specs = dict(method.specs(param.shape, param.dtype, options))
            compressed = method.compressed_state(param.shape, param.dtype, options) is not None
            steps = ["step"]
            if compressed and shared_specs and any(str(key).startswith(SHARED_PREFIX) for key in saved):
                specs.update({f"{SHARED_PREFIX}{key}": spec for key, spec in shared_specs.items()})
                steps.append(SHARED_STEP)
                homes.append(str(name))
            sharded = {key for key, value in saved.items() if hasattr(value, "placements")}
            if sharded:
                specs.update({key: spec for key, spec in specs_at_rest(specs).items() if key in sharded})
            fault = _fault_of_entry(saved, specs, steps) or _fault_of_parts(saved, sharded, param, compressed)
            if fault is None and compressed and not sharded:
                fault = fault_of_values(saved, param.shape, method, options)
            if fault is not None:
                raise ValueError(
                    f"{who} cannot load the state of parameter {name!r} (shape {tuple(param.shape)}): {fault}. It "
                    "belongs to another optimizer, model or dtype, or the file is damaged"
                )
            shared_step = saved.get(SHARED_STEP, shared_step)
            if compressed:
                counts.append(saved["step"])
    if shared_specs and (len(homes) > 1 or (not homes and max(counts) > 0)):
        raise ValueError(
            f"{who} cannot load this state: {', '.join(f'{SHARED_PREFIX}{key}' for key in shared_specs)} and "
            f"{SHARED_STEP}, which belong to all parameters together, must be in the state of one parameter, and are "
            f"in that of {' and '.join(map(repr, homes)) or 'none'}. Save and load the whole of optimizer.state_dict()"
        )
    if homes and shared_step < max(counts):
        raise ValueError(
            f"{who} cannot load this state: {SHARED_STEP!r} is {shared_step}, but a parameter has taken part in "
            f"{max(counts)} steps. The file is damaged"
        )


def fault_of_values(state: Mapping[str, Any], shape: Sequence[int], method: Method, options: Options) -> str | None:
    """Return what a method's kernels could not be handed in the state of a compressed tensor, as a clause."""
    if method.check_loaded is None:
        return None
    stack = options.is_stack(shape)
    states, each = (split_state(state), shape[1:]) if stack else ([state], shape)
    return next(filter(None, (method.check_loaded(part, each, options) for part in states)), None)


def _fault_of_entry(saved: Mapping[Any, Any], specs: Mapping[str, TensorSpec], steps: Sequence[str]) -> str | None:
    """Return what is wrong with the saved state of one parameter, as a clause; None if nothing is."""
    for key in saved:
        if key not in specs and key not in steps:
            return f"there is no {key!r} in it"
    for key in steps:
        count = saved.get(key)
        if not isinstance(count, int) or isinstance(count, bool) or not 0 <= count < _MAX_STEPS:
            return f"{key!r} was saved as {_shortened(count)}, and must be an int from 0 to 2^38"
    for key, spec in specs.items():
        part = saved.get(key)
        expected = f"this optimizer expects {(spec.shape, spec.dtype)}"
        if not isinstance(part, Tensor):
            return f"{key!r} was saved as {_shortened(part)}, {expected}"
        if tuple(part.shape) != spec.shape or part.dtype != spec.dtype:
            return f"{key!r} was saved as {(tuple(part.shape), part.dtype)}, {expected}"
        fault = "is on the meta device" if part.is_meta else fault_of_tensor(part)
        if fault is not None:
            return f"{key!r} {fault}"
        local = local_of(part.detach())  # an answer for the whole would ask all processes
        if key == "exp_avg_sq" and local.numel() and bool((local.amin() < 0).any()):
            return f"{key!r} has negative entries, and is a mean of squares"
    return None


def _fault_of_parts(saved: Mapping[Any, Any], sharded: Iterable[Any], param: Tensor, compressed: bool) -> str | None:
    """Return why saved parts do not fit a parameter, as a clause; None if they do."""
    for key in sharded:
        if not hasattr(param, "placements"):
            return f"{key!r} is one process's part of it, and the parameter is not sharded"
        if not is_at_rest(saved[key], param, compressed=compressed):
            return f"{key!r} is not this process's part: load it by torch.distributed.checkpoint, which cuts it anew"
    return None


def _shortened(value: Any) -> str:
    text = repr(value) if not isinstance(value, Tensor) else f"a tensor {tuple(value.shape)}, {value.dtype}"
    return text if len(text) <= 60 else f"{text[:57]}..."
