"""The optimizers that are compared: ours and other people's, each behind an adapter that takes a model.

An adapter sets its optimizer up as the Trainer does (GaLore's and APOLLO's settings are those of its strings) and gives
low-rank methods the very matrices that ours compress. What is not installed says so and how to install it; nothing is
imported before it is used.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from hf_lowmem_optim import OPTIMIZERS, OptimizerFactory
from hf_lowmem_optim.trainer.param_groups import COMPRESSED, place_parameters

__all__ = ["FOREACH", "FUSED", "PEERS", "Candidate", "Peer", "candidates", "split_parameters"]

LEARNING_RATE = 1e-4
FOREACH, FUSED = "torch AdamW foreach", "torch AdamW fused"


@dataclass(frozen=True)
class Peer:
    """An optimizer that is not ours.

    Attributes:
        name: Its name in tables.
        module: What must be importable.
        install: What to give pip.
        build: Makes it from the model and the rank (ignored by those that have none).
        ranked: Whether there is one per rank.
        compiles: Whether its first step compiles for tens of seconds.
    """

    name: str
    module: str
    install: str
    build: Callable[[nn.Module, int], Optimizer]
    ranked: bool = False
    compiles: bool = False

    @property
    def problem(self) -> str | None:
        """Why it cannot be measured here, or None."""
        if importlib.util.find_spec(self.module) is None:
            return f"not installed (pip install {self.install})"
        return None


@dataclass(frozen=True)
class Candidate:
    """One line of a table, before it is built.

    Attributes:
        name: ``"ldadam rank=16"``.
        build: Makes the optimizer from a model.
        ours: Whether it is of this package; an error in one that is not is a line in the table, not a crash.
        problem: Why it cannot be measured, or None.
        compiles: As in :class:`Peer`.
    """

    name: str
    build: Callable[[nn.Module], Optimizer]
    ours: bool = True
    problem: str | None = None
    compiles: bool = False


def trainable(model: nn.Module) -> list[nn.Parameter]:
    """What an optimizer gets."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def split_parameters(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """The matrices that our factory would compress, whatever the rank, and all other trainable parameters."""
    placements = place_parameters(model, None, lambda parameter, settings: COMPRESSED)
    matrices = [p.parameter for p in placements if p.targeted and p.parameter.ndim == 2]
    others = [p.parameter for p in placements if not (p.targeted and p.parameter.ndim == 2)]
    return matrices, others


def low_rank_groups(model: nn.Module, **settings: Any) -> list[dict[str, Any]]:
    """Groups as GaLore and those after it want them: the settings on the group of matrices."""
    matrices, others = split_parameters(model)
    groups = [{"params": matrices, **settings}, {"params": others}]
    return [group for group in groups if group["params"]]


def _adamw_foreach(model: nn.Module, _: int) -> Optimizer:
    return torch.optim.AdamW(trainable(model), lr=LEARNING_RATE, foreach=True)


def _adamw_fused(model: nn.Module, _: int) -> Optimizer:
    return torch.optim.AdamW(trainable(model), lr=LEARNING_RATE, fused=True)


def _adafactor(model: nn.Module, _: int) -> Optimizer:
    from transformers import Adafactor

    return Adafactor(trainable(model), lr=LEARNING_RATE, scale_parameter=False, relative_step=False)


def _bitsandbytes_8bit(model: nn.Module, _: int) -> Optimizer:
    from bitsandbytes.optim import AdamW8bit

    return AdamW8bit(trainable(model), lr=LEARNING_RATE)


def _bitsandbytes_32bit(model: nn.Module, _: int) -> Optimizer:
    from bitsandbytes.optim import AdamW32bit

    return AdamW32bit(trainable(model), lr=LEARNING_RATE)


def _torchao_8bit(model: nn.Module, _: int) -> Optimizer:
    from torchao.optim import AdamW8bit

    return AdamW8bit(trainable(model), lr=LEARNING_RATE)


def _torchao_4bit(model: nn.Module, _: int) -> Optimizer:
    from torchao.optim import AdamW4bit

    return AdamW4bit(trainable(model), lr=LEARNING_RATE)


def _galore(model: nn.Module, rank: int) -> Optimizer:
    from galore_torch import GaLoreAdamW

    groups = low_rank_groups(model, rank=rank, update_proj_gap=200, scale=0.25, proj_type="std")
    return GaLoreAdamW(groups, lr=LEARNING_RATE, no_deprecation_warning=True)


def _apollo(model: nn.Module, rank: int) -> Optimizer:
    from apollo_torch import APOLLOAdamW

    settings = {"proj": "random", "scale_type": "channel", "scale": 1.0, "update_proj_gap": 200, "proj_type": "std"}
    return APOLLOAdamW(low_rank_groups(model, rank=rank, **settings), lr=LEARNING_RATE)


def _pytorch_optimizer_low_rank(name: str) -> Callable[[nn.Module, int], Optimizer]:
    def build(model: nn.Module, rank: int) -> Optimizer:
        import pytorch_optimizer

        groups = low_rank_groups(model, rank=rank, update_proj_gap=200, scale=0.25, projection_type="std")
        return getattr(pytorch_optimizer, name)(groups, lr=LEARNING_RATE)  # type: ignore[no-any-return]

    return build


def _came(model: nn.Module, _: int) -> Optimizer:
    from pytorch_optimizer import CAME

    return CAME(trainable(model), lr=LEARNING_RATE)


_COLLECTION = ("pytorch_optimizer", "pytorch-optimizer")
_GALORE = ("galore_torch", "--no-deps galore-torch")
_APOLLO = ("apollo_torch", "--no-deps apollo-torch")

#: The two AdamW come first: everything is compared with them.
PEERS: dict[str, Peer] = {
    peer.name: peer
    for peer in (
        Peer(FOREACH, "torch", "torch", _adamw_foreach),
        Peer(FUSED, "torch", "torch", _adamw_fused),
        Peer("transformers Adafactor", "transformers", "transformers", _adafactor),
        Peer("bitsandbytes AdamW8bit", "bitsandbytes", "bitsandbytes", _bitsandbytes_8bit),
        Peer("bitsandbytes AdamW32bit", "bitsandbytes", "bitsandbytes", _bitsandbytes_32bit),
        Peer("torchao AdamW8bit", "torchao", "torchao", _torchao_8bit, compiles=True),
        Peer("torchao AdamW4bit", "torchao", "torchao", _torchao_4bit, compiles=True),
        Peer("galore-torch", *_GALORE, _galore, ranked=True),
        Peer("apollo-torch", *_APOLLO, _apollo, ranked=True),
        Peer("pytorch-optimizer GaLore", *_COLLECTION, _pytorch_optimizer_low_rank("GaLore"), ranked=True),
        Peer("pytorch-optimizer Fira", *_COLLECTION, _pytorch_optimizer_low_rank("Fira"), ranked=True),
        Peer("pytorch-optimizer CAME", *_COLLECTION, _came),
    )
}


def ours(name: str, **hyper: Any) -> Candidate:
    """One of our optimizers with settings; the name says them."""
    label = " ".join([name, *(f"{key}={value}" for key, value in hyper.items())])
    return Candidate(label, OptimizerFactory(name, lr=LEARNING_RATE, **hyper))


def peer(name: str, rank: int = 128) -> Candidate:
    """A peer at a rank."""
    found = PEERS[name]
    label = f"{name} rank={rank}" if found.ranked else name
    return Candidate(label, lambda model: found.build(model, rank), False, found.problem, found.compiles)


def candidates(ranks: Sequence[int], *, compiled: bool) -> Iterator[Candidate]:
    """Every peer and every optimizer of ours, those with a rank once per rank.

    The layer-wise ones are left out: their arithmetic is the normal mode's, and ``step()`` is not where it happens.

    Args:
        ranks: The ranks.
        compiled: Whether those that compile for tens of seconds are wanted.
    """
    for found in PEERS.values():
        if compiled or not found.compiles:
            yield from (peer(found.name, rank) for rank in (ranks if found.ranked else ranks[:1]))
    for entry in OPTIMIZERS.values():
        if entry.optimizer_class.layerwise:
            continue
        if entry.name == "ldadam":
            yield from (ours(entry.name, rank=rank) for rank in ranks)
        else:
            yield ours(entry.name)
