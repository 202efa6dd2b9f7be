"""The factory: what it makes of models, targets, settings of single modules and LoRA+, and what it says and refuses."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, PromptTuningConfig, get_peft_model
from peft.optimizers import create_loraplus_optimizer
from torch import nn
from transformers import Trainer, TrainingArguments
from transformers.utils import logging as transformers_logging

from hf_lowmem_optim import OPTIMIZERS, LDAdam, OptimizerFactory, build_report, measure_state, plan_optimizer
from hf_lowmem_optim.engine.optimizer import LowMemoryOptimizer
from hf_lowmem_optim.memory.byte_sizes import format_bytes
from hf_lowmem_optim.trainer import param_groups
from hf_lowmem_optim.trainer.optim_args import parse_optim_args
from hf_lowmem_optim.trainer.param_groups import COMPRESSED, EMBEDDING, HEAD, NOT_TARGET, TOO_SMALL, VECTOR
from tests.trainer import tiny_models as tiny
from tests.trainer.runs import ARGUMENTS, KINDS, NORMAL, assert_equal_to_the_bit, make_trainer, moved, values
from tests.trainer.tiny_models import only_head, tiny_llama, token_rows, with_lora


def ia3() -> nn.Module:
    config = IA3Config(target_modules=["k_proj", "up_proj"], feedforward_modules=["up_proj"])
    return get_peft_model(tiny_llama(), config)


@pytest.mark.parametrize("name", KINDS)
def test_factory_serves_a_plain_loop_and_the_trainer_again_and_again(name: str, tmp_path: Any) -> None:
    factory = OptimizerFactory(name, lr=1e-3, weight_decay=0.1)
    model = tiny_llama()
    first, second = factory(model), factory(model)
    assert first is not second
    assert type(first) is OPTIMIZERS[name].optimizer_class
    assert [g["param_names"] for g in first.param_groups] == [g["param_names"] for g in second.param_groups]

    chosen = (factory, {"lr": 5e-4})
    for _ in range(2):
        trainer = make_trainer(tmp_path, model, given={"optimizer_cls_and_kwargs": chosen})
        trainer.train()
        # Warm-up and decay start from the factory's rate, not from TrainingArguments.learning_rate.
        assert {group["initial_lr"] for group in trainer.optimizer.param_groups} == {5e-4}
    assert chosen == (factory, {"lr": 5e-4})


def test_training_arguments_that_do_not_reach_the_optimizer_are_named(tmp_path: Path, caplog: Any) -> None:
    def said(factory: OptimizerFactory, **settings: Any) -> list[str]:
        caplog.clear()
        make_trainer(tmp_path, given={"optimizer_cls_and_kwargs": (factory, {})}, max_steps=1, **settings).train()
        return [r.getMessage() for r in caplog.records if "has no effect" in r.getMessage()]

    own, both = OptimizerFactory("ldadam", lr=1e-3), {"learning_rate": 7e-3, "weight_decay": 0.1}
    no_effect = "has no effect: this LDAdam was made without it, with"
    assert said(own, **both) == [
        f"TrainingArguments(learning_rate=0.007) {no_effect} lr=0.001",
        f"TrainingArguments(weight_decay=0.1) {no_effect} weight_decay=0",
    ]
    assert not said(own) and not said(OptimizerFactory("ldadam", lr=7e-3, weight_decay=0.1), **both)
    assert not said(OptimizerFactory("ldadam", overrides={"mlp": {"lr": 7e-3}}), learning_rate=7e-3, warmup_steps=1)
    trainer = make_trainer(tmp_path, optim="ldadam", optim_args="dense_lr_ratio=4", max_steps=1, **both)
    trainer.train()
    assert "has no effect" not in caplog.text


def test_overrides_serve_one_optimizer_only() -> None:
    factory = OptimizerFactory("ldadam", rank=8)
    model = tiny_llama()
    assert {g["rank"] for g in factory(model, rank=4).param_groups} == {4, None}
    assert {g["rank"] for g in factory(model).param_groups} == {8, None}
    with pytest.raises(TypeError, match="rnak"):
        factory(model, rnak=4)
    with pytest.raises(TypeError, match="without a model"):
        factory(rank=4)
    with pytest.raises(TypeError, match=r"needs the model, not list.*LDAdam\(groups"):
        factory(list(tiny_llama().parameters()))  # type: ignore[call-overload]


def test_factory_copies_pickles_and_prints() -> None:
    factory = OptimizerFactory("ldadam", target_modules=["mlp"], rank=4)
    assert repr(factory) == "OptimizerFactory('ldadam', target_modules=['mlp'], rank=4)"
    for twin in (copy.deepcopy(factory), pickle.loads(pickle.dumps(factory))):
        assert repr(twin) == repr(factory)
        assert len(twin(tiny_llama()).param_groups) == len(factory(tiny_llama()).param_groups)


def test_summary_says_what_went_where_once_unless_told_to_be_silent(caplog: pytest.LogCaptureFixture) -> None:
    plan = plan_optimizer(OptimizerFactory("ldadam", rank=8)(tiny_llama()))
    assert len(caplog.records) == 1
    assert f"LDAdam for {sum(p.numel() for p in tiny_llama().parameters()):,} trainable parameters" in caplog.text
    for part in ("compressed (rank=8, ", "dense: embedding", "dense: output head", "dense: norm, bias or other vector"):
        assert part in caplog.text
    assert f"state: {format_bytes(plan.total_bytes)} (" in caplog.text and " 1 tensor  " in caplog.text
    assert "learning rate: 0.001; start with 2.5 × AdamW's to fine-tune, 8 × from scratch" in caplog.text
    caplog.clear()
    OptimizerFactory("trion", rank=8)(nn.TransformerEncoderLayer(32, 2, 64))
    assert "dense: not a target module (in_proj_weight)" in caplog.text and "start with" not in caplog.text
    assert "learning rate: 0.02, 0.0003 for what is dense; the default of Trion is 0.02" in caplog.text
    caplog.clear()
    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        OptimizerFactory("ldadam", rank=8)(tiny_llama())
    finally:
        transformers_logging.set_verbosity(before)
    assert not caplog.records


def test_float16_moments_of_the_dense_rule_are_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    warning = "float16 weights keep AdamW's moments in float16 (dense_state=param)"
    OptimizerFactory("ldadam", rank=8)(tiny_llama().half())
    assert warning in caplog.text
    caplog.clear()
    OptimizerFactory("ldadam", rank=8, dense_state="fp32")(tiny_llama().half())
    OptimizerFactory("ldadam", rank=8)(tiny_llama().bfloat16())
    assert warning not in caplog.text


NOTHING, MORE = "compresses nothing here", "This is more than AdamW takes; a smaller rank or window saves memory."
FEWER = "This is more than AdamW takes; storage in fewer bits saves memory."
NO_LAYER = f"{NOTHING}: besides embeddings and the output head no linear"


@pytest.mark.parametrize(
    ("name", "hyper", "model", "said"),
    [
        *((name, {}, ia3, NO_LAYER) for name in OPTIMIZERS),
        ("ldadam", {"rank": 16}, lambda: with_lora(r=4), f"{NOTHING}: every target is too small for rank=16"),
        # on request it is no warning
        ("ldadam", {"rank": None}, tiny_llama, "dense: rank=None"),
        ("lowrank_mfac", {"window": 32, "rank": 1}, with_lora, MORE),
        ("lowrank_mfac", {"window": 1, "rank": 1}, with_lora, "  compressed ("),
        ("dash", {"statistics_dtype": "fp32"}, tiny_llama, FEWER),
    ],
)
def test_what_saves_no_memory_is_said(name: str, hyper: dict[str, Any], model: Any, said: str, caplog: Any) -> None:
    optimizer = OptimizerFactory(name, **hyper)(model())
    plan = plan_optimizer(optimizer)
    assert said in caplog.text
    assert (f"{type(optimizer).__name__} {NOTHING}" in caplog.text) == (NOTHING in said)
    assert ("all 4 tensors take the dense AdamW rule" in caplog.text) == (model is ia3)
    dense = plan.component_bytes.keys() == {"dense"}
    assert ("start with AdamW's, since nothing is compressed" in caplog.text) == (
        dense and not name.startswith("trion")
    )
    assert dense == (NOTHING in said or hyper == {"rank": None})
    assert (
        ("more than AdamW takes" in caplog.text)
        == (said in (MORE, FEWER))
        == (plan.total_bytes > plan.adamw_fp32_bytes)
    )


@pytest.mark.parametrize(
    ("name", "hyper", "dense"),
    [
        ("ldadam", {"rank": 6, "error_feedback": "4bit"}, set()),
        # basis, moments and error of an 8 × 64 adapter: (6·(8 + 2·64) + 8·64)·4 bytes, where two moments take 2·8·64·4
        ("ldadam", {"rank": 6, "error_feedback": "fp32"}, {"lora_A"}),
        ("microadam", {"density": 0.25, "min_compress_size": 1, "value_dtype": "bf16"}, {"lora_A", "body"}),
        ("microadam", {"density": 0.05, "min_compress_size": 1}, set()),
        # the method is the reason to take it, not the memory
        ("sparse_mfac", {"window": 256, "density": 0.1}, set()),
    ],
)
def test_what_would_be_no_smaller_stays_dense(name: str, hyper: dict[str, Any], dense: set[str], caplog: Any) -> None:
    model = nn.ModuleDict(
        {"body": nn.Linear(256, 256, bias=False), "lora_A": nn.Linear(64, 8, bias=False), "norm": nn.LayerNorm(8)}
    )
    optimizer, placements = OptimizerFactory(name, **hyper).build(model)
    larger = {p.name.removesuffix(".weight") for p in placements if p.rule == "compressed state would be larger"}
    assert larger == dense
    model["lora_A"](torch.ones(1, 64)).sum().backward()
    model["body"](torch.ones(1, 256)).sum().backward()
    optimizer.step()
    for key in ("body", "lora_A"):
        tensors = {k: v for k, v in optimizer.state[model[key].weight].items() if isinstance(v, torch.Tensor)}
        assert (tensors.keys() == {"exp_avg", "exp_avg_sq"}) == (key in dense)
        assert name == "sparse_mfac" or sum(v.nbytes for v in tensors.values()) <= 8 * model[key].weight.numel()
    caplog.clear()
    OptimizerFactory(name, **hyper)(model)
    assert ("compressed state would be larger" in caplog.text) == bool(dense)


@pytest.mark.parametrize(
    ("rounding", "said"),
    [("stochastic", "are rounded stochastically"), ("compensated", "have a correction of 8 bits")],
)
def test_dense_state_reaches_every_group_and_the_summary(
    rounding: str, said: str, tmp_path: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """Through ``optim_args``, in a model whose embedding is large enough to be quantized."""
    pytest.importorskip("bitsandbytes")
    model = tiny_llama()
    model.resize_token_embeddings(256)
    text = f"rank=8,dense_state=8bit,weight_rounding={rounding}"
    trainer = make_trainer(tmp_path, model.to(torch.bfloat16), optim="ldadam", optim_args=text)
    trainer.train()
    settings = {(g["dense_state"], g["weight_rounding"]) for g in trainer.optimizer.param_groups}
    assert settings == {("8bit", rounding)}
    report = measure_state(trainer.optimizer)
    assert report == plan_optimizer(trainer.optimizer) and report.component_bytes["dense statistics"] > 0
    assert "dense, 8 bit: embedding" in caplog.text and said in caplog.text


RANK = 4


def above_rank(parameter: nn.Parameter, settings: object) -> str:
    shape = parameter.shape
    return COMPRESSED if len(shape) >= 2 and min(shape[0], shape[1:].numel()) > RANK else TOO_SMALL


def lora(targets: list[str], **settings: Any) -> Callable[[], nn.Module]:
    """Makes a tiny Llama with adapters that are large enough to be compressed."""
    return lambda: with_lora(tiny_llama(), r=8, target_modules=targets, **settings)


def prompt_tuning() -> nn.Module:
    return get_peft_model(tiny_llama(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))


def frozen_backbone() -> nn.Module:
    model = tiny.tiny_bert_classifier()
    model.bert.requires_grad_(False)
    model.bert.encoder.layer[0].attention.output.dense.requires_grad_(True)
    return model


def t5_with_its_own_head() -> nn.Module:
    model = tiny.tiny_t5()
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    return model


@dataclass(frozen=True)
class Placed:
    """A model, and names (endings) of parameters by the rule they must take."""

    model: Callable[[], nn.Module]
    compressed: int
    dense: dict[str, set[str]] = field(default_factory=dict)
    targets: object = None


TOKENS, BASE = {"model.embed_tokens.weight"}, "base_model.model."
IN_EMBEDDING = {f"{BASE}model.embed_tokens.lora_embedding_{x}.default" for x in "AB"}
IN_HEAD = {f"{BASE}lm_head.lora_{x}.default.weight" for x in "AB"}
OF_TOKENS = {f"{BASE}model.embed_tokens.token_adapter.trainable_tokens_delta.default"}
SAVED_HEAD = {f"{BASE}lm_head.modules_to_save.default.weight"}
VIT = {"vit.embeddings.cls_token", "vit.embeddings.position_embeddings"}
PLACED = {
    "llama": Placed(tiny_llama, 14, {EMBEDDING: TOKENS, HEAD: {"lm_head.weight"}}),
    "llama tied": Placed(lambda: tiny_llama(tied=True), 14, {EMBEDDING: TOKENS, HEAD: set()}),
    "llama classifier": Placed(lambda: tiny_llama(classifier=True), 14, {EMBEDDING: TOKENS, HEAD: {"score.weight"}}),
    "gpt2 (Conv1D, tied)": Placed(
        tiny.tiny_gpt2, 4, {EMBEDDING: {"transformer.wte.weight", "transformer.wpe.weight"}, HEAD: set()}
    ),
    "bert classifier": Placed(tiny.tiny_bert_classifier, 7, {HEAD: {"classifier.weight"}, NOT_TARGET: set()}),
    "gpt2 untied": Placed(lambda: tiny.tiny_gpt2(tied=False), 4, {HEAD: {"lm_head.weight"}}),
    # Its attention biases are an embedding of positions; transformers 5 always ties its head.
    "t5": Placed(tiny.tiny_t5, 16, {HEAD: set(), NOT_TARGET: set()}),
    # No separate base model: the head is known from `get_output_embeddings` alone.
    "t5 untied": Placed(t5_with_its_own_head, 16, {HEAD: {"lm_head.weight"}, NOT_TARGET: set()}),
    # The patch projection is a convolution; class token and positions are bare parameters.
    "vit": Placed(tiny.tiny_vit, 7, {HEAD: {"classifier.weight"}, NOT_TARGET: VIT}),
    "frozen": Placed(frozen_backbone, 1, {HEAD: {"classifier.weight"}, EMBEDDING: set()}),
    "lora": Placed(lora(["q_proj", "down_proj"]), 8, {EMBEDDING: set(), HEAD: set(), VECTOR: set()}),
    "lora below the rank": Placed(lambda: with_lora(r=2), 0),
    "lora with a saved head": Placed(lora(["q_proj"], modules_to_save=["lm_head"]), 4, {HEAD: SAVED_HEAD}),
    "lora on the head": Placed(lora(["q_proj", "lm_head"]), 4, {HEAD: IN_HEAD}),
    # Nothing was named, so that nothing to compress is no mistake.
    "no matrix": Placed(lambda: nn.Sequential(nn.Embedding(9, 8), nn.LayerNorm(8)), 0, {EMBEDDING: {"0.weight"}}),
    "only the head trains": Placed(only_head, 0, {HEAD: {"lm_head.weight"}}),
    "lora on the embedding": Placed(lora(["embed_tokens", "q_proj"]), 4, {EMBEDDING: IN_EMBEDDING}),
    "dora": Placed(lora(["q_proj"], use_dora=True), 4, {NOT_TARGET: set()}),
    "tokens": Placed(lora(["q_proj"], trainable_token_indices=[1, 2]), 4, {EMBEDDING: OF_TOKENS}),
    "ia3": Placed(ia3, 0),
    "prompt tuning": Placed(prompt_tuning, 0, {EMBEDDING: {"prompt_encoder.default.embedding.weight"}}),
    "plain modules": Placed(lambda: nn.Sequential(nn.Embedding(9, 8), nn.Conv2d(8, 8, 3), nn.LayerNorm(8)), 1),
    "inside a wrapper": Placed(lambda: nn.ModuleDict({"net": tiny_llama()}), 14, {HEAD: {"net.lm_head.weight"}}),
    "list of names": Placed(tiny_llama, 4, targets=["q_proj", "mlp.up_proj"]),
    "regex": Placed(tiny_llama, 2, targets=r"model\.layers\.1\.self_attn\.(q|k)_proj"),
    "all-linear takes the head": Placed(tiny_llama, 15, {HEAD: set()}, targets="all-linear"),
    "all_linear": Placed(tiny_llama, 15, {HEAD: set()}, targets="all_linear"),
    "when named": Placed(tiny_llama, 2, {EMBEDDING: set(), HEAD: set()}, targets=["embed_tokens", "lm_head"]),
    "tied head when named": Placed(lambda: tiny_llama(tied=True), 1, {EMBEDDING: set()}, targets=["lm_head"]),
    "bare parameters of a custom module": Placed(tiny.tiny_vit, 1, targets=["vit.embeddings.patch_embeddings"]),
}


@pytest.mark.parametrize("case", PLACED.values(), ids=PLACED.keys())
def test_every_trainable_parameter_is_placed_once_by_its_role_and_decays_as_in_the_trainer(case: Placed) -> None:
    model = case.model()
    placements = param_groups.place_parameters(model, case.targets, above_rank)  # type: ignore[arg-type]
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert {p.name: p.parameter for p in placements} == trainable
    assert sum(p.rule == COMPRESSED for p in placements) == case.compressed
    assert all(p.rule == VECTOR for p in placements if p.parameter.ndim < 2)
    for rule, names in case.dense.items():
        assert {p.name for p in placements if p.rule == rule} == names

    groups = param_groups.build_param_groups(placements, ("rank", None), 0.1)
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


def settings(optimizer: LowMemoryOptimizer, key: str) -> dict[str, Any]:
    """The value of a hyper-parameter by name of the parameter."""
    return {name: group[key] for group in optimizer.param_groups for name in group["param_names"]}


def test_the_first_override_that_matches_holds_and_the_rest_is_as_before(caplog: pytest.LogCaptureFixture) -> None:
    overrides = {
        "mlp.up_proj": {"rank": None},
        "mlp": {"rank": 12, "lr": 2e-3},
        r"model\.layers\.1\.self_attn\.(q|k)_proj": {"error_feedback": "none"},
        # also beside norms in float32, which are not rounded
        "norm": {"lr": 3e-3, "weight_decay": 0.0, "weight_rounding": "stochastic"},
        "lm_head": {"rank": 6, "weight_decay": 0.5, "weight_rounding": "stochastic"},
    }
    factory = OptimizerFactory("ldadam", lr=1e-3, rank=8, weight_decay=0.1, overrides=overrides)
    model = tiny_llama()
    model.lm_head.bfloat16()
    model.model.norm.bfloat16()
    optimizer = factory(model)
    names = [name for name, _ in model.named_parameters()]
    ranks, rates, decays, errors = (settings(optimizer, k) for k in ("rank", "lr", "weight_decay", "error_feedback"))
    rounding = settings(optimizer, "weight_rounding")
    for name in names:
        norm, mlp, head = "norm" in name, "mlp" in name, "lm_head" in name
        dense = norm or "up_proj" in name or "embed" in name
        assert ranks[name] == (None if dense else 12 if mlp else 6 if head else 8)
        assert rates[name] == (3e-3 if norm else 2e-3 if mlp and not dense else 1e-3)
        assert decays[name] == (0.0 if norm else 0.5 if head else 0.1)
        assert rounding[name] == ("stochastic" if norm or head else "nearest")
        assert errors[name] == ("none" if "layers.1.self_attn.q" in name or "layers.1.self_attn.k" in name else "4bit")
    assert ranks.keys() == set(names)
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(names)
    for label in (
        "compressed (rank=8, state_dtype=fp32, error_feedback=4bit)   ",
        "compressed (rank=8, state_dtype=fp32, error_feedback=none)   ",
        "compressed (rank=12, state_dtype=fp32, error_feedback=4bit), lr=0.002  ",
        "compressed (rank=6, state_dtype=fp32, error_feedback=4bit), weight_decay=0.5",
        "dense: rank=None ",
        "dense: norm, bias or other vector, lr=0.003",
        "dense: embedding ",
    ):
        assert label in caplog.text


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_takes_targets_and_overrides_and_keeps_its_plan(name: str) -> None:
    """Of embedding and head too, which are compressed where they are named."""
    key, off = OPTIMIZERS[name].optimizer_class.method.switch
    model = tiny_llama()
    small = {"min_compress_size": 64} if name.startswith("microadam") else {"rank": 4} if key == "rank" else {}
    overrides = {"k_proj": {key: off}, "q_proj": {"lr": 5e-4}}
    targets = ["embed_tokens", "lm_head", "self_attn"]
    optimizer = OptimizerFactory(name, targets, lr=1e-3, overrides=overrides, **small)(model)
    before = values(model)
    torch.manual_seed(0)
    model(input_ids=torch.randint(1, 40, (2, 8)), labels=torch.randint(1, 40, (2, 8))).loss.backward()
    optimizer.step()
    assert {n for n in before if "k_proj" in n or "q_proj" in n} <= moved(model, before)
    state = {n: optimizer.state[p] for n, p in model.named_parameters()}
    dense = {n for n, s in state.items() if s.keys() == {"step", "exp_avg", "exp_avg_sq"}}
    assert dense == {n for n in state if "k_proj" in n or not any(target in n for target in targets)}
    assert measure_state(optimizer) == plan_optimizer(optimizer)


def test_lora_plus_is_the_optimizer_with_two_rates(tmp_path: Path) -> None:
    """Through `optim_args`, under a schedule, against groups made by hand."""
    finals = []
    for by_hand in (False, True):
        model = with_lora()
        halves = [[p for n, p in model.named_parameters() if f"lora_{x}" in n] for x in "AB"]
        groups = [{"params": halves[0]}, {"params": halves[1], "lr": 16e-3}]
        given = {"optimizers": (LDAdam(groups, lr=1e-3, rank=4) if by_hand else None, None)}
        settings = {"learning_rate": 1e-3, "lr_scheduler_type": "linear", "max_steps": 6, "max_grad_norm": 1.0}
        text = "rank=4,lr_ratio=16"
        trainer = make_trainer(tmp_path, model, given=given, optim="ldadam", optim_args=text, **settings)
        trainer.train()
        assert trainer.state.global_step == 6
        finals.append(values(model))
    assert_equal_to_the_bit(*finals)
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    assert moved(model, values(with_lora())) == trainable


@pytest.mark.parametrize("dense_ratio", [None, 4])
def test_lora_plus_is_for_b_alone_on_top_of_overrides_and_the_dense_rate(dense_ratio: int | None) -> None:
    model = with_lora(target_modules=["q_proj", "embed_tokens"], modules_to_save=["lm_head"])
    ratios = {"lr_ratio": 8, "dense_lr_ratio": dense_ratio}
    factory = OptimizerFactory("ldadam", lr=1e-3, rank=4, overrides={"layers.1": {"lr": 1e-4}}, **ratios)
    rates = settings(factory(model), "lr")
    assert len(rates) == 4 + 2 + 1
    for name, rate in rates.items():
        base = 1e-4 if "layers.1" in name else 1e-3 if "q_proj" in name else 1e-3 * (dense_ratio or 1)
        # an embedding's B starts at random, not at zero
        assert rate == pytest.approx(8 * base if "lora_B" in name else base), name
    assert repr(factory).startswith("OptimizerFactory('ldadam', overrides={'layers.1': {'lr': 0.0001}}, lr_ratio=8, ")
    again = settings(factory.build(model, lr=2e-3)[0], "lr")
    assert again["base_model.model.lm_head.modules_to_save.default.weight"] == 2e-3 * (dense_ratio or 1)


def test_the_dense_rule_may_have_a_rate_of_its_own(tmp_path: Path) -> None:
    """Through `optim_args` too; a rate that an override sets stays."""
    factory = OptimizerFactory("ldadam", lr=1e-3, rank=4, dense_lr_ratio=4, overrides={"lm_head": {"lr": 1e-5}})
    rates = settings(factory(tiny_llama()), "lr")
    for name, rate in rates.items():
        expected = 1e-5 if "lm_head" in name else 1e-3 if "_proj" in name else 4e-3
        assert rate == pytest.approx(expected), name
    assert all(p.rule == COMPRESSED for p in factory.build(tiny_llama())[1] if "_proj" in p.name)
    args = TrainingArguments(str(tmp_path), optim="ldadam", optim_args="rank=4,dense_lr_ratio=4", learning_rate=1e-3)
    from_args = settings(OptimizerFactory.from_training_args(args)(tiny_llama()), "lr")
    assert from_args == {**rates, "lm_head.weight": 4e-3}
    # as a person writes it, where 0.1·0.1 is not quite 0.01
    report = build_report(OptimizerFactory("ldadam", lr=0.1, rank=4, dense_lr_ratio=0.1)(tiny_llama()), [])
    assert [group["description"].partition("lr=")[2] for group in report["groups"]] == ["", "0.01", "0.01"]


@pytest.mark.parametrize("name", NORMAL)
def test_pefts_own_helper_takes_our_classes(name: str) -> None:
    model, optimizer_class = with_lora(), OPTIMIZERS[name].optimizer_class
    own = parse_optim_args(ARGUMENTS[name], optimizer_class)
    optimizer = create_loraplus_optimizer(model, optimizer_class, lr=1e-3, loraplus_lr_ratio=16, **own)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    trainable = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert rates == {id(p): 16e-3 if "lora_B" in n else 1e-3 for n, p in trainable.items()}
    batch, before, losses = torch.stack([row["input_ids"] for row in token_rows(2)]), values(model), []
    for _ in range(6):
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert moved(model, before) == set(trainable)
    assert any(optimizer.method.compresses(p.shape, optimizer.param_groups[0]) for p in trainable.values())
    assert measure_state(optimizer) == plan_optimizer(optimizer)


def bf16_but_norms() -> nn.Module:
    model = tiny_llama().bfloat16()
    for name, module in model.named_modules():
        if "norm" in name:
            module.float()
    return model


def refused(message: str, name: str = "ldadam", model: Any = tiny_llama, error: Any = ValueError, **given: Any) -> Any:
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
    refused("it matches are float32", model=bf16_but_norms, overrides={"norm": {"weight_rounding": "compensated"}}),
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
def test_what_cannot_be_meant_is_refused(message: str, name: str, model: Any, error: Any, given: Any) -> None:
    built = model()
    with pytest.raises(error, match=message):
        OptimizerFactory(name, **given).build(built)
