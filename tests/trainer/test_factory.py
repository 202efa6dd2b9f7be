from __future__ import annotations

import copy
import logging
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers.utils import logging as transformers_logging

from hf_lowmem_optim import OPTIMIZERS, OptimizerFactory, measure_state, plan_optimizer
from hf_lowmem_optim.memory.byte_sizes import format_bytes
from tests.trainer.runs import make_trainer
from tests.trainer.tiny_models import only_head, tiny_llama, with_lora


@pytest.mark.parametrize("name", OPTIMIZERS)
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


def test_summary_says_what_went_where_once_unless_transformers_is_told_to_be_silent(
    caplog: pytest.LogCaptureFixture,
) -> None:
    optimizer = OptimizerFactory("ldadam", rank=8)(tiny_llama())
    assert len(caplog.records) == 1
    for part in (
        f"LDAdam for {sum(p.numel() for p in tiny_llama().parameters()):,} trainable parameters",
        "compressed (rank=8, ",
        "dense: embedding",
        "dense: output head",
        "dense: norm, bias or other vector",
        f"state: {format_bytes(plan_optimizer(optimizer).total_bytes)} (",
    ):
        assert part in caplog.text
    caplog.clear()
    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        OptimizerFactory("ldadam", rank=8)(tiny_llama())
    finally:
        transformers_logging.set_verbosity(before)
    assert not caplog.records


def test_adapters_below_the_rank_train_densely_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    model = with_lora(r=4)
    with caplog.at_level(logging.WARNING):
        optimizer = OptimizerFactory("ldadam", rank=16)(model)
    assert "compresses nothing here: every target is too small for rank=16" in caplog.text
    assert plan_optimizer(optimizer).component_bytes.keys() == {"dense"}
    caplog.clear()
    OptimizerFactory("ldadam", rank=None)(tiny_llama())  # on request it is no warning
    assert "compresses nothing" not in caplog.text and "dense: rank=None" in caplog.text


@pytest.mark.parametrize(
    ("name", "hyper", "dense"),
    [
        ("ldadam", {"rank": 6, "error_feedback": "4bit"}, set()),
        # basis, moments and error of an 8 × 64 adapter: (6·(8 + 2·64) + 8·64)·4 bytes, where two moments take 2·8·64·4
        ("ldadam", {"rank": 6, "error_feedback": "fp32"}, {"lora_A"}),
        ("microadam", {"density": 0.25, "min_compress_size": 1}, {"lora_A", "body"}),
        ("microadam", {"density": 0.05, "min_compress_size": 1}, set()),
        # the method is the reason to take it, not the memory
        ("sparse_mfac", {"window": 256, "density": 0.1}, set()),
    ],
)
def test_what_compression_would_not_make_smaller_stays_dense(
    name: str, hyper: dict[str, Any], dense: set[str], caplog: pytest.LogCaptureFixture
) -> None:
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


def test_dense_state_reaches_every_group_and_the_summary(tmp_path: Any, caplog: pytest.LogCaptureFixture) -> None:
    """Through ``optim_args``, in a model whose embedding is large enough to be quantized."""
    pytest.importorskip("bitsandbytes")
    model = tiny_llama()
    model.resize_token_embeddings(256)
    text = "rank=8,dense_state=8bit,weight_rounding=stochastic"
    trainer = make_trainer(tmp_path, model.to(torch.bfloat16), optim="ldadam", optim_args=text)
    trainer.train()
    settings = {(g["dense_state"], g["weight_rounding"]) for g in trainer.optimizer.param_groups}
    assert settings == {("8bit", "stochastic")}
    report = measure_state(trainer.optimizer)
    assert report == plan_optimizer(trainer.optimizer) and report.component_bytes["dense statistics"] > 0
    assert "dense, 8 bit: embedding" in caplog.text and "rounded stochastically" in caplog.text


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
