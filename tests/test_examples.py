"""Every example and the demo run from start to end in a folder that is not the repository."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

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
    "pruning.py": (["--seeds", "1"], "90% pruned: "),
}


def test_every_example_is_run() -> None:
    assert {path.name for path in EXAMPLES.glob("*.py")} == set(SHORT)


def run(command: list[str], directory: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(EXAMPLES.parent)}
    return subprocess.run(command, cwd=directory, env=environment, capture_output=True, text=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", SHORT)
def test_example(name: str, tmp_path: Path) -> None:
    options, last = SHORT[name]
    trainer_options = (
        []
        if name in ("plain_loop.py", "pruning.py")
        else ["--report_to", "none", "--output_dir", str(tmp_path / "out")]
    )
    result = run([sys.executable, str(EXAMPLES / name), *options, *trainer_options], tmp_path)
    assert result.returncode == 0, result.stderr
    assert last in result.stdout.splitlines()[-1]


@pytest.mark.slow
def test_demo(tmp_path: Path) -> None:
    result = run([sys.executable, "-m", "hf_lowmem_optim", "demo", "--steps", "50"], tmp_path)
    assert result.returncode == 0, result.stderr
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in result.stdout.splitlines() if "| " in line]
    table = {row[0]: row for row in rows[-2:]}
    assert set(table) == {"adamw_torch", "ldadam"}
    # a byte-level model that has learnt anything at all is well below ln 256 = 5.5
    assert all(float(row[2]) < 4.5 and float(row[3]) < 4.0 for row in table.values())
    assert float(table["ldadam"][6]) < float(table["adamw_torch"][6]) == 8.0
    assert not list(tmp_path.iterdir())
