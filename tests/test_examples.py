"""Every example and the demo run from start to end in a folder that is not the repository, on less text."""

from __future__ import annotations

from pathlib import Path
from pydoc_data.topics import topics

import pytest

from tests.forks import in_fork, run_script

EXAMPLES = Path(__file__).parent.parent / "examples"
#: Options that make each example short; and what its last line says.
SHORT = {
    "train_language_model.py": (["--max_steps", "2", "--optim_args", "rank=4", "--sequence_length", "64"], "eval_loss"),
    "finetune_classifier.py": (["--max_steps", "2", "--rank", "4", "--sequence_length", "32"], "eval_accuracy"),
    "layerwise_full_finetuning.py": (["--max_steps", "2"], "resident memory"),
    "lora_finetuning.py": (
        ["--max_steps", "2", "--per_device_eval_batch_size", "64", "--use_dora"],
        "merged model: {'eval_loss'",
    ),
    "qlora_finetuning.py": (["--max_steps", "2", "--per_device_train_batch_size", "2"], "optimizer state: "),
    "per_module_settings.py": (["--max_steps", "2", "--per_device_eval_batch_size", "64"], "eval_loss"),
    "trl_sft.py": (["--max_steps", "2"], "'optim': 'ldadam'"),
    "plain_loop.py": ([], "AdamW: "),
}


def test_every_example_is_run() -> None:
    """One of them by ``tests/trainer/test_fsdp2.py``, in two processes."""
    assert {path.name for path in EXAMPLES.glob("*.py")} == {*SHORT, "fsdp2_full_finetuning.py"}


def run_on_less_text(target: str, argv: list[str], folder: Path, shorter: bool = False) -> None:
    """Run a script that takes the documentation of Python as its text: some beginnings will do."""
    texts = {name: topics[name][:8000] for name in ("compound", "formatstrings", "specialnames", "typesseq")}
    topics.clear()
    topics.update(texts)
    if shorter:
        from hf_lowmem_optim.trainer import demo

        demo._SEQUENCE_LENGTH = 32
    run_script(target, argv, folder)


@pytest.mark.slow
@pytest.mark.parametrize("name", SHORT)
def test_example(name: str, tmp_path: Path) -> None:
    options, last = SHORT[name]
    trainer_options = [] if name == "plain_loop.py" else ["--report_to", "none", "--output_dir", str(tmp_path / "out")]
    command = str(EXAMPLES / name), [*options, *trainer_options], tmp_path
    result = in_fork(run_on_less_text, *command, output=tmp_path / "printed")
    assert result.returncode == 0, result.stderr
    assert last in result.stdout.splitlines()[-1]


@pytest.mark.slow
def test_demo(tmp_path: Path) -> None:
    (folder := tmp_path / "empty").mkdir()
    command = "hf_lowmem_optim", ["demo", "--steps", "50"], folder
    result = in_fork(run_on_less_text, *command, True, output=tmp_path / "printed")
    assert result.returncode == 0, result.stderr
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in result.stdout.splitlines() if "| " in line]
    table = {row[0]: row for row in rows[-2:]}
    assert set(table) == {"adamw_torch", "ldadam"}
    # a byte-level model that has learnt anything at all is well below ln 256 = 5.5
    assert all(float(row[2]) < 4.5 and float(row[3]) < 4.0 for row in table.values())
    assert float(table["ldadam"][6]) < float(table["adamw_torch"][6]) == 8.0
    # a line for each log, no dictionary; and the picture
    logs = [line for line in result.stdout.splitlines() if "step    50 of 50  loss " in line]
    assert [line.split()[0] for line in logs] == ["adamw_torch", "ldadam"]
    assert "{" not in result.stdout and "50/50" in result.stderr
    (picture,) = folder.iterdir()
    assert picture.name == "demo.png" and str(picture) in result.stdout.splitlines()[-1]
