"""The table of optimizers with what their state costs: printed by ``hf-lowmem-optim list`` and kept in the README."""

from __future__ import annotations

from typing import Any

import torch

from hf_lowmem_optim.memory.plan import plan_state
from hf_lowmem_optim.registry import OPTIMIZERS, OptimizerEntry

__all__ = ["llama_2_7b_tensors", "optimizer_table"]

_HIDDEN, _INTERMEDIATE, _LAYERS, _VOCABULARY = 4096, 11008, 32, 32000


def llama_2_7b_tensors() -> tuple[dict[str, tuple[int, ...]], dict[str, tuple[int, ...]]]:
    """Shapes of Llama-2-7B: what the factory compresses by default, and what takes the dense rule.

    Returns:
        Two dicts of shapes by name: the linear layers; embedding, head and norms.
    """
    linear: dict[str, tuple[int, ...]] = {}
    dense: dict[str, tuple[int, ...]] = {"embed": (_VOCABULARY, _HIDDEN), "head": (_VOCABULARY, _HIDDEN)}
    for layer in range(_LAYERS):
        linear.update((f"{layer}.{name}", (_HIDDEN, _HIDDEN)) for name in "qkvo")
        linear.update((f"{layer}.{name}", (_INTERMEDIATE, _HIDDEN)) for name in ("gate", "up"))
        linear[f"{layer}.down"] = (_HIDDEN, _INTERMEDIATE)
        dense.update((f"{layer}.{name}", (_HIDDEN,)) for name in ("input", "post_attention"))
    return linear, {**dense, "final": (_HIDDEN,)}


def bytes_per_parameter(entry: OptimizerEntry, dtype: torch.dtype) -> float:
    """Return the bytes of state per parameter of the whole Llama-2-7B at the optimizer's defaults."""
    settings: tuple[dict[str, Any], ...] = ({}, dict([entry.optimizer_class.method.switch]))
    plans = [
        plan_state(entry.name, {name: (shape, dtype) for name, shape in tensors.items()}, **hyper)
        for tensors, hyper in zip(llama_2_7b_tensors(), settings, strict=True)
    ]
    return sum(plan.total_bytes for plan in plans) / sum(plan.num_parameters for plan in plans)


def optimizer_table() -> str:
    """Return the table in Markdown, one row per registered optimizer and one for AdamW."""
    lines = [
        "| `optim=` | class | B/param, fp32 | B/param, bf16 | what it does | paper |",
        "|---|---|---|---|---|---|",
        "| (`adamw_torch`) | `torch.optim.AdamW` | 8.00 | 4.00 | two full moments in the parameter's dtype | |",
    ]
    for entry in OPTIMIZERS.values():
        sizes = [f"{bytes_per_parameter(entry, dtype):.2f}" for dtype in (torch.float32, torch.bfloat16)]
        cells = [f"`{entry.name}`", f"`{entry.optimizer_class.__name__}`", *sizes, entry.summary, entry.paper]
        lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        "Bytes of optimizer state per parameter, for all parameters of Llama-2-7B at the default settings: linear "
        "layers compressed; embedding, head and norms dense.",
    ]
    return "\n".join(lines)
