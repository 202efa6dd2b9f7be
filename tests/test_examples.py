"""Every example and the demo run from start to end in a folder that is not the repository, on less text.

``python -m tests.test_examples FOLDER`` runs them, each in a fork of a process that has imported other people's
packages, which takes longer than what they do, and has computed nothing.
"""

from __future__ import annotations

import gc
import importlib
import os
import runpy
import subprocess
import sys
from pathlib import Path
from pydoc_data.topics import topics

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
IMPORTED = ("transformers.trainer", "transformers.models.llama.modeling_llama", "peft")
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
    "nested_lora.py": (
        ["--max_steps", "2", "--lora_rank", "2", "--modes", "losses", "matryoshka"],
        "losses by rank in out/aurac.png",
    ),
}


@pytest.mark.slow
def test_every_example_and_the_demo_run(tmp_path: Path) -> None:
    # two of them run in two processes: tests/trainer/test_fsdp2.py, tests/local_updates/test_trainer.py
    assert {path.name for path in EXAMPLES.glob("*.py")} == {*SHORT, "fsdp2_full_finetuning.py", "local_updates.py"}
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(EXAMPLES.parent)}
    subprocess.run([sys.executable, "-m", __name__, str(tmp_path)], env=environment, check=True, timeout=1800)
    printed, errors = {}, {}
    for name in (*SHORT, "demo"):
        status, out, err = ((tmp_path / f"{name}.{part}").read_text() for part in ("status", "1", "2"))
        assert status == "0", f"{name}: {err}"
        printed[name], errors[name] = out.splitlines(), err
    for name, (_, last) in SHORT.items():
        assert last in printed[name][-1], name
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in printed["demo"] if "| " in line]
    table = {row[0]: row for row in rows[-2:]}
    assert set(table) == {"adamw_torch", "ldadam"}
    # a byte-level model that has learnt anything at all is well below ln 256 = 5.5
    assert all(float(row[2]) < 4.5 and float(row[3]) < 4.0 for row in table.values())
    assert float(table["ldadam"][6]) < float(table["adamw_torch"][6]) == 8.0
    # a line for each log, no dictionary; and the picture
    logs = [line for line in printed["demo"] if "step    25 of 25  loss " in line]
    assert [line.split()[0] for line in logs] == ["adamw_torch", "ldadam"]
    assert not any("{" in line for line in printed["demo"]) and "25/25" in errors["demo"]
    assert any(line.startswith("losses: ") and "at rank 2; AURAC " in line for line in printed["nested_lora.py"])
    assert (tmp_path / "nested_lora.py" / "out" / "losses" / "rank-1" / "adapter_config.json").exists()
    (picture,) = (tmp_path / "demo").iterdir()
    assert picture.name == "demo.png" and str(picture) in printed["demo"][-1]


def run(name: str, folder: Path) -> None:
    """Do what the command line would, in the folder."""
    os.chdir(folder)
    if name == "demo":
        from hf_lowmem_optim.trainer import demo

        demo._SEQUENCE_LENGTH, demo._FINAL_STEPS = 32, 25
        sys.argv = ["hf_lowmem_optim", "demo", "--steps", "25"]
        runpy.run_module("hf_lowmem_optim", run_name="__main__", alter_sys=True)
        return
    trainer_options = [] if name in ("plain_loop.py", "pruning.py") else ["--report_to", "none", "--output_dir", "out"]
    sys.argv = [str(EXAMPLES / name), *SHORT[name][0], *trainer_options]
    sys.path[0] = str(EXAMPLES)
    runpy.run_path(sys.argv[0], run_name="__main__")


def run_all(root: Path) -> None:
    """Run each in a process and a folder of its own; write what it printed and how it ended."""
    for module in IMPORTED:
        importlib.import_module(module)
    assert "hf_lowmem_optim" not in sys.modules  # each imports what it needs
    texts = {name: topics[name][:8000] for name in ("compound", "formatstrings", "specialnames", "typesseq")}
    topics.clear()
    topics.update(texts)
    gc.freeze()  # as in conftest.py
    for name in (*SHORT, "demo"):
        (root / name).mkdir()
        if child := os.fork():
            status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            (root / f"{name}.status").write_text(str(status))
            continue
        for stream in (1, 2):
            os.dup2(os.open(root / f"{name}.{stream}", os.O_WRONLY | os.O_CREAT, 0o644), stream)
        run(name, root / name)
        sys.exit()


if __name__ == "__main__":
    run_all(Path(sys.argv[1]))
