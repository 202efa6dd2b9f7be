"""Whatever a file or an argument holds: exit status 0, or 2 with one line of reason; never a traceback, never long."""

from __future__ import annotations

import copy
import json
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from hf_lowmem_optim import OptimizerFactory
from hf_lowmem_optim.__main__ import main
from hf_lowmem_optim.memory.report import REPORT_NAME, REPORT_SCHEMA
from hf_lowmem_optim.trainer.presets import PRESETS

NUM_MUTANTS = 350

#: JSON values of every kind, at and beyond every limit.
HOSTILE = [
    *(None, True, -1, 0, 1, 2**31, 2**63, -(10**18), 10**18, 10**400, 0.5, 1e308, float("nan"), float("inf")),
    *(
        "",
        "x",
        "7",
        "\x1b[2J",
        "a\nb",
        "\ud800",
        "é" * 5000,
        [],
        [[]],
        [10**18],
        ["x", None],
        {},
        {"x": {}},
        {"a\nb": 1},
    ),
]

REPORT: dict[str, Any] = {
    "schema": REPORT_SCHEMA,
    "optimizer": "LDAdam",
    "settings": {"rank": 4, "error_feedback": "4bit"},
    "num_parameters": 3,
    "adamw_fp32_bytes": 24,
    "predicted": {
        "total_bytes": 12,
        "component_bytes": {"basis": 12},
        "group_bytes": [12],
        "dtype_bytes": {"uint8": 12},
    },
    "measured": {
        "total_bytes": 12,
        "component_bytes": {"basis": 4, "error": 8},
        "group_bytes": [4, 8],
        "dtype_bytes": {"float32": 12},
        "in_gradient_bytes": 8,
    },
    "this_process_bytes": 6,
    "groups": [{"num_parameters": 1, "description": "dense"}, {"num_parameters": 2, "description": "compressed"}],
    "gradients": {"peak_bytes": 4, "all_bytes": 12},
    "step_memory": {"device": "cuda:0", "peak_bytes": 100, "process_rss_bytes": None},
    "log_history": [{"step": 1, "loss": 2.0}, {"step": 2, "eval_loss": 1.0}],
}


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Paths to every value inside a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield (*path, key)
        yield from places(item, (*path, key))


def mutant(original: dict[str, Any], chance: random.Random) -> bytes:
    """A copy with one to three values replaced or taken away; now and then, damaged bytes."""
    changed = copy.deepcopy(original)
    for _ in range(chance.randint(1, 3)):
        *parents, last = chance.choice(list(places(changed)))
        inside = changed
        for key in parents:
            inside = inside[key]
        if chance.random() < 0.2 and isinstance(inside, dict):
            del inside[last]
        else:
            inside[last] = copy.deepcopy(chance.choice(HOSTILE))
        if not changed:
            break
    content = json.dumps(changed, ensure_ascii=chance.random() < 0.9).encode(errors="surrogatepass")
    if chance.random() < 0.1:
        at = chance.randrange(len(content))
        content = content[:at] + chance.choice([b"", b"\xff", b"{", b"[" * 5000, b"9" * 5000]) + content[at + 1 :]
    return content


Outcome = Callable[..., int]


@pytest.fixture
def outcome(capsys: pytest.CaptureFixture[str]) -> Outcome:
    def run(argv: list[str], expected: str = "") -> int:
        started = time.monotonic()
        status = main(argv)
        printed = capsys.readouterr()
        assert time.monotonic() - started < 20
        assert "Traceback" not in printed.err
        assert expected in printed.err
        if status == 0:
            assert printed.out
        else:
            assert (status, printed.err.count("\n"), printed.out) == (2, 1, "")
            assert printed.err.startswith(f"hf-lowmem-optim {argv[0]}: ")
            assert len(printed.err) < 2000 and printed.err[:-1].isprintable()
        return status

    return run


def test_reports_of_any_content(outcome: Outcome, tmp_path: Path) -> None:
    chance, file = random.Random(0), tmp_path / REPORT_NAME
    file.write_text(json.dumps(REPORT))
    assert outcome(["report", str(tmp_path)]) == 0
    statuses = []
    for _ in range(NUM_MUTANTS):
        file.write_bytes(mutant(REPORT, chance))
        statuses.append(outcome(["report", str(tmp_path)]))
    assert min(statuses.count(0), statuses.count(2)) > NUM_MUTANTS // 20


@pytest.mark.parametrize("preset", ["llama-3.2-1b", "bert-base", "t5-base", "mamba-130m", "vit-base"])
def test_plans_for_configurations_of_any_content(preset: str, outcome: Outcome, tmp_path: Path) -> None:
    chance, file, original = random.Random(preset), tmp_path / "config.json", {**PRESETS[preset]}
    original |= {key: 1 for key in ("num_hidden_layers", "num_layers") if key in original}
    original["id2label"] = {"0": "no"}
    original |= (
        {"head_dim": 64, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}} if "llama" in preset else {}
    )
    statuses = []
    for _ in range(NUM_MUTANTS // 5):
        file.write_bytes(mutant(original, chance))
        statuses.append(outcome(["plan", str(file), "--optim", "ldadam", "adamw_torch"]))
    assert min(statuses.count(0), statuses.count(2)) > 3


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x00",
        b"\xff\xfe{}",
        b"[" * 4_000_000,
        b'{"a":' * 1_000_000,
        b"9" * 5000,
        b"NaN",
        b"[]",
        b'"' + b"x" * 10_000,
    ],
    ids=lambda content: repr(content[:6]),
)
def test_files_that_are_no_object(content: bytes, outcome: Outcome, tmp_path: Path) -> None:
    for command, name in (("report", REPORT_NAME), ("plan", "config.json")):
        (tmp_path / name).write_bytes(content)
        assert outcome([command, str(tmp_path)]) == 2
        (tmp_path / name).unlink()
        (tmp_path / name).mkdir()
        assert outcome([command, str(tmp_path)]) == 2
        (tmp_path / name).rmdir()


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"num_hidden_layers": 10**18}, "'num_hidden_layers': 1000000000000000000"),
        ({"num_labels": 2**30}, "'num_labels': 1073741824"),
        ({"num_hidden_layers": 10_000}, "more than 50,000 parts"),
        ({"num_attention_heads": 0}, "ZeroDivisionError"),
        ({"head_dim": 10**18}, "'head_dim': 1000000000000000000"),
        ({"hidden_size": 0, "num_attention_heads": 1}, "without anything to train"),
        ({"hidden_size": -64}, "-64"),
        ({"hidden_size": "64"}, "expected int"),
        ({"architectures": 5}, "architectures"),
        ({"pad_token_id": 10**9}, "Padding_idx"),
    ],
    ids=str,
)
def test_sizes_that_no_model_has(changes: dict[str, Any], expected: str, outcome: Outcome, tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**PRESETS["llama-3.2-1b"], "num_hidden_layers": 1, **changes}))
    assert outcome(["plan", str(file)], expected) == 2


def test_large_sizes_that_models_have(outcome: Outcome, tmp_path: Path) -> None:
    """Gemma 3n's vocabulary by layer, Doge's experts, Llama 4's positions, a tokenizer's "no limit"."""
    large = {"vocab_size_per_layer_input": 262_144, "num_experts": 16_384, "max_position_embeddings": 10_485_760}
    content = {**PRESETS["llama-3.2-1b"], "num_hidden_layers": 1, **large, "model_max_length": 10**30, "seed": 2**63}
    (tmp_path / "config.json").write_text(json.dumps(content))
    assert outcome(["plan", str(tmp_path), "--optim", "ldadam"]) == 0


NINES = "9" * 5000
#: The time to match these grows exponentially with a name's length, or by its twelfth power: hours for names of models.
ENDLESS = ("(.*)*x", r"([\w.]+)+-", r"(\w|\.|[a-z])*-", ".*" * 12 + "-")


@pytest.mark.parametrize(
    "arguments",
    [
        *(["--budget", text] for text in (f"{NINES}GiB", "99999999999GiB", "x" * 10**6)),
        *(["--lora", text] for text in ("r=99999999999", f"r={NINES}", "r=²", "target=" + "x" * 10**6)),
        *(
            ["--optim-args", text]
            for text in (f"rank={NINES[:4000]}", f"rank={NINES}", "rank=" + "[" * 10**6, "a" * 10**6)
        ),
        *(["--freeze", text] for text in ("(" * 5000, "x" * 10**6, "x{99999999999}")),
        *(["--target-modules", text] for text in ("(" * 5000, "x" * 10**6, "x{99999999999}")),
        *([option, text] for option in ("--freeze", "--target-modules") for text in ENDLESS),
        *([option, "x" * 10**6] for option in ("--dtype", "--sharding", "--quantize")),
    ],
    ids=lambda arguments: " ".join(arguments)[:30],
)
def test_arguments_of_any_length(arguments: list[str], outcome: Outcome) -> None:
    assert outcome(["plan", "bert-base", "--optim", "ldadam", *arguments]) == 2


def nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize(
    "overrides",
    [
        {"(" * 5000: {"lr": 1e-3}},
        {"x" * 10**6: {"lr": 1e-3}},
        {"x{99999999999}": {"lr": 1e-3}},
        *({entry: {"lr": 1e-3}} for entry in ENDLESS),
        {"0": {"rank": nested(100_000)}},
        {"0": nested(100_000)},
        nested(100_000),
        {"0": {"lr": 10**400}},
        {"0": {"x" * 10**6: 1}},
    ],
    ids=lambda overrides: str(type(overrides).__name__),
)
def test_overrides_of_any_length_and_depth(overrides: Any) -> None:
    started = time.monotonic()
    with pytest.raises((TypeError, ValueError), match=r"overrides") as refused:
        OptimizerFactory("ldadam", lr=1e-3, overrides=overrides)(
            nn.ModuleDict({"decoder_layer" * 8: nn.Linear(32, 32)})
        )
    assert len(str(refused.value)) < 1500
    assert time.monotonic() - started < 5


@pytest.mark.parametrize("failure", ["OSError('libllvmlite.so: no such file')", "AttributeError('damaged')"])
def test_numba_that_fails_in_any_way_leaves_plain_torch(
    failure: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from hf_lowmem_optim.ops import dispatch

    (tmp_path / "numba_that_fails.py").write_text(f"raise {failure}")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(dispatch._PACKAGE, "cpu", "numba_that_fails")
    monkeypatch.delenv(dispatch.ENVIRONMENT_VARIABLE, raising=False)
    dispatch._resolve.cache_clear()
    dispatch._loaded.cache_clear()
    try:
        assert dispatch.chosen_backend(torch.device("cpu")) == "reference"
        assert dispatch.chosen_backend(torch.device("cpu")) == "reference"
    finally:
        dispatch._resolve.cache_clear()
        dispatch._loaded.cache_clear()
    (warning,) = [record.getMessage() for record in caplog.records]
    assert failure.split("'")[1] in warning
