"""The optimizers whose peak memory is measured, and what the planner predicts for each.

Other people's are set up as the Trainer sets them up, because that is what the planner describes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from peers import LEARNING_RATE, PEERS, low_rank_groups, ours, split_parameters, trainable
from torch import nn
from torch.optim import Optimizer

from hf_lowmem_optim import OPTIMIZERS
from hf_lowmem_optim.memory.reference_steps import galore_step
from hf_lowmem_optim.memory.references import ParameterFacts
from hf_lowmem_optim.trainer.plan_model import plan_memory

__all__ = ["ENTRIES", "NO_OPTIMIZER", "Entry", "plan"]

NO_OPTIMIZER = "no optimizer"
_GALORE = {"rank": 128, "update_proj_gap": 200, "scale": 0.25, "proj_type": "std"}


class LayerwiseGaLore(Optimizer):
    """GaLore's layer-wise mode as transformers has it: an optimizer per parameter, called by a hook in the backward.

    It is an ``Optimizer`` only so that its state can be measured; ``step()`` does nothing.

    Args:
        model: The model.
    """

    def __init__(self, model: nn.Module) -> None:
        from galore_torch import GaLoreAdamW

        super().__init__(trainable(model), {})
        self.inner: dict[nn.Parameter, Optimizer] = {}
        for group in low_rank_groups(model, **_GALORE):
            settings = {key: value for key, value in group.items() if key != "params"}
            for parameter in group["params"]:
                alone = [{"params": [parameter], **settings}]
                self.inner[parameter] = GaLoreAdamW(alone, lr=LEARNING_RATE, no_deprecation_warning=True)
                parameter.register_post_accumulate_grad_hook(self._update)

    def _update(self, parameter: torch.Tensor) -> None:
        optimizer = self.inner[parameter]  # type: ignore[index]
        optimizer.step()
        optimizer.zero_grad()
        self.state[parameter] = optimizer.state[parameter]

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Do nothing: everything is updated."""


@dataclass(frozen=True)
class Entry:
    """An optimizer to measure.

    Attributes:
        build: Makes it from the model; None from "no optimizer".
        planned: Its name in the planner; None if the planner does not know it.
        ours: Whether it is of this package.
        problem: Why it cannot be measured here, or None.
        layerwise: Whether one gradient exists at a time.
    """

    build: Callable[[nn.Module], Optimizer | None]
    planned: str | None
    ours: bool = False
    problem: str | None = None
    layerwise: bool = False


def _adamw_8bit(model: nn.Module) -> Optimizer:
    """As the Trainer does: embeddings keep 32 bits."""
    from bitsandbytes.optim import AdamW8bit, GlobalOptimManager

    for module in model.modules():
        if isinstance(module, nn.Embedding):
            GlobalOptimManager.get_instance().register_module_override(module, "weight", {"optim_bits": 32})
    return AdamW8bit(trainable(model), lr=LEARNING_RATE)


def _peer(name: str, planned: str, build: Callable[[nn.Module], Optimizer] | None = None) -> Entry:
    found = PEERS[name]
    return Entry(build or (lambda model: found.build(model, _GALORE["rank"])), planned, problem=found.problem)


def _ours(name: str) -> Entry:
    return Entry(ours(name).build, name, ours=True, layerwise=OPTIMIZERS[name].optimizer_class.layerwise)


ENTRIES: Mapping[str, Entry] = {
    NO_OPTIMIZER: Entry(lambda model: None, None),
    "adamw_torch (foreach)": _peer("torch AdamW foreach", "adamw_torch"),
    "adamw_torch_fused": _peer("torch AdamW fused", "adamw_torch_fused"),
    "adamw_bnb_8bit": _peer("bitsandbytes AdamW8bit", "adamw_8bit", _adamw_8bit),
    "galore_adamw": _peer("galore-torch", "galore_adamw"),
    "galore_adamw_layerwise": Entry(
        LayerwiseGaLore, "galore_adamw", problem=PEERS["galore-torch"].problem, layerwise=True
    ),
    **{name: _ours(name) for name in OPTIMIZERS},
}


def plan(model: nn.Module, entry: Entry) -> dict[str, int]:
    """Predict weights, gradients, state and what a step allocates.

    Args:
        model: The model, of which only names, shapes and dtypes are read.
        entry: The optimizer.

    Returns:
        Bytes of each and their sum, ``planned_bytes``.
    """
    planned = plan_memory(model, entry.planned or "adamw_torch")
    row = planned.optimizers[0]
    parts = {
        "weights": sum(planned.weights.weight_bytes.values()),
        "gradients": sum(planned.gradient_bytes(row).values()),
        "state": 0 if row.state is None or entry.planned is None else row.state.total_bytes,
        "step": 0 if entry.planned is None else row.temporary_bytes or 0,
    }
    if entry.layerwise and not entry.ours:
        # the planner has no layer-wise GaLore: its state is the normal mode's, its gradients and steps come one by one
        matrices = {id(parameter) for parameter in split_parameters(model)[0]}
        facts = [ParameterFacts(tuple(p.shape), p.dtype, id(p) in matrices) for p in trainable(model)]
        parts["gradients"] = max(fact.numel * fact.dtype.itemsize for fact in facts)
        parts["step"] = max(galore_step([fact]) for fact in facts)
    return {**{f"planned_{part}_bytes": count for part, count in parts.items()}, "planned_bytes": sum(parts.values())}
