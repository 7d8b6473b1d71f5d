"""The Triton kernels: ``@triton.jit`` functions only. The files of ``fused`` launch them.

Shape letters as in ``layer``; in capitals inside a kernel they are the padded sizes of a block,
powers of two, and the true sizes are ``n_experts``, ``dim``, ``hidden``. Offsets within a tensor
are int32 where none with a row for each pair can have 2³¹ numbers, and int64 where a batch of
volumes has more. The router's are int32 within a tile, and int64 for the tile's first token and for
a chunk's share of a gradient. Those within an expert's weights are always int32.
"""
