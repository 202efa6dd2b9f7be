from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
from peft import IA3Config, PromptTuningConfig, get_peft_model
from torch import nn
from transformers import Trainer

from hf_lowmem_optim.trainer.param_groups import (
    COMPRESSED,
    EMBEDDING,
    HEAD,
    NOT_TARGET,
    TOO_SMALL,
    VECTOR,
    build_param_groups,
    place_parameters,
)
from tests.trainer.tiny_models import (
    only_head,
    tiny_bert_classifier,
    tiny_gpt2,
    tiny_llama,
    tiny_t5,
    tiny_vit,
    with_lora,
)

RANK = 4


def above_rank(parameter: nn.Parameter, settings: object) -> str:
    shape = parameter.shape
    return COMPRESSED if len(shape) >= 2 and min(shape[0], shape[1:].numel()) > RANK else TOO_SMALL


def lora(targets: list[str], **settings: Any) -> Callable[[], nn.Module]:
    """Makes a tiny Llama with adapters that are large enough to be compressed."""
    return lambda: with_lora(tiny_llama(), r=8, target_modules=targets, **settings)


def peft(config: Any) -> Callable[[], nn.Module]:
    return lambda: get_peft_model(tiny_llama(), config)


def frozen_backbone() -> nn.Module:
    model = tiny_bert_classifier()
    model.bert.requires_grad_(False)
    model.bert.encoder.layer[0].attention.output.dense.requires_grad_(True)
    return model


def t5_with_its_own_head() -> nn.Module:
    model = tiny_t5()
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    return model


@dataclass(frozen=True)
class Case:
    """A model, and names (endings) of parameters by the rule they must take."""

    model: Callable[[], nn.Module]
    compressed: int
    dense: dict[str, set[str]] = field(default_factory=dict)
    targets: object = None
    absent: tuple[str, ...] = ()


TOKENS, BASE = {"model.embed_tokens.weight"}, "base_model.model."
IN_EMBEDDING = {f"{BASE}model.embed_tokens.lora_embedding_{x}.default" for x in "AB"}
IN_HEAD = {f"{BASE}lm_head.lora_{x}.default.weight" for x in "AB"}
OF_TOKENS = {f"{BASE}model.embed_tokens.token_adapter.trainable_tokens_delta.default"}
SAVED_HEAD = {f"{BASE}lm_head.modules_to_save.default.weight"}
VIT = {"vit.embeddings.cls_token", "vit.embeddings.position_embeddings"}
CASES = {
    "llama": Case(tiny_llama, 14, {EMBEDDING: TOKENS, HEAD: {"lm_head.weight"}}),
    "llama tied": Case(lambda: tiny_llama(tied=True), 14, {EMBEDDING: TOKENS, HEAD: set()}),
    "llama classifier": Case(lambda: tiny_llama(classifier=True), 14, {EMBEDDING: TOKENS, HEAD: {"score.weight"}}),
    "gpt2 (Conv1D, tied)": Case(
        tiny_gpt2, 4, {EMBEDDING: {"transformer.wte.weight", "transformer.wpe.weight"}, HEAD: set()}
    ),
    "bert classifier": Case(tiny_bert_classifier, 7, {HEAD: {"classifier.weight"}, NOT_TARGET: set()}),
    "gpt2 untied": Case(lambda: tiny_gpt2(tied=False), 4, {HEAD: {"lm_head.weight"}}),
    # Its attention biases are an embedding of positions; transformers 5 always ties its head.
    "t5": Case(tiny_t5, 16, {HEAD: set(), NOT_TARGET: set()}),
    # No separate base model: the head is known from `get_output_embeddings` alone.
    "t5 untied": Case(t5_with_its_own_head, 16, {HEAD: {"lm_head.weight"}, NOT_TARGET: set()}),
    # The patch projection is a convolution; class token and positions are bare parameters.
    "vit": Case(tiny_vit, 7, {HEAD: {"classifier.weight"}, NOT_TARGET: VIT}),
    "frozen": Case(frozen_backbone, 1, {HEAD: {"classifier.weight"}, EMBEDDING: set()}, absent=("bert.pooler",)),
    "lora": Case(
        lora(["q_proj", "down_proj"]),
        8,
        {EMBEDDING: set(), HEAD: set(), VECTOR: set()},
        absent=("base_layer", "lm_head"),
    ),
    "lora below the rank": Case(lambda: with_lora(r=2), 0),
    "lora with a saved head": Case(lora(["q_proj"], modules_to_save=["lm_head"]), 4, {HEAD: SAVED_HEAD}),
    "lora on the head": Case(lora(["q_proj", "lm_head"]), 4, {HEAD: IN_HEAD}),
    # Nothing was named, so that nothing to compress is no mistake.
    "no matrix": Case(lambda: nn.Sequential(nn.Embedding(9, 8), nn.LayerNorm(8)), 0, {EMBEDDING: {"0.weight"}}),
    "only the head trains": Case(only_head, 0, {HEAD: {"lm_head.weight"}}),
    "lora on the embedding": Case(lora(["embed_tokens", "q_proj"]), 4, {EMBEDDING: IN_EMBEDDING}),
    "dora": Case(lora(["q_proj"], use_dora=True), 4, {NOT_TARGET: set()}),
    "tokens": Case(lora(["q_proj"], trainable_token_indices=[1, 2]), 4, {EMBEDDING: OF_TOKENS}),
    "ia3": Case(
        peft(IA3Config(target_modules=["k_proj", "up_proj"], feedforward_modules=["up_proj"])),
        0,
        absent=("base_layer",),
    ),
    "prompt tuning": Case(
        peft(PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)),
        0,
        {EMBEDDING: {"prompt_encoder.default.embedding.weight"}},
    ),
    "plain modules": Case(lambda: nn.Sequential(nn.Embedding(9, 8), nn.Conv2d(8, 8, 3), nn.LayerNorm(8)), 1),
    "inside a wrapper": Case(lambda: nn.ModuleDict({"net": tiny_llama()}), 14, {HEAD: {"net.lm_head.weight"}}),
    "list of names": Case(tiny_llama, 4, targets=["q_proj", "mlp.up_proj"]),
    "regex": Case(tiny_llama, 2, targets=r"model\.layers\.1\.self_attn\.(q|k)_proj"),
    "all-linear takes the head": Case(tiny_llama, 15, {HEAD: set()}, targets="all-linear"),
    "all_linear": Case(tiny_llama, 15, {HEAD: set()}, targets="all_linear"),
    "when named": Case(tiny_llama, 2, {EMBEDDING: set(), HEAD: set()}, targets=["embed_tokens", "lm_head"]),
    "tied head when named": Case(lambda: tiny_llama(tied=True), 1, {EMBEDDING: set()}, targets=["lm_head"]),
    "bare parameters of a custom module": Case(tiny_vit, 1, targets=["vit.embeddings.patch_embeddings"]),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_every_trainable_parameter_is_placed_once_by_its_role_and_decays_as_in_the_trainer(case: Case) -> None:
    model = case.model()
    placements = place_parameters(model, case.targets, above_rank)  # type: ignore[arg-type]
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert {p.name: p.parameter for p in placements} == trainable
    assert sum(p.rule == COMPRESSED for p in placements) == case.compressed
    assert all(p.rule == VECTOR for p in placements if p.parameter.ndim < 2)
    for rule, names in case.dense.items():
        assert {p.name for p in placements if p.rule == rule} == names
    assert not [p.name for p in placements if any(part in p.name for part in case.absent)]

    groups = build_param_groups(placements, ("rank", None), 0.1)
    assert all(group["params"] for group in groups)
    assert sum(len(group["params"]) for group in groups) == len(placements)
    # The Trainer's own split, over the same parameters.
    decaying = set(Trainer.get_decay_parameter_names(None, model))  # type: ignore[arg-type]
    for group in groups:
        for name, _ in group["params"]:
            assert group["weight_decay"] == (0.1 if name in decaying else 0.0)
    dense = {name for group in groups if "rank" in group for name, _ in group["params"]}
    assert all(group.get("rank", 1) in (None, 1) for group in groups)
    assert dense == {p.name for p in placements if p.rule not in (COMPRESSED, TOO_SMALL)}
