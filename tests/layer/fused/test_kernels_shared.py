"""What the experts' kernels share: the tile map, dropout's bits, offsets of 64 bits, the sums."""

from unittest import mock

import pytest
import torch
from harness.kernels import CALL, HERE, OPTIONS, check_all, expert_tiles, pair, triton

from dmoe_layer.fused import call, launch, narrow, router, wide

pytestmark = pytest.mark.usefixtures("poisoned")

SMALL = {"n_experts": 2, "k": 2, "hidden_dim": 20}
ONE = {"batch": 1, "values": [[2]], "tokens": 17}


@pytest.mark.parametrize(("tokens", "n_experts", "k"), [(700, 5, 3), (16, 64, 8), (300, 1, 1)])
def test_the_sort_leaves_the_map_of_tiles(tokens, n_experts, k):
    x, w = torch.randn(2, tokens // 2, 8, device=HERE), torch.randn(1, 2, n_experts, 8, device=HERE)
    b = torch.zeros(1, 2, n_experts, device=HERE)
    *_, offsets, tiles, _, _ = router._fused_route(x, w, b, None, None, k, None, False)
    assert torch.equal(tiles, expert_tiles(offsets))
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
@pytest.mark.parametrize("chunk", [2, 4])
def test_one_launch_sums_the_chunks_of_all_four_gradients(chunk, block, monkeypatch):
    monkeypatch.setattr(launch, "sum_block", lambda _: block)
    rows = (0, 5, 1, 150)  # of these, more chunks than a program takes at a time
    offsets = torch.tensor((0, *rows), device=HERE).cumsum(0)
    chunks = [-(-n // chunk) for n in rows]
    # Shares past the last chunk are nobody's.
    shapes = ((5, 130), (5,), (130, 3), (130,))
    shares = [torch.randn(sum(chunks) + 2, *shape, device=HERE) for shape in shapes]
    with mock.patch.object(launch, "launch", wraps=launch.launch) as spy:
        found = launch.sum_chunks(offsets, chunk, shares)
    assert spy.call_count == 1
    for one, share in zip(found, shares, strict=True):
        parts = share[: sum(chunks)].split(chunks)
        torch.testing.assert_close(one, torch.stack([part.sum(dim=0) for part in parts]))


@pytest.mark.parametrize("module", [narrow, wide])
def test_gradients_of_weights_alone_take_no_memory_for_those_of_rows(module):
    dim, dtype = (24, torch.bfloat16) if module is narrow else (130, torch.float32)
    layer, _ = pair(dim=dim, n_experts=2, dtype=dtype, attribute_sizes=None)
    layer.router.requires_grad_(False)
    y = layer(torch.randn(1, 16, dim, device=HERE, dtype=dtype))
    with mock.patch.object(call.ExpertCall, "pair_sums", side_effect=AssertionError):
        y.sum().backward()
    assert layer.w1_EHD.grad is not None
