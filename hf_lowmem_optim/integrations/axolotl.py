"""A plugin of axolotl: ``plugins: [hf_lowmem_optim.integrations.axolotl.LowMemoryOptimizers]``.

Loading it makes the optim strings valid, so that ``optimizer: ldadam`` works in axolotl's configuration; ``optim_args``
and ``optim_target_modules`` go where the Trainer has them.
"""

from __future__ import annotations

from typing import Any

from axolotl.integrations.base import BasePlugin

from hf_lowmem_optim.trainer.callbacks import OptimizerStateMemoryCallback
from hf_lowmem_optim.trainer.strings import register_optimizer_strings

__all__ = ["LowMemoryOptimizers"]


class LowMemoryOptimizers(BasePlugin):  # type: ignore[misc]  # axolotl is not there to be read
    """Registers the optim strings, and reports on the optimizer's state."""

    def register(self, cfg: Any) -> None:
        """Make the strings valid; axolotl calls this before it checks the configuration.

        Raises:
            UnsupportedTransformersError: The installed transformers lacks what the strings are attached to.
        """
        register_optimizer_strings()

    def add_callbacks_post_trainer(self, cfg: Any, trainer: Any) -> list[Any]:
        """Add the callback that logs the bytes of state and writes the report."""
        return [OptimizerStateMemoryCallback()]
