"""What mkdocs asks of this site: the docstrings' roles (``:class:`~a.b.C```) are shown as code."""

from __future__ import annotations

import re
from typing import Any

_ROLE = re.compile(r":(?:class|func|mod|meth|attr|data):<code>~?(?P<path>[\w.]*?)(?P<name>\w+)</code>")


def on_page_content(html: str, **_: Any) -> str:
    """Return a page with the last name of what a role refers to."""
    return _ROLE.sub(lambda match: f"<code>{match['name']}</code>", html)
