"""``IOBSPruningCallback``: prune in a Trainer run, and see in the logs what that did."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, Literal

from torch import nn
from torch.optim import Optimizer
from transformers import TrainerCallback, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from hf_lowmem_optim.engine.coupled import Scope
from hf_lowmem_optim.memory.measure import unwrap_optimizer
from hf_lowmem_optim.pruning.projection import Projection
from hf_lowmem_optim.pruning.pruner import IOBSPruner, Saliency, named_parameters
from hf_lowmem_optim.pruning.schedule import PruningSchedule, ScheduleKind
from hf_lowmem_optim.trainer.callbacks import add_to_log, log_early
from hf_lowmem_optim.trainer.deepspeed import deepspeed_plugin
from hf_lowmem_optim.trainer.param_groups import prunable_weights

__all__ = ["IOBSPruningCallback"]

logger = logging.getLogger(__name__)


class IOBSPruningCallback(TrainerCallback, ExportableState):
    """Prunes the weights of linear and convolution layers while the Trainer trains them.

    Embeddings, output heads and adapters stay dense, unless ``optim_target_modules`` names them. What is pruned is
    exactly zero in the model and its checkpoints; a run that resumes goes on as if it had not been interrupted.

    Keys of the training logs, of the last projection: ``pruning/sparsity``; ``pruning/loss_increase``, what the
    quadratic model of the window predicted (not with optimizers that have none); and ``pruning/kept_changed``, the
    entries that are kept now and were pruned before.

    Attributes:
        num_steps: The steps so far that pruning counted.

    Args:
        sparsity: As for :class:`~hf_lowmem_optim.IOBSPruner`, like all other arguments; steps count from the begin of
            training, without those that a gradient scaler skipped.
        initial_sparsity: Of the first projection.
        pattern: (N, M) for N:M patterns.
        begin: The first step at which it may project.
        end: The last; not beyond the end of the run.
        every: Steps from a projection to the next.
        schedule: ``"cubic"`` or ``"constant"``.
        saliency: ``"magnitude"`` or ``"obs"``.
        correction: Move the kept entries to where the pruned ones are missed least.
        damping: λ, ``"auto"``, or None for the optimizer's own.
        scope: ``"model"`` or ``"tensor"``; None for the optimizer's.
        exclude: Names of parameters that stay dense, or parts of names (whole words between dots).

    Example:
        >>> args = TrainingArguments(..., optim="sparse_mfac", optim_args="window=32,density=0.25", max_steps=2000)
        >>> Trainer(model, args, train_dataset=data, callbacks=[IOBSPruningCallback(sparsity=0.9, end=1000)])
    """

    def __init__(
        self,
        sparsity: float | None = None,
        *,
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
        exclude: Sequence[str] = (),
    ) -> None:
        self._arguments: dict[str, Any] = {
            "sparsity": sparsity,
            "initial_sparsity": initial_sparsity,
            "pattern": pattern,
            "begin": begin,
            "end": end,
            "every": every,
            "schedule": schedule,
            "saliency": saliency,
            "correction": correction,
            "damping": damping,
            "scope": scope,
            "exclude": [exclude] if isinstance(exclude, str) else list(exclude),
        }
        # wrong ones are told before anything is loaded
        PruningSchedule(sparsity, initial_sparsity, pattern, begin, end, every, schedule)
        self.num_steps = 0
        self._pruner: IOBSPruner | None = None
        self._last: Projection | None = None

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: Any,
        model: nn.Module | None = None,
        optimizer: Optimizer | None = None,
        **_: Any,
    ) -> None:
        """Make the pruner, or go on where a checkpoint ended.

        Raises:
            ValueError: The run ends before the sparsity is reached, or the pruner cannot work.
            NotImplementedError: The run is one of DeepSpeed, or parameters are sharded.
        """
        if deepspeed_plugin(args) is not None:
            raise NotImplementedError("DeepSpeed's partitions have no matrices to prune: use DDP")
        if self._pruner is not None:
            self._pruner.remove()
        assert model is not None and optimizer is not None
        inner = unwrap_optimizer(optimizer)
        prunable = prunable_weights(model, args.optim_target_modules)
        others = [p for group in inner.param_groups for p in group["params"] if id(p) not in prunable]
        others += named_parameters(self._arguments["exclude"], list(model.named_parameters()))
        self._pruner = IOBSPruner(inner, **{**self._arguments, "exclude": others})
        self._pruner.schedule.check_run(state.max_steps)
        self._last = None
        if state.global_step > 0:
            self._pruner.resume(self._steps_of(state))
        self.num_steps = self._pruner.num_steps
        log_early(inner, self)

    def _steps_of(self, state: Any) -> int:
        """Return the calls of the pruner in the run that is resumed."""
        saved = (state.stateful_callbacks or {}).get(type(self).__name__)
        return int(saved["attributes"]["num_steps"]) if saved else int(state.global_step)

    def state(self) -> dict[str, Any]:
        """Return what the Trainer saves of it."""
        return {"args": self._arguments, "attributes": {"num_steps": self.num_steps}}

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: Any, optimizer: Any = None, **_: Any
    ) -> None:
        """Prune after the optimizer's step, unless a gradient scaler skipped that."""
        if self._pruner is not None and not getattr(optimizer, "step_was_skipped", False):
            self._last = self._pruner.step() or self._last
            self.num_steps = self._pruner.num_steps

    def on_log(
        self, args: Any, state: TrainerState, control: Any, logs: Any = None, optimizer: Any = None, **_: Any
    ) -> None:
        """Add what the last projection did to a training log."""
        if self._last is None or not logs or "loss" not in logs or "pruning/sparsity" in logs:
            return
        entries: dict[str, Any] = {"sparsity": self._last.sparsity, "kept_changed": self._last.kept_changed}
        if self._last.loss_increase is not None:
            entries["loss_increase"] = self._last.loss_increase
        add_to_log(state, logs, {f"pruning/{key}": value for key, value in entries.items()})

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: Any, **_: Any) -> None:
        """Let the optimizer go, and warn if the model is not as sparse as it was to be."""
        if self._pruner is None:
            return
        zeros, wanted = self._pruner.num_zeros()
        if zeros < wanted and state.is_world_process_zero:
            logger.warning(
                "the model has %d zeros of the %d that sparsity=%.3g asks for: training stopped before end=%d, skipped "
                "steps (fp16), or loaded a checkpoint from before (load_best_model_at_end=True)",
                *(zeros, wanted, self._pruner.schedule.target, self._pruner.schedule.end),
            )
        self._pruner.remove()
        self._pruner = None
