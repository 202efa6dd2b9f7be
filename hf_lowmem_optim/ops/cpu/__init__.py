"""The numba versions of the operations; importing this package registers all of them."""
