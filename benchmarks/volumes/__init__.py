"""The 3D network's training step, by patch: `python -m benchmarks.volumes`."""
