"""What the experts' kernels share: the tile map, dropout's bits, offsets of 64 bits, the sums."""

import itertools
from unittest import mock

import pytest
import torch
from harness.kernels import CALL, HERE, OPTIONS, check_all, expert_tiles, pair, triton

from dmoe_layer.fused import call, launch, narrow, router, wide
from dmoe_layer.fused.kernels import common
from dmoe_layer.tensors import ExpertWeights

pytestmark = pytest.mark.usefixtures("poisoned")

TILE = common.TILE.value
SMALL = {"n_experts": 2, "k": 2, "hidden_dim": 20}
ONE = {"batch": 1, "values": [[2]], "tokens": 17}


@pytest.mark.parametrize(("tokens", "n_experts", "k"), [(700, 5, 3), (16, 64, 8), (300, 1, 1)])
def test_the_sort_leaves_the_map_of_tiles(tokens, n_experts, k):
    x, w = torch.randn(2, tokens // 2, 8, device=HERE), torch.randn(1, 2, n_experts, 8, device=HERE)
    b = torch.zeros(1, 2, n_experts, device=HERE)
    _, experts, *_, offsets, tiles, _, _ = router._fused_route(x, w, b, None, None, k, None, False)
    counts = experts.flatten().bincount(minlength=n_experts).tolist()
    for found, expected in zip((offsets, tiles), expert_tiles(counts), strict=True):
        assert torch.equal(found, expected)
    rows = (tiles[:, 2] - tiles[:, 1]).tolist()
    assert sum(rows) == tokens * k


@pytest.mark.parametrize(("dim", "fused", "k"), [(24, True, 1), (24, True, 2), (130, False, 2)])
def test_offsets_of_64_bits_give_what_those_of_32_give(dim, fused, k, monkeypatch):
    seen = []

    def record(numbers, real=launch.offset_type):
        seen.append(real(numbers))
        return seen[-1]

    monkeypatch.setattr(call, "offset_type", record)
    monkeypatch.setattr(narrow, "fuses_backward", lambda *_: fused)
    layer, _ = pair(dim=dim, n_experts=2, k=k)
    x, a = torch.randn(1, 17, dim, device=HERE, requires_grad=True), torch.tensor([1])
    found = []
    for least in (2**31, 0):
        monkeypatch.setattr(launch, "LEAST_INT64", least)
        torch.manual_seed(0)
        y = layer(x, a.to(HERE))
        found.append([y, *torch.autograd.grad(y.square().sum(), [x, *layer.parameters()])])
    half = len(seen) // 2
    assert half
    assert seen == [triton.language.int32] * half + [triton.language.int64] * half
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_so_many_numbers_as_an_int32_cannot_count_have_offsets_of_64_bits():
    assert launch.offset_type(2**31 - 1) == triton.language.int32
    assert launch.offset_type(2**31) == triton.language.int64


@pytest.mark.parametrize(("dim", "activation"), [(20, "relu"), (20, "gelu"), (100, "relu")])
def test_what_stays_in_registers_equals_the_naive_loop_in_fp32_too(dim, activation, monkeypatch):
    # Compiled, it is slower than the wide kernels, so that it is never so; formulas show.
    monkeypatch.setattr(narrow, "fuses_forward", lambda *_: True)
    monkeypatch.setattr(narrow, "fuses_backward", lambda *_: True)
    options = {**OPTIONS, **SMALL, "dim": dim, "hidden_dim": 70, "activation": activation}
    check_all(options, {**CALL, **ONE}, torch.float32)


@pytest.mark.parametrize(
    ("dim", "dtype"), [(24, torch.bfloat16), (24, torch.float32), (130, torch.float32)]
)
def test_dropout_is_drawn_once_a_step_and_not_at_all_in_eval(dim, dtype):
    layer, _ = pair(dim=dim, n_experts=2, dtype=dtype, attribute_sizes=None)
    x = torch.randn(1, 16, dim, device=HERE, dtype=dtype, requires_grad=True)
    with mock.patch.object(call, "launch", wraps=launch.launch) as spy:
        layer(x).sum().backward()
        drawn = [c for c in spy.call_args_list if c.args[0] is call.draw_kept_kernel]
        assert len(drawn) == 1
        spy.reset_mock()
        layer.eval()(x).sum().backward()
        assert all(c.args[0] is not call.draw_kept_kernel for c in spy.call_args_list)


def test_sums_over_pairs_take_no_memory_of_their_own_and_those_of_one_no_launch():
    x = torch.zeros(5, 8)
    for k in (1, 2, 3):
        sums = mock.Mock(x=x, x_dtype=x.dtype, k=k, dim=8, empty=lambda *shape: torch.zeros(shape))
        sums.offset_opts = lambda width: {}
        y, rest = call.ExpertCall.pair_sums(sums)
        assert y.shape == x.shape
        assert rest is None if k == 1 else rest.shape == (5 * (k - 1), 8)
        with mock.patch.object(call, "launch") as spy:
            assert call.ExpertCall.sum_pairs(sums, y, rest) is y
        assert spy.call_count == (k > 1)


@pytest.mark.parametrize("block", [128, 512])
@pytest.mark.parametrize(("window", "first_tile"), [(1, 0), (2, 0), (3, 2), (4, 7)])
def test_one_launch_sums_the_chunks_of_all_four_gradients(window, first_tile, block, monkeypatch):
    monkeypatch.setattr(launch, "sum_block", lambda _: block)
    # Of the fourth expert there are more chunks than a program takes at once.
    pairs = (0, 5 * TILE, 1, 150 * TILE - 1, 0)
    offsets, tiles = expert_tiles(pairs)
    windows = launch.Windows.of(len(tiles) - first_tile, window * TILE - 5, first_tile)
    assert windows.tiles == window
    # A window past the last tile, and one whose first tile is another expert's, are not its own.
    owner = [int(e) if stop else None for e, _, stop, _ in tiles[first_tile::window].tolist()]
    owner += range(len(pairs))
    shapes = ((5, 130), (5,), (130, 3), (130,))
    shares = [torch.randn(len(owner), *shape, device=HERE) for shape in shapes]
    with mock.patch.object(launch, "launch", wraps=launch.launch) as spy:
        found = launch.sum_chunks(offsets, windows, shares)
    assert spy.call_count == 1
    for one, share in zip(found, shares, strict=True):
        for e, total in enumerate(one):
            own = [share[c] for c, of in enumerate(owner) if of == e]
            torch.testing.assert_close(total, torch.stack(own).sum(dim=0))


def wide_call(counts, dim):
    """A call of fp32 experts of ``dim`` hidden units, which have so many pairs each, k = 1."""
    offsets, tiles = expert_tiles(counts)
    n_experts, rows = len(counts), sum(counts)
    order = torch.randperm(rows, device=HERE).to(torch.int32)
    shapes = ((n_experts, dim, dim), (n_experts, dim)) * 2
    weights = ExpertWeights(*(torch.randn(shape, device=HERE) for shape in shapes))
    x, gates = torch.randn(rows, dim, device=HERE), torch.rand(rows, 1, device=HERE)
    pairs = router.SortedPairs(order, offsets, tiles)
    return call.ExpertCall(x, pairs, gates, weights, "relu", 0.0, None, torch.float32)


@pytest.mark.parametrize(
    ("window", "split"), [(1, True), (2, True), (3, True), (50, True), (1, False)]
)
@pytest.mark.parametrize(
    "counts",
    [
        # An expert with no pairs; one that begins and ends in a window.
        [0, 5, 3 * TILE, 1, 0, 6 * TILE + 7, TILE - 1],
        # One that goes on behind the tiles of a segment.
        [5, 3, 11 * TILE],
    ],
)
def test_each_row_is_in_one_chunk_of_its_expert(counts, window, split, monkeypatch):
    # The segments, of 300 rows, end within tiles.
    monkeypatch.setattr(wide, "PROGRAMS", 2**30 if split else 1)
    monkeypatch.setattr(wide, "LEAST_ROWS", 300)
    real = launch.Windows.of
    of = staticmethod(lambda tiles, _, first=0: real(tiles, window * TILE, first))
    monkeypatch.setattr(launch.Windows, "of", of)
    experts = wide_call(counts, 16)
    experts.first_rows = 2**30  # so large that a hidden layer is never whole in memory
    segments = list(wide.segments(experts, False))
    experts.first_rows = 16
    assert len(segments) == -(-sum(counts) // 300) > 4
    starts = experts.offsets[0].tolist()
    for segment in segments:
        dz, gated, h = torch.randn(3, segment.rows, 16, device=HERE)
        found = wide._of_weights(experts, segment, dz, gated, h, torch.float32)
        x = experts.x[experts.order.long()][slice(*segment.bounds)]
        for e, (start, stop) in enumerate(itertools.pairwise(starts)):
            own = slice(max(start - segment.first, 0), max(stop - segment.first, 0))
            true = (dz[own].mT @ x[own], dz[own].sum(0), gated[own].mT @ h[own], gated[own].sum(0))
            for one, expected in zip(found, true, strict=True):
                torch.testing.assert_close(one[e], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("module", [narrow, wide])
def test_gradients_of_weights_alone_take_no_memory_for_those_of_rows(module):
    dim, dtype = (24, torch.bfloat16) if module is narrow else (130, torch.float32)
    layer, _ = pair(dim=dim, n_experts=2, dtype=dtype, attribute_sizes=None)
    layer.router.requires_grad_(False)
    y = layer(torch.randn(1, 16, dim, device=HERE, dtype=dtype))
    with mock.patch.object(call.ExpertCall, "pair_sums", side_effect=AssertionError):
        y.sum().backward()
    assert layer.w1_EHD.grad is not None
