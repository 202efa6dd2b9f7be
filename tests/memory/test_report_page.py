"""The report as a page: all of the run is on it, it needs nothing else, and nothing in a file becomes markup."""

from __future__ import annotations

import copy
import json
import random
import re
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from hf_lowmem_optim.__main__ import main
from hf_lowmem_optim.memory.report import REPORT_NAME, load_report
from hf_lowmem_optim.memory.report_page import report_page
from tests.test_hostile_input import NUM_MUTANTS, REPORT, mutant

TAGS = [
    "html",
    "head",
    "meta",
    "title",
    "style",
    "body",
    "h1",
    "h2",
    "h3",
    "p",
    "b",
    "i",
    "div",
    "span",
    "figure",
    "pre",
    "svg",
    "path",
    "text",
    "circle",
]
ATTRIBUTES = [
    "lang",
    "charset",
    "http-equiv",
    "content",
    "name",
    "class",
    "style",
    "title",
    "viewbox",
    "role",
    "aria-label",
]
ATTRIBUTES += ["d", "x", "y", "cx", "cy", "r", "fill", "stroke", "text-anchor"]
MARKUP = '<img src="http://x/">&\'"</div></style><script>alert(1)</script>'


class Page(HTMLParser):
    """A page whose tags are all closed, in order, and of the kinds that we write."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: Counter[str] = Counter()
        self.widths: list[float] = []
        self.words: list[str] = []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag != "meta":
            self.open.append(tag)
        self.handle_startendtag(tag, attrs)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in TAGS
        self.tags[tag] += 1
        for name, value in attrs:
            assert name in ATTRIBUTES
            if name == "style" and (width := re.match("width:(.*)%;", value or "")):
                self.widths.append(float(width[1]))
            # no number that a browser cannot draw
            assert name not in ("d", "x", "y", "cx", "cy", "style") or not re.search("nan|inf|e[+-]", value or "")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] != ["style"]:
            self.words.append(data)


def test_the_page_has_all_of_the_run(tmp_path: Path, capsys: Any) -> None:
    history = [{"step": 10 * i, "loss": 3.0 / i, "learning_rate": 1e-3 / i, "grad_norm": 1.0} for i in range(1, 9)]
    report = {**REPORT, "log_history": [*history, {"step": 80, "eval_loss": 0.5, "train_loss": 1.0}]}
    report["step_seconds"] = [{"step": 10 * i, "seconds": 0.25} for i in range(1, 9)]
    (tmp_path / REPORT_NAME).write_text(json.dumps(report))
    assert main(["report", str(tmp_path), "--html", str(tmp_path / "out.html")]) == 0
    content = (tmp_path / "out.html").read_text(encoding="utf-8")
    page = Page(content)
    assert not re.search("https?:|//|url\\(|@import", content)
    # of 24 bytes: predicted 12 of basis; measured 4 and 8; AdamW all of them
    assert page.widths == [50.0, 16.667, 33.333, 100.0]
    assert page.tags["svg"] == 4 and page.tags["circle"] == 4 * 8 + 1
    text = " ".join(page.words)
    for expected in (
        "training: last 0.375",
        "evaluation: last 0.5",
        "last 1.25e-4",
        "last 0.25",
        "step 80",
        "nothing",
    ):
        assert (expected in text) == (expected != "nothing")
    # what the command prints is there, too
    numbers = capsys.readouterr().out.partition("\n")[2].strip("\n")
    assert numbers in page.words


def test_nothing_in_a_file_becomes_markup(tmp_path: Path) -> None:
    hostile = copy.deepcopy(REPORT)
    hostile |= {"optimizer": MARKUP, "settings": {MARKUP: MARKUP}, "log_history": [{"step": 1, "loss": MARKUP}]}
    hostile["groups"] = [{"num_parameters": 1, "description": MARKUP}] * 2
    for state in ("predicted", "measured"):
        hostile[state]["component_bytes"] = {MARKUP: 12}
        hostile[state]["dtype_bytes"] = {MARKUP: 12}
    hostile["step_memory"]["device"] = MARKUP
    page = Page(report_page(hostile))
    assert " ".join(page.words).count("<script>alert(1)</script>") == 10
    assert page.tags["svg"] == 0

    chance, file, pages = random.Random(0), tmp_path / REPORT_NAME, 0
    for _ in range(NUM_MUTANTS):
        file.write_bytes(mutant(REPORT, chance))
        try:
            report = load_report(tmp_path)
        except ValueError:
            continue
        assert Page(report_page(report)).tags["html"] == 1
        pages += 1
    assert pages > NUM_MUTANTS // 20
