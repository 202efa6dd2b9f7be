"""Trainers of other libraries and of users, which make parameter groups of their own."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import nn
from transformers import Trainer, TrainingArguments

from hf_lowmem_optim import LDAdam, OptimizerFactory
from tests.trainer.runs import ARGUMENTS, KINDS, assert_same_parameters, make_trainer
from tests.trainer.tiny_models import tiny_llama


class Loss(nn.Module):
    """A loss with weights of its own, around the model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.classifier = nn.Linear(48, 16)

    def forward(self, **inputs: Any) -> Any:
        outputs = self.model(**inputs)
        return outputs.loss + self.classifier(outputs.logits).square().mean()


class SentenceTrainer(Trainer):
    """Sentence Transformers' hook: groups of the loss and its model, and learning rates by pattern."""

    rates: ClassVar[dict[str, float]] = {r"v_proj": 5e-3, r"norm|embed_tokens": 2e-4}

    def __init__(self, *given: Any, **more: Any) -> None:
        super().__init__(*given, **more)
        torch.manual_seed(1)
        self.loss = Loss(self.model)

    def compute_loss(self, model: Any, inputs: Any, **more: Any) -> Any:
        return self.loss(**inputs)

    def get_optimizer_cls_and_kwargs(  # type: ignore[override]
        self, args: TrainingArguments, model: Any = None
    ) -> tuple[Any, Any]:
        chosen, keywords = super().get_optimizer_cls_and_kwargs(args, self.loss)
        assert not {"params", "model", "optimizer_dict"} & keywords.keys()
        decaying, parameters = self.get_decay_parameter_names(self.loss), dict(self.loss.named_parameters())
        groups: list[dict[str, Any]] = []
        for pattern, rate in [(None, None), *self.rates.items()]:
            matching = {name: p for name, p in parameters.items() if pattern is None or re.search(pattern, name)}
            for group in groups:
                group["params"] = [p for p in group["params"] if all(p is not other for other in matching.values())]
            for decays in (True, False):
                members = [p for name, p in matching.items() if (name in decaying) == decays]
                own = {"weight_decay": args.weight_decay if decays else 0.0}
                groups.append({"params": members, **own, **({} if rate is None else {"lr": rate})})
        return chosen, {**keywords, "optimizer_dict": groups}


def settings_by_name(trainer: Trainer, module: nn.Module) -> dict[str, tuple[float, float]]:
    """The learning rate and weight decay of every parameter that the optimizer has."""
    names = {id(p): name for name, p in module.named_parameters()}
    return {
        names[id(p)]: (group.get("initial_lr", group["lr"]), group["weight_decay"])
        for group in trainer.optimizer.param_groups
        for p in group["params"]
    }


def compressed(trainer: Trainer) -> Iterator[str]:
    optimizer = trainer.optimizer.optimizer
    for group in optimizer.param_groups:
        for name, p in zip(group["param_names"], group["params"], strict=True):
            if optimizer.method.compresses(p.shape, group):
                yield name


@pytest.mark.parametrize("optim", KINDS)
def test_groups_of_a_sentence_trainer_keep_rates_decay_and_weights_of_the_loss(optim: str, tmp_path: Path) -> None:
    common = {"weight_decay": 0.1, "trainer_class": SentenceTrainer, "learning_rate": 1e-3}
    theirs = make_trainer(tmp_path, optim="adamw_torch", **common)
    ours = make_trainer(tmp_path, optim=optim, optim_args=ARGUMENTS[optim], **common)
    before = {name: p.detach().clone() for name, p in ours.loss.named_parameters()}
    for trainer in (theirs, ours):
        trainer.train()
    found = settings_by_name(ours, ours.loss)
    assert found == settings_by_name(theirs, theirs.loss)
    assert {rate for rate, _ in found.values()} == {1e-3, 5e-3, 2e-4}
    assert found.keys() == before.keys()
    assert not [name for name, p in ours.loss.named_parameters() if torch.equal(p, before[name])]
    # what is compressed is what would be without groups, and the loss's matrix
    assert set(compressed(ours)) == {"classifier.weight"} | {name for name in before if "_proj" in name}


@pytest.mark.parametrize("optim", ["ldadam", "microadam_layerwise"])
def test_sentence_transformers_own_trainer(optim: str, tmp_path: Path) -> None:
    sentence_transformers = pytest.importorskip("sentence_transformers")
    losses = pytest.importorskip("sentence_transformers.losses")
    from datasets import Dataset
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    words = ["[PAD]", "[UNK]", *map(str, range(30))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    folder = str(tmp_path / "bert")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(folder)
    sizes = {"num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 16}
    config = BertConfig(vocab_size=len(words), hidden_size=32, intermediate_size=64, **sizes)
    BertModel(config).save_pretrained(folder)
    rows = {"a": ["1 2 3"] * 8, "b": ["4 5 6"] * 8, "label": [0, 1] * 4}
    found = []
    for name in ("adamw_torch", optim):
        model = sentence_transformers.SentenceTransformer(folder, device="cpu")
        loss = losses.SoftmaxLoss(model, sentence_embedding_dimension=32, num_labels=2)
        settings = {"optim": name, "optim_args": ARGUMENTS.get(name), "learning_rate_mapping": {"query": 5e-3}}
        settings |= {"max_steps": 2, "max_grad_norm": 0.0, "weight_decay": 0.1, "report_to": [], "use_cpu": True}
        args = sentence_transformers.SentenceTransformerTrainingArguments(
            str(tmp_path), save_strategy="no", disable_tqdm=True, per_device_train_batch_size=2, **settings
        )
        trainer = sentence_transformers.SentenceTransformerTrainer(model, args, Dataset.from_dict(rows), loss=loss)
        trainer.train()
        found.append(settings_by_name(trainer, loss))
    assert found[0] == found[1]
    assert 5e-3 in {rate for rate, _ in found[1].values()}
    assert any("classifier" in name for name in found[1])


class SparesEmbeddings(Trainer):
    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        return [name for name in super().get_decay_parameter_names(model) if "embed" not in name]


def test_a_subclass_decides_what_decays(tmp_path: Path) -> None:
    found = []
    for optim in ("adamw_torch", "ldadam", "ldadam_layerwise"):
        trainer = make_trainer(tmp_path, optim=optim, weight_decay=0.1, trainer_class=SparesEmbeddings)
        trainer.train()
        found.append(settings_by_name(trainer, trainer.model))
    assert found[0] == found[1] == found[2]
    assert found[1]["model.embed_tokens.weight"] == (5e-5, 0.0)
    assert found[1]["lm_head.weight"] == (5e-5, 0.1)


class OwnGroups(Trainer):
    """Calls the class that the arguments name with its own groups, as LLaVA, LLaMA-Factory and Unsloth do."""

    with_model = True

    def create_optimizer(self, model: Any = None) -> Any:
        head = [p for name, p in self.model.named_parameters() if "lm_head" in name]
        rest = [p for name, p in self.model.named_parameters() if "lm_head" not in name]
        chosen, keywords = Trainer.get_optimizer_cls_and_kwargs(self.args, self.model if self.with_model else None)
        keywords["lr"] *= 2
        self.optimizer = chosen([{"params": head, "lr": 1e-4, "weight_decay": 0.3}, {"params": rest}], **keywords)
        return self.optimizer


class OwnGroupsWithoutModel(OwnGroups):
    with_model = False


def test_a_subclass_calls_the_class_with_its_own_groups(tmp_path: Path) -> None:
    trainer = make_trainer(
        tmp_path, optim="ldadam", optim_args="rank=4", weight_decay=0.1, learning_rate=1e-3, trainer_class=OwnGroups
    )
    trainer.train()
    optimizer = trainer.optimizer.optimizer
    assert type(optimizer) is LDAdam
    groups = [(g["initial_lr"], g["weight_decay"], g["rank"], len(g["params"])) for g in optimizer.param_groups]
    # in the order in which they were given; embedding and norms are dense, the head as well
    assert groups == [(1e-4, 0.3, None, 1), (2e-3, 0.1, 4, 14), (2e-3, 0.1, None, 6)]


def test_without_the_model_the_class_says_what_it_does_not_know(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    common = {"optim": "ldadam", "trainer_class": OwnGroupsWithoutModel}
    trainer = make_trainer(tmp_path, optim_args="rank=4", **common)
    with caplog.at_level(logging.WARNING):
        trainer.train()
    assert "cannot tell embeddings and the output head from other matrices" in caplog.text
    assert [(g["rank"], len(g["params"])) for g in trainer.optimizer.param_groups] == [(4, 1), (4, 20)]
    for settings, named in (
        ({"optim_target_modules": ["q_proj"]}, r"optim_target_modules=\['q_proj'\]"),
        ({"optim_args": "dense_lr_ratio=4"}, r"dense_lr_ratio=4\.0"),
    ):
        with pytest.raises(ValueError, match=named + " cannot be followed without the model; call"):
            make_trainer(tmp_path, **common, **settings).train()


def test_parameters_of_no_module_and_settings_of_groups_are_kept() -> None:
    model, extra, frozen = tiny_llama(), nn.Parameter(torch.randn(8, 8)), nn.Parameter(torch.randn(8, 8), False)
    chosen = OptimizerFactory("ldadam", rank=4, dense_lr_ratio=4.0, lr=1e-3).class_for(model)
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    layer = model.model.layers[0].mlp.up_proj.weight
    groups = [
        {"params": iter([extra, frozen])},
        {"params": embedding, "rank": 2},  # a rank compresses it, as in overrides
        {"params": [("mine", layer)], "rank": None},
        {"params": [head], "lr": 3e-3, "label": "head"},
    ]
    optimizer = chosen(groups)
    found = [(g["param_names"], g["rank"], g["lr"]) for g in optimizer.param_groups]
    assert found == [
        (["model.embed_tokens.weight"], 2, 1e-3),
        (["lm_head.weight"], None, 3e-3),  # has a rate of its own
        (["0 of group 0", "1 of group 0"], None, 4e-3),
        (["mine"], None, 4e-3),
    ]
    assert optimizer.param_groups[1]["label"] == "head"


def test_given_groups_and_the_trainers_make_the_same_run(tmp_path: Path) -> None:
    """The string makes what the factory makes for the model, in the same groups: checkpoints of both load."""
    settings = {"weight_decay": 0.1, "learning_rate": 1e-3, "max_steps": 3}
    by_string = make_trainer(tmp_path, optim="ldadam", optim_args="rank=4,dense_lr_ratio=2", **settings)
    factory = OptimizerFactory("ldadam", lr=1e-3, weight_decay=0.1, rank=4, dense_lr_ratio=2.0)
    by_factory = make_trainer(tmp_path, given={"optimizer_cls_and_kwargs": (factory, {})}, **settings)
    for trainer in (by_string, by_factory):
        trainer.train()
    assert_same_parameters(by_string, by_factory)
    groups = [[{**g, "params": len(g["params"])} for g in t.optimizer.param_groups] for t in (by_string, by_factory)]
    assert groups[0] == groups[1]
