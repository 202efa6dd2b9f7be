"""A callback that logs how many bytes the optimizer's state takes."""

from __future__ import annotations

import logging
import sys
from types import FrameType
from typing import Any

from torch.optim import Optimizer
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import CallbackHandler

from hf_lowmem_optim.memory.measure import StateReport, measure_state

__all__ = ["OptimizerStateMemoryCallback"]

logger = logging.getLogger(__name__)


class OptimizerStateMemoryCallback(TrainerCallback):
    """Logs the measured bytes of optimizer state with every training log.

    Keys: ``optimizer_state/total_bytes``, ``optimizer_state/<component>_bytes`` (``first_moment``, ``second_moment``,
    ``basis``, ``error``, ``dense``, ...), ``optimizer_state/group_<i>_bytes`` and, for comparison,
    ``optimizer_state/adamw_fp32_bytes``. They are in ``log_history``, in what is printed and in what every
    ``report_to`` service gets. It works with any torch optimizer; components are then the keys of its state.

    Only training logs have them (those with a loss), on the main process, from the first step on. Under sharding
    they are this process's bytes.

    Example:
        >>> Trainer(model, args, train_dataset=data, callbacks=[OptimizerStateMemoryCallback()])
    """

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Move to the front of the callbacks."""
        self._move_to_front()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Move to the front if this callback was added after the Trainer was made, or another took its place."""
        self._move_to_front()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        optimizer: Optimizer | None = None,
        **kwargs: Any,
    ) -> None:
        """Add the bytes to a training log, before the reporters see it."""
        if optimizer is None or not logs or not state.is_world_process_zero:
            return
        if "loss" not in logs and "train_loss" not in logs:
            return
        report = measure_state(optimizer)
        if not report.total_bytes:
            return
        entries = _log_entries(report)
        logs.update(entries)
        # The Trainer copied its logs into the history before it called the callbacks.
        if state.log_history and state.log_history[-1].get("step") == state.global_step:
            state.log_history[-1].update(entries)

    def _move_to_front(self) -> None:
        """Become the first callback, so that what `on_log` adds reaches the reporters too.

        The Trainer puts the reporters before the user's callbacks, and offers a callback neither itself nor its place
        in the list. So the handler is taken from the frames that are calling us: the one whose `self` is a
        CallbackHandler with this very callback. The list gets replaced and not changed, because the handler is
        iterating over it.
        """
        frame: FrameType | None = sys._getframe(1)
        while frame is not None:
            handler = frame.f_locals.get("self")
            if isinstance(handler, CallbackHandler) and any(callback is self for callback in handler.callbacks):
                if handler.callbacks[0] is not self:
                    others = [callback for callback in handler.callbacks if callback is not self]
                    handler.callbacks = [self, *others]
                return
            frame = frame.f_back
        logger.warning(
            "OptimizerStateMemoryCallback was not called by a transformers CallbackHandler, so it cannot move before "
            "the reporters: the bytes are in log_history, but callbacks before this one do not get them."
        )


def _log_entries(report: StateReport) -> dict[str, int]:
    """The log's keys and values."""
    entries = {"total": report.total_bytes, **report.component_bytes, "adamw_fp32": report.adamw_fp32_bytes}
    entries.update((f"group_{index}", count) for index, count in enumerate(report.group_bytes))
    return {f"optimizer_state/{name}_bytes": count for name, count in entries.items()}
