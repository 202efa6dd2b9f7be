"""The one table of optimizers: what the strings, the factory, the planner and the command line read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from hf_lowmem_optim.optimizers.base import LowMemoryOptimizer
from hf_lowmem_optim.optimizers.hyperparameters import nearest
from hf_lowmem_optim.optimizers.layerwise import LDAdamLayerwise, MicroAdamLayerwise
from hf_lowmem_optim.optimizers.ldadam import LDAdam, ldadam_state
from hf_lowmem_optim.optimizers.lowrank_mfac import LowRankMFAC, lowrank_mfac_state
from hf_lowmem_optim.optimizers.microadam import MicroAdam, microadam_state
from hf_lowmem_optim.optimizers.sparse_ggt import SparseGGT, sparse_ggt_state
from hf_lowmem_optim.optimizers.sparse_mfac import SparseMFAC, sparse_mfac_state
from hf_lowmem_optim.state import TensorSpec

__all__ = ["OPTIMIZERS", "OptimizerEntry", "get_entry"]


@dataclass(frozen=True)
class OptimizerEntry:
    """One optimizer.

    Attributes:
        name: The string for ``TrainingArguments(optim=...)``.
        optimizer_class: The class.
        state_function: ``(shape, dtype, **hyper) -> dict[str, TensorSpec]``.
        paper: Where the method is published.
        summary: What it does, in a line.
    """

    name: str
    optimizer_class: type[LowMemoryOptimizer]
    state_function: Callable[..., dict[str, TensorSpec]]
    paper: str
    summary: str


OPTIMIZERS: dict[str, OptimizerEntry] = {
    entry.name: entry
    for entry in (
        OptimizerEntry(
            "ldadam",
            LDAdam,
            ldadam_state,
            "arXiv 2410.16103 (ICLR 2025)",
            "Adam in a low-rank subspace that follows the gradient, with error feedback",
        ),
        OptimizerEntry(
            "microadam",
            MicroAdam,
            microadam_state,
            "arXiv 2405.15593 (NeurIPS 2024)",
            "Adam over a window of Top-K gradients, the rest fed back from a 4-bit error",
        ),
        OptimizerEntry(
            "sparse_mfac",
            SparseMFAC,
            sparse_mfac_state,
            "arXiv 2306.06098 (ICML 2024)",
            "inverse Fisher matrix (M-FAC) of a window of sparse gradients, with error feedback",
        ),
        OptimizerEntry(
            "lowrank_mfac",
            LowRankMFAC,
            lowrank_mfac_state,
            "arXiv 2306.06098 (ICML 2024)",
            "inverse Fisher matrix (M-FAC) of a window of low-rank gradients, with error feedback",
        ),
        OptimizerEntry(
            "sparse_ggt",
            SparseGGT,
            sparse_ggt_state,
            "arXiv 2306.06098 (ICML 2024)",
            "full-matrix AdaGrad (GGT) over a window of sparse gradients, with error feedback",
        ),
        OptimizerEntry(
            "ldadam_layerwise",
            LDAdamLayerwise,
            ldadam_state,
            "arXiv 2410.16103 (ICLR 2025)",
            "ldadam, each parameter updated in the backward pass as soon as its gradient is there",
        ),
        OptimizerEntry(
            "microadam_layerwise",
            MicroAdamLayerwise,
            microadam_state,
            "arXiv 2405.15593 (NeurIPS 2024)",
            "microadam, each parameter updated in the backward pass as soon as its gradient is there",
        ),
    )
}


def get_entry(name: str) -> OptimizerEntry:
    """Look an optimizer up by its string.

    Args:
        name: For example ``"ldadam"``.

    Returns:
        Its entry.

    Raises:
        ValueError: There is none of that name; the message has the nearest one and the list.
    """
    if name not in OPTIMIZERS:
        known = ", ".join(OPTIMIZERS)
        raise ValueError(
            f"optim={name!r} is not an optimizer of this package{nearest(str(name), OPTIMIZERS)} ({known})"
        )
    return OPTIMIZERS[name]
