"""SparseGGT: full-matrix AdaGrad with a window of sparse gradients (arXiv 2306.06098; GGT: arXiv 1806.02958).

Window, compression, state and the other lines are those of ``sparse_mfac.py``; only the preconditioner differs:

5. u ← (eps·I + (GᵀG)^½)⁻¹c = Gᵀw with the window's rows as G, eps = ``damping``, and the weights w from GGᵀ alone
"""

from __future__ import annotations

import functools
from dataclasses import replace

from hf_lowmem_optim.engine.optimizer import LowMemoryOptimizer
from hf_lowmem_optim.ops.gram import ggt_weights
from hf_lowmem_optim.optimizers.sparse_mfac import SparseMFAC, sparse_update_

__all__ = ["SparseGGT", "sparse_ggt_update_"]

sparse_ggt_update_ = functools.partial(sparse_update_, row_weights=ggt_weights)
"""One step of SparseGGT on the tensors of one system: see :func:`sparse_update_`."""


class SparseGGT(LowMemoryOptimizer):
    """SparseGGT: the gradient, preconditioned by full-matrix AdaGrad over a window of sparse gradients.

    Options, parameter groups, absent and non-finite gradients are as in
    :class:`~hf_lowmem_optim.optimizers.sparse_mfac.SparseMFAC`. ``damping`` is GGT's eps, added to the singular values
    of the window: it has the unit of a gradient's norm, not of its square. The first step is c/(‖c‖ + eps): its length
    is the learning rate, whatever the size of the gradient; later ones are at most as long.

    Example:
        >>> optimizer = SparseGGT(model.parameters(), lr=1e-2, window=32, density=0.01)
        >>> loss.backward()
        >>> optimizer.step()

    Source: arXiv 2306.06098, algorithm 1 with GGT; arXiv 1806.02958, section 2.
    """

    method = replace(SparseMFAC.method, name="sparse_ggt", coupled_update_=sparse_ggt_update_, captured=False)
