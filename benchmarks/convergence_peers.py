"""The optimizers that ``convergence.py`` compares: torch's AdamW, ours, and other people's on the same matrices.

GaLore and APOLLO compress what :class:`OptimizerFactory` gives LDAdam at the same rank, and take their own AdamW at the
same rate for all else, as their users have it. Weight decay is 0 everywhere; betas and eps are each one's defaults.

GaLore multiplies the update of its matrices by 0.25, so that embeddings, head and norms have four times their rate.
The setting ``dense_lr_ratio=4``, for ours the factory's argument, gives any entry what GaLore has: the rate of the
dense parameters, relative to the matrices'.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from hf_lowmem_optim import OptimizerFactory, measure_state
from hf_lowmem_optim.registry import OPTIMIZERS, get_entry
from hf_lowmem_optim.trainer.optim_args import hyperparameters_from_text
from hf_lowmem_optim.trainer.param_groups import COMPRESSED

LOW_RANK: dict[str, dict[str, Any]] = {
    "galore": {"rank": 128, "update_proj_gap": 200, "scale": 0.25, "proj_type": "std"},
    "apollo": {
        "rank": 256,
        "update_proj_gap": 200,
        "scale": 1.0,
        "proj_type": "std",
        "proj": "random",
        "scale_type": "channel",
    },
}
"""Settings of a group that is compressed, with the values that their READMEs and transformers use."""


def build_optimizer(entry: str, model: nn.Module, lr: float) -> torch.optim.Optimizer:
    """Make an optimizer for a model.

    Args:
        entry: ``adamw`` (torch's), ``adamw_8bit`` (bitsandbytes), ``galore``, ``apollo`` or one of ours; settings after
            a colon as in ``optim_args``, for peers as in :data:`LOW_RANK`, ``dense_lr_ratio=…`` among them.
        model: The model.
        lr: Learning rate of the matrices, and of all else without ``dense_lr_ratio``.

    Raises:
        ImportError: The package of a peer is not installed.
        ValueError: There is no such optimizer or setting.
    """
    name, _, text = entry.partition(":")
    if name in OPTIMIZERS:
        return OptimizerFactory(name, lr=lr, **hyperparameters_from_text(text, get_entry(name).optimizer_class))(model)
    own = [part for part in text.split(",") if part and not part.startswith("dense_lr_ratio=")]
    optimizer = _build(name, ",".join(own), model, lr)
    for part in text.split(","):
        if part.startswith("dense_lr_ratio="):
            matrices = {id(parameter) for parameter in split_parameters(model)[0]}
            for group in optimizer.param_groups:
                if id(group["params"][0]) not in matrices:
                    group["lr"] *= float(part.partition("=")[2])
    return optimizer


def _build(name: str, settings: str, model: nn.Module, lr: float) -> torch.optim.Optimizer:
    """An optimizer that is not ours, with matrices and all else in different groups."""
    if name in LOW_RANK:
        chosen = parse_settings(name, settings, LOW_RANK[name])
        matrices, others = split_parameters(model, chosen["rank"])
        groups = [{"params": matrices, **chosen}, {"params": others}]
        if name == "galore":
            from galore_torch import GaLoreAdamW

            return GaLoreAdamW(groups, lr=lr, no_deprecation_warning=True)
        from apollo_torch import APOLLOAdamW

        return APOLLOAdamW(groups, lr=lr)
    if settings or name not in ("adamw", "adamw_8bit"):
        known = ", ".join(("adamw", "adamw_8bit", *LOW_RANK, *OPTIMIZERS))
        raise ValueError(f"entry {name!r} with {settings!r}: known are {known}; adamw and adamw_8bit take no settings")
    if name == "adamw_8bit":
        return adamw_8bit(model, lr)
    return torch.optim.AdamW([{"params": p} for p in split_parameters(model)], lr=lr, weight_decay=0.0)


def adamw_8bit(model: nn.Module, lr: float) -> torch.optim.Optimizer:
    """Bitsandbytes' AdamW as the Trainer sets it up: embeddings keep their state in 32 bits."""
    from bitsandbytes.optim import AdamW8bit, GlobalOptimManager

    manager = GlobalOptimManager.get_instance()
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            manager.register_module_override(module, "weight", {"optim_bits": 32})
    optimizer: torch.optim.Optimizer = AdamW8bit(
        [{"params": p} for p in split_parameters(model)], lr=lr, weight_decay=0.0
    )
    return optimizer


def split_parameters(model: nn.Module, rank: int = 1) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """The matrices that LDAdam compresses at this rank, and all else."""
    _, placements = OptimizerFactory("ldadam", rank=rank, error_feedback="none").build(model)
    matrices = [p.parameter for p in placements if p.rule == COMPRESSED]
    return matrices, [p.parameter for p in placements if p.rule != COMPRESSED]


def parse_settings(name: str, text: str, defaults: dict[str, Any]) -> dict[str, Any]:
    """``rank=16,scale=1`` over defaults whose types the values take."""
    settings = dict(defaults)
    for part in filter(None, text.split(",")):
        key, _, value = part.partition("=")
        if key not in defaults:
            raise ValueError(f"{name} has no setting {key!r}; there are {', '.join(defaults)}")
        settings[key] = type(defaults[key])(value)
    return settings


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of state, with the bases that GaLore's and APOLLO's projectors hold outside of the state's tensors."""
    projectors = [state["projector"].ortho_matrix for state in optimizer.state.values() if "projector" in state]
    return measure_state(optimizer).total_bytes + sum(basis.nbytes for basis in projectors)
