"""A callback that accounts for every byte of the optimizer's state, in the logs and in a report of the run."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Mapping
from typing import Any
from weakref import ReferenceType, WeakKeyDictionary, ref

from torch.optim import Optimizer
from transformers import TrainerCallback, TrainerState, TrainingArguments

from hf_lowmem_optim.memory.byte_sizes import format_bytes
from hf_lowmem_optim.memory.measure import StateReport, measure_state, unwrap_optimizer
from hf_lowmem_optim.memory.report import build_report, predicted_state, report_text, write_report
from hf_lowmem_optim.memory.step_memory import StepMemory, StepMemoryMeter

__all__ = ["EarlyLogCallback", "OptimizerStateMemoryCallback", "add_to_log", "log_early"]

logger = logging.getLogger(__name__)

#: The callbacks that add to the logs of the run that an optimizer is in; one may have the optimizer itself.
_callbacks_of: WeakKeyDictionary[Optimizer, list[ReferenceType[TrainerCallback]]] = WeakKeyDictionary()


class OptimizerStateMemoryCallback(TrainerCallback):
    """Logs the measured bytes of optimizer state with the training logs, and reports on the run at its end.

    Keys of the logs: ``optimizer_state/total_bytes``, ``optimizer_state/<component>_bytes`` (``first_moment``,
    ``second_moment``, ``basis``, ``error``, ``dense``, ...), ``optimizer_state/group_<i>_bytes``; for comparison
    ``optimizer_state/adamw_fp32_bytes`` and, for the optimizers of this package, ``optimizer_state/predicted_bytes``;
    for layer-wise ones ``optimizer_state/gradient_peak_bytes``, the most that gradients took at once; with
    ``error_feedback="grad"`` ``optimizer_state/in_gradient_bytes``, the gradients that keep errors, never freed;
    and ``optimizer_state/step_peak_bytes`` where the device told the peak of a step, or
    ``optimizer_state/process_rss_bytes`` on the CPU. They are in ``log_history``, in what is printed and in what every
    ``report_to`` service gets; only where the callback is added during training, the callbacks before it do not get
    them. It works with any torch optimizer; components are then the keys of its state.

    After the first step it warns if what is measured is not what was predicted, with FSDP2 on each process. At the end
    of training it prints a table and writes ``optimizer_state_report.json`` to the output directory (``hf-lowmem-optim
    report DIR`` reads it); so it does with every checkpoint, for a run that does not come to its end. Where it cannot
    write, it warns.

    The first training log (one with a loss) has all keys, on the main process; later ones have the total and what is
    another value than before. Tensors that FSDP2 shards (DTensors) count with all their parts, but in
    ``optimizer_state/process_bytes``, what the main process has of them.

    Args:
        reset_peak: Reset the device's process-wide peak counter before every step, so that the peak of each step is
            known, and not only of steps that go beyond everything before them. Other readers of the counter are then
            misled.

    Example:
        >>> Trainer(model, args, train_dataset=data, callbacks=[OptimizerStateMemoryCallback()])
    """

    def __init__(self, *, reset_peak: bool = False) -> None:
        self._meter = StepMemoryMeter(reset_peak=reset_peak)
        self._step_memory: StepMemory | None = None
        self._compared = False
        self._logged: dict[str, int] = {}
        # since the last log: seconds of training steps, and how many
        self._begun, self._seconds, self._steps = 0.0, 0.0, 0
        self._step_seconds: list[dict[str, float]] = []

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: Any, optimizer: Optimizer | None = None, **_: Any
    ) -> None:
        """Begin a run, and make this callback known to the one that comes before the reporters."""
        self._step_memory, self._compared, self._logged = None, False, {}
        self._seconds, self._steps, self._step_seconds = 0.0, 0, []
        if optimizer is not None:
            log_early(optimizer, self)

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: Any, **_: Any) -> None:
        """Note the time before a training step."""
        self._begun = time.perf_counter()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: Any, **_: Any) -> None:
        """Add the step's time to those since the last log."""
        self._seconds, self._steps = self._seconds + time.perf_counter() - self._begun, self._steps + 1

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: Any, optimizer: Optimizer | None = None, **_: Any
    ) -> None:
        """Note the device's memory before the step."""
        if optimizer is not None and state.is_world_process_zero:
            self._meter.start(optimizer)

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: Any, optimizer: Optimizer | None = None, **_: Any
    ) -> None:
        """Note it after the step; the first time compare what was predicted with what is there."""
        if optimizer is None or not (state.is_world_process_zero or _is_sharded(optimizer)):
            return
        if state.is_world_process_zero:
            self._step_memory = self._meter.stop(optimizer).largest(self._step_memory)
        if not self._compared and (measured := measure_state(optimizer, local=True)).total_bytes:
            self._compared = True
            _compare(optimizer, measured, args.process_index)

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: Any, optimizer: Optimizer | None = None, **_: Any
    ) -> None:
        """Write the report so far."""
        self._write_report(args, state, optimizer)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: Any, optimizer: Optimizer | None = None, **_: Any
    ) -> None:
        """Print the table and write the report."""
        if (report := self._write_report(args, state, optimizer)) is not None:
            print(report_text(report))

    def _write_report(
        self, args: TrainingArguments, state: TrainerState, optimizer: Optimizer | None
    ) -> dict[str, Any] | None:
        """Write the report, if there is anything to report, and return it."""
        if optimizer is None or args.output_dir is None or not state.is_world_process_zero:
            return None
        report = build_report(optimizer, state.log_history, self._step_seconds, self._step_memory)
        if not report["measured"]["total_bytes"]:
            return None
        try:
            write_report(report, args.output_dir)
        except OSError as error:  # a full disk must not cost the run its model, which is saved after this
            logger.warning("the report of the optimizer's state could not be written: %s", error)
        return report

    def on_log(
        self, args: Any, state: TrainerState, control: Any, logs: Any = None, optimizer: Any = None, **_: Any
    ) -> None:
        """Add the bytes that are not known yet to a training log, unless that is done."""
        if optimizer is None or not logs or not state.is_world_process_zero:
            return
        if ("loss" not in logs and "train_loss" not in logs) or "optimizer_state/total_bytes" in logs:
            return
        if not (report := measure_state(optimizer)).total_bytes:
            return
        if self._steps:
            self._step_seconds.append({"step": state.global_step, "seconds": self._seconds / self._steps})
            self._seconds, self._steps = 0.0, 0
        entries = _log_entries(report, predicted_state(optimizer), self._step_memory)
        # layer-wise optimizers count what gradients take at once
        if (peak := getattr(unwrap_optimizer(optimizer), "peak_gradient_bytes", None)) is not None:
            entries["optimizer_state/gradient_peak_bytes"] = peak
        if _is_sharded(optimizer):
            entries["optimizer_state/process_bytes"] = measure_state(optimizer, local=True).total_bytes
        total = "optimizer_state/total_bytes"
        new = {key: value for key, value in entries.items() if self._logged.get(key) != value or key == total}
        self._logged.update(new)
        add_to_log(state, logs, new)


class EarlyLogCallback(TrainerCallback):
    """Adds to a log what a callback of this package has for it, before the reporters get it.

    The Trainer calls its default callbacks first (``import hf_lowmem_optim`` makes this one of them), then the
    reporters of ``report_to``, then the user's callbacks.
    """

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: Any, optimizer: Optimizer | None = None, **_: Any
    ) -> None:
        """Forget an earlier run; the user's callback, which comes after this one, makes itself known again."""
        if optimizer is not None:
            _callbacks_of.pop(unwrap_optimizer(optimizer), None)

    def on_log(
        self, args: Any, state: TrainerState, control: Any, logs: Any = None, optimizer: Any = None, **_: Any
    ) -> None:
        """Let the user's callbacks have their turn."""
        for reference in () if optimizer is None else _callbacks_of.get(unwrap_optimizer(optimizer), ()):
            if (callback := reference()) is not None:
                callback.on_log(args, state, control, logs=logs, optimizer=optimizer)


def log_early(optimizer: Optimizer, callback: TrainerCallback) -> None:
    """Have a callback's ``on_log`` called before the reporters', in the run that an optimizer is in."""
    _callbacks_of.setdefault(unwrap_optimizer(optimizer), []).append(ref(callback))


def add_to_log(state: TrainerState, logs: dict[str, Any], entries: Mapping[str, Any]) -> None:
    """Add entries to a log and to the history, for which the Trainer copied the log before it called the callbacks."""
    logs.update(entries)
    if state.log_history and state.log_history[-1].get("step") == state.global_step:
        state.log_history[-1].update(entries)


def _is_sharded(optimizer: Optimizer) -> bool:
    """Return whether parameters are split over processes."""
    return any(hasattr(param, "placements") for group in optimizer.param_groups for param in group["params"])


def _compare(optimizer: Optimizer, measured: StateReport, process: int) -> None:
    """Warn if the state of a process differs from the plan, with the reason if it is a known one."""
    predicted = predicted_state(optimizer, local=True)
    if predicted is None or measured == predicted:
        return
    inner = unwrap_optimizer(optimizer)
    parameters = [p for group in inner.param_groups for p in group["params"]]
    reason = "please report this with the optimizer's settings"
    if absent := sum(not inner.state.get(p) for p in parameters):
        reason = f"{absent} of {len(parameters)} parameters have had no gradient yet"
    difference = Counter(measured.component_bytes)
    difference.subtract(predicted.component_bytes)
    parts = ", ".join(f"{name} {count:+,} B" for name, count in sorted(difference.items()) if count)
    found, planned = format_bytes(measured.total_bytes), format_bytes(predicted.total_bytes)
    who = type(inner).__name__ + (f" on process {process}" if _is_sharded(optimizer) else "")
    logger.warning("the state of %s takes %s, not the predicted %s (%s): %s", who, found, planned, parts, reason)


def _log_entries(report: StateReport, predicted: StateReport | None, memory: StepMemory | None) -> dict[str, int]:
    """Return the log's keys and values."""
    entries = {"total": report.total_bytes, **report.component_bytes, "adamw_fp32": report.adamw_fp32_bytes}
    entries.update((f"group_{index}", count) for index, count in enumerate(report.group_bytes))
    optional = {"in_gradient": report.in_gradient_bytes or None}
    optional["predicted"] = None if predicted is None else predicted.total_bytes
    if memory is not None:
        optional |= {"step_peak": memory.peak_bytes, "process_rss": memory.process_rss_bytes}
    entries.update((name, count) for name, count in optional.items() if count is not None)
    # Components may be two words ("error codes"); the keys of logs have none.
    return {f"optimizer_state/{name.replace(' ', '_')}_bytes": count for name, count in entries.items()}
