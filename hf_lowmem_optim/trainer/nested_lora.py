"""Nested LoRA ranks in a Trainer: every training mode by ``attach_nested_lora``, scores per rank by a callback."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import Trainer, TrainerCallback, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from hf_lowmem_optim.engine.optimizer import LowMemoryOptimizer
from hf_lowmem_optim.memory.measure import unwrap_optimizer
from hf_lowmem_optim.nested_lora.matryoshka import SETTINGS_NAME, MatryoshkaLora, read_settings
from hf_lowmem_optim.nested_lora.ranks import RULES, Rule, aurac, check_choice, check_ranks
from hf_lowmem_optim.words import shown

__all__ = ["RankEvaluationCallback", "attach_nested_lora"]

_trainer_of: weakref.WeakKeyDictionary[MatryoshkaLora, weakref.ReferenceType[Trainer]] = weakref.WeakKeyDictionary()


def attach_nested_lora(trainer: Trainer, nested: MatryoshkaLora) -> None:
    """Have a Trainer train as the mode of a :class:`~hf_lowmem_optim.MatryoshkaLora` says.

    ``"losses"``: each micro-batch gets a forward and a backward pass at every rank, of the loss divided by their
    number; accumulated gradients, mixed precision and what DDP sends are as for one pass, and the logged loss is the
    mean. ``"dylora"``: a run that resumes draws the ranks that the uninterrupted one does. In all modes
    ``matryoshka.json`` is written wherever the Trainer saves the adapter, and compared where a run resumes in its
    ``output_dir``; and :class:`~hf_lowmem_optim.RankEvaluationCallback` finds the Trainer.

    Args:
        trainer: Whose model is that of ``nested``; a subclass with a ``training_step`` of its own must be able to take
            that several times with one batch.
        nested: What is trained.

    Raises:
        ValueError: The model is another, this was done already, or ``"dylora"`` is to draw for several GPUs of one
            process.
        NotImplementedError: ``"losses"`` under DeepSpeed.

    Example:
        >>> trainer = Trainer(model, args, train_dataset=data)
        >>> attach_nested_lora(trainer, nested)
        >>> trainer.train()
    """
    if not any(module is nested.model for module in cast(nn.Module, trainer.model).modules()):
        raise ValueError("the MatryoshkaLora is of another model than the Trainer's")
    if nested in _trainer_of and _trainer_of[nested]() is trainer:
        raise ValueError("the MatryoshkaLora is attached to this Trainer already")
    if nested.mode == "losses" and trainer.is_deepspeed_enabled:
        raise NotImplementedError("mode='losses' has several backward passes a step, which DeepSpeed counts")
    if nested.mode == "dylora" and trainer.args.n_gpu > 1:
        raise ValueError(
            f"mode='dylora' draws one rank for a forward pass, but {trainer.args.n_gpu} GPUs of one process "
            "(nn.DataParallel) have a pass each: start a process for each GPU, as torchrun does, or let this one see a "
            "single GPU by CUDA_VISIBLE_DEVICES"
        )
    _trainer_of[nested] = weakref.ref(trainer)
    trainer.add_callback(_StepCallback(nested))
    changed: Any = trainer  # its methods are replaced for this one object
    save_model = trainer.save_model

    def save_with_settings(output_dir: str | None = None, *args: Any, **kwargs: Any) -> None:
        save_model(output_dir, *args, **kwargs)
        if trainer.args.should_save:
            nested.save_settings(output_dir or cast(str, trainer.args.output_dir))

    changed.save_model = save_with_settings
    if nested.mode == "losses":
        ranks = _EveryRank(trainer, nested)
        changed.compute_loss, changed.training_step = ranks.compute_loss, ranks.training_step


class _EveryRank:
    """Takes the place of a Trainer's ``training_step`` and ``compute_loss``."""

    def __init__(self, trainer: Trainer, nested: MatryoshkaLora) -> None:
        self._trainer, self._nested = trainer, nested
        self._compute_loss, self._training_step = trainer.compute_loss, trainer.training_step
        self._in_step = False

    def training_step(self, model: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        """Take the Trainer's step at every rank, and return the sum of what it returned."""
        ranks = self._nested.trained_ranks
        losses = []
        self._in_step = True
        try:
            for rank in ranks:
                # DDP averages gradients once, with the last: a micro-batch in between has a context around this one
                waits = rank != ranks[-1]
                context = self._trainer.accelerator.no_sync(model) if waits else contextlib.nullcontext()
                with self._nested.at(rank), context:
                    losses.append(self._training_step(model, *args, **kwargs))
        finally:
            self._in_step = False
        return torch.stack(losses).sum()

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        """Return the Trainer's loss; in a training step divided by the number of ranks."""
        result = self._compute_loss(*args, **kwargs)
        if not self._in_step:
            return result
        num_ranks = len(self._nested.trained_ranks)
        return (result[0] / num_ranks, *result[1:]) if isinstance(result, tuple) else result / num_ranks


class _StepCallback(TrainerCallback):
    """Counts the steps for ``"dylora"``, and checks a run at its begin."""

    def __init__(self, nested: MatryoshkaLora) -> None:
        self._nested = nested

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: Any,
        optimizer: Optimizer | None = None,
        **_: Any,
    ) -> None:
        """Refuse a run that cannot be what the mode says.

        Raises:
            ValueError: It resumes from a checkpoint of other ranks or another mode, or the optimizer steps in each
                backward pass, of which ``"losses"`` has several.
        """
        if self._nested.mode == "losses":
            inner = None if optimizer is None else unwrap_optimizer(optimizer)
            ours = isinstance(inner, LowMemoryOptimizer) and inner.method.layerwise
            if ours or any(word in str(args.optim) for word in ("layerwise", "lomo")):
                raise ValueError(
                    f"mode='losses' has several backward passes a step, and optim={str(args.optim)!r} uses up the "
                    "gradients of each: take the normal mode of the optimizer, or mode='dylora'"
                )
        if state.global_step > 0:
            self._check_checkpoint(Path(str(args.output_dir)) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}")

    def on_step_begin(self, args: Any, state: TrainerState, control: Any, **_: Any) -> None:
        """Tell the step from which ranks are drawn."""
        self._nested.begin_step(state.global_step)

    def _check_checkpoint(self, folder: Path) -> None:
        if (folder / SETTINGS_NAME).exists() and (saved := read_settings(folder)) != self._nested.settings():
            raise ValueError(
                f"{folder / SETTINGS_NAME} says {shown(saved)}, but this run trains {shown(self._nested.settings())}"
            )


class RankEvaluationCallback(TrainerCallback):
    """Evaluates at each rank whenever the Trainer evaluates, and logs the scores and their AURAC.

    Keys of the logs, and of the metrics (so that ``metric_for_best_model`` can name them):
    ``eval_rank/<r>/<metric>`` and ``eval_aurac/<metric>``. The other callbacks see one evaluation, the Trainer's own,
    of what is trained. :func:`~hf_lowmem_optim.attach_nested_lora` must have been called for the Trainer.

    Args:
        nested: Whose ranks.
        ranks: Those to evaluate; None for ``nested.ranks``.
        metric: Its name in the Trainer's metrics; that of one data set of several is ``"eval_<name>_accuracy"``.
        rule: Of inference: ``"paper"`` or ``"nested"``.
        greater_is_better: What :meth:`best` looks for; None: unless the metric's name ends with ``loss``.

    Example:
        >>> trainer = Trainer(..., callbacks=[RankEvaluationCallback(nested, metric="eval_loss")])
        >>> attach_nested_lora(trainer, nested)
    """

    def __init__(
        self,
        nested: MatryoshkaLora,
        ranks: Sequence[int] | None = None,
        metric: str = "eval_accuracy",
        rule: Rule = "paper",
        greater_is_better: bool | None = None,
    ) -> None:
        check_choice("rule", rule, RULES)
        self.nested, self.metric, self.rule = nested, metric, rule
        self.ranks = nested.ranks if ranks is None else check_ranks(ranks, nested.full_rank)
        nested.check_rank(self.ranks[0], rule)
        self.greater_is_better = not metric.endswith("loss") if greater_is_better is None else greater_is_better

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **_: Any) -> None:
        """Check that there is a Trainer, and that one of several data sets has the metric.

        Raises:
            ValueError: ``attach_nested_lora`` was not called, or no data set is meant.
        """
        sets = self._trainer().eval_dataset
        if isinstance(sets, dict) and not any(self.metric.startswith(f"eval_{name}_") for name in sets):
            raise ValueError(f"metric={self.metric!r} is of none of the data sets {', '.join(map(repr, sets))}")

    def on_evaluate(
        self,
        args: Any,
        state: TrainerState,
        control: Any,
        metrics: dict[str, float] | None = None,
        eval_dataloader: Any = None,
        **_: Any,
    ) -> None:
        """Evaluate on the same data at each rank.

        Raises:
            KeyError: There is no such metric.
        """
        trainer, metrics = self._trainer(), {} if metrics is None else metrics
        prefix = next((key for key in metrics if key.endswith("_runtime")), "eval_runtime").removesuffix("_runtime")
        sets = trainer.eval_dataset
        others = [f"eval_{name}_" for name in sets] if isinstance(sets, dict) else []
        # of "a" and "a_b" the longer name
        meant = max((each for each in others if self.metric.startswith(each)), key=len, default=f"{prefix}_")
        if meant != f"{prefix}_" or not self.metric.startswith(meant):
            return  # of another data set
        if self.metric not in metrics:
            raise KeyError(f"metric={self.metric!r} is none of {', '.join(metrics)}")
        scores = []
        for rank in self.ranks:
            with self.nested.at(rank, self.rule):
                output = trainer.evaluation_loop(
                    eval_dataloader,
                    description=f"Evaluation at rank {rank}",
                    prediction_loss_only=True if trainer.compute_metrics is None else None,
                    metric_key_prefix=prefix,
                )
            scores.append(float(cast("dict[str, float]", output.metrics)[self.metric]))
        entries = {f"eval_rank/{rank}/{self.metric}": score for rank, score in zip(self.ranks, scores, strict=True)}
        entries[f"eval_aurac/{self.metric}"] = aurac(scores, self.ranks)
        metrics.update(entries)
        trainer.log(entries)

    def best(self) -> Mapping[str, Any] | None:
        """Return the entry of the Trainer's log history with the best AURAC so far, of a resumed run too."""
        key = f"eval_aurac/{self.metric}"
        entries = [entry for entry in self._trainer().state.log_history if key in entry]
        choose = max if self.greater_is_better else min
        return choose(entries, key=lambda entry: entry[key]) if entries else None

    def _trainer(self) -> Trainer:
        trainer = _trainer_of[self.nested]() if self.nested in _trainer_of else None
        if trainer is None:
            raise ValueError("RankEvaluationCallback knows no Trainer: call attach_nested_lora(trainer, nested)")
        return trainer
