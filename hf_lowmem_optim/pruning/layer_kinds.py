"""Layers as matrices: the weights of linear and convolution layers as [out, in], and their inputs as [rows, in]."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["describe_fault", "is_supported", "matrices_of", "num_neighbours", "rows_of_input", "write_matrix_"]

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def _is_conv1d_of_transformers(layer: nn.Module) -> bool:
    """Return whether it is GPT-2's linear layer, whose weights are [in, out]; without importing transformers."""
    return any(
        f"{kind.__module__}.{kind.__name__}" == "transformers.pytorch_utils.Conv1D" for kind in type(layer).__mro__
    )


def is_supported(layer: nn.Module) -> bool:
    """Return whether a layer is one that can be pruned: linear, Conv1D of transformers, or a convolution."""
    return isinstance(layer, (nn.Linear, *_CONVOLUTIONS)) or _is_conv1d_of_transformers(layer)


def describe_fault(layer: nn.Module) -> str | None:
    """Return why a layer cannot be pruned, as a clause; None if it can."""
    if isinstance(layer, (nn.Embedding, nn.EmbeddingBag)):
        return "is an embedding, whose inputs are no vectors"
    if not is_supported(layer):
        return f"is a {type(layer).__name__}: linear layers, Conv1D of transformers and convolutions can be pruned"
    weight = layer._parameters.get("weight")
    if weight is None:
        return "computes its weight from other tensors (a parametrization): remove that first"
    if not weight.is_floating_point() or weight.dtype not in (
        torch.float32,
        torch.float64,
        torch.bfloat16,
        torch.float16,
    ):
        return f"has quantized weights ({weight.dtype}): load the model without quantization"
    if hasattr(weight, "placements"):
        return "is sharded (DTensor): prune the whole model in one process"
    if weight.is_meta:
        return "has no weights (meta device)"
    return None


def _groups(layer: Any) -> int:
    return layer.groups if isinstance(layer, _CONVOLUTIONS) else 1


def num_neighbours(layer: Any) -> int:
    """Return the entries in the dimension of which N:M patterns take M at a time: inputs, or the last of a kernel."""
    return int(layer.weight.shape[0 if _is_conv1d_of_transformers(layer) else -1])


def matrices_of(layer: Any, weight: Tensor) -> Tensor:
    """Return weights as float64 [groups, out, in]."""
    if _is_conv1d_of_transformers(layer):
        return weight.T.double()[None]
    groups = _groups(layer)
    return weight.double().reshape(groups, weight.shape[0] // groups, -1)


def write_matrix_(layer: Any, matrices: Tensor) -> None:
    """Write float64 [groups, out, in] to the layer's weights, rounded to nearest."""
    weight = layer.weight.detach()
    weight.copy_(matrices[0].T if _is_conv1d_of_transformers(layer) else matrices.reshape(weight.shape))


def rows_of_input(layer: Any, x: Tensor) -> Iterator[Tensor]:
    """Yield what each group of a layer multiplies with its weights, float32 or float64 [rows, in]."""
    x = x if x.dtype == torch.float64 else x.float()
    if not isinstance(layer, _CONVOLUTIONS):
        yield x.reshape(-1, x.shape[-1])
        return
    spatial = len(layer.kernel_size)
    if x.dim() == spatial + 1:
        x = x[None]
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    x = functional.pad(x, layer._reversed_padding_repeated_twice, mode=mode)
    for dim, (size, stride, dilation) in enumerate(
        zip(layer.kernel_size, layer.stride, layer.dilation, strict=True), start=2
    ):
        # a window of every place, behind all dimensions
        x = x.unfold(dim, (size - 1) * dilation + 1, stride)[..., ::dilation]
    for part in x.chunk(layer.groups, dim=1):
        # [batch, in, places …, kernel …] → [batch · places, in · kernel]
        places = tuple(range(2, 2 + spatial))
        yield part.permute(0, *places, 1, *range(2 + spatial, 2 + 2 * spatial)).reshape(
            -1, part.shape[1] * layer.weight[0, 0].numel()
        )
