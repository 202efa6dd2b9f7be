"""Nested LoRA ranks in Trainer runs: every mode, resumed, evaluated at each rank, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import EarlyStoppingCallback, TrainerCallback

from hf_lowmem_optim import MatryoshkaLora, RankEvaluationCallback, attach_nested_lora
from tests.trainer import runs
from tests.trainer.runs import Reporter, StopAt, assert_equal_to_the_bit, logged, make_trainer, values
from tests.trainer.tiny_models import tiny_llama, token_rows, with_lora

RANKS = (1, 2, 4)


def build(folder: Path, mode: Any = "losses", *, given: dict[str, Any] | None = None, **settings: Any) -> Any:
    """A Trainer of an adapter of rank 6 that is attached, and the MatryoshkaLora."""
    model = with_lora()
    nested = MatryoshkaLora(model, RANKS, mode=mode)
    callbacks = [make(nested) for make in (given or {}).pop("callbacks", [])]
    trainer = make_trainer(folder, model, given={**(given or {}), "callbacks": callbacks}, rows=24, **settings)
    attach_nested_lora(trainer, nested)
    return trainer, nested


@pytest.mark.parametrize(
    ("mode", "optim", "more"),
    [
        ("matryoshka", "microadam", ""),
        ("dylora", "ldadam", ",lr_ratio=4"),
        ("losses", "ldadam", ",error_feedback=grad"),
    ],
)
def test_every_mode_learns_and_resumes_to_the_bit(mode: str, optim: str, more: str, tmp_path: Path) -> None:
    settings = runs.settings_of(optim, max_steps=8, gradient_accumulation_steps=2, learning_rate=5e-2)
    settings["optim_args"] += more

    def run(folder: str, *callbacks: Any, resume: bool = False, **also: Any) -> Any:
        given = {"callbacks": [lambda _, each=each: each for each in callbacks]}
        trainer, nested = build(tmp_path / folder, mode, given=given, **settings, **also)
        trainer.train(resume_from_checkpoint=resume)
        return trainer, nested

    whole, nested = run("whole")
    with nested.at(4), torch.no_grad():
        rows = torch.stack([row["input_ids"] for row in token_rows(24)])
        assert whole.model(rows, labels=rows).loss < with_lora()(rows, labels=rows).loss - 0.02
    run("parts", StopAt(), save_strategy="steps", save_steps=100)
    resumed, _ = run("parts", resume=True)
    assert_equal_to_the_bit(values(resumed.model), values(whole.model))

    whole.save_model(str(tmp_path / "end"))
    for folder in (tmp_path / "end", tmp_path / "parts" / f"checkpoint-{runs.STOP}"):
        assert json.loads((folder / "matryoshka.json").read_text()) == nested.settings()
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path / "end")
    inputs = {"input_ids": torch.stack([row["input_ids"] for row in token_rows(2)])}
    again = MatryoshkaLora.from_pretrained(loaded, tmp_path / "end")
    for each in (nested, again):
        each.set_rank(2)
    assert torch.equal(loaded.eval()(**inputs).logits, whole.model.eval()(**inputs).logits)

    other = with_lora()
    trainer = make_trainer(tmp_path / "parts", other, rows=24, **settings)
    attach_nested_lora(trainer, MatryoshkaLora(other, (1, 2), mode=mode))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"matryoshka\.json says .*1, 2, 4.* but this run trains .*1, 2\]"):
        trainer.train(resume_from_checkpoint=True)


def test_losses_are_the_mean_over_ranks_with_accumulation(tmp_path: Path) -> None:
    """A step of SGD is the mean of those at each rank, the logged loss too; evaluation divides nothing."""

    def step(rank: int | None) -> tuple[dict[str, torch.Tensor], float, Any]:
        trainer, nested = build(
            tmp_path,
            "losses" if rank is None else "matryoshka",
            optim="sgd",
            learning_rate=0.5,
            max_steps=1,
            gradient_accumulation_steps=3,
            lr_scheduler_type="constant",
            given={"eval_dataset": token_rows(4)},
        )
        nested.set_rank(rank)
        before = values(trainer.model)
        trainer.train()
        moves = {name: value - before[name] for name, value in values(trainer.model).items()}
        return moves, logged(trainer, "loss")[0], trainer

    alone = [step(rank) for rank in RANKS]
    moves, loss, trainer = step(None)
    assert loss == pytest.approx(sum(each[1] for each in alone) / 3, rel=1e-5)
    assert sum(bool(move.any()) for move in moves.values()) == 4  # lora_B; lora_A waits for it
    for name, move in moves.items():
        torch.testing.assert_close(move, sum(each[0][name] for each in alone) / 3, rtol=1e-3, atol=1e-7)
    plain = make_trainer(tmp_path, trainer.model, given={"eval_dataset": token_rows(4)})
    assert trainer.evaluate()["eval_loss"] == plain.evaluate()["eval_loss"]


class Counter(TrainerCallback):
    """Counts evaluations, and may fail in the middle of one."""

    def __init__(self, fail_at: int = 10**9) -> None:
        self.num_batches, self.fail_at, self.evaluations = 0, fail_at, list[Any]()

    def on_prediction_step(self, *args: Any, **kwargs: Any) -> None:
        self.num_batches += 1
        if self.num_batches == self.fail_at:
            raise KeyboardInterrupt

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        self.evaluations.append(dict(metrics))


def accuracy(given: Any) -> dict[str, float]:
    return {"accuracy": float((given.predictions[:, :-1].argmax(-1) == given.label_ids[:, 1:]).mean())}


def test_ranks_are_evaluated_and_logged(tmp_path: Path) -> None:
    """Others see one evaluation each time; the best model can be that of the best AURAC."""
    counter, reporter = Counter(), Reporter()
    given = {
        "eval_dataset": token_rows(6),
        "compute_metrics": accuracy,
        "callbacks": [
            lambda nested: RankEvaluationCallback(nested, metric="eval_loss"),
            lambda nested: RankEvaluationCallback(nested, [1, 6], rule="nested"),
            lambda _: counter,
            lambda _: reporter,
            lambda _: EarlyStoppingCallback(early_stopping_patience=2),
        ],
    }
    metric = "eval_aurac/eval_loss"
    steps = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2}
    best = {"metric_for_best_model": metric, "load_best_model_at_end": True, "save_total_limit": 1}
    trainer, nested = build(
        tmp_path, "matryoshka", given=given, max_steps=6, learning_rate=3e-2, optim="adamw_torch", **steps, **best
    )
    trainer.train()
    assert trainer.state.global_step == 6 and nested.rank is None  # early stopping counted 3, not 18
    assert len(counter.evaluations) == 3 and len(logged(trainer, "eval_loss")) == 3
    history = [entry for entry in trainer.state.log_history if metric in entry]
    assert len(history) == 3 and trainer.state.best_metric == min(entry[metric] for entry in history)
    assert sum(metric in entry for entry in reporter.seen) == 3
    callbacks = [each for each in trainer.callback_handler.callbacks if isinstance(each, RankEvaluationCallback)]
    losses, accuracies = callbacks
    assert losses.best() == min(history, key=lambda entry: entry[metric])
    assert (losses.greater_is_better, accuracies.greater_is_better) == (False, True)
    found = accuracies.best()
    assert found is not None and found.keys() == {
        *("eval_rank/1/eval_accuracy", "eval_rank/6/eval_accuracy", "eval_aurac/eval_accuracy", "step", "epoch")
    }

    metrics = trainer.evaluate()
    one, two, four = (metrics[f"eval_rank/{rank}/eval_loss"] for rank in RANKS)
    assert metrics[metric] == pytest.approx((one / 2 + two + four / 2) / 2)
    for rank, rule, key in ((2, "paper", "eval_rank/2/eval_loss"), (6, "nested", "eval_rank/6/eval_accuracy")):
        with nested.at(rank, rule):
            own = trainer.evaluation_loop(trainer.get_eval_dataloader(), description="").metrics
        assert metrics[key] == own["eval_" + key.partition("eval_")[2].partition("eval_")[2]]
    assert trainer.evaluate(metric_key_prefix="test").keys().isdisjoint({metric})

    counter.fail_at = counter.num_batches + 4  # three of all, the first of a rank
    nested.set_rank(3, "nested")
    with pytest.raises(KeyboardInterrupt):
        trainer.evaluate()
    assert (nested.rank, nested.rule) == (3, "nested")


def test_one_of_several_data_sets_is_evaluated(tmp_path: Path) -> None:
    """Also where its name begins with another one's."""
    given = {
        "eval_dataset": {"one": token_rows(2), "one_more": token_rows(2, seed=2)},
        "callbacks": [
            lambda nested: RankEvaluationCallback(nested, metric="eval_one_loss"),
            lambda nested: RankEvaluationCallback(nested, metric="eval_one_more_loss"),
        ],
    }
    trainer, _ = build(tmp_path, "matryoshka", given=given, max_steps=1, eval_strategy="steps", optim="sgd")
    trainer.train()
    one, more = (logged(trainer, f"eval_aurac/eval_{name}_loss") for name in ("one", "one_more"))
    assert len(one) == len(more) == 1 and one != more
    assert not any("aurac" in key for key in trainer.evaluate(token_rows(2)))  # of neither


@pytest.mark.parametrize(
    ("given", "settings", "error", "message"),
    [
        ({"mode": "losses"}, {"optim": "ldadam_layerwise", "optim_args": "rank=4"}, ValueError, "several backward"),
        ({"metric": "eval_los"}, {}, KeyError, "metric='eval_los' is none of eval_loss"),
        ({"metric": "eval_third_loss", "sets": True}, {}, ValueError, "none of the data sets 'first'"),
        ({"metric": "eval_loss", "attach": False}, {}, ValueError, "call attach_nested_lora"),
    ],
)
def test_what_cannot_work_is_refused(
    given: dict[str, Any], settings: dict[str, Any], error: type[Exception], message: str, tmp_path: Path
) -> None:
    model = with_lora()
    nested = MatryoshkaLora(model, RANKS, mode=given.get("mode", "matryoshka"))
    callbacks = [RankEvaluationCallback(nested, metric=given["metric"])] if "metric" in given else []
    rows = {"first": token_rows(2)} if given.get("sets") else token_rows(2)
    settings = {"max_steps": 1, "eval_strategy": "steps", "optim": "sgd", **settings}
    trainer = make_trainer(tmp_path, model, given={"eval_dataset": rows, "callbacks": callbacks}, **settings)
    if given.get("attach", True):
        attach_nested_lora(trainer, nested)
        with pytest.raises(ValueError, match="this Trainer already"):
            attach_nested_lora(trainer, nested)
    with pytest.raises(error, match=message):
        trainer.train()
    with pytest.raises(ValueError, match="another model"):
        attach_nested_lora(trainer, MatryoshkaLora(with_lora(), RANKS))
    for wrong in ({"rule": "nestd"}, {"ranks": (2, 1)}, {"ranks": (1, 7)}):
        with pytest.raises(ValueError, match="rule=" if "rule" in wrong else "ranks="):
            RankEvaluationCallback(nested, **wrong)  # type: ignore[arg-type]


def test_what_steps_or_draws_in_each_pass_is_refused(tmp_path: Path) -> None:
    """DeepSpeed however it was started, and the replicas of a model on several GPUs of one process."""
    model = with_lora()
    nested = MatryoshkaLora(model, RANKS, mode="losses")
    trainer = make_trainer(tmp_path, model, optim="sgd")
    trainer.is_deepspeed_enabled = True  # by accelerate launch, too, which leaves args.deepspeed as it is
    with pytest.raises(NotImplementedError, match="DeepSpeed"):
        attach_nested_lora(trainer, nested)
    nested.remove()
    nested = MatryoshkaLora(model, RANKS, mode="dylora")
    trainer.args._n_gpu = 2
    with pytest.raises(ValueError, match="2 GPUs of one process"):
        attach_nested_lora(trainer, nested)
    trainer.args._n_gpu = 1
    attach_nested_lora(trainer, nested)
