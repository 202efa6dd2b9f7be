"""The planner's page: what is in it, and what a browser shows, is what plan_memory gives."""

from __future__ import annotations

import functools
import html
import json
import random
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from hf_lowmem_optim import OPTIMIZERS, ModelOptions, plan_memory
from hf_lowmem_optim.__main__ import main
from hf_lowmem_optim.memory.plots import COLORS

PAGE = Path(__file__).parents[2] / "docs" / "planner" / "index.html"
DATA: dict[str, Any] = json.loads(re.search(r"^const DATA = (\{.*\});$", PAGE.read_text(), re.M)[1])
#: Those that are planned in well under a second.
QUICK = ("minilm-l6", "bert-base", "qwen2.5-0.5b", "llama-3.2-1b")


class Choice(NamedTuple):
    """What somebody chooses on the page; ``way`` is its value there."""

    model: str
    way: str
    setting: int
    gpus: str
    layerwise: bool
    tokens: str
    checkpointing: bool


def choices(count: int) -> list[Choice]:
    """Random choices, the same each time, no setting twice."""
    chance, found = random.Random(0), []
    for number in range(count):
        model = chance.choice(QUICK)
        ways = DATA["models"][model]["ways"]
        index = chance.randrange(len(ways))
        quantized = "quantized" in ways[index] and chance.random() < 0.5
        setting = (number * 7) % len(DATA["settings"])
        layerwise = DATA["settings"][setting][0] in DATA["layerwise"] and chance.random() < 0.4
        tokens = chance.choice(["", *ways[index].get("activations", {})])
        plans = ways[index]["gpus"]
        known = [count for count in plans if not layerwise or plans[count]["layerwise_steps"][setting] is not None]
        gpus = chance.choice(known)
        way = f"{index}+4bit" if quantized else str(index)
        found.append(Choice(model, way, setting, gpus, layerwise, tokens, chance.random() < 0.5))
    return found


@functools.cache
def planned(choice: Choice) -> tuple[int, dict[str, int]]:
    """The total and the state's components, from plan_memory."""
    index, _, quantized = choice.way.partition("+")
    way = DATA["models"][choice.model]["ways"][int(index)]
    name, text = DATA["settings"][choice.setting]
    name += "_layerwise" * choice.layerwise
    batch = {"seq_len": int(choice.tokens), "checkpointing": choice.checkpointing} if choice.tokens else {}
    options = ModelOptions(dtype=way["dtype"], lora=way["lora"] or None, quantize=quantized or None, **batch)
    sharding = "fsdp" if choice.gpus != "1" else "ddp"
    shared = {"gpus": int(choice.gpus), "sharding": sharding}
    plan = plan_memory(choice.model, name, optim_args=text or None, options=options, **shared)
    (row,) = plan.optimizers
    state = dict(row.state.component_bytes) if name in OPTIMIZERS else {"state": row.state.total_bytes}
    return plan.total_bytes(row), state


def test_the_page_needs_nothing_else_and_is_small() -> None:
    content = PAGE.read_text()
    assert len(content.encode()) <= 2**20
    assert not re.search(r"(src|href)=.?(https?:)?//|@import|fetch\(|XMLHttp", content)
    template = Path(__file__).parents[2] / "hf_lowmem_optim" / "memory" / "planner_page.html"
    head, tail = template.read_text().split("/*DATA*/null")
    assert content.startswith(head) and content.endswith(tail), "run python benchmarks/planner_page.py"
    for model in DATA["models"].values():
        for way in model["ways"]:
            assert all(len(plans["rows"]) == len(DATA["settings"]) for plans in way["gpus"].values())


@pytest.mark.parametrize("choice", choices(20), ids=str)
def test_the_data_of_the_page_are_the_planner_s(choice: Choice) -> None:
    """Without a browser: each number that the page adds up."""
    index, _, quantized = choice.way.partition("+")
    way = DATA["models"][choice.model]["ways"][int(index)]
    plans = way["gpus"][choice.gpus]
    step, *pairs = plans["rows"][choice.setting]
    state = {DATA["components"][key]: count for key, count in zip(pairs[::2], pairs[1::2], strict=True)}
    active = way["activations"][choice.tokens][choice.checkpointing] if choice.tokens else 0
    weights = sum((way["quantized"] if quantized else plans["weights"]).values())
    total, components = planned(choice)
    assert state == components
    if choice.layerwise:
        step = plans["layerwise_steps"][choice.setting]
    if choice.layerwise and choice.gpus == "1":
        assert total == weights + max(plans["largest_gradient"], active) + sum(state.values()) + step
    else:
        assert total == weights + sum(plans["gradients"].values()) + sum(state.values()) + max(step or 0, active)


def shown(tmp_path: Path, script: str) -> Any:
    """Return what a script in the page prints there as JSON, in Chromium without a window."""
    chromium = shutil.which("chromium") or pytest.skip("needs Debian's chromium")
    page = tmp_path / "page.html"
    report = f"const result = (() => {{{script}}})(); document.body.textContent = 'RESULT' + JSON.stringify(result);"
    page.write_text(PAGE.read_text().replace("</body>", f"<script>{report}</script></body>"))
    command = [chromium, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom", page.as_uri()]
    text = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    return json.loads(html.unescape(re.search(r"RESULT(.*)</body>", text, re.S)[1]))


def test_a_browser_shows_the_planner_s_bytes(tmp_path: Path) -> None:
    """Each choice as a user makes it; and a plan that is pasted, with an optimizer and settings of its own."""
    plan = plan_memory("minilm-l6", ["ldadam", "ldadam_layerwise", "adafactor"], optim_args="rank=24")
    tried = [(*choice, DATA["settings"][choice.setting][0]) for choice in choices(20)]
    script = f"""
      const choose = (id, value) => {{ $(id).value = value; $(id).dispatchEvent(new Event("change")); }};
      const mark = (id, value) => {{ $(id).checked = value; $(id).dispatchEvent(new Event("change")); }};
      const paste = (text) => {{ $("paste").value = text; $("paste").dispatchEvent(new Event("input")); }};
      const rows = () => [...document.querySelectorAll("#parts tr")].map((row) => row.dataset);
      const parts = () => rows().map(({{part, bytes}}) => [part, +bytes]);
      const seen = () => [+$("verdict").dataset.bytes, parts(), $("code").textContent, $("wrong").textContent];
      const found = {json.dumps(tried)}.map(([model, way, setting, gpus, layerwise, tokens, checkpointing, name]) => {{
        choose("model", model); choose("way", way); choose("gpus", gpus); choose("method", name);
        choose("setting", setting); choose("tokens", tokens); mark("checkpointing", checkpointing);
        if (!$("layerwise").disabled) mark("layerwise", layerwise);
        return seen();
      }});
      paste({json.dumps(json.dumps(plan.to_dict()))});
      found.push(...[0, 1, 2].map((index) => {{ choose("method", chosen().settings[index][0]); return seen(); }}));
      paste('{{"model_type": "llama"}}');
      return [found, $("wrong").textContent];"""
    found, refusal = shown(tmp_path, script)
    for choice, (total, rows, code, _) in zip(choices(20), found[:20], strict=True):
        state = {part.removeprefix("state: "): count for part, count in rows if part.startswith("state: ")}
        assert (total, state) == planned(choice) and total == sum(count for _, count in rows), choice
        assert ('_layerwise"' in code) == choice.layerwise and "learning_rate=" in code
    for row, (total, _, code, wrong) in zip(plan.optimizers, found[20:], strict=True):
        assert total == plan.total_bytes(row) and wrong == "", row.name
        assert f'optim="{row.name}"' in code and ("rank=24" in code) == row.registered
    assert "learning_rate=5e-5,  # 2.5 ×" in found[20][2] and "This is a configuration" in refusal


def test_every_component_has_a_colour_of_its_own_in_pictures() -> None:
    assert set(DATA["components"]) - {"state"} <= COLORS.keys()
    assert len(set(COLORS.values())) == len(COLORS)


def test_the_command_writes_the_page_for_any_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = {"model_type": "bert", "architectures": ["BertForMaskedLM"], "vocab_size": 1000, **sizes}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert main(["plan", str(tmp_path), "--optim", "ldadam", "--html", str(tmp_path / "out.html")]) == 0
    assert "ldadam" in capsys.readouterr().out
    content = (tmp_path / "out.html").read_text()
    (model,) = json.loads(re.search(r"^const DATA = (\{.*\});$", content, re.M)[1])["models"].values()
    plans = model["ways"][1]["gpus"]["1"]
    plan = plan_memory(tmp_path, "ldadam", optim_args="rank=8")
    assert plans["weights"] == plan.weights.weight_bytes
    assert sum(plans["rows"][0][2::2]) == plan["ldadam"].state.total_bytes


def test_the_page_works_by_keyboard_and_on_a_telephone() -> None:
    chromium = shutil.which("chromium") or pytest.skip("needs Debian's chromium")
    api = pytest.importorskip("playwright.sync_api")
    with api.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page, errors = browser.new_page(viewport={"width": 390, "height": 900}), list[str]()
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("request", lambda request: errors.append(request.url) if not request.url.startswith("file:") else None)
        page.goto(PAGE.as_uri())
        # another model, and a setting from the table
        page.select_option("#model", "minilm-l6")
        page.focus("#model")
        before = page.input_value("#model")
        page.keyboard.press("ArrowUp")
        page.keyboard.press("Home")
        assert page.input_value("#model") == next(iter(DATA["models"])) != before
        page.focus("#all button")
        page.keyboard.press("Enter")
        # nothing is wider than a telephone
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        browser.close()
    assert errors == []
