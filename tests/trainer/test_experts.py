"""Mixtures of experts, whose weights are stacked in one parameter: compressed by default, each expert by itself."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from hf_lowmem_optim import OPTIMIZERS, OptimizerFactory, OptimizerStateMemoryCallback
from hf_lowmem_optim.engine.optimizer import LowMemoryOptimizer
from hf_lowmem_optim.trainer.param_groups import COMPRESSED, NOT_TARGET, SWITCHED_OFF, TOO_SMALL, VECTOR
from tests.trainer import runs
from tests.trainer.tiny_models import tiny_gpt_oss, tiny_llama, tiny_mixtral, token_rows

MIXTRAL = {"experts.gate_up_proj": (4, 48, 32), "experts.down_proj": (4, 32, 24)}
GPT_OSS = {"experts.gate_up_proj": (6, 32, 48), "experts.down_proj": (6, 24, 32)}
BIASES = {"experts.gate_up_proj_bias": (6, 48), "experts.down_proj_bias": (6, 32)}
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj"]


class LayerExperts(nn.Module):
    """What a layer of a model that is not transformers' may have."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3, 16, 12))


def not_experts() -> nn.Module:
    """Three dimensions, of other meanings."""
    model = nn.ModuleDict({"kernel": nn.Conv1d(16, 16, 3), "last": nn.Linear(16, 16)})
    model.position = nn.Parameter(torch.ones(3, 16, 12))
    return model


def placed(model: nn.Module, name: str = "ldadam", **given: Any) -> tuple[LowMemoryOptimizer, dict[str, Any]]:
    """Return the optimizer, and rule and group of each parameter of experts, by the end of its name."""
    given = {"rank": 4, **given} if "rank" in NAMES[name] else given
    optimizer, placements = OptimizerFactory(name, **given).build(model)
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    return optimizer, {
        ".".join(p.name.split(".")[-2:]): (p.rule, groups[id(p.parameter)]) for p in placements if "experts" in p.name
    }


NAMES = {name: entry.optimizer_class.method.options.defaults() for name, entry in OPTIMIZERS.items()}


@pytest.mark.parametrize("targets", [None, "all-linear", ["experts"], ["q_proj", "experts"]], ids=str)
@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("make", [tiny_mixtral, tiny_gpt_oss])
def test_experts_are_compressed_each_by_itself(make: Callable[[], nn.Module], name: str, targets: Any) -> None:
    small = {"min_compress_size": 64} if "min_compress_size" in NAMES[name] else {}
    optimizer, found = placed(make(), name, target_modules=targets, **small)
    weights, biases = (MIXTRAL, {}) if make is tiny_mixtral else (GPT_OSS, BIASES)
    assert {key: rule for key, (rule, _) in found.items()} == {
        **dict.fromkeys(weights, COMPRESSED),
        **dict.fromkeys(biases, VECTOR),
    }
    for key, (rule, group) in found.items():
        # where only the number of entries matters, all experts of a layer are one tensor as before
        assert group["stacked"] == (rule == COMPRESSED and optimizer.method.whole is not True)
        assert optimizer.method.is_dense(group) == (rule != COMPRESSED)
        if rule == COMPRESSED and name == "ldadam":
            specs = optimizer.method.state_specs(torch.empty(weights[key]), group)
            assert specs["exp_avg"].shape == (weights[key][0], 4, max(weights[key][1:]))


def test_what_has_three_dimensions_is_no_stack_of_experts_for_that() -> None:
    optimizer, placements = OptimizerFactory("ldadam", rank=4).build(not_experts())
    assert {p.name: p.rule for p in placements if p.parameter.ndim == 3} == {
        "position": NOT_TARGET,
        "kernel.weight": COMPRESSED,
    }
    assert not any(group["stacked"] for group in optimizer.param_groups)
    model = nn.ModuleDict({"layer": LayerExperts(), "last": nn.Linear(16, 16)})
    optimizer, placements = OptimizerFactory("ldadam", rank=4).build(model)
    assert {p.name: (p.rule, p.settings) for p in placements if p.parameter.ndim == 3} == {
        "layer.weight": (COMPRESSED, {"stacked": True})
    }
    model.layer.weight.requires_grad_(False)
    assert "layer.weight" not in {p.name for p in OptimizerFactory("ldadam", rank=4).build(model)[1]}


@pytest.mark.parametrize(
    ("values", "rule", "stacked"),
    [
        ({"rank": None}, SWITCHED_OFF, False),
        ({"rank": 8}, COMPRESSED, True),
        ({"rank": 8, "lr": 0.1}, COMPRESSED, True),
        ({"stacked": False}, TOO_SMALL, False),  # as one matrix of four rows
        ({"stacked": False, "rank": 3}, COMPRESSED, False),
        ({"rank": 24}, TOO_SMALL, True),
    ],
    ids=str,
)
def test_overrides_say_what_becomes_of_experts(values: dict[str, Any], rule: str, stacked: bool) -> None:
    _, found = placed(tiny_mixtral(), overrides={"experts": values})
    assert found["experts.down_proj"][0] == rule
    group = found["experts.down_proj"][1]
    assert {key: group[key] for key in values} == values
    assert group["stacked"] is stacked or rule == SWITCHED_OFF


def test_other_layers_may_be_stacks_too(caplog: pytest.LogCaptureFixture) -> None:
    model = not_experts()
    OptimizerFactory("ldadam", rank=4, overrides={"kernel": {"stacked": True, "rank": 2}})(model)
    assert "compressed (stacked=True, rank=2" in caplog.text
    with pytest.raises(ValueError, match="stacked=True has no effect: nothing that it matches has three dimensions"):
        OptimizerFactory("ldadam", rank=4, overrides={"last": {"stacked": True}}).build(model)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("ldadam", {}),
        ("ldadam", {"optim_args": "rank=4,error_feedback=grad"}),
        ("ldadam_layerwise", {"gradient_accumulation_steps": 2}),
        ("lowrank_mfac", {}),
        ("microadam", {}),
    ],
    ids=str,
)
@pytest.mark.parametrize("make", [tiny_mixtral, tiny_gpt_oss])
def test_a_mixture_of_experts_trains_and_resumes_to_the_bit(
    make: Callable[[], Any], name: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    """And plan and measurement are equal."""
    checkpoint = tmp_path / f"checkpoint-{runs.STOP}"

    def model() -> nn.Module:
        # the Trainer itself reads no experts from a checkpoint of Mixtral (huggingface/transformers#48805)
        fresh = make()
        if checkpoint.exists():
            fresh.load_state_dict(type(fresh).from_pretrained(checkpoint).state_dict())
        return fresh

    schedule = {"max_steps": 12, "lr_scheduler_type": "cosine", "warmup_steps": 3, "weight_decay": 0.1}
    trainer = runs.assert_resumes_to_the_bit(tmp_path, model, **runs.settings_of(name, **schedule, **settings))
    groups = {n: group for group in trainer.optimizer.param_groups for n in group["param_names"]}
    experts = {n for n in groups if n.endswith(tuple(MIXTRAL))}
    assert experts and all(groups[n]["stacked"] == (name != "microadam") for n in experts)
    assert experts <= runs.moved(trainer.model, runs.values(make()))
    losses = runs.logged(trainer, "loss")
    assert losses[-1] < losses[0]


def test_experts_without_a_token_stay_finite(tmp_path: Path) -> None:
    """Their gradient is zero, from the first step on or for some."""
    model = tiny_mixtral()
    optimizer = OptimizerFactory("ldadam", rank=4, lr=1e-2)(model)
    experts = model.model.layers[0].mlp.experts.gate_up_proj
    before, reached = experts.detach().clone(), torch.zeros(4, dtype=torch.bool)
    for row in token_rows(2, length=3):
        ids = row["input_ids"][None, :1].expand(1, 2)  # one token: two of four experts
        model(input_ids=ids, labels=ids).loss.backward()
        reached |= experts.grad.abs().amax(dim=(1, 2)) > 0
        optimizer.step()
        optimizer.zero_grad()
    assert experts.isfinite().all() and 0 < reached.sum() < 4
    assert [not torch.equal(*pair) for pair in zip(experts, before, strict=True)] == reached.tolist()


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("ldadam", {"target_modules": LINEAR, "rank": 3}),
        ("ldadam", {"overrides": {"experts": {"stacked": False}}, "rank": 3}),
        ("microadam", {"target_modules": LINEAR, "min_compress_size": 64}),
    ],
    ids=str,
)
def test_a_checkpoint_from_before_experts_were_compressed(name: str, given: dict[str, Any]) -> None:
    """They were dense, or one matrix: refused with the setting that gives that, with which it loads."""
    model, now = tiny_mixtral(), {key: value for key, value in given.items() if key in NAMES[name]}
    old = OptimizerFactory(name, **given)(model)
    ids = torch.stack([row["input_ids"] for row in token_rows(2)])
    model(input_ids=ids, labels=ids).loss.backward()
    old.step()
    saved = old.state_dict()
    for group in saved["param_groups"]:
        del group["stacked"]
    message = (
        "target modules" if name == "microadam" else "left out of optim_target_modules .*stacked=False in overrides"
    )
    with pytest.raises(ValueError, match=rf"groups of \[.*Build it with .*{message}"):
        OptimizerFactory(name, **now)(model).load_state_dict(saved)
    again = OptimizerFactory(name, **given)(model)
    again.load_state_dict(saved)
    again.step()
    assert len(again.state) == len(old.state) and len(again.param_groups) == 3


def test_the_report_names_the_groups_of_experts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    callback = OptimizerStateMemoryCallback()
    runs.make_trainer(tmp_path, tiny_mixtral(), given={"callbacks": [callback]}, **runs.settings_of("ldadam")).train()
    text = capsys.readouterr().out
    assert "(compressed, weight_decay 0, stacked=True" in text and "stacked=False" not in text
    runs.make_trainer(tmp_path, tiny_llama(), given={"callbacks": [callback]}, **runs.settings_of("ldadam")).train()
    assert "stacked" not in capsys.readouterr().out
