from __future__ import annotations

import copy
import logging
import pickle
from typing import Any

import pytest
import torch
from torch import nn
from transformers.utils import logging as transformers_logging

from hf_lowmem_optim import OPTIMIZERS, OptimizerFactory, measure_state, plan_optimizer
from hf_lowmem_optim.memory.byte_sizes import format_bytes
from tests.trainer.runs import make_trainer
from tests.trainer.tiny_models import tiny_llama, with_lora


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
