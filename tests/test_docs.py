"""README and docs: their code runs, their figures are those that commands print, their quotes and links are right.

A block of code that is not run says why, in a comment on the line above it:

    <!-- not run: needs a GPU -->
    <!-- run by: tests/test_examples.py -->

``bash``: our commands run in this process. ``python``: the blocks of a page run in one namespace, which has ``model``,
``data`` and ``train.py``. ``text`` under such a block is what the block prints or logs. ``yaml`` is read.
"""

from __future__ import annotations

import ast
import contextlib
import io
import logging
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import render
import torch
import yaml

from hf_lowmem_optim.__main__ import main
from tests.trainer.tiny_models import VOCAB, tiny_llama

ROOT = render.ROOT
PACKAGE = ROOT / "hf_lowmem_optim"
NAMES = {path: str(path.relative_to(ROOT)) for path in render.PAGES}
#: Why a block may be left out.
REASONS = ("needs ", "downloads ", "installs ", "takes ", "a script of your own")
_BLOCK = re.compile(
    r"(?P<mark>^ *<!-- [^\n]* -->\n)?^(?P<indent> *)```(?P<language>\w*)[^\n]*\n(?P<code>.*?)^(?P=indent)```$",
    re.M | re.S,
)


@dataclass(frozen=True)
class Block:
    """A block of code of a page."""

    language: str
    code: str
    mark: str
    line: int

    @property
    def left_out(self) -> bool:
        return self.mark.startswith(("not run:", "run by:"))


def blocks(path: Path) -> Iterator[Block]:
    """Return the blocks of a page, but those of tables, which show the command that wrote the figures."""
    text = render._MARKED.sub(lambda m: "\n" * m[0].count("\n"), path.read_text())
    for match in _BLOCK.finditer(text):
        code = re.sub(f"^{match['indent']}", "", match["code"], flags=re.M)
        mark = (match["mark"] or "").strip().removeprefix("<!-- ").removesuffix(" -->")
        yield Block(match["language"], code, mark, text[: match.start("code")].count("\n"))


@pytest.mark.parametrize("page", render.PAGES, ids=NAMES.get)
def test_tables_and_plans_are_what_the_commands_print(page: Path) -> None:
    """Check what ``python benchmarks/render.py --check`` checks."""
    assert render.render_page(page.read_text()) == page.read_text()


def test_a_block_that_is_not_run_says_why() -> None:
    assert "<!-- table: optimizers -->" in (ROOT / "README.md").read_text()
    for page, name in NAMES.items():
        for block in blocks(page):
            where, (kind, _, reason) = f"{name}:{block.line}", block.mark.partition(": ")
            assert block.language in ("bash", "python", "text", "yaml", "json"), where
            if block.language == "yaml":
                assert isinstance(yaml.safe_load(block.code), dict), where
            elif kind == "run by":
                test = (ROOT / reason).read_text()
                scripts = re.findall(r"\S+\.(?:py|yaml)", block.code) if block.language == "bash" else [page.name]
                assert scripts and all(Path(script).name in test for script in scripts), where
            elif block.left_out:
                assert reason.startswith(REASONS), where
            elif block.language == "bash":  # of these, the next test runs each
                assert block.mark == "test command" or all(map(runs_here, commands(block.code))), where


def commands(code: str) -> list[list[str]]:
    """Return the commands of a block; a line may end in a comment."""
    lines = code.replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def runs_here(words: list[str]) -> bool:
    return words[0] == "hf-lowmem-optim" and words[1] in ("list", "plan", "report")


@pytest.fixture
def namespace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Names and files that every page may use: a small Llama, and rows of tokens in the Trainer's form."""
    monkeypatch.chdir(tmp_path)
    # without a GPU the Trainer takes bf16=True only with use_cpu=True, which no reader needs
    monkeypatch.setattr("transformers.training_args.is_torch_bf16_gpu_available", lambda: True)
    torch.manual_seed(0)
    tokens = torch.randint(0, VOCAB, (8, 16))
    data = [{"input_ids": row, "labels": row} for row in tokens]
    return {"model": tiny_llama(hidden_size=256, intermediate_size=512), "data": data, "__name__": "page"}


@pytest.mark.parametrize("page", render.PAGES, ids=NAMES.get)
def test_the_code_of_a_page_runs(page: Path, namespace: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    said = ""
    for block in blocks(page):
        if block.left_out or block.mark == "test command" or block.language in ("yaml", "json"):
            continue
        if block.language == "text":
            if block.mark == "printed":
                assert [line.rstrip() for line in block.code.splitlines()] == said.splitlines(), f"line {block.line}"
            continue
        out = io.StringIO()
        caplog.clear()
        with contextlib.redirect_stdout(out), caplog.at_level(logging.INFO, "hf_lowmem_optim"):
            if block.language == "bash":
                for words in commands(block.code):
                    assert main(words[1:]) == 0, words
            else:
                exec(compile("\n" * block.line + block.code, str(page), "exec"), namespace)
        said = "\n".join([*caplog.messages, out.getvalue()]).strip()


_LINK = re.compile(r"(?<!!)\[[^\]]*\]\((?!https?:)([^)\s]+)\)|!\[[^\]]*\]\(([^)\s]+)\)")


def test_the_links_of_the_readme_lead_somewhere() -> None:
    """Those of the site are checked by mkdocs."""
    found = [a or b for a, b in _LINK.findall((ROOT / "README.md").read_text())]
    assert len(found) > 10
    for link in found:
        path, _, anchor = link.partition("#")
        assert (ROOT / path).exists(), link
        assert not anchor or re.search(rf"^#+ {anchor.replace('-', '.')}$", (ROOT / path).read_text(), re.M | re.I), (
            link
        )


# --- quoted messages

#: What a logged message says only when it runs; on the page it is an ellipsis as well.
_FORMATTED = re.compile(r"%[.0-9]*[sdrgf]")


def texts(node: ast.AST) -> str:
    """Return a string of the source; what is only known when it runs is an ellipsis."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(texts(part) if isinstance(part, ast.Constant) else "…" for part in node.values)
    return f"{texts(node.left)}{texts(node.right)}" if isinstance(node, ast.BinOp) else "…"


def test_troubleshooting_quotes_messages_that_exist_and_all_warnings() -> None:
    page = (ROOT / "docs" / "troubleshooting.md").read_text()
    quotes = [quote.split("…") for quote in re.findall(r"^- `(.+?)`:?$", page, re.M)]
    assert len(quotes) > 60
    known, warnings = set[str](), set[str]()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, (ast.JoinedStr, ast.Constant, ast.BinOp)):
                known.add(texts(node))
            elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("logger.warning", "warnings.warn"):
                warnings.add(_FORMATTED.sub("…", texts(node.args[0])))
    known |= {_FORMATTED.sub("…", text) for text in known if "%" in text}
    unknown = [quote for quote in quotes if not any(occurs(quote, text) for text in known)]
    assert not unknown
    # a warning that is made elsewhere is a mere ellipsis here
    silent = [text for text in warnings if len(text) > 5 and not any(occurs(quote, text) for quote in quotes)]
    assert not silent


def occurs(quote: list[str], text: str) -> bool:
    """Tell whether the pieces of a quote come one after the other in a text."""
    place = 0
    for piece in quote:
        place = text.find(piece, place) + len(piece)
        if place < len(piece):
            return False
    return True
