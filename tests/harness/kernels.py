"""Runs the Triton backend, in Triton's interpreter or on a GPU, and draws what its kernels draw.

A test file that imports this is skipped where there is no Triton.
"""

import itertools
from functools import partial

import pytest
import torch

from dmoe_layer import DMoE
from dmoe_layer.operators import draw_seed

from .exactness import assert_close, run_both

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")

from dmoe_layer.fused.call import draw_kept  # noqa: E402
from dmoe_layer.fused.kernels import noise  # noqa: E402
from dmoe_layer.fused.kernels.common import TILE  # noqa: E402
from dmoe_layer.fused.launch import block_size, launch  # noqa: E402

HERE = "cuda" if torch.cuda.is_available() else "cpu"
# Rows that a test's own kernel takes at once: a GPU's compiler needs minutes for thousands.
BLOCK = 256


@triton.jit
def _noise_kernel(out_ptr, seed, n_experts, TOKENS: tl.constexpr, EXPERTS: tl.constexpr):
    t = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    e = tl.arange(0, EXPERTS)
    drawn = noise.normal_noise(seed, t, EXPERTS)
    at = t[:, None] * n_experts + e[None, :]
    tl.store(out_ptr + at, drawn, mask=(e < n_experts)[None, :])


def kernel_noise(noisy, tokens, n_experts, dtype):
    """What the routing kernel draws in the call that follows, (T, E)."""
    if not noisy:
        return None
    blocks, seed = -(-tokens // BLOCK), int(draw_seed())
    noise = torch.empty(blocks * BLOCK, n_experts, device=HERE)
    sizes = {"TOKENS": BLOCK, "EXPERTS": block_size(n_experts, 8)}
    launch(_noise_kernel, (blocks,), noise, noise, seed, n_experts, **sizes)
    return noise[:tokens].cpu()


def kernel_dropout(p, indices_TK, n_experts, dim, dtype):
    """The factors of dropout in the call that follows, (T, k, D)."""
    pairs, dropped, seed = indices_TK.numel(), round(p * 2**16), draw_seed()
    words = draw_kept(torch.empty(pairs, dtype=torch.int32, device=HERE), dim, p, seed)
    bits = words.cpu().unsqueeze(-1) >> torch.arange(32) & 1
    scale = 2**16 / (2**16 - dropped) if dropped < 2**16 else 1.0
    bits = bits.flatten(1)[:, :dim].to(dtype)
    # They are those of the pairs as sorted by expert.
    of_pairs = torch.empty_like(bits)
    of_pairs[indices_TK.cpu().flatten().argsort(stable=True)] = bits
    return of_pairs.view(*indices_TK.shape, dim) * scale


def expert_tiles(counts):
    """Where each expert's pairs and tiles begin, (2, E + 1), and the map of the tiles.

    ``counts`` are the numbers of pairs of each expert. Computed without a kernel.
    """
    pairs = list(itertools.accumulate(counts, initial=0))
    rows = [
        (e, first, min(first + TILE.value, stop), 0)
        for e, (start, stop) in enumerate(itertools.pairwise(pairs))
        for first in range(start, stop, TILE.value)
    ]
    tiles = [sum(row[0] < e for row in rows) for e in range(len(pairs))]
    rows += [(0, 0, 0, 0)] * (pairs[-1] // TILE.value + len(counts) - len(rows))
    offsets = torch.tensor([pairs, tiles], dtype=torch.int32, device=HERE)
    return offsets, torch.tensor(rows, dtype=torch.int32, device=HERE)


run_kernels = partial(run_both, device=HERE, noise=kernel_noise, dropout=kernel_dropout)

OPTIONS = {
    "dim": 24, "hidden_dim": None, "n_experts": 8, "k": 2, "attribute_sizes": 3,
    "unknown": "error", "activation": "relu", "bias": True, "noise": "train", "dropout": 0.1,
    "residual": False, "backend": "triton",
}  # fmt: skip
CALL = {
    "batch": 3, "tokens": 21, "values": [[0], [2], [2]], "training": True, "masked": False,
    "seed": 5,
}  # fmt: skip


def assert_same_rows(found, true):
    """Bits on a GPU; in the interpreter, whose GEMM is numpy's, what rounding allows."""
    if HERE == "cuda":
        assert torch.equal(found, true)
    torch.testing.assert_close(found, true, rtol=1e-5, atol=1e-6)


def check_all(options, call, dtype):
    for what, (found, true) in run_kernels(options, call, dtype).items():
        assert_close(found, true, dtype, what)


def pair(**options):
    """A layer with the kernels, and the same with the eager backend."""
    ours = DMoE(**{"dim": 16, "hidden_dim": 24, "attribute_sizes": 3, **options}, backend="triton")
    eager = DMoE(**{"dim": 16, "hidden_dim": 24, "attribute_sizes": 3, **options}, backend="eager")
    eager.load_state_dict(ours.state_dict())
    return ours.to(HERE), eager.to(HERE)
