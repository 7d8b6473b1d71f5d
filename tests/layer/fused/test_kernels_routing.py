"""The routing kernels: the sort by expert, scores that tie, what backward is left, dropout."""

import math

import pytest
import torch
from harness.kernels import HERE, kernel_dropout, pair
from harness.saved import bytes_of, saved_for_backward

from dmoe_layer import DMoE
from dmoe_layer.fused import router
from dmoe_layer.fused.kernels import routing as kernels
from dmoe_layer.fused.launch import launch, offset_type

pytestmark = pytest.mark.usefixtures("poisoned")


def test_pairs_are_sorted_by_expert_and_then_by_token():
    x = torch.randn(3, 200, 8, device=HERE)
    w, b = torch.randn(2, 2, 5, 8, device=HERE), torch.zeros(2, 2, 5, device=HERE)
    rows = torch.tensor([[0], [1], [0]], device=HERE)
    counts = torch.tensor([140, 0, 460], device=HERE)
    for tokens, per_sample in ((x, None), (x.flatten(0, 1), counts)):
        logits, indices, gates, order, offsets, _, chosen, _ = router._fused_route(
            tokens, w, b, rows, per_sample, 3, None, False
        )
        assert torch.equal(chosen.long(), indices)
        assert torch.equal(order.long(), indices.flatten().argsort(stable=True))
        assert offsets[0].diff().tolist() == indices.flatten().bincount(minlength=5).tolist()
        top = logits.topk(3)
        assert torch.equal(indices, top.indices)
        torch.testing.assert_close(gates, top.values.softmax(dim=-1))


def test_scores_that_are_equal_infinite_or_nan_choose_k_different_experts():
    w = torch.zeros(1, 2, 6, 8, device=HERE)
    for bias in ([0.0] * 6, [-math.inf] * 6, [math.nan] * 6, [1, math.inf, -math.inf, 0, 1, 1],
                 [-1, -2, math.nan, -3, -4, -5], [-1, -2, -math.nan, -3, -4, -5]):  # fmt: skip
        b = torch.zeros(1, 2, 6, device=HERE)
        b[0, 0] = torch.tensor(bias)
        x = torch.zeros(1, 3, 8, device=HERE)
        logits, indices, gates, *_ = router._fused_route(x, w, b, None, None, 4, None, False)
        torch.testing.assert_close(logits[0], b[0, 0], equal_nan=True)
        assert all(len(set(row)) == 4 and max(row) < 6 for row in indices.tolist())
        top = logits.topk(4).values
        torch.testing.assert_close(logits.gather(1, indices), top, equal_nan=True)
        torch.testing.assert_close(gates, top.softmax(dim=-1), equal_nan=True)


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_dropout_keeps_the_share_it_should_and_columns_are_independent(p):
    kept = kernel_dropout(p, torch.zeros(2**12, 2), 8, 24, torch.float64).view(-1, 24) > 0
    share = kept.double().mean()
    assert abs(share - (1 - p)) < 4 * math.sqrt(p * (1 - p) / kept.numel())
    assert torch.corrcoef(kept.double().T).sub(torch.eye(24)).abs().max() < 0.06


@pytest.mark.parametrize(
    ("dtype", "options", "kept"),
    [
        (torch.float32, {}, 4 * 8),
        (torch.bfloat16, {}, 2 * 8),
        (torch.float16, {}, 2 * 8),
        (torch.float32, {"noise": "never"}, 0),
    ],
    ids=str,
)
def test_backward_is_left_the_slope_of_the_noise_and_no_more(dtype, options, kept):
    layer = DMoE(24, attribute_sizes=3, dtype=dtype, backend="triton", **options).to(HERE)
    x = torch.randn(2, 100, 24, device=HERE, dtype=dtype, requires_grad=True)
    inputs = (x, *layer.parameters())
    with saved_for_backward(*inputs) as saved:
        layer(x, torch.tensor([0, 2]))
    # A slot's place in the order, gate, expert and dropout's bits; slopes. Each sample's row of the
    # table, where each expert's pairs begin, and the map of 400 // 128 + 8 tiles.
    assert bytes_of(saved) == 200 * (2 * 13 + kept) + 2 * 8 + 9 * 8 + 11 * 16


def test_slopes_are_written_only_where_a_gradient_may_want_them(monkeypatch):
    layer, _ = pair(noise="always")
    x, kept, original = torch.randn(2, 18, 16, device=HERE), [], router._route
    monkeypatch.setattr(router, "_route", lambda *a: kept.append(a[-1]) or original(*a))
    layer(x, 0)
    with torch.no_grad():
        layer(x, 0)
    layer.requires_grad_(False)(x, 0)
    layer(x.requires_grad_(), 0)
    layer.router.noise = "never"
    layer(x, 0)
    assert kept == [True, False, False, True, False]


def test_each_row_of_the_table_gets_the_shares_of_all_its_chunks_and_of_no_other():
    chunks, n_experts, dim = 300, 3, 5  # more than one block of chunks, and of numbers
    routers = torch.randint(-1, 4, (chunks, 2), dtype=torch.int32, device=HERE)
    dw, db = (torch.randn(chunks, 2, n_experts, *d, device=HERE) for d in ((dim,), ()))
    for shares in (dw, db):
        shares[(routers == -1).all(dim=1)] = math.nan  # nobody's
    found = [torch.empty(5, *shares.shape[1:], device=HERE) for shares in (dw, db)]
    launch(
        kernels.sum_routers_kernel, (5, 3), dw, dw, db, routers, *found, chunks,
        n_experts=n_experts, dim=dim, OFFSET=offset_type(dw.numel()), ROUTERS=2, CHUNKS=128,
        BLOCK=16,
    )  # fmt: skip
    for ours, shares in zip(found, (dw, db), strict=True):
        for row in range(5):
            times = (routers == row).sum(dim=1)
            true = shares.double()[times > 0] * times[times > 0].view(-1, *[1] * (shares.ndim - 1))
            torch.testing.assert_close(ours[row].double(), true.sum(dim=0), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("call", [router._route, torch.ops.dmoe_layer.fused_route])
def test_a_gradient_through_noise_is_refused_where_its_slopes_were_not_kept(call):
    x, w = torch.randn(1, 20, 8, device=HERE), torch.randn(1, 2, 5, 8, device=HERE)
    b, seed = torch.zeros(1, 2, 5, device=HERE), torch.tensor(3)
    logits, *_ = call(x.requires_grad_(), w, b, None, None, 2, seed, False)
    with pytest.raises(RuntimeError, match="keep_slopes=True to differentiate"):
        logits.sum().backward()
