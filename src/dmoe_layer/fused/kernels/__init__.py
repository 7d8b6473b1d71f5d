"""The Triton kernels: ``@triton.jit`` functions only. The files of ``fused`` launch them.

Shape letters as in ``layer``; in capitals inside a kernel they are the padded sizes of a block,
powers of two, and the true sizes are ``n_experts``, ``dim``, ``hidden``. Offsets into the
experts' tensors are int32 where these have fewer than 2³¹ numbers, and int64 where a batch of
volumes has more; the router's are int64 throughout.
"""
