"""The command line: what it prints, and exit status 2 with a reason for what is wrong."""

from __future__ import annotations

import csv
import inspect
import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from hf_lowmem_optim.__main__ import main
from hf_lowmem_optim.memory.report import REPORT_SCHEMA
from hf_lowmem_optim.memory.table import llama_2_7b_tensors
from hf_lowmem_optim.registry import OPTIMIZERS


def test_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list"]) == 0
    printed = capsys.readouterr().out
    assert all(f"| `{name}` |" in printed for name in OPTIMIZERS)


def test_the_reference_shapes_are_those_of_llama_2_7b() -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(tie_word_embeddings=False))
    shapes = sorted(tuple(p.shape) for p in model.parameters())
    linear, dense = llama_2_7b_tensors()
    assert sorted([*linear.values(), *dense.values()]) == shapes


@pytest.mark.parametrize("argv", [[], ["lsit"], ["demo", "--steps", "0"], ["demo", "--steps", "many"]])
def test_wrong_commands(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(argv)
    assert stopped.value.code == 2
    assert capsys.readouterr().err


PLAN = ["plan", "bert-base"]


def test_plan_prints_a_table_json_or_csv(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(PLAN) == 0
    table = capsys.readouterr().out
    assert max(map(len, table.splitlines())) <= 120
    assert main([*PLAN, "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert main([*PLAN, "--csv"]) == 0
    lines = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    names = [row["name"] for row in content["optimizers"]]
    assert names[: len(OPTIMIZERS)] == list(OPTIMIZERS)
    assert [line["name"] for line in lines] == names
    for row, line in zip(content["optimizers"], lines, strict=True):
        assert row["name"] in table
        assert line["state_bytes"] == str(row["state_bytes"])
        temporaries = row["temporary_bytes"] or 0
        held = sum(content["weight_bytes"].values()) + sum(row["gradient_bytes"].values())
        assert row["total_bytes"] == held + row["state_bytes"] + temporaries == int(line["total_bytes"])


def test_plan_shows_its_progress_on_a_terminal_alone(capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    assert main([*PLAN, "--optim", "ldadam", "microadam"]) == 0
    assert "planning" not in capsys.readouterr().err
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert main([*PLAN, "--optim", "ldadam", "microadam"]) == 0
    printed = capsys.readouterr().err
    assert printed.startswith("\rplanning ldadam (1 of 2)\rplanning microadam (2 of 2)\r")
    assert printed.endswith("\r") and not printed.rsplit("\r", 2)[1].strip()


def test_plan_takes_all_its_options(capsys: pytest.CaptureFixture[str]) -> None:
    options = "--optim ldadam --optim-args rank=4 --dtype bf16 --lora r=8,target=query+value --freeze embeddings"
    options += " --quantize 4bit --gpus 2 --sharding ddp --budget 2GiB --target-modules lora_A lora_B"
    options += " --reserve 1GiB --seq-len 64 --batch-size 4 --checkpointing --adamw-lr 2e-5"
    assert main([*PLAN, *options.split()]) == 0
    printed = capsys.readouterr().out
    expected = ["LoRA r=8 on query+value", "per GPU of 2 with DDP", "DDP buckets", "rank=4", "≤ 1 GiB", "fits"]
    expected += ["Activations: 4 × 64 tokens", "1 GiB of it are kept", "5e-05 (2.5 ×)"]
    assert [text for text in expected if text not in printed] == []


def test_a_plan_of_which_nothing_fits_has_its_table_json_csv_and_a_status_of_its_own(capsys: Any) -> None:
    tight = ["plan", "minilm-l6", "--optim", "ldadam", "--budget", "20MiB", "--reserve", "0"]
    assert main(tight) == 3
    assert "over by " in capsys.readouterr().out
    assert main([*tight, "--json"]) == 3
    content = json.loads(capsys.readouterr().out)
    assert content["optimizers"][0]["fits"] is False and content["suggestions"]
    assert main([*tight, "--csv"]) == 3
    assert "ldadam,True" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["lama-2-7b"], "did you mean 'llama-2-7b'"),
        (["bert-base", "--budget", "24"], "24GiB, 80GB or 512MiB"),
        (["bert-base", "--budget", "24GiB", "--reserve", "24GiB"], "leaves nothing"),
        (["bert-base", "--plot", "a.txt"], "out.png or out.svg"),
        (["bert-base", "--html", "a.pdf"], "out.html"),
        (["bert-base", "--html", "/nowhere/at/all.html"], "/nowhere/at is no directory: make it first"),
        (["bert-base", "--budgt", "24GiB"], "usage: hf-lowmem-optim plan"),
    ],
)
def test_a_typo_is_refused_before_torch_is_loaded(argv: list[str], message: str) -> None:
    code = "import sys; from hf_lowmem_optim.__main__ import main\n"
    code += "try: status = main(sys.argv[1:])\nexcept SystemExit as stop: status = stop.code\n"
    code += "print(status, {'torch', 'transformers', 'numpy'} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code, "plan", *argv], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "2 set()"
    assert message in done.stderr


def test_a_plan_prints_no_advice_of_bitsandbytes_on_other_kernels(capsys: pytest.CaptureFixture[str]) -> None:
    ops = pytest.importorskip("bitsandbytes.backends.cpu.ops")
    assert "Failed to load CPU gemm_4bit_forward from kernels-community" in inspect.getsource(ops)
    assert main([*PLAN, "--optim", "adamw_fp32"]) == 0
    ops.logger.warning("Failed to load CPU gemm_4bit_forward from kernels-community: %s", "no such module")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["plan", "lama-2-7b"], "did you mean 'llama-2-7b'"),
        ([*PLAN, "--budget", "1MiB"], "leaves nothing of the budget"),
        ([*PLAN, "--adamw-lr", "-1"], "adamw_lr=-1"),
        (["plan", "mamba-130m", "--seq-len", "8"], "plan without seq_len"),
        ([*PLAN, "--plot", "/nowhere/at/all.png"], "/nowhere/at/all.png"),
        (["report", "/nowhere"], "OptimizerStateMemoryCallback"),
        (["demo", "--optim", "ldamm", "--steps", "1"], "did you mean 'ldadam'"),
        (["demo", "--optim", "ldadam", "adamw_troch", "--steps", "1"], "did you mean 'adamw_torch'"),
        (["demo", "--optim", "ldadam", "--optim-args", "rnak=4", "--steps", "1"], "rank"),
        (["demo", "--optim", "ldadam", "--learning-rate", "-1", "--steps", "1"], "lr=-1.0"),
    ],
)
def test_wrong_arguments_have_a_reason(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == 2
    assert message in capsys.readouterr().err


def test_reports_are_read_strictly(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "optimizer_state_report.json"
    for content, message in (("{", "not valid JSON"), ('{"schema": "other/1"}', "schema 'other/1'")):
        file.write_text(content)
        assert main(["report", str(tmp_path)]) == 2
        assert message in capsys.readouterr().err


def test_pictures_are_drawn_at_a_laptops_width(tmp_path: Path) -> None:
    image = pytest.importorskip("matplotlib.image")
    out = tmp_path / "plan.png"
    assert main([*PLAN, "--budget", "2GiB", "--plot", str(out)]) == 0
    state = {"total_bytes": 12, "component_bytes": {"basis": 4, "error": 8}, "group_bytes": [12], "dtype_bytes": {}}
    report = {"schema": REPORT_SCHEMA, "optimizer": "LDAdam", "settings": {"rank": 4}, "num_parameters": 3}
    report |= {"adamw_fp32_bytes": 24, "predicted": None, "measured": state, "this_process_bytes": 6, "gradients": None}
    report |= {"groups": [{"num_parameters": 3, "description": "dense"}]}
    report |= {"step_memory": {"device": "cuda:0", "peak_bytes": 100, "process_rss_bytes": None}}
    report |= {"log_history": [{"step": 1, "loss": 2.0, "learning_rate": 1e-3}, {"step": 2, "eval_loss": 1.0}]}
    (tmp_path / "optimizer_state_report.json").write_text(json.dumps(report))
    other = tmp_path / "report.png"
    assert main(["report", str(tmp_path), "--plot", str(other)]) == 0
    for path in (out, other):
        height, width = image.imread(path).shape[:2]
        assert 1100 <= width <= 1300 and 400 <= height <= 900


def test_a_missing_matplotlib_names_the_extra(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main([*PLAN, "--plot", "out.png"]) == 2
    assert "pip install 'hf-lowmem-optim[plot]'" in capsys.readouterr().err


@pytest.mark.parametrize(("error", "status", "said"), [(KeyboardInterrupt, 130, "stopped"), (BrokenPipeError, 141, "")])
def test_an_interrupt_and_a_reader_that_has_gone_are_no_tracebacks(
    error: type[BaseException],
    status: int,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    def fail(args: Any) -> None:
        raise error

    monkeypatch.setattr("hf_lowmem_optim.__main__._list", fail)
    monkeypatch.setattr("os.dup2", lambda *descriptors: None)
    assert main(["list"]) == status
    assert capfd.readouterr().err.strip() == (f"hf-lowmem-optim list: {said}" if said else "")
