"""Benchmarks: the layer beside other ways to compute it. ``python -m benchmarks`` runs them."""

import os

# The profiler announces each start and stop on stderr; this must be set before torch is loaded.
os.environ.setdefault("KINETO_LOG_LEVEL", "6")
