"""The methods, one file each, to be read beside the paper."""

from hf_lowmem_optim.engine.optimizer import LowMemoryOptimizer
from hf_lowmem_optim.optimizers.dash import Dash
from hf_lowmem_optim.optimizers.dct_adamw import DCTAdamW
from hf_lowmem_optim.optimizers.ldadam import LDAdam
from hf_lowmem_optim.optimizers.lordo import LoRDO
from hf_lowmem_optim.optimizers.lowrank_mfac import LowRankMFAC
from hf_lowmem_optim.optimizers.microadam import MicroAdam
from hf_lowmem_optim.optimizers.sparse_ggt import SparseGGT
from hf_lowmem_optim.optimizers.sparse_mfac import SparseMFAC
from hf_lowmem_optim.optimizers.trion import Trion

__all__ = [
    "DCTAdamW",
    "Dash",
    "LDAdam",
    "LoRDO",
    "LowMemoryOptimizer",
    "LowRankMFAC",
    "MicroAdam",
    "SparseGGT",
    "SparseMFAC",
    "Trion",
]
