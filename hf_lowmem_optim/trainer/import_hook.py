"""Registers the optim strings whenever transformers is imported, without importing it.

``import hf_lowmem_optim`` must make ``optim="ldadam"`` valid, yet a plain PyTorch user must not pay for (or need)
transformers. So: modules that are already imported are handled at once, the others right after Python has executed
them. This module and ``attachment`` import only the standard library.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

from hf_lowmem_optim.trainer.attachment import (
    CARD_MODULE,
    HANDLERS_MODULE,
    MEMBERS_MODULE,
    TRAINER_MODULE,
    UnsupportedTransformersError,
)

__all__ = ["install"]

_WATCHED = (MEMBERS_MODULE, HANDLERS_MODULE, CARD_MODULE, TRAINER_MODULE)


def _after_import(module: ModuleType) -> None:
    """Add what is ours to ``module``, one of the watched modules."""
    # Imported here: it pulls in torch and the optimizers, which this file must not do before transformers itself has.
    from hf_lowmem_optim.trainer import strings

    try:
        strings.ADDITIONS[module.__name__](module)
    except UnsupportedTransformersError as error:
        # A warning and not an error: whoever uses the optimizers in a plain loop must still be able to import
        # transformers. `register_optimizer_strings()` raises.
        warnings.warn(str(error), RuntimeWarning, stacklevel=2)


class _PostImportFinder(MetaPathFinder):
    """Lets the other finders find the watched modules, then adds a call at the end of their execution."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return the spec of a watched module, or None for every other module."""
        if fullname not in _WATCHED:
            return None
        others = (finder for finder in sys.meta_path if not isinstance(finder, _PostImportFinder))
        for spec in (finder.find_spec(fullname, path, target) for finder in others):
            if spec is not None:
                _call_after_execution(spec)
                return spec
        return None


def _call_after_execution(spec: ModuleSpec) -> None:
    """Make ``spec``'s own loader, which is made anew for every import, call us after it executed the module."""
    loader = spec.loader
    if loader is None or not hasattr(loader, "exec_module"):
        return
    execute = loader.exec_module

    def exec_module(module: ModuleType) -> None:
        execute(module)
        _after_import(module)

    # An attribute of this one loader object: its class, and with it `get_source`, resources and isinstance, stay.
    loader.exec_module = exec_module  # type: ignore[method-assign]


def install() -> None:
    """Register now in what is already imported, and later in what is not. Calling it again changes nothing."""
    # By name: where this module has been imported anew, the finder there is of a class that is not this one.
    others = [f for f in sys.meta_path if (type(f).__module__, type(f).__name__) != (__name__, "_PostImportFinder")]
    sys.meta_path[:] = [_PostImportFinder(), *others]
    for name in _WATCHED:
        module = sys.modules.get(name)
        # A module that is still being executed (someone imports us from inside transformers) has not got its names yet.
        if module is not None and not getattr(module.__spec__, "_initializing", False):
            _after_import(module)
