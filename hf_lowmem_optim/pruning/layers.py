"""I-OBS layer by layer, without training (arXiv 2408.17163, its setting for language models and ViTs).

In the order in which a batch runs through them, ``iterations`` times over all layers, with dense weights W₀ and inputs
X₀ in the dense network:

1. X ← the layer's inputs in the network as it is pruned by now;  H ← XᵀX/n + damping·mean(diag)·I
2. W⁺ ← W − (W·XᵀX/n − (X₀W₀ᵀ)ᵀX/n)·H⁻¹       a Newton step on ‖XWᵀ − X₀W₀ᵀ‖² at the sparse point W (first at W₀)
3. W ← sweep(W⁺, H)                               SparseGPT's (``sweep.py``)
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from hf_lowmem_optim.engine.options import COUNT, POSITIVE, check_number, nearest, shown
from hf_lowmem_optim.ops.dispatch import full_precision
from hf_lowmem_optim.pruning.layer_kinds import (
    describe_fault,
    is_supported,
    matrices_of,
    num_neighbours,
    rows_of_input,
    write_matrix_,
)
from hf_lowmem_optim.pruning.network import Network, evaluating
from hf_lowmem_optim.pruning.support import check_pattern
from hf_lowmem_optim.pruning.sweep import newton_point, solve_rows_, sweep_
from hf_lowmem_optim.words import check_type

__all__ = ["iobs_layers_", "prunable_layers"]


@dataclass(frozen=True)
class _Settings:
    """How each layer is pruned."""

    sparsity: float
    pattern: tuple[int, int] | None
    damping: float
    block_size: int
    exact: bool


@torch.no_grad()
def iobs_layers_(
    model: nn.Module,
    batches: Iterable[Any],
    sparsity: float | None = None,
    iterations: int = 3,
    pattern: Sequence[int] | None = None,
    damping: float = 0.01,
    block_size: int = 128,
    layers: Sequence[str] | None = None,
    exact: bool = False,
) -> None:
    """Prune the linear and convolution layers of a model, one after the other, by calibration batches.

    Every layer (every group of a convolution) is pruned to ``sparsity`` by itself, exactly ⌊s·n⌋ entries. The
    weights are in memory twice, and of one layer at a time (or of a few with the same input) some matrices of 8·in²
    bytes. Where the model is a list of blocks (``network.py``), each layer runs its own block alone, and what a block
    gives is kept twice, for all batches.

    Args:
        model: Any model; it is run in evaluation mode, and changed in place.
        batches: What it is run on: dicts of keyword arguments, tuples of arguments, or tensors. They should cover what
            it will be used on: the more parameters a layer has, the more of them.
        sparsity: s, in [0, 1); 0.5, or what ``pattern`` says.
        iterations: How often each layer is pruned. More is better on the calibration data, and soon saturates on
            others.
        pattern: (N, M): N of each M neighbouring inputs are kept.
        damping: Added to H, relative to its mean diagonal.
        block_size: Columns that are chosen from together.
        layers: Names of layers, or parts of names (whole words between dots); by default all linear and convolution
            layers but the output head of a model of transformers; elsewhere name the others.
        exact: Solve every row exactly for the weights that stay: much better, and in³/6 operations a row, so for layers
            of up to a few hundred inputs.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: An argument is out of range; a layer cannot be pruned, or gets no input, or other ones in the dense
            and in the pruned network; or its inputs or weights are not finite. Before a layer's inputs are looked at,
            nothing has been changed.

    Example:
        >>> iobs_layers_(model, [{"input_ids": ids} for ids in calibration], sparsity=0.5)
    """
    pattern, sparsity = check_pattern(pattern, sparsity)
    check_number("iterations", iterations, COUNT)
    check_number("block_size", block_size, COUNT)
    check_number("damping", damping, POSITIVE)
    check_type("exact", exact, bool, "True or False")
    check_type("model", model, nn.Module, "a torch module")
    check_type("batches", batches, Iterable, "a list of batches")
    if isinstance(batches, (Mapping, Tensor)):
        raise TypeError(f"batches is a {type(batches).__name__}, a batch itself: give a list of batches")
    chosen = prunable_layers(model, layers, pattern)
    inputs = list(batches)
    if not inputs:
        raise ValueError("batches is empty: the layers' inputs are what their weights are judged by")

    settings = _Settings(sparsity, pattern, damping, block_size, exact)
    with evaluating(model), full_precision():
        network = Network(model, chosen, inputs)
        total = iterations * len(chosen)
        with tqdm(total=total, desc="pruning", unit="layer", disable=None) as progress:  # None: only on a terminal
            for _ in range(iterations):
                network.begin()
                for names in network.order:
                    _prune_(network, names, settings)
                    progress.update(len(names))


def _prune_(network: Network, names: Sequence[str], settings: _Settings) -> None:
    """Prune layers that have one input."""
    X = _moments(network, names[0])
    for name in names:
        layer = network.layers[name]
        matrices, W0 = matrices_of(layer, layer.weight), matrices_of(layer, network.dense[name])
        if not bool(torch.isfinite(matrices).all()):
            raise ValueError(f"the weights of {name!r} are not finite")
        for W, dense_W, H0, cross in zip(matrices, W0, X.squares, X.crossed, strict=True):
            if not bool(torch.isfinite(H0).all() & torch.isfinite(cross).all()):
                raise ValueError(f"the inputs of {name!r} are not finite")
            H = H0.clone()
            H.diagonal().add_(settings.damping * (float(H0.diagonal().mean()) or 1.0))
            target = newton_point(W, H, H0, dense_W @ cross)
            pruned = sweep_(W.copy_(target), H, settings.sparsity, settings.pattern, settings.block_size)
            if settings.exact:
                solve_rows_(W, target, H, pruned)
        write_matrix_(layer, matrices)


# ------------------------------------------------------------------------------------------------------------- layers


def prunable_layers(
    model: nn.Module, layers: Sequence[str] | None = None, pattern: Sequence[int] | None = None
) -> dict[str, Any]:
    """Return the layers that are to be pruned, by name, each weight once.

    Args:
        model: The model.
        layers: Names or parts of names; None for all linear and convolution layers but the output head.
        pattern: (N, M), or None.

    Raises:
        TypeError: ``layers`` is not a list of names.
        ValueError: A name is none, a layer cannot be pruned, or there is none.
    """
    modules = dict(model.named_modules())
    if layers is None:
        others = _not_by_default(model)
        chosen = {name: layer for name, layer in modules.items() if is_supported(layer) and layer not in others}
    else:
        chosen = {}
        check_type("layers", layers, Sequence, "a list of names of layers")
        for entry in layers if not isinstance(layers, str) else [layers]:
            if not isinstance(entry, str) or not entry:
                raise TypeError(f"layers has {shown(entry)}, which is no name of a layer")
            found = {name: layer for name, layer in modules.items() if f".{entry}." in f".{name}."}
            if not found:
                raise ValueError(f"layers: {shown(entry)} names no layer{nearest(entry, modules)}")
            leaves = {name: layer for name, layer in found.items() if is_supported(layer)}
            chosen |= leaves or found  # if there is none, the fault of what was named is told
    unique: dict[int, str] = {}
    for name, layer in chosen.items():
        if (fault := describe_fault(layer)) is not None:
            raise ValueError(f"{name!r} {fault}")
        unique.setdefault(id(layer.weight), name)
        if pattern is not None and num_neighbours(layer) % pattern[1]:
            raise ValueError(
                f"the last dimension of {name!r}, {num_neighbours(layer)}, is not divisible by the {pattern[1]} of "
                f"pattern={tuple(pattern)}: leave it out of layers"
            )
    if not unique:
        raise ValueError(f"{type(model).__name__} has no linear or convolution layer to prune")
    return {name: modules[name] for name in unique.values()}


def _not_by_default(model: nn.Module) -> set[nn.Module]:
    """Return output heads of transformers models, and layers that share their weight with an embedding."""
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, (nn.Embedding, nn.EmbeddingBag))}
    others = {m for m in model.modules() if is_supported(m) and id(m._parameters.get("weight")) in embeddings}
    module: Any
    for module in model.modules():
        if hasattr(module, "get_output_embeddings") and hasattr(module, "base_model"):
            others |= {head for head in [module.get_output_embeddings()] if isinstance(head, nn.Module)}
            if module.base_model is not module:  # a classifier and the like: all that is outside of it
                others |= set(module.modules()) - set(module.base_model.modules())
    return others


# ------------------------------------------------------------------------------------------------------------- inputs


class _Moments:
    """Of the inputs of a layer, for each of its groups: XᵀX/n and X₀ᵀX/n, float64 [groups, in, in]."""

    def __init__(self) -> None:
        self.count = 0
        self.squares: list[Tensor] = []
        self.crossed: list[Tensor] = []

    def add(self, layer: nn.Module, dense: Tensor, pruned: Tensor) -> None:
        """Add the inputs of one call."""
        pairs = list(zip(rows_of_input(layer, dense), rows_of_input(layer, pruned), strict=True))
        if not self.squares:
            self.squares = [torch.zeros_like(X[:1].T @ X[:1], dtype=torch.float64) for _, X in pairs]
            self.crossed = [square.clone() for square in self.squares]
        for index, (X0, X) in enumerate(pairs):
            self.squares[index] += X.T @ X
            self.crossed[index] += X0.T @ X
        self.count += len(pairs[0][1])

    def end(self) -> None:
        """Divide by n."""
        for sums in (*self.squares, *self.crossed):
            sums /= self.count


def _moments(network: Network, name: str) -> _Moments:
    """Return the moments of what a layer gets in the dense network and in the pruned one."""
    layer, moments = network.layers[name], _Moments()
    for before, after in network.inputs_of(name):
        if [x.shape for x in before] != [x.shape for x in after]:
            raise ValueError(
                f"{name!r} gets other inputs in the pruned network than in the dense one (a router sends others): "
                "leave it out of layers"
            )
        for X0, X in zip(before, after, strict=True):
            moments.add(layer, X0, X)
    if not moments.count:
        raise ValueError(
            f"{name!r} gets no row of input in any batch (an expert without tokens): leave it out of layers"
        )
    moments.end()
    return moments
