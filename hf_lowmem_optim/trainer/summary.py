"""The account of what went where, which the factory logs for every optimizer it makes."""

from __future__ import annotations

from collections.abc import Sequence

from hf_lowmem_optim.engine.optimizer import LowMemoryOptimizer
from hf_lowmem_optim.memory.budget import SIZE_KEYS
from hf_lowmem_optim.memory.byte_sizes import format_bytes
from hf_lowmem_optim.memory.plan import plan_optimizer
from hf_lowmem_optim.memory.plan_table import align
from hf_lowmem_optim.trainer.param_groups import COMPRESSED, SWITCHED_OFF, Placement

__all__ = ["describe_placements"]

_DENSE = {"param": "dense", "fp32": "dense, fp32", "8bit": "dense, 8 bit"}


def describe_placements(optimizer: LowMemoryOptimizer, placements: Sequence[Placement]) -> str:
    """Write the summary of an optimizer made from placements: tensors by rule, and the bytes of state to expect."""
    sizes: dict[str, list[int]] = {}
    for placement in sorted(placements, key=lambda placement: placement.rule != COMPRESSED):
        sizes.setdefault(_label(optimizer, placement), []).append(placement.parameter.numel())
    rows = [(f"  {label}", f"{len(n):,} tensors", f"{sum(n):,} parameters") for label, n in sizes.items()]
    lines = align(rows)
    plan = plan_optimizer(optimizer)
    parts = ", ".join(f"{name} {format_bytes(count)}" for name, count in plan.component_bytes.items())
    if optimizer.defaults["weight_rounding"] != "nearest":
        lines.append("  weights narrower than float32 are rounded stochastically")
    total, adamw = format_bytes(plan.total_bytes), format_bytes(plan.adamw_fp32_bytes)
    lines.append(f"  state: {total} ({parts}); AdamW in fp32: {adamw}")
    if plan.total_bytes > plan.adamw_fp32_bytes:
        scales = " or ".join(key for key in SIZE_KEYS if key in optimizer.method.shaping)
        lines.append(f"  This is more than AdamW takes; a smaller {scales} saves memory.")
    return "\n".join([f"{type(optimizer).__name__} for {plan.num_parameters:,} trainable parameters:", *lines])


def _label(optimizer: LowMemoryOptimizer, placement: Placement) -> str:
    """Describe the rule of a parameter, with the settings that go with it and those of its own."""
    settings = {**optimizer.defaults, **placement.settings}
    keys = optimizer.method.shaping
    if placement.rule == COMPRESSED:
        shaping = (key for key in optimizer.method.shaping if key != "dense_state")
        label = f"compressed ({', '.join(f'{key}={settings[key]}' for key in shaping)})"
    else:
        key, off = optimizer.method.switch
        keys = (*keys, key)
        reason = f"{key}={off}" if placement.rule == SWITCHED_OFF else placement.rule
        label = f"{_DENSE[settings['dense_state']]}: {reason}"
    own = {key: value for key, value in placement.settings.items() if key not in keys}
    if not placement.decays:
        own.pop("weight_decay", None)
    return ", ".join(
        [label, *(f"{key}={value:g}" if type(value) is float else f"{key}={value}" for key, value in own.items())]
    )
