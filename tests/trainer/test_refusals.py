"""What the factory refuses, with a reason that names it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from torch import nn

from hf_lowmem_optim import OptimizerFactory
from tests.trainer.tiny_models import only_head, tiny_llama


def bf16_but_norms() -> nn.Module:
    model = tiny_llama().bfloat16()
    for name, module in model.named_modules():
        if "norm" in name:
            module.float()
    return model


def refused(
    message: str,
    name: str = "ldadam",
    model: Callable[[], nn.Module] = tiny_llama,
    error: type[Exception] = ValueError,
    **given: Any,
) -> Any:
    return pytest.param(message, name, model, error, given, id=message)


HYPER = [
    refused("did you mean 'ldadam'", name="ldamm"),
    refused("did you mean 'rank'", error=TypeError, rnak=4),
    refused("rank=0", rank=0),
    refused("no trainable parameter", model=lambda: tiny_llama().requires_grad_(False)),
]
TARGETS = [
    refused(r"\['q_proj'\].*none of them holds a trainable", model=only_head, target_modules=["q_proj"]),
    refused(r"optim_target_modules=\['q_prj'\].*did you mean 'q_proj'", target_modules=["q_prj"]),
    refused("'nope' matches no module", target_modules=["q_proj", "nope"]),
    refused("must match the whole name", target_modules="self_attn"),
    refused("matches 2 modules.*none of them holds", target_modules=r"model\.layers\.\d\.mlp"),
    refused("not a valid regex", target_modules="*proj"),
    refused("is empty", target_modules=[]),
    refused("is empty or has an empty entry", target_modules=[""]),
    refused("must be a list of module names", error=TypeError, target_modules=3),
    refused(r"must be a list of module names", error=TypeError, target_modules=[3]),
]
OVERRIDES = [
    refused(r"must be a dict such as", error=TypeError, overrides=[("mlp", {})]),
    refused(r"overrides\['mlp'\]=8", error=TypeError, overrides={"mlp": 8}),
    refused(r"overrides\[3\]", error=TypeError, overrides={3: {"rank": 8}}),
    refused(r"overrides\['mlp'\]={} is empty", overrides={"mlp": {}}),
    refused("is empty; name a module", overrides={"": {"rank": 8}}),
    refused(r"overrides\['mlp'\].*'rnak'; did you mean 'rank'", error=TypeError, overrides={"mlp": {"rnak": 8}}),
    refused(r"overrides\['mlp'\]: rank='8'", error=TypeError, overrides={"mlp": {"rank": "8"}}),
    refused(r"overrides\['mlp'\]: lr=-1.0", overrides={"mlp": {"lr": -1.0}}),
    refused(r"overrides\['mpl'\].*matches no module of Llama", overrides={"mpl": {"rank": 8}}),
    refused("did you mean 'q_proj'", overrides={"q_prj": {"rank": 8}}),
    refused("not a valid regex", overrides={"*": {"rank": 8}}),
    refused("none of them holds a trainable parameter itself", overrides={"act_fn": {"rank": 8}}),
    refused("'up_proj'.*taken by 'mlp'; put 'up_proj'", overrides={"mlp": {"rank": 8}, "up_proj": {"rank": 4}}),
    refused("biases and norms do not decay", overrides={"norm": {"weight_decay": 0.1}}),
    refused("rank=4 has no effect: nothing that it matches is compressed", overrides={"norm": {"rank": 4}}),
    refused("give it a rank as well", overrides={"embed": {"error_feedback": "none"}}),
    refused("is for the dense rule, and all .* is", name="sparse_mfac", overrides={"q_proj": {"betas": (0.5, 0.6)}}),
    refused("eps=0.001 has no effect", name="lowrank_mfac", overrides={"q_proj": {"eps": 1e-3}}),
    refused("dense_state='fp32' has no effect", name="sparse_mfac", overrides={"q_proj": {"dense_state": "fp32"}}),
    refused("it matches are float32", model=bf16_but_norms, overrides={"norm": {"weight_rounding": "stochastic"}}),
]
RATIOS = [
    refused("dense_lr_ratio=0 is out of range", dense_lr_ratio=0),
    refused("lr_ratio=0 is out of range", lr_ratio=0),
    refused("lr_ratio='16'", error=TypeError, lr_ratio="16"),
    refused("lr_ratio=inf", lr_ratio=float("inf")),
    refused("lr_ratio=16 .*LlamaForCausalLM has no trainable lora_B", lr_ratio=16),
    refused("dense_lr_ratio=4 has no effect: nothing is compressed", dense_lr_ratio=4, rank=None),
    refused(
        "dense_lr_ratio=4 has no effect: nothing without a rate of its own",
        dense_lr_ratio=4,
        overrides={key: {"lr": 1e-3} for key in ("lm_head", "embed", "norm")},
    ),
]


@pytest.mark.parametrize(("message", "name", "model", "error", "given"), HYPER + TARGETS + OVERRIDES + RATIOS)
def test_what_cannot_be_meant_is_refused_with_a_reason(
    message: str, name: str, model: Callable[[], nn.Module], error: type[Exception], given: dict[str, Any]
) -> None:
    built = model()
    with pytest.raises(error, match=message):
        OptimizerFactory(name, **given).build(built)
