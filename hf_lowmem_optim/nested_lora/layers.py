"""The LoRA layers of a peft model, and the hook that weighs their components; found by what they have, without peft."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from hf_lowmem_optim.nested_lora.ranks import Rule, Scaling, component_weights, scale_at
from hf_lowmem_optim.words import nearest, shown

__all__ = ["NestedLayer", "WeighComponents", "find_layers", "lora_config"]

#: Initializations after which the base weights are the model's own and the adapter, if trained anew, is zero.
_INITS = (True, False, "gaussian", "eva")


class WeighComponents:
    """Multiplies what goes into a ``lora_B`` by a diagonal: a forward pre-hook that deepcopy and pickle carry.

    Attributes:
        diagonal: One factor for each component, float32 (float64 for adapters of that), with as many dimensions of
            size 1 behind it as a convolution has.
        drawn: The one to take in training mode, if there is one.
    """

    def __init__(self, diagonal: Tensor) -> None:
        self.diagonal = diagonal
        self.drawn: Tensor | None = None

    def __call__(self, module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Return the arguments with the first one, A·x, multiplied."""
        components = args[0]
        # moved once, not in every pass
        if module.training and self.drawn is not None:
            diagonal = self.drawn = self.drawn.to(components.device)
        else:
            diagonal = self.diagonal = self.diagonal.to(components.device)
        return components * diagonal.to(components.dtype), *args[1:]


class NestedLayer:
    """One LoRA layer, and the weights of its components.

    Args:
        name: Of the layer in the model.
        layer: As peft made it.
        adapter: Its name.
        ranks: Those that are trained.
        scaling: What s(r) is; None for peft's own.
    """

    def __init__(self, name: str, layer: Any, adapter: str, ranks: Sequence[int], scaling: Scaling | None) -> None:
        self.name, self.layer, self.adapter, self.ranks = name, layer, adapter, ranks
        self.own_rank: int = layer.r[adapter]
        self.alpha: float = layer.lora_alpha[adapter]
        self.peft_scaling: Scaling = "sqrt" if layer.use_rslora.get(adapter, False) else "rank"
        self.scaling: Scaling = scaling or self.peft_scaling
        # what peft multiplies by after lora_B
        self.factor: float = layer.scaling[adapter]
        self.hook = WeighComponents(self._diagonal(None, "paper"))
        self.handle: RemovableHandle = self.b.register_forward_pre_hook(self.hook)

    @property
    def a(self) -> Any:
        """``lora_A`` of this adapter."""
        return self.layer.lora_A[self.adapter]

    @property
    def b(self) -> Any:
        """``lora_B`` of this adapter."""
        return self.layer.lora_B[self.adapter]

    def weights(self, rank: int | None, rule: Rule) -> list[float]:
        """Return p, or what stands in its place at a rank."""
        return component_weights(self.ranks, self.own_rank, self.alpha, self.scaling, rank, rule)

    def set_rank(self, rank: int | None, rule: Rule) -> None:
        """Weigh the components as for a rank, or None for all trained ranks at once."""
        self.hook.diagonal, self.hook.drawn = self._diagonal(rank, rule), None

    def draw(self, rank: int) -> None:
        """Weigh the components as for a rank, but in training mode only."""
        self.hook.drawn = self._diagonal(rank, "paper")

    def saved_tensors(self, state: Mapping[str, Tensor], rank: int, rule: Rule) -> dict[str, Tensor]:
        """Return the weights of a stock adapter of that rank, or of the layer's own if that is smaller, by name."""
        kept = min(rank, self.own_rank)
        factor = scale_at(self.alpha, kept, self.peft_scaling)
        key_a, key_b = (f"{self.name}.{part}.{self.adapter}.weight" for part in ("lora_A", "lora_B"))
        a, b = state[key_a].detach()[:kept], state[key_b].detach()[:, :kept].contiguous()  # or safetensors refuses it
        if rule == "nested" or self.scaling != self.peft_scaling:
            a = _scale_rows(a, [each / factor for each in self.weights(rank, rule)[:kept]])
        saved = {key_a: a, key_b: b}
        if self.b.bias is not None:  # peft multiplies it by the scale as well, but no hook does
            bias = f"{self.name}.lora_B.{self.adapter}.bias"
            saved[bias] = state[bias].detach() * (self.factor / factor)
        return saved

    def fold_(self, rank: int, rule: Rule) -> Tensor:
        """Multiply the rows of A as the hook would, for peft to merge; return A as it was."""
        before: Tensor = self.a.weight.detach().clone()
        with torch.no_grad():
            self.a.weight.copy_(_scale_rows(before, [each / self.factor for each in self.weights(rank, rule)]))
        return before

    def _diagonal(self, rank: int | None, rule: Rule) -> Tensor:
        """Return the weights without the factor that peft has, as the hook takes them."""
        weight = self.b.weight
        values = [each / self.factor for each in self.weights(rank, rule)]
        dtype = torch.promote_types(weight.dtype, torch.float32)
        return torch.tensor(values, dtype=dtype, device=weight.device).view(-1, *(1,) * (weight.ndim - 2))


def _scale_rows(matrix: Tensor, values: Sequence[float]) -> Tensor:
    """Return the rows, or what else the first dimension counts, each times its value; rounded once."""
    wide = torch.promote_types(matrix.dtype, torch.float32)
    factors = torch.tensor(values, dtype=wide, device=matrix.device).view(-1, *(1,) * (matrix.ndim - 1))
    return (matrix.to(wide) * factors).to(matrix.dtype)


def lora_config(model: Any, adapter: str) -> Any:
    """Return peft's configuration of an adapter.

    Raises:
        TypeError: The model is none of peft's.
        ValueError: It has no such adapter, or that is no LoRA, or begins with other base weights than the model's.
    """
    configs = getattr(model, "peft_config", None)
    if not isinstance(configs, Mapping) or not hasattr(model, "get_base_model"):
        raise TypeError(
            f"{type(model).__name__} is no PeftModel: give MatryoshkaLora what get_peft_model() or "
            "PeftModel.from_pretrained() returned, before anything else wraps it"
        )
    if adapter not in configs:
        known = ", ".join(map(repr, configs))
        raise ValueError(f"adapter={shown(adapter)} is none of {known}{nearest(str(adapter), configs)}")
    config = configs[adapter]
    if getattr(config.peft_type, "value", config.peft_type) != "LORA":
        raise ValueError(f"adapter {adapter!r} is of type {config.peft_type}, not LoRA: its components have no order")
    if config.init_lora_weights not in _INITS:
        raise ValueError(
            f"init_lora_weights={config.init_lora_weights!r} begins with an adapter that is not zero, or with other "
            "base weights, made for all components at once: fewer of them are no adapter of the model. Use True, "
            "'gaussian' or 'eva'"
        )
    return config


def find_layers(model: nn.Module, adapter: str) -> dict[str, Any]:
    """Return the layers of an adapter by name.

    Raises:
        ValueError: There is none, one is of a kind whose components cannot be weighed, or one has the hook already.
    """
    found: dict[str, Any] = {}
    refused: dict[str, list[str]] = {}
    for name, module in model.named_modules():
        if adapter in getattr(module, "lora_embedding_A", ()):
            refused.setdefault("embeddings", []).append(name)
        elif adapter in getattr(module, "lora_B", ()) and adapter in getattr(module, "r", ()):
            if reason := _refusal(module, adapter):
                refused.setdefault(reason, []).append(name)
            found[name] = module
    if refused:
        listed = "; ".join(f"{reason} ({', '.join(names)})" for reason, names in refused.items())
        raise ValueError(
            f"the components of some layers cannot be weighed: {listed}. Leave them out of target_modules, or "
            "target_parameters"
        )
    if not found:
        raise ValueError(f"adapter {adapter!r} has no layer")
    for name, module in found.items():
        if any(isinstance(hook, WeighComponents) for hook in module.lora_B[adapter]._forward_pre_hooks.values()):
            raise ValueError(f"adapter {adapter!r} has a MatryoshkaLora already (at {name}): call its remove() first")
    return found


def _refusal(layer: Any, adapter: str) -> str | None:
    """Return why an input of ``lora_B`` cannot stand for the components of a layer, if it cannot."""
    b, variant = layer.lora_B[adapter], type(layer.lora_variant.get(adapter)).__name__
    if not layer.scaling[adapter]:
        return "layers with lora_alpha=0"
    if hasattr(layer, "parameter_name"):
        return "target_parameters"
    if isinstance(layer.get_base_layer(), nn.MultiheadAttention):
        return "nn.MultiheadAttention, which peft merges in each forward pass"
    if isinstance(b, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        if b.groups > 1:
            return "grouped convolutions"
        return None if variant == "NoneType" else f"convolutions with {variant}"
    if b.weight.ndim != 2:
        return f"layers with a lora_B of type {type(b).__name__}"
    return None if variant in ("NoneType", "DoraLinearVariant") else f"layers with {variant}"
