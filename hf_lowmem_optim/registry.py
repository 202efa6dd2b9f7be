"""The table of methods: what the strings, the factory, the planner and the command line read."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from hf_lowmem_optim.engine.backward import layerwise
from hf_lowmem_optim.engine.optimizer import LowMemoryOptimizer
from hf_lowmem_optim.engine.options import nearest
from hf_lowmem_optim.optimizers.dash import Dash
from hf_lowmem_optim.optimizers.dct_adamw import DCTAdamW
from hf_lowmem_optim.optimizers.ldadam import LDAdam
from hf_lowmem_optim.optimizers.lordo import LoRDO
from hf_lowmem_optim.optimizers.lowrank_mfac import LowRankMFAC
from hf_lowmem_optim.optimizers.microadam import MicroAdam
from hf_lowmem_optim.optimizers.sparse_ggt import SparseGGT
from hf_lowmem_optim.optimizers.sparse_mfac import SparseMFAC
from hf_lowmem_optim.optimizers.trion import Trion
from hf_lowmem_optim.words import shown

__all__ = [
    "OPTIMIZERS",
    "LDAdamLayerwise",
    "MicroAdamLayerwise",
    "OptimizerEntry",
    "after_registration",
    "get_entry",
    "register_optimizer",
]


@dataclass(frozen=True)
class OptimizerEntry:
    """One optimizer.

    Attributes:
        name: The string for ``TrainingArguments(optim=...)``.
        optimizer_class: The class.
        paper: Where the method is published.
        summary: What it does, in a line.
    """

    name: str
    optimizer_class: type[LowMemoryOptimizer]
    paper: str
    summary: str


OPTIMIZERS: dict[str, OptimizerEntry] = {}
"""Every optimizer by its string."""

after_registration: list[Callable[[], None]] = []
"""Called after every registration: the Trainer layer adds the string to transformers, if that is loaded."""


def register_optimizer(
    name: str, optimizer_class: type[LowMemoryOptimizer], *, paper: str = "", summary: str = ""
) -> None:
    """Make an optimizer known under a string, and its layer-wise version, if any, under ``<name>_layerwise``.

    It then has whatever the methods of this package have: the ``optim`` string and ``optim_args``, the factory, plan
    and report, exact resume, layer-wise mode. Register before building ``TrainingArguments``, before or after
    transformers is imported; ``docs/adding-an-optimizer.md`` has a complete example. A class that is defined anew, as
    when a cell of a notebook runs again, takes the place of its earlier self.

    Args:
        name: The string, in lower case: the name of the class's :class:`~hf_lowmem_optim.engine.method.Method`.
        optimizer_class: A subclass of :class:`~hf_lowmem_optim.engine.optimizer.LowMemoryOptimizer` with a ``method``.
        paper: Where the method is published.
        summary: What it does, in a line.

    Raises:
        TypeError: The class is no such subclass.
        ValueError: The name is no identifier in lower case, is not the method's, or belongs to another class.
    """
    if not (isinstance(optimizer_class, type) and issubclass(optimizer_class, LowMemoryOptimizer)):
        raise TypeError(
            f"optimizer_class={optimizer_class!r} is no subclass of LowMemoryOptimizer: derive it from that, with a "
            "class attribute `method = Method(...)`"
        )
    method = getattr(optimizer_class, "method", None)
    if method is None:
        raise TypeError(f"{optimizer_class.__name__} has no class attribute `method = Method(...)`")
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name) or name.endswith("_layerwise"):
        raise ValueError(f"name={name!r} must be a lower-case identifier that does not end in '_layerwise'")
    if name != method.name:
        who = optimizer_class.__name__
        raise ValueError(
            f"name={name!r} is not the name of {who}'s method, {method.name!r}; to vary a method under a name of its "
            f"own give {who} the attribute `method = dataclasses.replace(Base.method, name={name!r})`"
        )
    known = OPTIMIZERS.get(name)
    if known is not None and _identity(known.optimizer_class) != _identity(optimizer_class):
        raise ValueError(f"name={name!r} is taken by {known.optimizer_class.__name__}; choose another one")
    OPTIMIZERS[name] = OptimizerEntry(name, optimizer_class, paper, summary)
    if method.replicated is None:
        other = f"{name}_layerwise"
        note = f"{name}, each parameter updated in the backward pass as soon as its gradient is there"
        OPTIMIZERS[other] = OptimizerEntry(other, layerwise(optimizer_class), paper, note)
    for call in after_registration:
        call()


def _identity(optimizer_class: type) -> tuple[str, str]:
    return optimizer_class.__module__, optimizer_class.__qualname__


def get_entry(optimizer: str | type[LowMemoryOptimizer]) -> OptimizerEntry:
    """Look an optimizer up by its string or its class.

    Args:
        optimizer: For example ``"ldadam"`` or ``LDAdam``.

    Returns:
        Its entry.

    Raises:
        ValueError: There is none of that name; the message has the nearest one and the list. Or the class is not
            registered.
        NotImplementedError: The method has no layer-wise mode.
        TypeError: It is neither a string nor a class of this package.
    """
    if isinstance(optimizer, str):
        if optimizer not in OPTIMIZERS:
            if (normal := OPTIMIZERS.get(optimizer.removesuffix("_layerwise"))) is not None:
                layerwise(normal.optimizer_class)  # says why there is none
            known = ", ".join(OPTIMIZERS)
            raise ValueError(
                f"optim={optimizer!r} is not an optimizer of this package{nearest(optimizer, OPTIMIZERS)} ({known})"
            )
        return OPTIMIZERS[optimizer]
    for entry in OPTIMIZERS.values():
        if entry.optimizer_class is optimizer:
            return entry
    if isinstance(optimizer, type) and issubclass(optimizer, LowMemoryOptimizer):
        who = optimizer.__name__
        name = optimizer.method.name if "method" in vars(optimizer) else who.lower()
        raise ValueError(f"{who} is not registered: call register_optimizer({name!r}, {who}) first")
    raise TypeError(
        f"{shown(optimizer)} is no optimizer of this package: give the name or the class of one "
        f"({', '.join(OPTIMIZERS)}). Any other optimizer goes straight to the Trainer: "
        "optimizer_cls_and_kwargs=(SomeOptimizer, {...})"
    )


_LDADAM, _MICROADAM, _EFCP = "2410.16103 (ICLR 2025)", "2405.15593 (NeurIPS 2024)", "2306.06098 (ICML 2024)"
_DCT = "2505.17967 (ICLR 2026)"
for _class, _paper, _summary in (
    (LDAdam, _LDADAM, "Adam in a low-rank subspace that follows the gradient, with error feedback"),
    (MicroAdam, _MICROADAM, "Adam over a window of Top-K gradients, the rest fed back from a 4-bit error"),
    (SparseMFAC, _EFCP, "inverse Fisher matrix (M-FAC) of a window of sparse gradients, with error feedback"),
    (LowRankMFAC, _EFCP, "inverse Fisher matrix (M-FAC) of a window of low-rank gradients, with error feedback"),
    (SparseGGT, _EFCP, "full-matrix AdaGrad (GGT) over a window of sparse gradients, with error feedback"),
    (DCTAdamW, _DCT, "AdamW on the largest rows of the gradient's cosine transform, with error feedback"),
    (Trion, _DCT, "Muon's update from the largest rows of the momentum's cosine transform"),
    (Dash, "2602.02016", "Shampoo by blocks with Adam's step sizes, its statistics as 8-bit triangles"),
    (LoRDO, "2602.04396 (ICML 2026)", "low-rank Adam of workers that step apart and average every so many steps"),
):
    register_optimizer(_class.method.name, _class, paper=f"arXiv {_paper}", summary=_summary)

LDAdamLayerwise = layerwise(LDAdam)
MicroAdamLayerwise = layerwise(MicroAdam)
