"""How a step is run, once for all methods."""
