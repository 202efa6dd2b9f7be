"""The command line: what it prints, and exit status 2 with a reason for what is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from hf_lowmem_optim.__main__ import main
from hf_lowmem_optim.memory.table import llama_2_7b_tensors, optimizer_table
from hf_lowmem_optim.registry import OPTIMIZERS

README = (Path(__file__).parent.parent / "README.md").read_text()


def test_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list"]) == 0
    printed = capsys.readouterr().out
    assert all(f"| `{name}` |" in printed for name in OPTIMIZERS)


def test_the_table_in_the_readme_is_what_the_command_prints() -> None:
    assert optimizer_table() in README


def test_the_reference_shapes_are_those_of_llama_2_7b() -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(tie_word_embeddings=False))
    shapes = sorted(tuple(p.shape) for p in model.parameters())
    linear, dense = llama_2_7b_tensors()
    assert sorted([*linear.values(), *dense.values()]) == shapes


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["demo", "--optim", "ldamm", "--steps", "1"], "ldadam"),
        (["demo", "--optim", "ldadam", "--optim-args", "rnak=4", "--steps", "1"], "rank"),
        (["demo", "--optim", "ldadam", "--learning-rate", "-1", "--steps", "1"], "lr=-1.0"),
    ],
)
def test_wrong_arguments_of_the_demo(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("argv", [[], ["lsit"], ["demo", "--steps", "0"], ["demo", "--steps", "many"]])
def test_wrong_commands(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(argv)
    assert stopped.value.code == 2
    assert capsys.readouterr().err
