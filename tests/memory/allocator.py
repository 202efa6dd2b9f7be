"""The benchmarks' count of what an action allocates for a moment: the tests' bounds are on what the tables show."""

from interleave import peak_bytes

__all__ = ["peak_bytes"]
