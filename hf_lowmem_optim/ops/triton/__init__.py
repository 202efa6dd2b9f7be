"""The Triton versions of the operations; importing this package registers all of them."""

from hf_lowmem_optim.ops.triton import block_quant, block_topk, ldadam, low_rank, sparse_window, window_products

__all__ = ["block_quant", "block_topk", "ldadam", "low_rank", "sparse_window", "window_products"]
