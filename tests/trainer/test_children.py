"""`hf-lowmem-optim run`: the processes that a script starts have our strings as well, and are python's in all else."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

#: Starts itself anew: by subprocess in another folder, then by multiprocessing, then to import "transformers": a
#: stand-in, before which ours must be there. The strings in the real one: the last test here, and test_launcher.py.
FRONT_END = """
import multiprocessing, os, subprocess, sys

def train():
    subprocess.run([sys.executable, "-c", "import sys; sys.path.insert(0, sys.argv[1]); import transformers; "
        "print(transformers.__file__, 'hf_lowmem_optim.trainer.import_hook' in sys.modules)", FOLDER], check=True)

if __name__ == "__main__":
    if len(sys.argv) == 1:
        subprocess.run([sys.executable, __file__, "again"], cwd="/", check=True)
    else:
        process = multiprocessing.get_context("spawn").Process(target=train)
        process.start()
        process.join()
        sys.exit(process.exitcode)
"""

#: What a process that does not import transformers can see of us.
LOOK = """
import json, sys
json.dump({"path": sys.path, "modules": sorted(sys.modules), "flags": list(sys.flags), "argv": sys.argv,
           "custom": getattr(sys, "custom", None), "own": sys.modules["sitecustomize"].__dict__.get("OWN"),
           "finders": [getattr(finder, "__name__", "") for finder in sys.meta_path]}, sys.stdout)
"""


def python(arguments: Sequence[str], folder: Path, *more: str, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join((str(ROOT), *more)), **environment}
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=folder, env=env, text=True, capture_output=True, timeout=300)


def test_the_strings_reach_processes_of_any_depth(tmp_path: Path) -> None:
    stand_in = tmp_path / "transformers.py"
    stand_in.touch()
    (tmp_path / "front.py").write_text(f"FOLDER = {str(tmp_path)!r}\n{FRONT_END}")
    launched = python(["-m", "hf_lowmem_optim", "run", "front.py"], tmp_path)
    assert (launched.stdout, launched.returncode) == (f"{stand_in} True\n", 0), launched.stderr


def test_a_child_is_found_as_python_starts_it(tmp_path: Path) -> None:
    """Its path, flags and modules are python's; the user's own sitecustomize runs; our code is not imported."""
    (tmp_path / "user").mkdir()
    (tmp_path / "user" / "sitecustomize.py").write_text("import sys\nOWN = sys.custom = 'set by the user'")
    (tmp_path / "look.py").write_text(LOOK)
    (tmp_path / "start.py").write_text("import subprocess, sys; subprocess.run([sys.executable, '-Xutf8', 'look.py'])")
    user = str(tmp_path / "user")
    direct, launched = (
        json.loads(python([*before, "start.py"], tmp_path, user).stdout)
        for before in ([], ["-m", "hf_lowmem_optim", "run"])
    )
    assert direct["own"] == direct["custom"] == "set by the user"
    assert launched.pop("finders") == ["_RunFinder", *direct.pop("finders")]
    new = set(launched.pop("modules")) - set(direct.pop("modules"))
    assert not [name for name in new if name.split(".")[0] != "importlib"]
    assert launched == direct


def test_an_error_in_the_users_sitecustomize_is_reported_as_python_does(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("raise ValueError('of the user')")
    (tmp_path / "script.py").write_text("print('goes on')")
    direct = python(["script.py"], tmp_path, str(tmp_path))
    launched = python(["-m", "hf_lowmem_optim", "run", "script.py"], tmp_path, str(tmp_path))
    assert "of the user" in direct.stderr
    # the interpreter that was replaced has reported it, too
    assert (launched.stdout, launched.stderr) == ("goes on\n", 2 * direct.stderr)


@pytest.mark.parametrize("given", [["-O", "-um"], ["-m"], ["-Wignore", "-bmhf_lowmem_optim"]])
def test_options_of_the_interpreter_are_kept(given: list[str], tmp_path: Path) -> None:
    (tmp_path / "flags.py").write_text("import sys; print(sys.flags, sys.warnoptions, sys.argv)")
    plain = [flag.replace("mhf_lowmem_optim", "").removesuffix("m") for flag in given]
    direct = python([*(flag for flag in plain if flag != "-"), "flags.py", "run"], tmp_path)
    ours = [] if given[-1].endswith("optim") else ["hf_lowmem_optim"]
    launched = python([*given, *ours, "run", "flags.py", "run"], tmp_path)
    assert direct.stdout
    assert launched.stdout == direct.stdout


def test_where_the_strings_cannot_reach(tmp_path: Path) -> None:
    """Interpreters without the environment or of another one; asked for directly, that is an error."""
    (tmp_path / "sees.py").write_text("import sys; print(any('_RunFinder' in repr(f) for f in sys.meta_path))")
    starts = "import os, subprocess, sys; run = lambda *a, **e: subprocess.run([sys.executable, *a, 'sees.py'], env="
    starts += "{**os.environ, **e}); run(); run('-E'); run(HF_LOWMEM_OPTIM_RUN='/another')"
    (tmp_path / "starts.py").write_text(starts)
    launched = python(["-m", "hf_lowmem_optim", "run", "starts.py"], tmp_path)
    assert launched.stdout.split() == ["True", "False", "False"]
    code = "import sys; sys.path.insert(0, {!r}); from hf_lowmem_optim.__main__ import main; sys.exit(main({!r}))"
    called = python(["-c", code.format(str(ROOT), ["run", "sees.py"])], tmp_path)
    assert (called.returncode, called.stdout) == (0, "True\n")
    isolated = python(["-I", "-c", code.format(str(ROOT), ["run", "sees.py"])], tmp_path)
    assert (isolated.returncode, isolated.stdout) == (2, "")
    assert "-I, -E and -S" in isolated.stderr


@pytest.mark.slow
def test_trl_starts_accelerate_which_starts_a_training_with_ldadam(tmp_path: Path) -> None:
    pytest.importorskip("trl")
    tokenizers = pytest.importorskip("tokenizers")
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = {word: number for number, word in enumerate(["<unk>", "<pad>", "<eos>", "to", "be", "or", "not"])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    model, data = tmp_path / "model", tmp_path / "data"
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<pad>", eos_token="<eos>"
    ).save_pretrained(model)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(words), num_hidden_layers=1, **sizes)).save_pretrained(model)
    data.mkdir()
    (data / "train.jsonl").write_text('{"text": "to be or not to be"}\n' * 8)
    arguments = f"sft --model_name_or_path {model} --dataset_name {data} --output_dir out --max_steps 2 --use_cpu true"
    arguments += " --bf16 false --report_to none --save_strategy no --num_processes 1 --optim ldadam --optim_args"
    launched = python(["-m", "hf_lowmem_optim", "run", "-m", "trl.cli.main", *arguments.split(), "rank=4"], tmp_path)
    assert launched.returncode == 0, launched.stderr[-3000:]
    assert "train_loss" in launched.stdout
    assert "LDAdam for" in launched.stderr + launched.stdout
