"""What the Trainer must be told of an optimizer at the start: above all of one that acts during the backward pass.

The Trainer looks at ``param.grad`` after the backward pass, where a layer-wise optimizer has left nothing: it would log
a gradient norm of 0, and clip nothing. So a callback, added to the Trainer's default ones, refuses settings that cannot
be honoured before the first gradient, tells the optimizer which micro-batch is the last of a step, and logs the norm
that the optimizer measured. For every optimizer it takes off the hooks that an earlier one left on the model, and for
all of this package it warns where a run resumes without their state.
"""

from __future__ import annotations

import logging
from dataclasses import fields
from typing import Any

from accelerate.state import AcceleratorState, GradientState, is_initialized
from torch import nn
from torch.optim import Optimizer
from transformers import TrainerCallback, TrainerState, TrainingArguments

from hf_lowmem_optim.engine.backward import check_accumulation
from hf_lowmem_optim.engine.gradient_error import GradientErrors
from hf_lowmem_optim.engine.hooks import take_over
from hf_lowmem_optim.engine.optimizer import LowMemoryOptimizer
from hf_lowmem_optim.memory.measure import unwrap_optimizer
from hf_lowmem_optim.trainer.callbacks import add_to_log

__all__ = ["BackwardCallback", "check_adapters", "check_backward_arguments", "shards_later"]

logger = logging.getLogger(__name__)


def check_backward_arguments(
    args: TrainingArguments, optimizer_class: type[LowMemoryOptimizer], *, error_in_gradients: bool
) -> None:
    """Refuse training arguments that need all gradients at once, or those of other processes.

    Raises:
        ValueError: The message names the argument and what would be right.
    """
    method = optimizer_class.method
    if method.layerwise:
        optim, instead = f"optim={method.name!r}", f"use optim={method.name.removesuffix('_layerwise')!r}"
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
        scales = "skips steps, but with error_feedback='grad' a gradient is added to the error, which is not scaled, "
        scales += "and cannot be dropped"
        uses = "error_feedback='grad' adds a gradient to the error"
    else:
        return
    if args.fp16:
        raise ValueError(f"fp16=True scales the loss and {scales}. Train with bf16=True, or {instead}")
    if args.world_size > 1 and not (method.layerwise and shards_later()):
        remedy = "Train in one process, or with FSDP2" if method.layerwise else "Train in one process"
        raise ValueError(f"{uses} before the {args.world_size} processes have averaged it. {remedy}, or {instead}")


def shards_later() -> bool:
    """Return whether accelerate will shard the model with FSDP2 when it prepares it."""
    return is_initialized() and bool(getattr(AcceleratorState(), "is_fsdp2", False))


def check_adapters(model: nn.Module, who: str) -> None:
    """Raise ValueError for AdaLoRA, which reads ``param.grad`` after the backward pass, where ``who`` leaves none."""
    for module in model.modules():
        configs = getattr(module, "peft_config", None)
        if isinstance(configs, dict) and any(config.peft_type == "ADALORA" for config in configs.values()):
            raise ValueError(
                f"AdaLoRA reads gradients when update_and_allocate() is called, but {who} has used them up by then. "
                "Use the normal mode, with another error_feedback than 'grad'; or LoRA"
            )


class BackwardCallback(TrainerCallback):
    """Prepares optimizers at the start of a run; ``import hf_lowmem_optim`` adds it to every Trainer."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: Any, optimizer: Any = None, **given: Any
    ) -> None:
        """Refuse what cannot work, connect the optimizer with accelerate's count of micro-batches, begin a step."""
        if optimizer is not None and "model" in given:
            take_over(given["model"].parameters(), unwrap_optimizer(optimizer))
        if (inner := _ours(optimizer)) is None:
            return
        inner.restore_hooks()
        if state.is_world_process_zero:
            _tell_what_does_not_reach(inner, args)
        if state.global_step > 0 and not any(inner.state.values()):
            logger.warning(
                "training resumes after step %d, but %s has no state: the checkpoint lacks optimizer.pt or "
                "scheduler.pt, and the Trainer begins both anew",
                *(state.global_step, type(inner).__name__),
            )
        layerwise = inner.method.layerwise
        error_in_gradients = any(GradientErrors.serves(inner.method, group) for group in inner.param_groups)
        if not layerwise and not error_in_gradients:
            return
        check_backward_arguments(args, type(inner), error_in_gradients=error_in_gradients)
        if layerwise:
            _connect(inner, args)
        # auto_find_batch_size begins anew with the same optimizer, after a backward pass that ran out of memory.
        if used := inner.abandon_step():
            lost = f"{type(inner).__name__} cannot take back"
            logger.warning(
                "training begins anew after a step that failed in its backward pass: %d tensors had made use of their "
                "gradients already, which %s",
                *(used, lost if layerwise else "stay in their errors, for later steps to use"),
            )
        if error_in_gradients:
            clips = f", and max_grad_norm={args.max_grad_norm} clips by it" if (args.max_grad_norm or 0) > 0 else ""
            logger.warning("error_feedback='grad': grad_norm is the norm of gradient plus error%s", clips)

    def on_log(
        self, args: Any, state: TrainerState, control: Any, logs: Any = None, optimizer: Any = None, **_: Any
    ) -> None:
        """Log the norm of the gradients that came; the Trainer has that of those that were left, or none."""
        inner = _ours(optimizer)
        if inner is not None and inner.method.layerwise and logs and "loss" in logs and inner.grad_norm is not None:
            add_to_log(state, logs, {"grad_norm": inner.grad_norm.item()})


def _tell_what_does_not_reach(optimizer: Any, args: TrainingArguments) -> None:
    """Warn of training arguments that were set, but which an optimizer that was made without them does not have."""
    defaults = {each.name: each.default for each in fields(args)}
    for key, name in (("lr", "learning_rate"), ("weight_decay", "weight_decay")):
        own, wanted = float(optimizer.defaults[key]), getattr(args, name)
        # the schedule changes lr itself
        groups = [group.get(f"initial_{key}", group[key]) for group in optimizer.param_groups]
        if wanted != defaults[name] and wanted not in (own, *groups):
            logger.warning(
                "TrainingArguments(%s=%g) has no effect: this %s was made without it, with %s=%g",
                *(name, wanted, type(optimizer).__name__, key, own),
            )


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


def _is_last_micro_batch() -> bool:
    return bool(GradientState().sync_gradients)


def _ours(optimizer: Optimizer | None) -> Any | None:
    """Return the optimizer under accelerate's wrapper if it is of this package."""
    inner = None if optimizer is None else unwrap_optimizer(optimizer)
    return inner if isinstance(inner, LowMemoryOptimizer) else None
