"""The Triton versions of the operations; importing this package registers all of them."""
