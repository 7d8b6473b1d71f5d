"""Benchmarks: of the layer, of the 3D network's training step, and a report of the kernels.

``python -m benchmarks``, ``python -m benchmarks.volumes``, ``python -m benchmarks.kernels``.
"""

import os

# The profiler announces each start and stop on stderr; this must be set before torch is loaded.
os.environ.setdefault("KINETO_LOG_LEVEL", "6")
