"""``LocalUpdatesCallback``: workers of a Trainer run under DDP step apart, and average every so many steps."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from torch import nn
from torch.optim import Optimizer
from transformers import Trainer, TrainerCallback, TrainerState, TrainingArguments

from hf_lowmem_optim.engine.averaging import SyncedOptimizer, keep_gradients_local, num_workers
from hf_lowmem_optim.local_updates.optimizer import LocalUpdates
from hf_lowmem_optim.local_updates.outer import OuterNesterov
from hf_lowmem_optim.memory.measure import unwrap_optimizer
from hf_lowmem_optim.trainer.callbacks import add_to_log, log_early

__all__ = ["LocalUpdatesCallback"]


class LocalUpdatesCallback(TrainerCallback):
    """Lets the workers of a Trainer run step apart: for :class:`~hf_lowmem_optim.LocalUpdates`, and for LoRDO.

    It has DistributedDataParallel leave each worker its own gradients, refuses at the start what would communicate at
    every step or lead to checkpoints between two syncs, and syncs once more at the end of training. Arguments that the
    user left at their defaults it sets: ``ddp_broadcast_buffers=False``, ``ddp_find_unused_parameters=False`` and
    ``average_tokens_across_devices=False``.

    Key of the training logs: ``local_updates/communicated_bytes``, what this worker has put into collectives so far.
    The loss in the logs is the mean over the workers, ``grad_norm`` that of the first.

    Args:
        trainer: The Trainer, before ``train()``.
        sync_every: K, or periods, as for LocalUpdates: the Trainer's optimizer, whichever ``optim`` names, is made and
            wrapped. None if the Trainer has an optimizer that syncs already: ``optim="lordo"``, or LocalUpdates among
            its ``optimizers``.
        average: As for LocalUpdates.
        outer: As for LocalUpdates.
        sync_dtype: As for LocalUpdates.

    Raises:
        ValueError: The Trainer cannot keep an optimizer that is made now, or it syncs already.
        NotImplementedError: The run is one of FSDP or DeepSpeed, or the optimizer steps during the backward pass.

    Example:
        >>> trainer = Trainer(model, TrainingArguments(..., optim="adamw_torch", save_steps=160), train_dataset=data)
        >>> trainer.add_callback(LocalUpdatesCallback(trainer, sync_every=16))
        >>> trainer.train()
    """

    def __init__(
        self,
        trainer: Trainer,
        sync_every: int | Mapping[str, int] | None = None,
        *,
        average: Sequence[str] = ("params", "moments"),
        outer: OuterNesterov | None = None,
        sync_dtype: Literal["fp32", "bf16"] = "fp32",
    ) -> None:
        _refuse_engines(trainer)
        args, handler = trainer.args, trainer.accelerator.ddp_handler
        for argument in ("ddp_broadcast_buffers", "ddp_find_unused_parameters"):
            if getattr(args, argument) is None:
                setattr(args, argument, False)
                # made from the arguments with the Trainer, and read when the model is wrapped
                if handler is not None:
                    setattr(handler, argument.removeprefix("ddp_"), False)
        # on is its default, and cannot be told from what the user wants
        args.average_tokens_across_devices = False
        if sync_every is not None:
            model_init: Any = trainer.model_init
            if model_init is not None:
                raise ValueError(
                    "model_init makes a new model and optimizer in train(): give the Trainer a model, or make "
                    "LocalUpdates in a create_optimizer() of your own and leave sync_every out here"
                )
            made = trainer.create_optimizer()
            if _synced(made) is not None:
                raise ValueError(f"{type(unwrap_optimizer(made)).__name__} syncs by itself: leave sync_every out here")
            trainer.optimizer = LocalUpdates(made, sync_every, average=average, outer=outer, sync_dtype=sync_dtype)
        # the Trainer has its callbacks: a cycle would keep the model
        self._trainer = weakref.ref(trainer)
        self._connected = weakref.WeakSet[nn.Module]()
        self._optimizer: SyncedOptimizer | None = None
        self._first = True

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: Any, optimizer: Any = None, **_: Any
    ) -> None:
        """Refuse what cannot work, and have DDP leave the gradients alone.

        Raises:
            ValueError: An argument would communicate at every step, or save or evaluate between two syncs.
            NotImplementedError: The run is one of FSDP or DeepSpeed.
        """
        trainer, self._optimizer, self._first = self._trainer(), _synced(optimizer), True
        if trainer is None or self._optimizer is None:
            raise ValueError(
                f"LocalUpdatesCallback found {type(unwrap_optimizer(optimizer)).__name__}, which averages nothing: "
                "give it the Trainer that it is added to, and sync_every=16; or optim='lordo'"
            )
        _refuse_engines(trainer)
        _check_schedule(args, state, self._optimizer.sync_every)
        log_early(optimizer, self)
        if num_workers() == 1:
            return
        _check_arguments(args)
        self._check_saved(args)
        model = trainer.model_wrapped
        if model not in self._connected:
            keep_gradients_local(model)
            self._connected.add(model)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: Any, **_: Any) -> None:
        """Sync after the last step, before the Trainer saves, and where it saves or evaluates out of turn.

        That is where the optimizer's count is not the Trainer's: in a second ``train()``, or resumed without its state.

        Raises:
            ValueError: The optimizer turns out to have state that is each worker's own, and the run would save it.
        """
        if self._first:
            # torch's optimizers have their state only now
            self._first = False
            self._check_saved(args)
        self._sync_if_needed(control)

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: Any, **_: Any) -> None:
        """Sync where an epoch's end saves or evaluates."""
        self._sync_if_needed(control)

    def _sync_if_needed(self, control: Any) -> None:
        """Sync before the Trainer saves, evaluates, or ends training."""
        wanted = control.should_training_stop or control.should_save or control.should_evaluate
        if self._optimizer is not None and wanted:
            self._optimizer.sync()

    def _check_saved(self, args: TrainingArguments) -> None:
        """Raise ValueError, on all workers, if checkpoints would have state that is each worker's own."""
        saves = str(getattr(args.save_strategy, "value", args.save_strategy)) != "no" and not args.save_only_model
        if self._optimizer is None or num_workers() == 1 or not saves:
            return
        if (own := self._optimizer.own_state()) is not None:
            raise ValueError(
                f"{own}: no worker's is that of all. Use save_only_model=True or save_strategy='no', or average all of "
                "the state: optim='adamw_torch' with average=('params', 'moments')"
            )

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: Any, **_: Any) -> None:
        """Sync if a callback after this one ended training, unless the best checkpoint has been loaded."""
        loaded = args.load_best_model_at_end and state.best_model_checkpoint is not None
        if self._optimizer is not None and self._optimizer.steps_since_sync and not loaded:
            self._optimizer.sync()
        self._optimizer = None

    def on_log(self, args: Any, state: TrainerState, control: Any, logs: Any = None, **_: Any) -> None:
        """Add what has been sent so far to a training log."""
        if self._optimizer is not None and logs and "loss" in logs:
            add_to_log(state, logs, {"local_updates/communicated_bytes": self._optimizer.communicated_bytes})


def _synced(optimizer: Optimizer | None) -> SyncedOptimizer | None:
    """Return what syncs inside wrappers such as accelerate's; None if nothing does."""
    inner: Any = optimizer
    while isinstance(inner, Optimizer) and not isinstance(inner, SyncedOptimizer):
        inner = getattr(inner, "optimizer", None)
    return inner if isinstance(inner, SyncedOptimizer) else None


def _refuse_engines(trainer: Trainer) -> None:
    """Raise NotImplementedError where weights or gradients are not a worker's own."""
    for engine, there in (("FSDP", trainer.is_fsdp_enabled), ("DeepSpeed", trainer.is_deepspeed_enabled)):
        if there:
            raise NotImplementedError(f"{engine} communicates at every step: local updates need plain DDP")


def _check_schedule(args: TrainingArguments, state: TrainerState, sync_every: int) -> None:
    """Raise ValueError for checkpoints and evaluations that would fall between two syncs."""
    strategies = {"save_steps": args.save_strategy, "eval_steps": args.eval_strategy}
    for key, strategy in strategies.items():
        steps = getattr(state, key)
        if getattr(strategy, "value", strategy) == "steps" and steps and steps % sync_every:
            best = " (load_best_model_at_end=True needs both)" * bool(args.load_best_model_at_end)
            raise ValueError(
                f"{key}={steps} is no multiple of sync_every={sync_every}: between two syncs each worker has weights "
                f"of its own{best}. Set {key}={-(-steps // sync_every) * sync_every}"
            )


def _check_arguments(args: TrainingArguments) -> None:
    """Raise ValueError for what would communicate at every step, or let a worker fall out of step."""
    if args.fp16:
        raise ValueError(
            "fp16=True skips a worker's step where its gradients overflow, and the worker falls out of step with the "
            "others: train with bf16=True"
        )
    for argument in ("ddp_broadcast_buffers", "ddp_find_unused_parameters", "average_tokens_across_devices"):
        if getattr(args, argument):
            raise ValueError(f"{argument}=True communicates at every step: set {argument}=False")
