"""The Trainer's part for optimizers that act during the backward pass: layer-wise ones and ``error_feedback="grad"``.

The Trainer looks at ``param.grad`` after the backward pass, where a layer-wise optimizer has left nothing: it would log
a gradient norm of 0, and clip nothing. So a callback, added to the Trainer's default ones, refuses settings that cannot
be honoured before the first gradient, tells the optimizer which micro-batch is the last of a step, and logs the norm
that the optimizer measured. With any other optimizer it does nothing.
"""

from __future__ import annotations

import logging
from typing import Any

from accelerate.state import GradientState
from torch.optim import Optimizer
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_lowmem_optim.engine.backward import check_accumulation
from hf_lowmem_optim.engine.gradient_error import GradientErrors
from hf_lowmem_optim.engine.optimizer import LowMemoryOptimizer
from hf_lowmem_optim.memory.measure import unwrap_optimizer
from hf_lowmem_optim.trainer.callbacks import add_to_log

__all__ = ["BackwardCallback", "check_backward_arguments"]

logger = logging.getLogger(__name__)


def is_layerwise(optimizer_class: type[LowMemoryOptimizer]) -> bool:
    """Return whether optimizers of a class update during the backward pass."""
    return optimizer_class.method.layerwise


def keeps_error_in_gradients(optimizer: LowMemoryOptimizer) -> bool:
    """Return whether an optimizer keeps the error of any parameter in its gradient."""
    return any(GradientErrors.serves(optimizer.method, group) for group in optimizer.param_groups)


def check_backward_arguments(
    args: TrainingArguments, optimizer_class: type[LowMemoryOptimizer], *, error_in_gradients: bool
) -> None:
    """Refuse training arguments that need all gradients at once, or those of other processes.

    Args:
        args: The training arguments.
        optimizer_class: The optimizer.
        error_in_gradients: Whether it keeps errors in the gradients.

    Raises:
        ValueError: The message names the argument and what would be right.
    """
    if is_layerwise(optimizer_class):
        optim = f"optim={optimizer_class.method.name!r}"
        instead = f"use optim={optimizer_class.method.name.removesuffix('_layerwise')!r}"
        if args.max_grad_norm is not None and args.max_grad_norm > 0:
            raise ValueError(
                f"max_grad_norm={args.max_grad_norm!r} (1.0 is the default) clips by the norm of all gradients "
                f"together, which are never there at once with {optim}. Set max_grad_norm=0; to clip each tensor by "
                f"its own norm add clip_tensor_norm=1.0 to optim_args; or {instead}"
            )
        scales = f"needs all gradients before it knows whether to use them, but {optim} uses each at once"
        uses = f"{optim} uses a gradient"
    elif error_in_gradients:
        instead = "use error_feedback='4bit'"
        scales = (
            "skips steps, but with error_feedback='grad' a gradient is added to the error, which is not scaled, and "
            "cannot be dropped"
        )
        uses = "error_feedback='grad' adds a gradient to the error"
    else:
        return
    if args.fp16:
        raise ValueError(f"fp16=True scales the loss and {scales}. Train with bf16=True, or {instead}")
    if args.world_size > 1:
        raise ValueError(
            f"{uses} before the {args.world_size} processes have averaged it. Train in one process, or {instead}"
        )


class BackwardCallback(TrainerCallback):
    """Serves optimizers that act during the backward pass; ``import hf_lowmem_optim`` adds it to every Trainer."""

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: Optimizer | None = None,
        **kwargs: Any,
    ) -> None:
        """Refuse what cannot work, connect the optimizer with accelerate's count of micro-batches, begin a step."""
        inner = _ours(optimizer)
        if inner is None:
            return
        layerwise, error_in_gradients = is_layerwise(type(inner)), keeps_error_in_gradients(inner)
        if not layerwise and not error_in_gradients:
            return
        check_backward_arguments(args, type(inner), error_in_gradients=error_in_gradients)
        if layerwise:
            _connect(inner, args)
        # auto_find_batch_size begins anew with the same optimizer, after a backward pass that ran out of memory.
        if used := inner.abandon_step():
            logger.warning(
                "training begins anew after a step that failed in its backward pass: %d tensors had made use of their "
                "gradients already, which %s",
                used,
                f"{type(inner).__name__} cannot take back"
                if layerwise
                else "stay in their errors, for later steps to use",
            )
        if error_in_gradients:
            clipped = args.max_grad_norm is not None and args.max_grad_norm > 0
            logger.warning(
                "error_feedback='grad': grad_norm is the norm of gradient plus error%s",
                f", and max_grad_norm={args.max_grad_norm} clips by it" if clipped else "",
            )

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        optimizer: Optimizer | None = None,
        **kwargs: Any,
    ) -> None:
        """Log the norm of the gradients that came; the Trainer has that of those that were left, or none."""
        inner = _ours(optimizer)
        if inner is None or not is_layerwise(type(inner)) or not logs or "loss" not in logs or inner.grad_norm is None:
            return
        add_to_log(state, logs, {"grad_norm": inner.grad_norm.item()})


def _connect(optimizer: Any, args: TrainingArguments) -> None:
    """Check a layer-wise optimizer's own settings, and let it ask accelerate for the last micro-batch of a step."""
    if args.gradient_accumulation_steps > 1:
        for group in optimizer.param_groups:
            # a dense tensor accumulates its gradient as always
            if any(optimizer.method.compresses(param.shape, group) for param in group["params"]):
                check_accumulation(group)
    optimizer.is_last_micro_batch = _is_last_micro_batch
    if args.torch_compile:
        logger.warning(
            "torch_compile=True computes all gradients of a graph before the first of them is used, so %s gives the "
            "right result but saves no memory for gradients. Leave torch_compile out to have one at a time",
            optimizer.method.name,
        )


def _ours(optimizer: Optimizer | None) -> Any | None:
    """Return the optimizer under accelerate's wrapper if it is of this package."""
    inner = None if optimizer is None else unwrap_optimizer(optimizer)
    return inner if isinstance(inner, LowMemoryOptimizer) else None


def _is_last_micro_batch() -> bool:
    """Return whether the running backward pass completes the gradients of a step."""
    return bool(GradientState().sync_gradients)
