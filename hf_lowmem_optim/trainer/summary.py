"""The account of what went where, which the factory logs for every optimizer it makes."""

from __future__ import annotations

from collections.abc import Sequence

from hf_lowmem_optim.memory.plan import plan_optimizer
from hf_lowmem_optim.memory.units import format_bytes
from hf_lowmem_optim.optimizers.base import LowMemoryOptimizer
from hf_lowmem_optim.trainer.param_groups import COMPRESSED, TOO_SMALL, Placement

__all__ = ["describe_placements"]


def describe_placements(optimizer: LowMemoryOptimizer, placements: Sequence[Placement]) -> str:
    """Write the summary: tensors and parameters by rule, and the bytes of state to expect.

    Args:
        optimizer: The optimizer made from the placements.
        placements: Where each parameter went.

    Returns:
        A few lines of text.
    """
    rules = dict.fromkeys(placement.rule for placement in placements)
    settings = ", ".join(f"{key}={optimizer.defaults[key]}" for key in optimizer.state_keys if key != "dense_state")
    dense = {"param": "dense", "fp32": "dense, fp32", "8bit": "dense, 8 bit"}[optimizer.defaults["dense_state"]]
    rows = []
    for rule in sorted(rules, key=lambda rule: rule != COMPRESSED):
        label = f"compressed ({settings})" if rule == COMPRESSED else f"{dense}: {rule}"
        if rule == TOO_SMALL and optimizer.defaults[optimizer.dense_key] is None:
            label = f"{dense}: {optimizer.dense_key}=None"
        chosen = [placement.parameter.numel() for placement in placements if placement.rule == rule]
        rows.append((label, f"{len(chosen):,}", f"{sum(chosen):,}"))
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    lines = [
        f"  {label:<{widths[0]}}  {tensors:>{widths[1]}} tensors  {entries:>{widths[2]}} parameters"
        for label, tensors, entries in rows
    ]
    plan = plan_optimizer(optimizer)
    parts = ", ".join(f"{name} {format_bytes(count)}" for name, count in plan.component_bytes.items())
    if optimizer.defaults["weight_rounding"] != "nearest":
        lines.append("  weights narrower than float32 are rounded stochastically")
    total, adamw = format_bytes(plan.total_bytes), format_bytes(plan.adamw_fp32_bytes)
    return "\n".join(
        [
            f"{type(optimizer).__name__} for {plan.num_parameters:,} trainable parameters:",
            *lines,
            f"  state: {total} ({parts}); AdamW in fp32: {adamw}",
        ]
    )
