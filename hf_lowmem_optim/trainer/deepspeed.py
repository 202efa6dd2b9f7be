"""DeepSpeed ZeRO under the Trainer and accelerate: what it leaves of a method that needs matrices.

The stages 1 to 3 hand an optimizer one flat vector for each of its groups and each process. transformers allows that
for every optimizer.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from accelerate.state import AcceleratorState, is_initialized
from torch import nn

from hf_lowmem_optim.engine.checks import flat_note
from hf_lowmem_optim.engine.optimizer import LowMemoryOptimizer

if TYPE_CHECKING:
    from transformers import TrainingArguments

__all__ = ["check_zero", "deepspeed_plugin"]

logger = logging.getLogger(__name__)


def deepspeed_plugin(args: TrainingArguments | None = None) -> Any:
    """Return accelerate's settings of DeepSpeed, with which a model is to be trained; None without DeepSpeed.

    Args:
        args: Training arguments; without them, or where they say nothing, what accelerate was set up with counts.
    """
    plugin = getattr(args, "deepspeed_plugin", None)
    if plugin is None and is_initialized():
        plugin = AcceleratorState().deepspeed_plugin
    return plugin


def check_zero(
    optimizer_class: type[LowMemoryOptimizer], hyper: Any, args: TrainingArguments | None, model: nn.Module | None
) -> None:
    """Refuse ZeRO of a stage in which a method would train as AdamW, without a word of DeepSpeed's.

    Args:
        optimizer_class: The optimizer.
        hyper: Its hyper-parameters; what is missing has its default.
        args: The training arguments, if there are any.
        model: The model, if it is there already.

    Raises:
        NotImplementedError: The message names the remedy.
    """
    method, who, plugin = optimizer_class.method, optimizer_class.__name__, deepspeed_plugin(args)
    stage = 0 if plugin is None else int(plugin.zero_stage)
    if stage == 0 or method.is_dense(vars(method.check(hyper, who))):
        return
    remedy = "Use FSDP2 (fsdp=True; reshard_after_forward=False is ZeRO-2), or ZeRO stage 0"
    if not method.serves_flat:
        raise NotImplementedError(
            f"DeepSpeed ZeRO stage {stage} hands {who} one flat vector per process, without matrices: it would train "
            f'as AdamW. {remedy}, or optim="microadam"'
        )
    if model is not None and any(hasattr(param, "ds_shape") for param in model.parameters()):
        raise NotImplementedError(
            f"the model was loaded in parts (zero.Init): its tensors have no shapes, by which {who} is told what to "
            f"compress. {remedy}, or load the model before TrainingArguments are made"
        )
    if model is not None and AcceleratorState().is_main_process:
        logger.warning("DeepSpeed ZeRO stage %d hands over one flat vector per process. %s", stage, flat_note(who))
