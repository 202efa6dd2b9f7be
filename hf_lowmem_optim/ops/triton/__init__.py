"""The Triton versions of the operations; importing this package registers all of them."""

from hf_lowmem_optim.ops.triton.block_quant import dequantize_into, quantize_into
from hf_lowmem_optim.ops.triton.block_topk import select_all
from hf_lowmem_optim.ops.triton.ldadam import descend_weights_, move_moments_
from hf_lowmem_optim.ops.triton.ldadam_step import later_step_
from hf_lowmem_optim.ops.triton.low_rank import orthonormal_columns
from hf_lowmem_optim.ops.triton.lowrank_mfac import compress_, descend_by_factors_
from hf_lowmem_optim.ops.triton.sparse_window import update_all
from hf_lowmem_optim.ops.triton.window_products import combine, descend_all, gram_rows

__all__ = [
    "combine",
    "compress_",
    "dequantize_into",
    "descend_all",
    "descend_by_factors_",
    "descend_weights_",
    "gram_rows",
    "later_step_",
    "move_moments_",
    "orthonormal_columns",
    "quantize_into",
    "select_all",
    "update_all",
]
