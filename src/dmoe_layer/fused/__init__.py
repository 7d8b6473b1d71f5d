"""The fused backend: Triton kernels on a GPU. Imported only where it is chosen."""
