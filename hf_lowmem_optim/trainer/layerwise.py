"""What the layer-wise optimizers need from the Trainer, for whatever way they got into it.

The Trainer looks at ``param.grad`` after the backward pass, where they have left nothing: it would log a gradient norm
of 0, and clip nothing. So a callback, added to the Trainer's default ones, refuses settings that cannot be honoured,
tells the optimizer which micro-batch is the last of a step, and logs the norm that the optimizer measured. With any
other optimizer it does nothing.
"""

from __future__ import annotations

import logging
from typing import Any

from accelerate.state import GradientState
from torch.optim import Optimizer
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_lowmem_optim.memory.measure import unwrap_optimizer
from hf_lowmem_optim.optimizers.base import LowMemoryOptimizer
from hf_lowmem_optim.optimizers.layerwise import Layerwise

__all__ = ["LayerwiseCallback", "check_layerwise_arguments"]

logger = logging.getLogger(__name__)


def check_layerwise_arguments(args: TrainingArguments, optimizer_class: type[LowMemoryOptimizer]) -> None:
    """Refuse training arguments that need all gradients at once, or those of other processes.

    Args:
        args: The training arguments.
        optimizer_class: The optimizer; only layer-wise ones are checked.

    Raises:
        ValueError: The message names the argument and what would be right.
    """
    if not issubclass(optimizer_class, Layerwise):
        return
    name, normal = optimizer_class.name, optimizer_class.normal.name
    if args.max_grad_norm is not None and args.max_grad_norm > 0:
        raise ValueError(
            f"max_grad_norm={args.max_grad_norm!r} (1.0 is the default) clips by the norm of all gradients together, "
            f"which are never there at once with optim={name!r}. Set max_grad_norm=0; to clip each tensor by its own "
            f"norm add clip_tensor_norm=1.0 to optim_args; or use optim={normal!r}"
        )
    if args.fp16:
        raise ValueError(
            f"fp16=True scales the loss and needs all gradients before it knows whether to use them, but "
            f"optim={name!r} uses each at once. Train with bf16=True, or use optim={normal!r}"
        )
    if args.world_size > 1:
        raise ValueError(
            f"optim={name!r} uses a gradient before the {args.world_size} processes have averaged it. Train in one "
            f"process, or use optim={normal!r}"
        )


class LayerwiseCallback(TrainerCallback):
    """Serves layer-wise optimizers; ``import hf_lowmem_optim`` adds it to every Trainer."""

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: Optimizer | None = None,
        **kwargs: Any,
    ) -> None:
        """Refuse what cannot work, connect the optimizer with accelerate's count of micro-batches, begin a step."""
        inner = _layerwise(optimizer)
        if inner is None:
            return
        check_layerwise_arguments(args, type(inner))
        if args.gradient_accumulation_steps > 1:
            for group in inner.param_groups:
                # a dense tensor accumulates its gradient as always
                if any(inner.compresses(param.shape, group) for param in group["params"]):
                    inner.check_accumulation(group)
        inner.is_last_micro_batch = _is_last_micro_batch
        # auto_find_batch_size begins anew with the same optimizer, after a backward pass that ran out of memory.
        used = inner.abandon_step()
        if used:
            logger.warning(
                "training begins anew after a step that failed in its backward pass: %d tensors had made use of their "
                "gradients already, which %s cannot take back",
                used,
                type(inner).__name__,
            )
        if args.torch_compile:
            logger.warning(
                "torch_compile=True computes all gradients of a graph before the first of them is used, so %s gives "
                "the right result but saves no memory for gradients. Leave torch_compile out to have one at a time",
                inner.name,
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
        inner = _layerwise(optimizer)
        if inner is None or not logs or "loss" not in logs or inner.grad_norm is None:
            return
        logs["grad_norm"] = inner.grad_norm.item()
        # The Trainer copied its logs into the history before it called the callbacks.
        if state.log_history and state.log_history[-1].get("step") == state.global_step:
            state.log_history[-1]["grad_norm"] = logs["grad_norm"]


def _layerwise(optimizer: Optimizer | None) -> Layerwise | None:
    """The layer-wise optimizer under accelerate's wrapper, None if it is another."""
    inner = None if optimizer is None else unwrap_optimizer(optimizer)
    return inner if isinstance(inner, Layerwise) else None


def _is_last_micro_batch() -> bool:
    """Whether the backward pass that runs completes the gradients of a step."""
    return bool(GradientState().sync_gradients)
