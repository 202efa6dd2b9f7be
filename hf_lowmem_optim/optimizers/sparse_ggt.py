"""SparseGGT: full-matrix AdaGrad with a window of sparse gradients (arXiv 2306.06098; GGT: arXiv 1806.02958).

Window, compression and state are those of ``sparse_mfac.py``, the rest of the algorithm is in ``preconditioned.py``;
only the preconditioner differs:

5. u ← (eps·I + (GᵀG)^½)⁻¹c with the window's rows as G, eps = ``damping``

The state is the table of ``sparse_mfac.py``.
"""

from __future__ import annotations

from typing import ClassVar

from hf_lowmem_optim.optimizers.sparse_mfac import SparseMFAC, sparse_mfac_state
from hf_lowmem_optim.preconditioners.ggt import ggt_weights

__all__ = ["SparseGGT", "sparse_ggt_state"]

sparse_ggt_state = sparse_mfac_state


class SparseGGT(SparseMFAC):
    """SparseGGT: the gradient, preconditioned by full-matrix AdaGrad over a window of sparse gradients.

    The arguments are those of :class:`~hf_lowmem_optim.optimizers.sparse_mfac.SparseMFAC`, and so are parameter
    groups, absent and non-finite gradients. ``damping`` is GGT's eps, added to the singular values of the window: it
    has the unit of a gradient's norm, not of its square. The first step is c/(‖c‖ + eps): its length is the learning
    rate, whatever the size of the gradient; later ones are at most as long.

    Example:
        >>> optimizer = SparseGGT(model.parameters(), lr=1e-2, window=32, density=0.01)
        >>> loss.backward()
        >>> optimizer.step()

    Source: arXiv 2306.06098, algorithm 1 with GGT; arXiv 1806.02958, section 2.
    """

    name: ClassVar[str] = "sparse_ggt"
    weights_function = staticmethod(ggt_weights)
