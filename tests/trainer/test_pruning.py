"""Pruning in Trainer runs, and the command ``prune``."""

from __future__ import annotations

import csv
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from hf_lowmem_optim import IOBSPruningCallback, iobs_layers_
from hf_lowmem_optim.__main__ import main
from hf_lowmem_optim.trainer import prune_model
from tests.trainer.runs import Reporter, StopAt, assert_equal_to_the_bit, logged, make_trainer, values
from tests.trainer.tiny_models import tiny_bert_classifier, tiny_llama, with_lora

MFAC: dict[str, Any] = {
    "optim": "sparse_mfac",
    "optim_args": "window=8,density=0.5,damping=0.01",
    "learning_rate": 1e-2,
    "max_steps": 10,
}
SHORT: dict[str, Any] = {"sparsity": 0.7, "begin": 2, "end": 8, "every": 3}


def linear_weights(model: Any) -> dict[str, torch.Tensor]:
    return {name: p for name, p in values(model).items() if p.dim() == 2 and "embed" not in name and "head" not in name}


def count_zeros(tensors: dict[str, torch.Tensor]) -> int:
    return sum(int((each == 0).sum()) for each in tensors.values())


@pytest.mark.parametrize("optim", ["sparse_mfac", "adamw_torch"])
def test_a_run_is_pruned_logged_and_resumed(optim: str, tmp_path: Path, caplog: Any) -> None:
    """Embeddings and head stay dense; reporters get the keys; stopped and resumed it is the same run to the bit."""
    settings = {**MFAC, "optim": optim} if optim == "sparse_mfac" else {**MFAC, "optim": optim, "optim_args": None}
    prune = {**SHORT, "correction": optim == "sparse_mfac", "exclude": ["layers.1.mlp"]}

    def run(folder: str, *more: Any, **also: Any) -> Any:
        callbacks = [IOBSPruningCallback(**prune), *more]
        return make_trainer(tmp_path / folder, given={"callbacks": callbacks}, **{**settings, **also})

    reporter = Reporter()
    whole = run("whole", reporter)
    whole.train()
    linear = linear_weights(whole.model)
    excluded = {name: each for name, each in linear.items() if "layers.1.mlp" in name}
    pruned = {name: each for name, each in linear.items() if name not in excluded}
    assert len(excluded) == 3
    numel = sum(each.numel() for each in pruned.values())
    assert count_zeros(pruned) == int(0.7 * numel)
    assert count_zeros(excluded) == 0 and int((whole.model.lm_head.weight == 0).sum()) == 0
    sparsity = logged(whole, "pruning/sparsity")
    assert sparsity[0] == 0 and sparsity[-1] == count_zeros(pruned) / numel and len(sparsity) == 9
    assert len(logged(whole, "pruning/kept_changed")) == 9
    assert len(logged(whole, "pruning/loss_increase")) == (9 if optim == "sparse_mfac" else 0)
    assert [entry["pruning/sparsity"] for entry in reporter.seen if "pruning/sparsity" in entry] == sparsity

    assert "zeros of the" not in caplog.text
    run("parts", StopAt(), save_strategy="steps", save_steps=100).train()
    assert "zeros of the" in caplog.text  # it stopped early
    resumed = run("parts")
    resumed.train(resume_from_checkpoint=True)
    assert_equal_to_the_bit(values(resumed.model), values(whole.model))


@pytest.mark.parametrize(
    ("settings", "prune", "message"),
    [
        ({}, {"sparsity": 0.7}, "first projection, at step 100"),
        ({}, {"sparsity": 0.7, "begin": 2, "end": 14, "every": 3}, "end=14 is beyond the run's 10 steps"),
        ({"optim": "adamw_torch", "optim_args": None}, SHORT, "sparse_mfac or lowrank_mfac"),
        ({}, {**SHORT, "exclude": ["layer"]}, "'layer' names no parameter"),
        ({}, {"pattern": (1, 3), "begin": 2, "end": 8, "every": 3}, "not divisible by the 3"),
        ({"model": with_lora}, SHORT, "frozen"),
        ({"twice": True}, SHORT, "has a pruner already"),
    ],
)
def test_what_cannot_work_is_refused(
    settings: dict[str, Any], prune: dict[str, Any], message: str, tmp_path: Path
) -> None:
    settings = {**MFAC, **settings}
    model = settings.pop("model", tiny_llama)()
    callbacks = [IOBSPruningCallback(**prune) for _ in range(1 + settings.pop("twice", False))]
    trainer = make_trainer(tmp_path, model, given={"callbacks": callbacks}, **settings)
    with pytest.raises(ValueError, match=message):
        trainer.train()
    with pytest.raises(ValueError, match="sparsity=2"):
        IOBSPruningCallback(sparsity=2)


def test_a_step_that_was_skipped_does_not_count() -> None:
    callback, calls = IOBSPruningCallback(**SHORT), list[int]()
    given: Any = SimpleNamespace()
    callback._pruner = cast(Any, SimpleNamespace(step=lambda: calls.append(1), num_steps=1))
    for skipped in (True, False):
        callback.on_optimizer_step(given, given, None, optimizer=SimpleNamespace(step_was_skipped=skipped))
        assert len(calls) == callback.num_steps == (not skipped)


def save(model: Any, folder: Path, words: list[str]) -> None:
    vocabulary = {word: index for index, word in enumerate(["[UNK]", "[PAD]", *words])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[PAD]").save_pretrained(folder)
    model.save_pretrained(folder)


WORDS = [f"w{index}" for index in range(40)]


def test_the_command_prunes_a_saved_language_model(tmp_path: Path, capsys: Any) -> None:
    save(tiny_llama(num_hidden_layers=1).to(torch.bfloat16), tmp_path / "model", WORDS)
    (tmp_path / "text.txt").write_text(" ".join(WORDS[i * i % 40] for i in range(700)))
    command = ["prune", str(tmp_path / "model"), "--data", str(tmp_path / "text.txt"), "--out", str(tmp_path / "out")]
    command += ["--pattern", "2:4", "--sequence-length", "16", "--iterations", "1"]
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert "(50.00%)" in printed and "perplexity: " in printed and " before, " in printed
    pruned = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert pruned.dtype == torch.bfloat16
    for name, weight in linear_weights(pruned).items():
        assert bool(((weight.view(-1, 4) == 0).sum(1) == 2).all()), name
    assert main(command) == 2
    assert "is there already" in capsys.readouterr().err
    for wrong, message in (
        (["--pattern", "2-4"], "'2-4' is not N:M"),
        (["--data", "nowhere"], "--data nowhere is no file"),
        (["--sparsity", "0.3"], "contradicts"),
        (["--sequence-length", "600"], "two are the least"),
        (["--layers", "embed_tokens"], "embedding"),
    ):
        assert main([*command, "--out", str(tmp_path / "other"), *wrong]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


def test_the_command_prunes_a_saved_classifier(tmp_path: Path, capsys: Any, caplog: Any, monkeypatch: Any) -> None:
    caplog.set_level(logging.ERROR)
    widths = list[int]()

    def watched(model: Any, batches: Any, *more: Any, **also: Any) -> None:
        widths.extend(batch["input_ids"].shape[1] for batch in batches)
        iobs_layers_(model, batches, *more, **also)

    monkeypatch.setattr(prune_model, "iobs_layers_", watched)
    save(tiny_bert_classifier(), tmp_path / "model", WORDS)
    with (tmp_path / "table.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        writer.writerows([" ".join(WORDS[i : i + 1 + i % 10]), "LABEL_1" if i % 2 else "0"] for i in range(30))
    command = ["prune", str(tmp_path / "model"), "--data", str(tmp_path / "table.csv"), "--out", str(tmp_path / "out")]
    assert main([*command, "--sparsity", "0.6", "--sequence-length", "8"]) == 0
    printed = capsys.readouterr().out
    assert "accuracy: " in printed and ("(59.9" in printed or "(60.0" in printed)
    assert "texts that were cut at --sequence-length 8 or the model's limit: 6\n" in printed  # of nine and ten words
    assert widths == [3, 6, 8, 8]  # padded to the longest of a batch of about the same length
    (tmp_path / "table.csv").write_text("text,label\nw1,LABEL_7\n")
    assert main([*command, "--out", str(tmp_path / "other")]) == 2
    assert "row 2: label 'LABEL_7' is none of LABEL_0, LABEL_1" in capsys.readouterr().err
