"""The eager backend: plain PyTorch, for any device and dtype."""
