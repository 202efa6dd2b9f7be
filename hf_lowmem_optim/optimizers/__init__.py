"""The optimizers, one file each, readable next to the paper."""

from hf_lowmem_optim.optimizers.base import LowMemoryOptimizer
from hf_lowmem_optim.optimizers.ldadam import LDAdam, ldadam_state, ldadam_update_
from hf_lowmem_optim.optimizers.microadam import MicroAdam, microadam_state, microadam_update_

__all__ = [
    "LDAdam",
    "LowMemoryOptimizer",
    "MicroAdam",
    "ldadam_state",
    "ldadam_update_",
    "microadam_state",
    "microadam_update_",
]
