"""Build the optimizers that are compared: ours and other people's, each from a model.

Other people's are set up as the Trainer sets them up, and low-rank ones get the very matrices that ours compress. What
is not installed says so and how to install it; nothing is imported before it is used.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from rounded_products import round_products_
from torch import nn
from torch.optim import Optimizer
from transformers import TrainingArguments

from hf_lowmem_optim import OPTIMIZERS, OptimizerFactory

LEARNING_RATE = 1e-4
FOREACH, FUSED = "torch AdamW foreach", "torch AdamW fused"
#: Settings of a compressed group, with the values that the authors' READMEs and transformers use.
GALORE: Mapping[str, Any] = {"rank": 128, "update_proj_gap": 200, "scale": 0.25, "proj_type": "std"}
APOLLO: Mapping[str, Any] = {**GALORE, "rank": 256, "scale": 1.0, "proj": "random", "scale_type": "channel"}


@dataclass(frozen=True)
class Peer:
    """Describe an optimizer that is not ours."""

    name: str
    module: str  # what must be importable
    install: str  # what to give pip
    build: Callable[[nn.Module, int], Optimizer]  # from the model and the rank, which those that have none ignore
    ranked: bool = False  # there is one per rank
    compiles: bool = False  # the first step compiles for tens of seconds
    gpu_only: bool = False

    @property
    def problem(self) -> str | None:
        """Why it cannot be measured here, or None."""
        if importlib.util.find_spec(self.module) is None:
            return f"not installed (pip install {self.install})"
        return "needs a GPU" if self.gpu_only and not torch.cuda.is_available() else None


@dataclass(frozen=True)
class Candidate:
    """Describe one line of a table, before its optimizer is built."""

    name: str  # "ldadam rank=16"
    build: Callable[[nn.Module], Optimizer]
    ours: bool = True  # an error in one that is not ours is a line in the table, not a crash
    problem: str | None = None  # why it cannot be measured here
    captured: bool = False  # a step is the replay of a CUDA graph


def trainable(model: nn.Module) -> list[nn.Parameter]:
    """Return what an optimizer gets."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def split_parameters(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Return the matrices that our factory compresses where the rank allows it, and all other trainable parameters."""
    groups = OptimizerFactory("ldadam", rank=1, error_feedback="none")(model).param_groups
    matrices = [p for group in groups if group["rank"] is not None for p in group["params"] if p.ndim == 2]
    compressed = {id(p) for p in matrices}
    return matrices, [p for p in trainable(model) if id(p) not in compressed]


def low_rank_groups(model: nn.Module, settings: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return groups as GaLore and its successors want them: the settings on the group of matrices."""
    matrices, others = split_parameters(model)
    return [group for group in ({"params": matrices, **settings}, {"params": others}) if group["params"]]


def galore(model: nn.Module, lr: float = LEARNING_RATE, **settings: Any) -> Optimizer:
    """Build the authors' GaLore."""
    from galore_torch import GaLoreAdamW

    groups = low_rank_groups(model, {**GALORE, **settings})
    return GaLoreAdamW(groups, lr=lr, no_deprecation_warning=True)  # type: ignore[no-any-return]


def apollo(model: nn.Module, lr: float = LEARNING_RATE, **settings: Any) -> Optimizer:
    """Build the authors' APOLLO."""
    from apollo_torch import APOLLOAdamW

    return APOLLOAdamW(low_rank_groups(model, {**APOLLO, **settings}), lr=lr)  # type: ignore[no-any-return]


def adamw(model: nn.Module, lr: float = LEARNING_RATE) -> Optimizer:
    """Build torch's AdamW with the matrices in a group of their own."""
    return torch.optim.AdamW([{"params": p} for p in split_parameters(model) if p], lr=lr, weight_decay=0.0)


class MuonWithAdamW(Optimizer):
    """Torch's Muon on the matrices that ours compress, its AdamW on all else; both scaled so that one rate fits both.

    Args:
        model: The model.
        lr: Learning rate of both.
    """

    def __init__(self, model: nn.Module, lr: float) -> None:
        matrices, others = split_parameters(model)
        muon = torch.optim.Muon(matrices, lr=lr, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
        self.parts = muon, torch.optim.AdamW(others, lr=lr, weight_decay=0.0)
        # the very groups of the two, which a scheduler writes
        super().__init__([group for part in self.parts for group in part.param_groups], {})

    def step(self, closure: None = None) -> None:  # type: ignore[override]  # no closure is served
        """Take a step of both."""
        for part in self.parts:
            part.step()
            self.state.update(part.state)


def adamw_8bit(model: nn.Module, lr: float = LEARNING_RATE) -> Optimizer:
    """Build bitsandbytes' AdamW as the Trainer sets it up: embeddings keep their state in 32 bits."""
    from bitsandbytes.optim import AdamW8bit, GlobalOptimManager

    for module in model.modules():
        if isinstance(module, nn.Embedding):
            GlobalOptimManager.get_instance().register_module_override(module, "weight", {"optim_bits": 32})
    groups = [{"params": p} for p in split_parameters(model) if p]
    return AdamW8bit(groups, lr=lr, weight_decay=0.0)


def _plain(module: str, name: str, model: nn.Module, _: int, **settings: Any) -> Optimizer:
    """Build an optimizer that treats all parameters alike."""
    found = getattr(importlib.import_module(module), name)
    return found(trainable(model), lr=LEARNING_RATE, **settings)  # type: ignore[no-any-return]


def _at_rank(build: Callable[..., Optimizer], model: nn.Module, rank: int) -> Optimizer:
    return build(model, rank=rank)


def _low_rank(module: str, name: str, model: nn.Module, rank: int) -> Optimizer:
    """Build one of pytorch-optimizer's low-rank optimizers with GaLore's settings."""
    settings = {**GALORE, "rank": rank}
    settings["projection_type"] = settings.pop("proj_type")
    found = getattr(importlib.import_module(module), name)
    return found(low_rank_groups(model, settings), lr=LEARNING_RATE)  # type: ignore[no-any-return]


def _peers() -> Iterator[Peer]:
    """Yield all peers; the two AdamW come first, as everything is compared with them."""
    yield Peer(FOREACH, "torch", "torch", partial(_plain, "torch.optim", "AdamW", foreach=True))
    yield Peer(FUSED, "torch", "torch", partial(_plain, "torch.optim", "AdamW", fused=True))
    adafactor = partial(_plain, "transformers", "Adafactor", scale_parameter=False, relative_step=False)
    yield Peer("transformers Adafactor", "transformers", "transformers", adafactor)
    for name in ("AdamW8bit", "AdamW32bit"):
        build = partial(_plain, "bitsandbytes.optim", name)
        yield Peer(f"bitsandbytes {name}", "bitsandbytes", "bitsandbytes", build)
    for name in ("AdamW8bit", "AdamW4bit"):
        yield Peer(f"torchao {name}", "torchao", "torchao", partial(_plain, "torchao.optim", name), compiles=True)
    flash = partial(_plain, "flashoptim", "FlashAdamW")
    yield Peer("flashoptim FlashAdamW", "flashoptim", "flashoptim", flash, gpu_only=True)
    at_rank: tuple[tuple[str, Callable[..., Optimizer]], ...] = (("galore", galore), ("apollo", apollo))
    for name, of_rank in at_rank:
        module, package = f"{name}_torch", f"{name}-torch"
        yield Peer(package, module, f"--no-deps {package}", partial(_at_rank, of_rank), ranked=True)
    collection = ("pytorch_optimizer", "pytorch-optimizer")
    for name in ("GaLore", "Fira"):
        yield Peer(f"{collection[1]} {name}", *collection, partial(_low_rank, collection[0], name), ranked=True)
    yield Peer(f"{collection[1]} CAME", *collection, partial(_plain, collection[0], "CAME"))


PEERS: dict[str, Peer] = {found.name: found for found in _peers()}


def ours(name: str, **hyper: Any) -> Candidate:
    """Return one of our optimizers with settings; the name says them."""
    label = " ".join([name, *(f"{key}={value}" for key, value in hyper.items())])
    return Candidate(label, OptimizerFactory(name, lr=LEARNING_RATE, **hyper))


def peer(name: str, rank: int = 128) -> Candidate:
    """Return a peer at a rank."""
    found = PEERS[name]
    label = f"{name} rank={rank}" if found.ranked else name
    return Candidate(label, lambda model: found.build(model, rank), False, found.problem)


def candidates(
    ranks: Sequence[int], *, compiled: bool, captured: bool = False, compensated: bool = False
) -> Iterator[Candidate]:
    """Yield every peer (those that compile for tens of seconds only if ``compiled``) and every optimizer of ours.

    Those with a rank come once per rank; layer-wise ones are left out, as ``step()`` is not where they compute. With
    ``captured``, those of ours whose step can be a CUDA graph come again, at the lowest rank; with ``compensated``,
    those whose kernels write corrections of narrow weights.
    """
    for found in PEERS.values():
        if compiled or not found.compiles:
            yield from (peer(found.name, rank) for rank in (ranks if found.ranked else ranks[:1]))
    for name in OPTIMIZERS:
        if name == "ldadam":
            yield from (ours(name, rank=rank) for rank in ranks)
        elif not OPTIMIZERS[name].optimizer_class.method.layerwise:
            yield ours(name)
    for name, entry in OPTIMIZERS.items():
        method, hyper = entry.optimizer_class.method, {"rank": min(ranks)} if name == "ldadam" else {}
        if captured and method.captured and not method.layerwise:
            once = ours(name, **hyper)
            yield replace(once, name=f"{once.name} captured", captured=True)
        if compensated and method.corrected is not None and not method.layerwise:
            yield ours(name, **hyper, weight_rounding="compensated")


def build_optimizer(entry: str, model: nn.Module, lr: float) -> Optimizer:
    """Build an optimizer from a line of text, with weight decay 0 and each one's default betas.

    Args:
        entry: ``adamw`` and ``muon`` (torch's), ``adamw_8bit`` (bitsandbytes), ``galore``, ``apollo`` or one of ours;
            after a colon settings as in ``optim_args``, for peers those of :data:`GALORE` and :data:`APOLLO`. Any entry
            takes ``dense_lr_ratio``, the rate of all else relative to the matrices'; and ``ldadam`` takes ``products``,
            ``tf32`` or ``bf16``, simulated by ``rounded_products.py``.
        model: The model.
        lr: Learning rate of the matrices, and of all else without ``dense_lr_ratio``.

    Raises:
        ImportError: The package of a peer is not installed.
        ValueError: There is no such optimizer or setting.
    """
    name, _, text = entry.partition(":")
    if name in OPTIMIZERS:
        return _from_optim_args(name, text, model, lr)
    builders: dict[str, tuple[Callable[..., Optimizer], Mapping[str, Any]]]
    builders = {"adamw": (adamw, {}), "muon": (MuonWithAdamW, {}), "adamw_8bit": (adamw_8bit, {})}
    builders |= {"galore": (galore, GALORE), "apollo": (apollo, APOLLO)}
    if name not in builders:
        raise ValueError(f"entry {name!r} is none of {', '.join((*builders, *OPTIMIZERS))}")
    build, defaults = builders[name]
    settings = parse_settings(name, text, {**defaults, "dense_lr_ratio": 1.0})
    ratio = settings.pop("dense_lr_ratio")
    optimizer = build(model, lr, **settings)
    matrices = {id(parameter) for parameter in split_parameters(model)[0]}
    for group in optimizer.param_groups:
        if id(group["params"][0]) not in matrices:
            group["lr"] *= ratio
    return optimizer


def _from_optim_args(name: str, text: str, model: nn.Module, lr: float) -> Optimizer:
    """Build one of ours, an LDAdam with simulated products where there is such a setting."""
    parts = text.split(",")
    simulated = [part for part in parts if part.startswith("products=")]
    args = ",".join(part for part in parts if part not in simulated)
    # the Trainer's own way, which reads optim_args; with max_grad_norm=0 it admits the layer-wise ones too
    found: dict[str, Any] = {"optim": name, "optim_args": args or None, "learning_rate": lr, "max_grad_norm": 0.0}
    optimizer = OptimizerFactory.from_training_args(TrainingArguments(output_dir="unused", **found))(model)
    for part in simulated:
        round_products_(optimizer, part.partition("=")[2])
    return optimizer


def parse_settings(name: str, text: str, defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``rank=16,scale=1`` over defaults, whose types the values take."""
    settings = dict(defaults)
    for part in filter(None, text.split(",")):
        key, _, value = part.partition("=")
        if key not in defaults:
            raise ValueError(f"{name} has no setting {key!r}; there are {', '.join(defaults)}")
        settings[key] = type(defaults[key])(value)
    return settings
