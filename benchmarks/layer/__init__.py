"""The layer beside other ways to compute it, by shape: `python -m benchmarks`."""
