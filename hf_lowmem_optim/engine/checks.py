"""What parameters, gradients and state must be like, and what they are called in errors."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from hf_lowmem_optim.engine.buckets import SHARED_PREFIX
from hf_lowmem_optim.engine.method import Method
from hf_lowmem_optim.engine.options import Options
from hf_lowmem_optim.engine.sharding.layout import local_of, sharding_problem
from hf_lowmem_optim.spec import TensorSpec

__all__ = [
    "check_flattened",
    "check_parameter",
    "check_part",
    "check_rounding",
    "check_tensor",
    "check_unchanged",
    "checked_parameters",
    "describe_parameter",
    "fault_of_tensor",
    "flat_note",
    "has_storage",
    "named_like_others",
    "refuse_mps",
]

logger = logging.getLogger(__name__)

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def check_parameter(param: Any, who: str, optimizer: str) -> None:
    """Refuse at construction what could not be updated later; frozen parameters may be anything."""
    if not isinstance(param, Tensor) or not param.requires_grad:
        return
    if param.dtype not in _DTYPES:
        raise TypeError(f"{who} has dtype {param.dtype}; {optimizer} supports float32, bfloat16 and float16")
    if not param.is_leaf:
        raise ValueError(
            f"{who} of shape {tuple(param.shape)} is not a leaf: it is the result of an operation, so that an update "
            "of it would be lost; pass the tensors that it was computed from, such as model.parameters()"
        )


def checked_parameters(given: Any, optimizer: str) -> tuple[Any, list[Tensor]]:
    """Return the parameters of a group, which are a tensor or some, with names or without; and their tensors."""
    params = [given] if isinstance(given, Tensor) else given if isinstance(given, set) else list(given)
    for item in params:
        if isinstance(item, tuple):
            check_parameter(item[1], f"parameter {item[0]!r}", optimizer)
        else:
            check_parameter(item, "a parameter", optimizer)
    return params, [each for each in (p[1] if isinstance(p, tuple) else p for p in params) if isinstance(each, Tensor)]


def describe_parameter(param: Tensor, group: Mapping[str, Any]) -> str:
    """Name a parameter in an error: its own name if the group has names, else its place and shape."""
    index = next(i for i, p in enumerate(group["params"]) if p is param)
    names = group.get("param_names")
    return f"parameter {names[index]!r}" if names else f"parameter {index} (shape {tuple(param.shape)})"


def check_tensor(
    param: Tensor,
    group: Mapping[str, Any],
    state: Mapping[str, Any] | None,
    *,
    rule: tuple[bool, Mapping[str, TensorSpec]],
    optimizer: Any,
) -> None:
    """Refuse what the rules of an optimizer cannot do with a parameter, before anything is touched.

    Args:
        param: A parameter that has a gradient.
        group: Its group.
        state: Its state; None or empty before its first gradient.
        rule: Whether it takes the compressed rule, and what its state is to be.
        optimizer: The optimizer.

    Raises:
        RuntimeError: The gradient is sparse or complex, or for the dense rule of another dtype than the parameter.
        NotImplementedError: The parameter is a sharded DTensor, which its group's options do not serve.
        ValueError: The options of the group no longer describe the state, which a kernel would read as what it is not.
    """
    grad, (compressed, specs), method = param.grad, rule, optimizer.method
    assert grad is not None
    dtype = param.dtype
    if grad.layout != torch.strided or grad.dtype != dtype or dtype not in _DTYPES:
        _refuse_gradient(param, grad, group, compressed, type(optimizer).__name__)
    if type(param) is not Parameter and hasattr(param, "placements"):
        _check_sharded(param, group, compressed, method, type(optimizer).__name__)
    elif (
        grad.shape != param.shape
        or grad.device != param.device
        or param.untyped_storage().nbytes() < param.storage_offset() * dtype.itemsize + param.nbytes
        # a gradient may be expanded, or a slice
        or (
            grad.untyped_storage().nbytes() < grad.storage_offset() * grad.itemsize + grad.nbytes
            and not has_storage(grad)
        )
    ):
        _refuse_memory(param, grad, group)
    if state:
        _check_state(param, group, state, specs, method)


def _refuse_gradient(param: Tensor, grad: Tensor, group: Mapping[str, Any], compressed: bool, who: str) -> None:
    """Raise RuntimeError for a gradient that is sparse, or of a dtype that the parameter's rule does not take."""
    if grad.layout != torch.strided:
        raise RuntimeError(
            f"{describe_parameter(param, group)} has a sparse gradient, which {who} does not support; "
            "build its module with sparse=False"
        )
    if grad.is_complex() or param.dtype not in _DTYPES:
        raise RuntimeError(
            f"{describe_parameter(param, group)} is {param.dtype} with a gradient of {grad.dtype}; "
            f"{who} supports float32, bfloat16 and float16"
        )
    if not compressed:
        raise RuntimeError(
            f"{describe_parameter(param, group)} is {param.dtype} with a gradient of {grad.dtype}; the dense rule "
            "needs both alike"
        )


def _check_state(
    param: Tensor,
    group: Mapping[str, Any],
    state: Mapping[str, Any],
    specs: Mapping[str, TensorSpec],
    method: Method,
) -> None:
    """Raise ValueError for a state that is not what the options of its group describe."""
    for key, spec in specs.items():
        part = state.get(key)
        fits = (
            part is not None
            and part.shape == spec.shape
            and part.dtype == spec.dtype
            and part.device == param.device
            and part.layout == torch.strided
            and part.is_contiguous()
            and not part.is_neg()
            and not part._is_zerotensor()
            and part.untyped_storage().nbytes() >= part.storage_offset() * spec.dtype.itemsize + part.nbytes
        )
        if not fits and (part is not None or key not in method.follows):
            check_part(key, part, spec, param, group, method)
    if len(state) > len(specs) + 1:
        known = {"step", *specs, *method.follows}
        superfluous = [key for key in state if key not in known and not key.startswith(SHARED_PREFIX)]
        if superfluous:
            _refuse_state(param, group, method, superfluous[0], "there", None)


def _refuse_memory(param: Tensor, grad: Tensor, group: Mapping[str, Any]) -> None:
    """Raise RuntimeError for a parameter and a gradient that are not alike, or of which one has lost its memory."""
    what = describe_parameter(param, group)
    if grad.shape != param.shape or grad.device != param.device:
        raise RuntimeError(
            f"{what} is {tuple(param.shape)} on {param.device}, its gradient {tuple(grad.shape)} on {grad.device}: "
            "param.data was replaced after the backward pass. Call zero_grad() when it is"
        )
    whose = "the gradient of " if has_storage(param) else ""
    raise RuntimeError(
        f"{whose}{what} has no memory of its size: its storage was freed or cut (by FSDP, or by resize_)"
    )


def check_part(
    key: str, part: Tensor | None, spec: TensorSpec, param: Tensor, group: Mapping[str, Any], method: Method
) -> None:
    """Raise ValueError for a tensor of a parameter's state that a kernel would read as what it is not."""
    if part is None or part.shape != spec.shape or part.dtype != spec.dtype:
        found = "missing" if part is None else f"{tuple(part.shape)}, {part.dtype}"
        _refuse_state(param, group, method, key, found, spec)
        return
    what = f"{key!r} of the state of {describe_parameter(param, group)}"
    if part.device != param.device:
        raise ValueError(f"{what} is on {part.device}, the parameter on {param.device}: move the state with it")
    if (fault := fault_of_tensor(part)) is not None:
        raise ValueError(f"{what} {fault}")


def fault_of_tensor(part: Tensor) -> str | None:
    """Return why a kernel cannot be handed a state tensor, as a clause; None if it can.

    Kernels walk ``numel()`` entries from an address on.
    """
    part = local_of(part)
    if part.layout != torch.strided or not part.is_contiguous():
        return f"is not contiguous ({part.layout}, strides {part.stride() if part.layout == torch.strided else 'none'})"
    if not has_storage(part):
        return "has no memory of its size"
    if part.is_neg() or part._is_zerotensor():
        return "is a lazily negated or zero tensor, whose memory does not hold its numbers"
    return None


def has_storage(tensor: Tensor) -> bool:
    """Return whether the memory of a tensor is there: a storage may be freed or cut under it, as FSDP does."""
    if tensor.is_contiguous():
        entries = tensor.numel()
    else:
        entries = 1 + sum([(n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True)])
    needed = (tensor.storage_offset() + entries) * tensor.element_size()
    return tensor.untyped_storage().nbytes() >= needed or tensor.numel() == 0


def _check_sharded(param: Any, group: Mapping[str, Any], compressed: bool, method: Method, who: str) -> None:
    """Raise NotImplementedError where the rules cannot update a DTensor."""
    what, why = describe_parameter(param, group), method.needs_one_process(group, sharded=True)
    if why is not None and compressed:
        raise NotImplementedError(f"{what} is sharded (DTensor), and {why}: {who} trains it in one process")
    if not hasattr(param.grad, "placements"):
        raise RuntimeError(f"{what} is sharded (DTensor), and its gradient is not")
    if group["weight_rounding"] == "compensated":
        raise NotImplementedError(
            f"{what} is sharded (DTensor), for which there is no weight_rounding='compensated'; give its group "
            "weight_rounding='nearest' or 'stochastic'"
        )
    plain = not compressed and group["dense_state"] != "8bit" and group["weight_rounding"] == "nearest"
    if not plain and (problem := sharding_problem(param)) is not None:
        key, off = method.switch
        raise NotImplementedError(
            f"{what} is sharded (DTensor) in a way that {who} does not serve: {problem}. Give its group {key}={off!r}, "
            "dense_state='param' and weight_rounding='nearest' for the rule that goes entry by entry"
        )


def _refuse_state(
    param: Tensor, group: Mapping[str, Any], method: Method, key: str, found: str, wanted: TensorSpec | None
) -> None:
    settings = ", ".join(f"{name}={value!r}" for name, value in method.settings(group).items())
    needed = "nothing of that name" if wanted is None else f"{tuple(wanted.shape)}, {wanted.dtype}"
    raise ValueError(
        f"the state of {describe_parameter(param, group)} does not fit the options of its group ({settings}): {key!r} "
        f"is {found}, but they need {needed}. Neither these options nor a parameter's shape and dtype can change in a "
        "run: set them back, or build a new optimizer"
    )


def check_unchanged(before: Options, now: Options, method: Method) -> None:
    """Raise ValueError for new values of options on which the state depends; its shapes need not tell."""
    for key in method.shaping:
        was, value = getattr(before, key), getattr(now, key)
        if value != was:
            raise ValueError(
                f"{key}={value!r} of a parameter group was {key}={was!r} when its state was made, which depends on it: "
                "it cannot change in a run. Set it back, or build a new optimizer"
            )


def named_like_others(params: Any, groups: Sequence[Mapping[str, Any]]) -> Any:
    """Return a new group's parameters, named by their place if the other groups' are named and these are not.

    torch would refuse them. The Trainer's groups here have names, and who unfreezes layers during a run gives none.
    """
    named = bool(groups) and "param_names" in groups[0]
    if not named or not isinstance(params, list) or any(isinstance(param, tuple) for param in params):
        return params
    before = sum(len(group["params"]) for group in groups)
    return [(f"added.{place}", param) for place, param in enumerate(params, before)]


def check_flattened(optimizer: Any, had_matrices: Sequence[bool]) -> None:
    """Refuse, or note for a method that can do with them, flat vectors in the place of a group's matrices.

    Args:
        optimizer: The optimizer, before its first step.
        had_matrices: For each group, whether it had matrices to compress when it was added.

    Raises:
        NotImplementedError: The method would train as AdamW.
    """
    for had, group in zip(had_matrices, optimizer.param_groups, strict=False):
        params = group["params"]
        if not had or not params or any(param.dim() != 1 for param in params):
            continue
        method, who = optimizer.method, type(optimizer).__name__
        what = "The group's matrices were replaced by flat vectors, as DeepSpeed ZeRO does in the stages 1 to 3"
        if not method.serves_flat:
            raise NotImplementedError(
                f"{what}: {who} would not find a matrix, and train as AdamW. Use FSDP2 "
                "(reshard_after_forward=False is ZeRO-2), ZeRO stage 0, or microadam"
            )
        logger.warning("%s. %s", what, flat_note(who))


def flat_note(who: str) -> str:
    """Say what an optimizer is on flat vectors."""
    return (
        f"{who} then selects entries in blocks that run across tensors and depend on the number of processes, whatever "
        "the size of a tensor: an experimental variant, not the method that one process or FSDP2 runs"
    )


def refuse_mps(params: Sequence[Tensor], who: str) -> None:
    """Raise ValueError for parameters on Apple's MPS, which has no float64, for a method that computes in it."""
    if any(param.device.type == "mps" for param in params):
        raise ValueError(
            f"{who} computes the inner products of gradients in float64, which mps has not: train on another device, "
            "or use ldadam or microadam"
        )


def check_rounding(groups: Sequence[Mapping[str, Any]]) -> None:
    """Raise ValueError if a way of rounding is asked for and would round nothing: every parameter is float32."""
    asked = [group for group in groups if group["weight_rounding"] != "nearest"]
    if asked and not any(param.dtype != torch.float32 for group in asked for param in group["params"]):
        raise ValueError(
            f"weight_rounding={asked[0]['weight_rounding']!r} has no effect here: every parameter is float32, and only "
            "bfloat16 and float16 weights are rounded. Load the model in bfloat16, or leave weight_rounding='nearest'"
        )
