"""A callback of Lightning that accounts for the optimizer's state, and writes the report of the run."""

from __future__ import annotations

import time
from typing import Any

from lightning.pytorch import Callback

from hf_lowmem_optim.memory.measure import measure_state
from hf_lowmem_optim.memory.report import build_report, report_text, write_report

__all__ = ["OptimizerStateReport"]


class OptimizerStateReport(Callback):  # type: ignore[misc]  # lightning is not there to be read
    """Logs the bytes of the first optimizer's state, and writes the report that ``hf-lowmem-optim report DIR`` reads.

    Every ``log_every_n_steps`` of the trainer it logs ``optimizer_state/total_bytes``, and keeps the learning rate, the
    time of a step and ``loss``, if the module logs one by that name, for the report. It is written to the trainer's
    ``default_root_dir`` with every validation and at the end of training, on the main process.

    Example:
        >>> Trainer(max_steps=1000, callbacks=[OptimizerStateReport()])
    """

    def __init__(self) -> None:
        self._history: list[dict[str, float]] = []
        self._seconds: list[dict[str, float]] = []
        self._since = (0, 0.0)  # the step and the time of the last entry

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Begin to count the time."""
        self._since = (trainer.global_step, time.perf_counter())

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        """Make an entry, if one is due."""
        step, (last, then) = trainer.global_step, self._since
        every = trainer.log_every_n_steps  # 0 for never
        if step == last or not every or step % every:
            return
        now, optimizer = time.perf_counter(), trainer.optimizers[0]
        self._since = (step, now)
        self._seconds.append({"step": step, "seconds": (now - then) / (step - last)})
        entry = {"step": step, "learning_rate": float(optimizer.param_groups[0]["lr"])}
        if (loss := trainer.callback_metrics.get("loss")) is not None:
            entry["loss"] = float(loss)
        self._history.append(entry)
        pl_module.log("optimizer_state/total_bytes", float(measure_state(optimizer).total_bytes), rank_zero_only=True)

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """Write the report so far."""
        if trainer.global_step and not trainer.sanity_checking:
            self._write(trainer)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Write the report, and print it."""
        print(report_text(self._write(trainer)))

    def _write(self, trainer: Any) -> dict[str, Any]:
        """Write the report and return it. Every process takes part: state may be sharded."""
        report = build_report(trainer.optimizers[0], self._history, self._seconds)
        if trainer.is_global_zero:
            write_report(report, trainer.default_root_dir)
        return report
