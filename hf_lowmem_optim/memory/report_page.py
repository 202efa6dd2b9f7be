"""A run's report as one page of HTML that needs nothing else: no script, no other file, no address.

Bars are elements of the page, so that their text keeps its size on a telephone; curves are SVG.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from itertools import cycle
from typing import Any

from hf_lowmem_optim.memory.byte_sizes import format_bytes
from hf_lowmem_optim.memory.report import report_text

__all__ = ["report_page"]

#: Legible on white and on black.
_PALETTE = ("#3f7fc4", "#d98a2b", "#2a9d8f", "#c0564a", "#8a63ad", "#7f9f3f", "#4fa3c7", "#b8739a")
_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 420, 210, 56, 10, 10, 28
_MAX_MARKED = 60

_STYLE = """
:root { color-scheme: light dark; --text: #1d2530; --soft: #5b6675; --line: #d8dde4; --page: #ffffff; --card: #f5f7f9 }
@media (prefers-color-scheme: dark) {
  :root { --text: #e6eaf0; --soft: #9aa6b5; --line: #333c48; --page: #12161c; --card: #1a2028 } }
* { box-sizing: border-box }
body { margin: 0 auto; padding: 20px 16px 40px; max-width: 1180px; color: var(--text); background: var(--page);
  font: 15px/1.5 system-ui, sans-serif; overflow-wrap: anywhere }
h1 { font-size: 22px; margin: 0 } h2 { font-size: 17px; margin: 28px 0 10px } h3 { font-size: 14px; margin: 0 0 4px }
p { margin: 4px 0; color: var(--soft) }
.curves { display: grid; gap: 16px; grid-template-columns: repeat(auto-fit, minmax(min(420px, 100%), 1fr)) }
figure { margin: 0; padding: 12px; border: 1px solid var(--line); border-radius: 8px; background: var(--card) }
figure p { font-size: 13px }
svg { width: 100%; height: auto; display: block } svg text { fill: var(--soft); font-size: 12px }
.grid { stroke: var(--line) } .curve { fill: none; stroke-width: 1.8; stroke-linejoin: round }
.row { margin: 8px 0 12px } .row div:first-child { display: flex; justify-content: space-between; gap: 12px }
.bar { display: flex; height: 20px; background: var(--card); border-radius: 4px; overflow: hidden }
.mark { display: inline-block; width: 10px; height: 10px; border-radius: 2px; margin-right: 6px }
.legend { display: flex; flex-wrap: wrap; gap: 2px 18px; font-size: 13px }
pre { padding: 12px; border: 1px solid var(--line); border-radius: 8px; background: var(--card); margin: 0;
  overflow-x: auto; font: 13px/1.5 ui-monospace, monospace; overflow-wrap: normal }
"""

#: The curves: title, and keys of the log with what they are called.
_CURVES: tuple[tuple[str, dict[str, str]], ...] = (
    ("Loss", {"loss": "training", "eval_loss": "evaluation"}),
    ("Learning rate", {"learning_rate": "learning rate"}),
    ("Gradient norm", {"grad_norm": "gradient norm"}),
    ("Seconds per training step", {"seconds": "seconds"}),
)


def report_page(report: Mapping[str, Any]) -> str:
    """Write a report that :func:`~hf_lowmem_optim.memory.report.load_report` has read as a page of HTML."""
    title, _, numbers = report_text(report).partition("\n")
    history = [*report["log_history"], *(report.get("step_seconds") or ())]
    ratio = report["adamw_fp32_bytes"] / max(report["measured"]["total_bytes"], 1)
    curves = "".join(_curve(name, keys, history) for name, keys in _CURVES)
    policy = "default-src 'none'; style-src 'unsafe-inline'"
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<style>{_STYLE}</style>
</head>
<body>
<h1>{escape(title)}</h1>
<p>AdamW with float32 moments takes {ratio:.3g} times as much</p>
<h2>Memory by component</h2>
{_bars(report)}
<h2>The run</h2>
<div class="curves">{curves}</div>
<h2>In numbers</h2>
<pre>{escape(numbers)}</pre>
</body>
</html>
"""


def _bars(report: Mapping[str, Any]) -> str:
    """Return a bar each for what was predicted, for what was measured and for AdamW, and their legend."""
    predicted, measured = report.get("predicted"), report["measured"]
    bars = {} if predicted is None else {"predicted": predicted["component_bytes"]}
    adamw = {"two float32 moments": report["adamw_fp32_bytes"]}
    bars |= {"measured": measured["component_bytes"], "AdamW with float32 moments": adamw}
    names = dict.fromkeys(name for bar in bars.values() for name in bar)
    colors = dict(zip(names, cycle(_PALETTE), strict=False))
    largest = max(1, *(sum(bar.values()) for bar in bars.values()))
    rows = []
    for label, bar in bars.items():
        parts = "".join(
            f'<div title="{escape(name)}: {format_bytes(count)}" '
            f'style="width:{100 * count / largest:.3f}%;background:{colors[name]}"></div>'
            for name, count in bar.items()
        )
        total = format_bytes(sum(bar.values()))
        rows.append(
            f'<div class="row"><div><span>{label}</span><b>{total}</b></div><div class="bar">{parts}</div></div>'
        )
    marks = "".join(
        f'<span><i class="mark" style="background:{colors[name]}"></i>{escape(name)}</span>' for name in names
    )
    return "\n".join([*rows, f'<div class="legend">{marks}</div>'])


def _curve(title: str, keys: Mapping[str, str], history: Sequence[Mapping[str, Any]]) -> str:
    """Return a figure with a line for each key that was logged."""
    lines = {label: points for key, label in keys.items() if (points := _points(history, key))}
    if not lines:
        return f"<figure><h3>{title}</h3><p>nothing logged</p></figure>"
    xs, ys = zip(*(point for points in lines.values() for point in points), strict=True)
    (left, right), (low, high) = _range(xs), _range(ys)

    def place(x: float, y: float) -> tuple[float, float]:
        across, up = (x - left) / (right - left), (y - low) / (high - low)
        return _LEFT + across * (_WIDTH - _LEFT - _RIGHT), _HEIGHT - _BOTTOM - up * (_HEIGHT - _TOP - _BOTTOM)

    drawn, base = [], _HEIGHT - _BOTTOM
    for part in range(5):
        y = base - part / 4 * (base - _TOP)
        drawn.append(f'<path class="grid" d="M{_LEFT} {y:.1f}H{_WIDTH - _RIGHT}"/>')
        text = _number(low + part / 4 * (high - low))
        drawn.append(f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{text}</text>')
    for x, anchor in ((left, "start"), (right, "end")):
        drawn.append(f'<text x="{place(x, low)[0]:.1f}" y="{_HEIGHT - 8}" text-anchor="{anchor}">step {x:g}</text>')
    last = []
    for color, (label, points) in zip(_PALETTE, lines.items(), strict=False):
        # what falls on the same tenth of a unit is drawn once
        places = dict.fromkeys(f"{x:.1f} {y:.1f}" for x, y in (place(*point) for point in points))
        drawn.append(f'<path class="curve" stroke="{color}" d="M{"L".join(places)}"/>')
        for point in points if len(points) <= _MAX_MARKED else ():
            x, y = place(*point)
            what = f"step {point[0]:g}: {_number(point[1])}"
            drawn.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.4" fill="{color}"><title>{what}</title></circle>')
        mark = f'<i class="mark" style="background:{color}"></i>'
        last.append(f"<span>{mark}{label}: last {_number(points[-1][1])}</span>")
    picture = f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{title}">{"".join(drawn)}</svg>'
    return f'<figure><h3>{title}</h3>{picture}<p class="legend">{"".join(last)}</p></figure>'


def _points(history: Sequence[Mapping[str, Any]], key: str) -> list[tuple[float, float]]:
    """Return steps and values of a key; text, NaN and numbers beyond every axis have no place."""
    pairs = [(entry.get("step"), entry.get(key)) for entry in history]
    return [
        (float(x), float(y))
        for x, y in pairs
        if all(isinstance(each, (int, float)) and abs(each) < 1e300 for each in (x, y))
        and x is not None
        and y is not None
    ]


def _number(value: float) -> str:
    """Write a number with three digits, in five to eight characters."""
    if value and not 1e-2 <= abs(value) < 1e5:
        mantissa, _, exponent = f"{value:.2e}".partition("e")
        return f"{mantissa}e{int(exponent)}"
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"


def _range(values: Sequence[float]) -> tuple[float, float]:
    """Return the ends of an axis, which are not the same."""
    low, high = min(values), max(values)
    span = 0.0 if high - low > 1e-9 * max(abs(low), abs(high)) else abs(low) or 1.0
    return low - span, high + span
