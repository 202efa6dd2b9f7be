"""The optimizers, one file each, readable next to the paper."""

from hf_lowmem_optim.optimizers.base import LowMemoryOptimizer
from hf_lowmem_optim.optimizers.ldadam import LDAdam, ldadam_state, ldadam_update_
from hf_lowmem_optim.optimizers.lowrank_mfac import LowRankMFAC, lowrank_mfac_state
from hf_lowmem_optim.optimizers.microadam import MicroAdam, microadam_state, microadam_update_
from hf_lowmem_optim.optimizers.sparse_ggt import SparseGGT, sparse_ggt_state
from hf_lowmem_optim.optimizers.sparse_mfac import SparseMFAC, sparse_mfac_state

__all__ = [
    "LDAdam",
    "LowMemoryOptimizer",
    "LowRankMFAC",
    "MicroAdam",
    "SparseGGT",
    "SparseMFAC",
    "ldadam_state",
    "ldadam_update_",
    "lowrank_mfac_state",
    "microadam_state",
    "microadam_update_",
    "sparse_ggt_state",
    "sparse_mfac_state",
]
