from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
from peft import IA3Config, LoraConfig, PromptTuningConfig, get_peft_model
from torch import nn
from transformers import Trainer

from hf_lowmem_optim.trainer.param_groups import (
    COMPRESSED,
    EMBEDDING,
    HEAD,
    NOT_TARGET,
    TOO_SMALL,
    VECTOR,
    Placement,
    build_param_groups,
    place_parameters,
)
from tests.trainer.tiny_models import tiny_bert_classifier, tiny_gpt2, tiny_llama, tiny_t5, tiny_vit

RANK = 4


def above_rank(parameter: nn.Parameter, settings: object) -> str:
    shape = parameter.shape
    return COMPRESSED if len(shape) >= 2 and min(shape[0], shape[1:].numel()) > RANK else TOO_SMALL


def place(model: nn.Module, targets: object = None) -> list[Placement]:
    return place_parameters(model, targets, above_rank)  # type: ignore[arg-type]


def lora(model: nn.Module, **settings: object) -> nn.Module:
    return get_peft_model(model, LoraConfig(**settings))


def frozen_backbone() -> nn.Module:
    model = tiny_bert_classifier()
    model.bert.requires_grad_(False)
    model.bert.encoder.layer[0].attention.output.dense.requires_grad_(True)
    return model


def t5_with_its_own_head() -> nn.Module:
    model = tiny_t5()
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    return model


def only_head() -> nn.Module:
    model = tiny_llama().requires_grad_(False)
    model.lm_head.requires_grad_(True)
    return model


@dataclass(frozen=True)
class Case:
    """A model, and names (endings) of parameters by the rule they must take."""

    model: Callable[[], nn.Module]
    compressed: int
    dense: dict[str, set[str]] = field(default_factory=dict)
    targets: object = None
    absent: tuple[str, ...] = ()


CASES = {
    "llama": Case(tiny_llama, 14, {EMBEDDING: {"model.embed_tokens.weight"}, HEAD: {"lm_head.weight"}}),
    "llama tied": Case(lambda: tiny_llama(tied=True), 14, {EMBEDDING: {"model.embed_tokens.weight"}, HEAD: set()}),
    "llama classifier": Case(
        lambda: tiny_llama(classifier=True), 14, {EMBEDDING: {"model.embed_tokens.weight"}, HEAD: {"score.weight"}}
    ),
    "gpt2 (Conv1D, tied)": Case(
        lambda: tiny_gpt2(tied=True), 4, {EMBEDDING: {"transformer.wte.weight", "transformer.wpe.weight"}, HEAD: set()}
    ),
    "bert classifier": Case(tiny_bert_classifier, 7, {HEAD: {"classifier.weight"}, NOT_TARGET: set()}),
    "gpt2 untied": Case(lambda: tiny_gpt2(tied=False), 4, {HEAD: {"lm_head.weight"}}),
    # Its attention biases are an embedding of positions; transformers 5 always ties its head.
    "t5": Case(tiny_t5, 16, {HEAD: set(), NOT_TARGET: set()}),
    # No separate base model: the head is known from `get_output_embeddings` alone.
    "t5 untied": Case(t5_with_its_own_head, 16, {HEAD: {"lm_head.weight"}, NOT_TARGET: set()}),
    # The patch projection is a convolution; class token and positions are bare parameters.
    "vit": Case(
        tiny_vit,
        7,
        {
            HEAD: {"classifier.weight"},
            NOT_TARGET: {"vit.embeddings.cls_token", "vit.embeddings.position_embeddings"},
        },
    ),
    "frozen backbone": Case(
        frozen_backbone, 1, {HEAD: {"classifier.weight"}, EMBEDDING: set()}, absent=("bert.pooler",)
    ),
    "lora": Case(
        lambda: lora(tiny_llama(), r=8, target_modules=["q_proj", "down_proj"]),
        8,
        {EMBEDDING: set(), HEAD: set(), VECTOR: set()},
        absent=("base_layer", "lm_head"),
    ),
    "lora below the rank": Case(lambda: lora(tiny_llama(), r=2, target_modules=["q_proj"]), 0),
    "lora with a saved head": Case(
        lambda: lora(tiny_llama(classifier=True), r=8, target_modules=["q_proj"], modules_to_save=["score"]),
        4,
        {HEAD: {"base_model.model.score.modules_to_save.default.weight"}},
    ),
    "lora on the head": Case(
        lambda: lora(tiny_llama(), r=8, target_modules=["q_proj", "lm_head"]),
        4,
        {HEAD: {f"base_model.model.lm_head.lora_{x}.default.weight" for x in "AB"}},
    ),
    # Nothing was named, so that nothing to compress is no mistake.
    "no matrix": Case(lambda: nn.Sequential(nn.Embedding(9, 8), nn.LayerNorm(8)), 0, {EMBEDDING: {"0.weight"}}),
    "only the head trains": Case(only_head, 0, {HEAD: {"lm_head.weight"}}),
    "lora on the embedding": Case(
        lambda: lora(tiny_llama(), r=8, target_modules=["embed_tokens", "q_proj"]),
        4,
        {EMBEDDING: {f"base_model.model.model.embed_tokens.lora_embedding_{x}.default" for x in "AB"}},
    ),
    "dora": Case(lambda: lora(tiny_llama(), r=8, target_modules=["q_proj"], use_dora=True), 4, {NOT_TARGET: set()}),
    "tokens": Case(
        lambda: lora(tiny_llama(), r=8, target_modules=["q_proj"], trainable_token_indices=[1, 2]),
        4,
        {EMBEDDING: {"base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta.default"}},
    ),
    "ia3": Case(
        lambda: get_peft_model(
            tiny_llama(), IA3Config(target_modules=["k_proj", "up_proj"], feedforward_modules=["up_proj"])
        ),
        0,
        absent=("base_layer",),
    ),
    "prompt tuning": Case(
        lambda: get_peft_model(tiny_llama(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)),
        0,
        {EMBEDDING: {"prompt_encoder.default.embedding.weight"}},
    ),
    "plain modules": Case(lambda: nn.Sequential(nn.Embedding(9, 8), nn.Conv2d(8, 8, 3), nn.LayerNorm(8)), 1),
    "inside a wrapper": Case(lambda: nn.ModuleDict({"net": tiny_llama()}), 14, {HEAD: {"net.lm_head.weight"}}),
    "list of names": Case(tiny_llama, 4, {NOT_TARGET: None}, targets=["q_proj", "mlp.up_proj"]),  # type: ignore[dict-item]
    "regex": Case(tiny_llama, 2, targets=r"model\.layers\.1\.self_attn\.(q|k)_proj"),
    "all-linear takes the head": Case(tiny_llama, 15, {HEAD: set()}, targets="all-linear"),
    "all_linear": Case(tiny_llama, 15, {HEAD: set()}, targets="all_linear"),
    "embeddings and head when named": Case(
        tiny_llama, 2, {EMBEDDING: set(), HEAD: set()}, targets=["embed_tokens", "lm_head"]
    ),
    "tied head when named": Case(lambda: tiny_llama(tied=True), 1, {EMBEDDING: set()}, targets=["lm_head"]),
    "bare parameters of a custom module": Case(tiny_vit, 1, targets=["vit.embeddings.patch_embeddings"]),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_every_trainable_parameter_is_placed_once_by_its_role(case: Case) -> None:
    model = case.model()
    placements = place(model, case.targets)
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert {p.name: p.parameter for p in placements} == trainable
    assert sum(p.rule == COMPRESSED for p in placements) == case.compressed
    assert all(p.rule == VECTOR for p in placements if p.parameter.ndim < 2)
    for rule, names in case.dense.items():
        if names is not None:
            assert {p.name for p in placements if p.rule == rule} == names
    assert not [p.name for p in placements if any(part in p.name for part in case.absent)]


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_groups_decay_what_the_trainer_decays_and_none_is_empty(case: Case) -> None:
    model = case.model()
    placements = place(model, case.targets)
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


@dataclass(frozen=True)
class Bad:
    model: Callable[[], nn.Module]
    targets: object
    error: type[Exception]
    message: str


BAD = {
    "nothing trainable": Bad(lambda: tiny_llama().requires_grad_(False), None, ValueError, "no trainable parameter"),
    "no matrix of that name": Bad(only_head, ["q_proj"], ValueError, "none of them holds a trainable parameter"),
    "unknown name": Bad(tiny_llama, ["q_prj"], ValueError, r"optim_target_modules=\['q_prj'\].*did you mean 'q_proj'"),
    "one entry of two": Bad(tiny_llama, ["q_proj", "nope"], ValueError, "'nope' matches no module"),
    "regex": Bad(tiny_llama, "self_attn", ValueError, "must match the whole name"),
    "container": Bad(tiny_llama, r"model\.layers\.\d\.mlp", ValueError, "matches 2 modules.*none of them holds"),
    "frozen": Bad(frozen_backbone, ["query"], ValueError, "none of them holds a trainable parameter"),
    "bad regex": Bad(tiny_llama, "*proj", ValueError, "not a valid regex"),
    "empty list": Bad(tiny_llama, [], ValueError, "is empty"),
    "empty entry": Bad(tiny_llama, [""], ValueError, "is empty or has an empty entry"),
    "number": Bad(tiny_llama, 3, TypeError, "must be a list of module names"),
    "list of numbers": Bad(tiny_llama, [3], TypeError, "must be a list of module names"),
}


@pytest.mark.parametrize("bad", BAD.values(), ids=BAD.keys())
def test_what_cannot_be_placed_is_refused_with_a_reason(bad: Bad) -> None:
    with pytest.raises(bad.error, match=bad.message):
        place(bad.model(), bad.targets)
