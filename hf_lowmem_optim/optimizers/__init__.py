"""The optimizers, one file each, readable next to the paper."""

from hf_lowmem_optim.optimizers.base import LowMemoryOptimizer
from hf_lowmem_optim.optimizers.ldadam import LDAdam, ldadam_state, ldadam_update_
from hf_lowmem_optim.optimizers.lowrank_mfac import LowRankMFAC, lowrank_mfac_state
from hf_lowmem_optim.optimizers.sparse_ggt import SparseGGT, sparse_ggt_state
from hf_lowmem_optim.optimizers.sparse_mfac import SparseMFAC, sparse_mfac_state

__all__ = [
    "LDAdam",
    "LowMemoryOptimizer",
    "LowRankMFAC",
    "SparseGGT",
    "SparseMFAC",
    "ldadam_state",
    "ldadam_update_",
    "lowrank_mfac_state",
    "sparse_ggt_state",
    "sparse_mfac_state",
]
