"""``error_feedback="grad"`` in the Trainer: what it rules out, refused before the first gradient, and what it changes.

The optimizer refuses the same by itself, in whatever loop (``optimizers/gradient_error.py``), but a gradient scaler
only at the first step. So a callback, added to the Trainer's default ones, looks at the training arguments.
"""

from __future__ import annotations

import logging
from typing import Any

from torch.optim import Optimizer
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_lowmem_optim.memory.measure import unwrap_optimizer
from hf_lowmem_optim.optimizers.gradient_error import ErrorInGradient

__all__ = ["GradientErrorCallback", "check_gradient_error_arguments"]

logger = logging.getLogger(__name__)


def check_gradient_error_arguments(args: TrainingArguments) -> None:
    """Refuse training arguments with which an error cannot be kept in the gradients.

    Args:
        args: The training arguments.

    Raises:
        ValueError: The message names the argument and what would be right.
    """
    if args.fp16:
        raise ValueError(
            "fp16=True scales the gradients and skips steps, but with error_feedback='grad' a gradient is added to the "
            "error, which is not scaled, and cannot be dropped. Train with bf16=True, or use error_feedback='4bit'"
        )
    if args.world_size > 1:
        raise ValueError(
            f"error_feedback='grad' adds a gradient to the error before the {args.world_size} processes have averaged "
            "it. Train in one process, or use error_feedback='4bit'"
        )


class GradientErrorCallback(TrainerCallback):
    """Serves optimizers that keep errors in the gradients; ``import hf_lowmem_optim`` adds it to every Trainer."""

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: Optimizer | None = None,
        **kwargs: Any,
    ) -> None:
        """Refuse what cannot work, and say what the logged norm is."""
        inner = None if optimizer is None else unwrap_optimizer(optimizer)
        if not isinstance(inner, ErrorInGradient) or not inner.has_errors_in_gradients:
            return
        check_gradient_error_arguments(args)
        # auto_find_batch_size begins anew with the same optimizer, after a backward pass that ran out of memory.
        if used := inner.abandon_step():
            logger.warning(
                "training begins anew after a step that failed in its backward pass: the gradients of %d tensors stay "
                "in their errors, for later steps to use",
                used,
            )
        clipped = args.max_grad_norm is not None and args.max_grad_norm > 0
        logger.warning(
            "error_feedback='grad': grad_norm is the norm of gradient plus error%s",
            f", and max_grad_norm={args.max_grad_norm} clips by it" if clipped else "",
        )
