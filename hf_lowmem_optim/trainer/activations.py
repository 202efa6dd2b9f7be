"""What forward and backward pass hold beside weights and gradients: a training step on the meta device, counted.

The meta device gives every tensor its size and no bytes, and autograd keeps and frees tensors there as on any other
device. So the step of a 70B model takes seconds, with the modules of transformers, gradient checkpointing and adapters
as they are. The estimate is the most that is alive at one moment of::

    tensors kept for the backward pass + tensors that a layer or the loss makes for a moment + the gradient at hand

Each gradient is dropped as soon as it is there, since the plan counts all gradients (in layer-wise mode the largest)
by themselves. Attention counts as a fused kernel (SDPA, FlashAttention): it keeps queries, keys, values, its output and
a float32 number for each row and head, and no matrix of scores. Batches are full, without padding. Not counted: what
kernels allocate inside, copies that autocast makes, and what the allocator loses to fragments.
"""

from __future__ import annotations

import inspect
import warnings
import weakref
from collections.abc import Set
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from hf_lowmem_optim.trainer.model_source import ModelOptions

__all__ = ["activation_bytes", "plan_activations"]

_NAME = "hf_lowmem_optim_planned"


def plan_activations(model: nn.Module, options: ModelOptions, quantized: Set[int]) -> tuple[int, str]:
    """Return the estimate for a plan's options, and what it is of, in a sentence.

    A layer of quantized weights is dequantized for a moment: the largest one is added.
    """
    length = options.seq_len or 1
    estimate = activation_bytes(model, options.batch_size, length, checkpointing=options.checkpointing)
    estimate += max((2 * p.numel() for p in model.parameters() if id(p) in quantized), default=0)
    how = "with" if options.checkpointing else "without"
    base, size = _base_of(model), options.batch_size
    pictures, positions = base.main_input_name == "pixel_values", getattr(base.config, "max_position_embeddings", None)
    batch = f"{size} × {length:,} tokens" if not pictures else "1 picture" if size == 1 else f"{size} pictures"
    note = (
        f"Activations: {batch} at a time, no padding, fused attention, {how} gradient checkpointing; an estimate, "
        "within 5 % of what was measured on a CPU (Llama, GPT-2, BERT, LoRA; ViT without checkpointing, 9 % with it); "
        "no GPU was compared. What autocast copies (bf16=True) is not in it."
    )
    if isinstance(positions, int) and length > positions and not pictures:
        note += f" {length:,} tokens are more than the {positions:,} positions of the model's configuration."
    return estimate, note


def activation_bytes(model: nn.Module, batch_size: int, seq_len: int, *, checkpointing: bool = False) -> int:
    """Estimate the bytes of activations at the worst moment of a training step, for a model on the meta device.

    Args:
        model: The model; its attention, mode and hooks are changed.
        batch_size: Sequences, or pictures, of one process at a time.
        seq_len: Tokens of each, without effect on pictures.
        checkpointing: Whether layers are computed anew in the backward pass (``gradient_checkpointing=True``).

    Raises:
        ValueError: The model cannot be run with such a batch.
    """
    base = _base_of(model)
    if not getattr(base, "_supports_sdpa", False):
        who = type(base).__name__
        raise ValueError(f"{who} has no attention that can be counted as a fused kernel; plan without seq_len")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            base.set_attn_implementation(_NAME)
            base.config.use_cache = False
            if checkpointing:
                base.gradient_checkpointing_enable({"use_reentrant": False})
            return _most_at_once(model.train(), _inputs(base, batch_size, seq_len))
    except Exception as error:  # a model computes with whatever its configuration holds
        positions = getattr(base.config, "max_position_embeddings", None)
        if isinstance(positions, int) and seq_len > positions:
            raise ValueError(
                f"seq_len={seq_len} is more than the {positions:,} positions (max_position_embeddings) of "
                f"{type(base).__name__}"
            ) from error
        what = f"{type(base).__name__} with batch_size={batch_size}, seq_len={seq_len}"
        raise ValueError(f"the activations of {what} cannot be estimated: {' '.join(str(error).split())}") from error


def _base_of(model: Any) -> Any:
    """Return the model below adapters."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _inputs(model: PreTrainedModel, batch_size: int, seq_len: int) -> dict[str, Tensor]:
    """Return a batch as a Trainer would hand it to the model."""
    accepted = inspect.signature(model.forward).parameters
    tokens = torch.zeros(batch_size, seq_len, dtype=torch.long, device="meta")
    if model.main_input_name == "pixel_values":
        sizes: Any = model.config.image_size
        height, width = (sizes, sizes) if isinstance(sizes, int) else sizes
        shape = (batch_size, model.config.num_channels, height, width)
        return {"pixel_values": torch.zeros(shape, dtype=model.dtype, device="meta"), "labels": tokens[:, 0]}
    inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "decoder_input_ids": tokens}
    if hasattr(model.config, "problem_type") and "Classification" in type(model).__name__:
        tokens = tokens[:, 0] if "Sequence" in type(model).__name__ else tokens
    return {key: value for key, value in {**inputs, "labels": tokens}.items() if key in accepted}


def _most_at_once(model: nn.Module, inputs: dict[str, Tensor]) -> int:
    """Run forward and backward pass; return the most bytes alive at once beside parameters, buffers and inputs."""
    trained = [p for p in model.parameters() if p.requires_grad]
    hooks: list[Any] = [p.register_post_accumulate_grad_hook(_drop_gradient) for p in trained]  # type: ignore[no-untyped-call]
    try:
        with _LiveBytes([*model.parameters(), *model.buffers(), *inputs.values()]) as counted:
            output = model(**inputs)
            loss = output.loss if getattr(output, "loss", None) is not None else output[0].float().mean()
            del output  # the Trainer lets go of the logits before the backward pass
            loss.backward()
    finally:
        for hook in hooks:
            hook.remove()
    most: int = counted.most
    return most


def _drop_gradient(parameter: Tensor) -> None:
    parameter.grad = None


class _LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of all storages that operations make, while they are alive."""

    def __init__(self, existing: list[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.most: int = 0
        self._now: int = 0
        self._sizes = {tensor.untyped_storage()._cdata: 0 for tensor in existing}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        for tensor in pytree.tree_leaves(output):
            if isinstance(tensor, Tensor) and (storage := tensor.untyped_storage())._cdata not in self._sizes:
                self._sizes[storage._cdata] = storage.nbytes()
                weakref.finalize(storage, self._freed, storage._cdata)
                self._now += storage.nbytes()
                self.most = max(self.most, self._now)
        return output

    def _freed(self, storage: int) -> None:
        self._now -= self._sizes.pop(storage)


class _FusedAttention(torch.autograd.Function):
    """The sizes of a fused attention kernel's tensors."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Return the output [batch, tokens, heads, width] and keep what the backward pass needs."""
        batch, heads, tokens, _ = query.shape
        output = query.new_empty(batch, tokens, heads, value.shape[-1])
        sums = query.new_empty(batch, heads, tokens, dtype=torch.float32)
        ctx.save_for_backward(query, key, value, output, sums)
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return gradients of queries, keys and values."""
        query, key, value, *_ = ctx.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def _attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **more: Any
) -> tuple[Tensor, None]:
    """Stand for an attention function of transformers."""
    if more.get("position_bias") is not None:
        raise ValueError("its attention has a learned bias, for which fused kernels differ; plan without seq_len")
    output: Tensor = _FusedAttention.apply(query, key, value)  # type: ignore[no-untyped-call]
    return output, None


def _no_mask(*_: Any, **__: Any) -> None:
    """Stand for a function that makes the mask, which full causal batches do without."""


AttentionInterface.register(_NAME, _attend)
AttentionMaskInterface.register(_NAME, _no_mask)
