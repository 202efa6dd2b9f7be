"""EFCP with GGT in float64 numpy, by definition: the root of a D × D matrix. Imports nothing from the package.

arXiv 2306.06098, algorithm 1; GGT: arXiv 1806.02958.
"""

from __future__ import annotations

import numpy as np

from tests.reference.mfac import Array, ReferenceMFAC


class ReferenceGGT(ReferenceMFAC):
    """As M-FAC; only the preconditioner differs."""

    def precondition(self, c: Array) -> Array:
        """u = (eps·I + (GᵀG)^½)⁻¹c."""
        squares, V = np.linalg.eigh(self.G.T @ self.G)
        root = V @ np.diag(np.sqrt(np.clip(squares, 0, None))) @ V.T
        return np.linalg.solve(self.damping * np.eye(c.size) + root, c)
