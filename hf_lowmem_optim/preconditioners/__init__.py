"""Inverses of full-matrix statistics, reduced to the small Gram matrix of a window of gradients."""
