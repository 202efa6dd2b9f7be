"""The report of a run: what was predicted, what was measured, and how the run went. Written, read and printed."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch.optim import Optimizer

from hf_lowmem_optim.engine.backward import Layerwise
from hf_lowmem_optim.engine.optimizer import LowMemoryOptimizer
from hf_lowmem_optim.engine.options import shown
from hf_lowmem_optim.json_file import check_shape, read_json
from hf_lowmem_optim.memory.byte_sizes import format_bytes
from hf_lowmem_optim.memory.measure import StateReport, measure_state, unwrap_optimizer
from hf_lowmem_optim.memory.plan import plan_optimizer
from hf_lowmem_optim.memory.plan_table import align
from hf_lowmem_optim.memory.step_memory import StepMemory

__all__ = [
    "REPORT_NAME",
    "REPORT_SCHEMA",
    "build_report",
    "load_report",
    "predicted_state",
    "report_text",
    "settings_text",
    "write_report",
]

REPORT_NAME = "optimizer_state_report.json"
REPORT_SCHEMA = "hf-lowmem-optim/report/1"

_STATE = {"total_bytes": int, "component_bytes": {str: int}, "dtype_bytes": {str: int}}
_SHAPE = {
    "optimizer": str,
    "settings": {str: (str, int, float, type(None))},
    "num_parameters": int,
    "adamw_fp32_bytes": int,
    "predicted?": _STATE,
    "measured": {**_STATE, "group_bytes": [int], "in_gradient_bytes?": int},
    "this_process_bytes": int,
    "groups": [{"num_parameters": int, "description": str}],
    "gradients?": {"peak_bytes": int, "all_bytes": int},
    "step_memory?": {"device": str, "peak_bytes?": int, "process_rss_bytes?": int},
    "step_seconds?": [{"step": int, "seconds": (int, float)}],
    "log_history": [dict],
}


def predicted_state(optimizer: Optimizer, *, local: bool = False) -> StateReport | None:
    """Return the planned state of an optimizer, None if it is not of this package.

    Args:
        optimizer: The optimizer.
        local: Count this process's part of sharded tensors (DTensors) instead of all parts together.
    """
    ours = isinstance(unwrap_optimizer(optimizer), LowMemoryOptimizer)
    return plan_optimizer(optimizer, local=local) if ours else None


def build_report(
    optimizer: Optimizer,
    log_history: Sequence[Mapping[str, Any]] = (),
    step_seconds: Sequence[Mapping[str, float]] = (),
    step_memory: StepMemory | None = None,
) -> dict[str, Any]:
    """Put a run's report together, as JSON values in the layout that ``"schema"`` names.

    Args:
        optimizer: The optimizer after its first step, of this package or not.
        log_history: What was logged: ``"step"`` beside ``"loss"``, ``"eval_loss"``, ``"learning_rate"``,
            ``"grad_norm"``, as the Trainer does.
        step_seconds: Mean ``"seconds"`` of a training step since the entry before, up to ``"step"``.
        step_memory: What the device said of a step.

    Returns:
        The report, for :func:`write_report`; state is that of all processes together.
    """
    inner, measured, predicted = unwrap_optimizer(optimizer), measure_state(optimizer), predicted_state(optimizer)
    return {
        "schema": REPORT_SCHEMA,
        "optimizer": type(inner).__name__,
        "settings": inner.method.settings(inner.defaults) if isinstance(inner, LowMemoryOptimizer) else {},
        "num_parameters": measured.num_parameters,
        "adamw_fp32_bytes": measured.adamw_fp32_bytes,
        "predicted": None if predicted is None else {"total_bytes": predicted.total_bytes, **predicted.breakdown()},
        "measured": {"total_bytes": measured.total_bytes, **measured.breakdown()},
        "this_process_bytes": measure_state(optimizer, local=True).total_bytes,
        "groups": [_describe_group(inner, group) for group in inner.param_groups],
        "gradients": _gradients(inner),
        "step_memory": None if step_memory is None else asdict(step_memory),
        "step_seconds": [dict(entry) for entry in step_seconds],
        "log_history": [dict(entry) for entry in log_history],
    }


def write_report(report: Mapping[str, Any], directory: str | Path) -> Path:
    """Write a report where ``hf-lowmem-optim report DIR`` finds it: all of it, or nothing.

    Returns:
        The file.
    """
    path = Path(directory) / REPORT_NAME
    unfinished = path.with_suffix(".tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    unfinished.replace(path)
    return path


def load_report(path: Path) -> dict[str, Any]:
    """Read a report from a run's output directory, or from the file itself.

    Raises:
        FileNotFoundError: There is none.
        ValueError: The file is no report, or one of another version.
    """
    file = path / REPORT_NAME if path.is_dir() else path
    if not file.is_file():
        raise FileNotFoundError(
            f"{str(file)!r} does not exist; train with callbacks=[OptimizerStateMemoryCallback()], which writes it to "
            "output_dir with every checkpoint and at the end of training"
        )
    report = read_json(file)
    loaded: dict[str, Any] = report if isinstance(report, dict) else {}
    if (schema := loaded.get("schema")) != REPORT_SCHEMA:
        raise ValueError(f"{shown(str(file))} has schema {shown(schema)}; this version reads {REPORT_SCHEMA!r}")
    check_shape(report, _SHAPE, f"{shown(str(file))} is no report")
    groups, sizes = (len(values) for values in (report["groups"], report["measured"]["group_bytes"]))
    if groups != sizes:
        raise ValueError(f"{shown(str(file))} is no report: it has {groups} groups and the bytes of {sizes}")
    return loaded


def report_text(report: Mapping[str, Any]) -> str:
    """Write a report for people to read."""
    measured, predicted = report["measured"], report.get("predicted")
    planned, found = None if predicted is None else predicted["component_bytes"], measured["component_bytes"]
    rows = [("component", "predicted", "measured")]
    for component in dict.fromkeys([*(planned or {}), *found]):
        rows.append(_row(component, None if planned is None else planned.get(component, 0), found.get(component, 0)))
    rows.append(_row("all", None if planned is None else sum(planned.values()), measured["total_bytes"]))
    lines = [f"Optimizer state of {report['optimizer']}: {report['num_parameters']:,} trained parameters"]
    if report["settings"]:
        lines.append("  " + ", ".join(f"{key}={value}" for key, value in report["settings"].items()))
    lines += [f"  {line}" for line in align(rows)]
    lines.append(f"  AdamW with float32 moments would take {format_bytes(report['adamw_fp32_bytes'])}")
    by_dtype = ", ".join(f"{dtype} {format_bytes(count)}" for dtype, count in measured["dtype_bytes"].items())
    lines.append(f"  by dtype: {by_dtype}")
    if measured.get("in_gradient_bytes"):
        kept = format_bytes(measured["in_gradient_bytes"])
        lines.append(f"  error: in {kept} of the gradients, which stayed in memory between steps")
    for number, (group, count) in enumerate(zip(report["groups"], measured["group_bytes"], strict=True)):
        size = f"{format_bytes(count)} for {group['num_parameters']:,} parameters"
        lines.append(f"  group {number}: {size} ({group['description']})")
    if report["this_process_bytes"] != measured["total_bytes"]:
        lines.append(f"  sharded: {format_bytes(report['this_process_bytes'])} of it in the main process")
    if report.get("gradients") is not None:
        peak, everything = (format_bytes(report["gradients"][key]) for key in ("peak_bytes", "all_bytes"))
        lines.append(f"  gradients: at most {peak} at once, of {everything} in all (layer-wise)")
    if (memory := report.get("step_memory")) is not None:
        lines.append(f"  {_step_memory_text(memory)}")
    return "\n".join(lines)


def settings_text(optimizer: Optimizer | None) -> str | None:
    """Write the options of an optimizer's groups in a line, with every value; None for one of somebody else."""
    inner = None if optimizer is None else unwrap_optimizer(optimizer)
    if not isinstance(inner, LowMemoryOptimizer):
        return None
    # the schedule changes lr itself
    groups = [{**group, "lr": group.get("initial_lr", group["lr"])} for group in inner.param_groups]
    keys = inner.method.options.defaults()
    words = [f"{key}={' or '.join(dict.fromkeys(repr(group[key]) for group in groups))}" for key in keys]
    return f"{type(inner).__name__} of hf_lowmem_optim with {', '.join(words)}"


def _gradients(optimizer: Optimizer) -> dict[str, int] | None:
    """Return the gradients at once and in all, for an optimizer that uses each as it comes."""
    if not isinstance(optimizer, Layerwise):
        return None
    everything = sum(p.numel() * p.element_size() for group in optimizer.param_groups for p in group["params"])
    return {"peak_bytes": optimizer.peak_gradient_bytes, "all_bytes": everything}


def _row(name: str, planned: int | None, found: int) -> tuple[str, str, str]:
    """Return one line of the table; what differs is marked."""
    if planned is None:
        return name, "–", format_bytes(found)
    return name, format_bytes(planned), format_bytes(found) + ("" if planned == found else f" ({found - planned:+,} B)")


def _step_memory_text(memory: Mapping[str, Any]) -> str:
    if (resident := memory.get("process_rss_bytes")) is not None:
        return f"resident memory of the process after a step: {format_bytes(resident)}"
    if (peak := memory.get("peak_bytes")) is None:
        return f"{memory['device']}: no step went beyond what the process had taken before"
    return f"{memory['device']}: at most {format_bytes(peak)} allocated during step()"


def _describe_group(optimizer: Optimizer, group: Mapping[str, Any]) -> dict[str, Any]:
    """Return a parameter group's size and what sets it apart."""
    words = [f"weight_decay {group['weight_decay']:g}"] if "weight_decay" in group else []
    if isinstance(optimizer, LowMemoryOptimizer):
        dense, switch = optimizer.method.is_dense(group), optimizer.method.switch[0]
        compressed = sum(p.numel() for p in group["params"] if optimizer.method.compresses(p.shape, group))
        rest = sum(p.numel() for p in group["params"]) - compressed
        words.insert(
            0, f"compressed, but for {rest:,}" if compressed and rest else "compressed" if compressed else "dense"
        )
        # the schedule changes lr itself
        now = {**group, "lr": group.get("initial_lr", group["lr"])}
        skipped = {"weight_decay", *((switch,) if dense else ())}
        own = {k: now[k] for k, v in optimizer.defaults.items() if k not in skipped and now[k] != v}
        words += [f"{k}={v:g}" if isinstance(v, float) else f"{k}={v}" for k, v in own.items()]
    return {"num_parameters": sum(p.numel() for p in group["params"]), "description": ", ".join(words) or "no settings"}
