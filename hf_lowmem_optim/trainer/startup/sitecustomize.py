"""What python runs first in each process of ``hf-lowmem-optim run``: our strings are there if transformers is imported.

Most processes never import it, so this imports only what starts as fast as python itself (``typing`` does not).
"""

from __future__ import annotations

import os
import sys
from importlib.machinery import ModuleSpec, PathFinder

FOLDER = __file__.rpartition(os.sep)[0]  # …/hf_lowmem_optim/trainer/startup


class _RunFinder:
    """Imports this package right before transformers; ``sys.path`` of a process need not lead to it."""

    @staticmethod
    def find_spec(name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        """Return the spec of the package that ``run`` belongs to, or None for every other module."""
        if name == "transformers":
            from hf_lowmem_optim.trainer.launcher import suggest_names

            suggest_names()
        return PathFinder.find_spec(name, [FOLDER.rsplit(os.sep, 3)[0]]) if name == "hf_lowmem_optim" else None


def _run_next(folders: list[str]) -> None:
    """Run the ``sitecustomize`` that python would have run without this one, and leave its name to it."""
    spec = PathFinder.find_spec("sitecustomize", folders)
    if spec is not None and spec.loader is not None:
        from importlib.util import module_from_spec

        sys.modules["sitecustomize"] = module = module_from_spec(spec)
        spec.loader.exec_module(module)


# PYTHONPATH also reaches the interpreters of other environments, where this package may not even be importable.
if os.environ.get("HF_LOWMEM_OPTIM_RUN") == os.path.realpath(sys.prefix):
    sys.meta_path.insert(0, _RunFinder)
if FOLDER in sys.path:
    behind = sys.path[sys.path.index(FOLDER) + 1 :]  # those before it have had their turn
    sys.path.remove(FOLDER)
    _run_next(behind)
