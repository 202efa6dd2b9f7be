"""The optimizers, one file each, readable next to the paper."""

from hf_lowmem_optim.optimizers.base import LowMemoryOptimizer
from hf_lowmem_optim.optimizers.ldadam import LDAdam, ldadam_state, ldadam_update_

__all__ = ["LDAdam", "LowMemoryOptimizer", "ldadam_state", "ldadam_update_"]
