"""Settings of single modules, and LoRA+: which group everything is in, and that it trains and resumes like that."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.optimizers import create_loraplus_optimizer
from transformers import TrainingArguments

from hf_lowmem_optim import (
    OPTIMIZERS,
    LDAdam,
    OptimizerFactory,
    OptimizerStateMemoryCallback,
    measure_state,
    plan_optimizer,
)
from hf_lowmem_optim.engine.optimizer import LowMemoryOptimizer
from hf_lowmem_optim.memory.report import load_report
from hf_lowmem_optim.trainer.param_groups import COMPRESSED
from tests.trainer.runs import NORMAL, assert_equal_to_the_bit, make_trainer, moved, values
from tests.trainer.tiny_models import tiny_llama, token_rows, with_lora


def settings(optimizer: LowMemoryOptimizer, key: str) -> dict[str, Any]:
    """The value of a hyper-parameter by name of the parameter."""
    return {name: group[key] for group in optimizer.param_groups for name in group["param_names"]}


def test_the_first_entry_that_matches_holds_and_the_rest_is_as_before(caplog: pytest.LogCaptureFixture) -> None:
    overrides = {
        "mlp.up_proj": {"rank": None},
        "mlp": {"rank": 12, "lr": 2e-3},
        r"model\.layers\.1\.self_attn\.(q|k)_proj": {"error_feedback": "none"},
        "norm": {"lr": 3e-3, "weight_decay": 0.0},
        "lm_head": {"rank": 6, "weight_decay": 0.5},
    }
    factory = OptimizerFactory("ldadam", lr=1e-3, rank=8, weight_decay=0.1, overrides=overrides)
    model = tiny_llama()
    with caplog.at_level(logging.WARNING):
        optimizer = factory(model)
    names = [name for name, _ in model.named_parameters()]
    ranks, rates, decays, errors = (settings(optimizer, k) for k in ("rank", "lr", "weight_decay", "error_feedback"))
    for name in names:
        norm, mlp, head = "norm" in name, "mlp" in name, "lm_head" in name
        dense = norm or "up_proj" in name or "embed" in name
        assert ranks[name] == (None if dense else 12 if mlp else 6 if head else 8)
        assert rates[name] == (3e-3 if norm else 2e-3 if mlp and not dense else 1e-3)
        assert decays[name] == (0.0 if norm else 0.5 if head else 0.1)
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


def test_lora_plus_is_for_b_alone_on_top_of_overrides() -> None:
    model = with_lora(target_modules=["q_proj", "embed_tokens"], modules_to_save=["lm_head"])
    factory = OptimizerFactory("ldadam", lr=1e-3, rank=4, lr_ratio=8, overrides={"layers.1": {"lr": 1e-4}})
    rates = settings(factory(model), "lr")
    assert len(rates) == 4 + 2 + 1
    for name, rate in rates.items():
        base = 1e-4 if "layers.1" in name else 1e-3
        # an embedding's B starts at random, not at zero
        assert rate == pytest.approx(8 * base if "lora_B" in name else base), name
    assert repr(factory).startswith("OptimizerFactory('ldadam', overrides={'layers.1': {'lr': 0.0001}}, lr_ratio=8, ")
    again = settings(factory.build(model, lr=2e-3)[0], "lr")
    assert again["base_model.model.lm_head.modules_to_save.default.weight"] == 2e-3


def test_the_dense_rule_may_have_a_rate_of_its_own(tmp_path: Path) -> None:
    """Through `optim_args` too; a rate that an override sets stays, and LoRA+'s multiplies."""
    factory = OptimizerFactory("ldadam", lr=1e-3, rank=4, dense_lr_ratio=4, overrides={"lm_head": {"lr": 1e-5}})
    optimizer = factory(tiny_llama())
    for name, rate in settings(optimizer, "lr").items():
        expected = 1e-5 if "lm_head" in name else 1e-3 if "_proj" in name else 4e-3
        assert rate == pytest.approx(expected), name
    assert all(p.rule == COMPRESSED for p in factory.build(tiny_llama())[1] if "_proj" in p.name)
    args = TrainingArguments(str(tmp_path), optim="ldadam", optim_args="rank=4,dense_lr_ratio=4", learning_rate=1e-3)
    from_args = settings(OptimizerFactory.from_training_args(args)(tiny_llama()), "lr")
    assert from_args == {**settings(optimizer, "lr"), "lm_head.weight": 4e-3}

    model = with_lora(target_modules=["q_proj"], modules_to_save=["lm_head"])
    both = OptimizerFactory("ldadam", lr=1e-3, rank=4, dense_lr_ratio=4, lr_ratio=8)(model)
    for name, rate in settings(both, "lr").items():
        assert rate == pytest.approx(8e-3 if "lora_B" in name else 4e-3 if "lm_head" in name else 1e-3), name


@pytest.mark.parametrize("name", NORMAL)
def test_pefts_own_helper_takes_our_classes(name: str) -> None:
    model = with_lora()
    optimizer = create_loraplus_optimizer(model, OPTIMIZERS[name].optimizer_class, lr=1e-3, loraplus_lr_ratio=16)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    trainable = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert rates == {id(p): 16e-3 if "lora_B" in n else 1e-3 for n, p in trainable.items()}
    batch = torch.stack([row["input_ids"] for row in token_rows(2)])
    losses = []
    for _ in range(6):
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert measure_state(optimizer) == plan_optimizer(optimizer)


def test_weights_of_single_modules_are_rounded_stochastically(caplog: pytest.LogCaptureFixture) -> None:
    """Of dense ones too, and beside norms in float32, which are not rounded."""
    model = tiny_llama().bfloat16()
    model.model.norm.float()
    stochastic = {"weight_rounding": "stochastic"}
    optimizer = OptimizerFactory("ldadam", rank=4, overrides={"lm_head": stochastic, "norm": stochastic})(model)
    chosen = settings(optimizer, "weight_rounding")
    assert {name for name, how in chosen.items() if how == "stochastic"} == {
        name for name in chosen if "lm_head" in name or "norm" in name
    }


def test_the_report_describes_the_groups_by_what_sets_them_apart(tmp_path: Path) -> None:
    overrides = {"down_proj": {"rank": 5}, "lm_head": {"lr": 1e-3}}
    factory = OptimizerFactory("ldadam", lr=1e-2, rank=4, weight_decay=0.1, lr_ratio=4, overrides=overrides)
    given = {"optimizer_cls_and_kwargs": (factory, {}), "callbacks": [OptimizerStateMemoryCallback()]}
    make_trainer(tmp_path, with_lora(modules_to_save=["lm_head"]), given=given).train()
    assert [group["description"] for group in load_report(tmp_path)["groups"]] == [
        "compressed, weight_decay 0.1",  # A of q_proj
        "compressed, weight_decay 0.1, lr=0.04",
        "compressed, weight_decay 0.1, rank=5",
        "compressed, weight_decay 0.1, lr=0.04, rank=5",
        "dense, weight_decay 0.1, lr=0.001",
    ]
