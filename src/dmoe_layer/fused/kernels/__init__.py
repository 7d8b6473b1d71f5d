"""The Triton kernels: ``@triton.jit`` functions only. The files of ``fused`` launch them.

Shape letters as in ``layer``; in capitals inside a kernel they are the padded sizes of a block,
powers of two, and the true sizes are ``n_experts``, ``dim``, ``hidden``. Offsets into tensors are
int64 throughout: a batch of volumes has more than 2³¹ numbers.
"""
