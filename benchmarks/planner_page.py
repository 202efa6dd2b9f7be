"""Write the planner's page, docs/planner/index.html, with plans of all presets; takes some minutes.

With ``--template`` the data stays, and only the page around it is written anew.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from hf_lowmem_optim.trainer.plan_model import shown_on_terminal
from hf_lowmem_optim.trainer.planner_data import model_data, page_of, template_with
from hf_lowmem_optim.trainer.presets import PRESETS

PAGE = Path(__file__).parent.parent / "docs" / "planner" / "index.html"
#: The first is shown first.
MODELS = sorted(PRESETS, key=lambda name: name != "llama-3.1-8b")


def main() -> None:
    """Plan for all models, or keep the data, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--template", action="store_true", help="keep the data")
    if parser.parse_args().template:
        (data,) = re.findall(r"^const DATA = (\{.*\});$", PAGE.read_text(encoding="utf-8"), re.M)
        PAGE.write_text(template_with(data), encoding="utf-8")
    else:
        models = {name: model_data(name) for name in shown_on_terminal(MODELS, "planning")}
        PAGE.write_text(page_of(models), encoding="utf-8")


if __name__ == "__main__":
    main()
