"""The numba versions of the operations; importing this package registers all of them."""

from hf_lowmem_optim.ops.cpu import block_quant, block_topk, packed_triangles, sparse_window

__all__ = ["block_quant", "block_topk", "packed_triangles", "sparse_window"]
