"""The eager backend's experts: when the hidden layer is kept, and that experts stay apart."""

import math

import naive
import pytest
import torch
from harness.exactness import assert_close, blocks_of
from harness.saved import gradients_and_largest_saved

from dmoe_layer import DMoE
from dmoe_layer.dropout import Dropout
from dmoe_layer.eager import dispatch, experts


@pytest.mark.parametrize("activation", sorted(naive.ACTIVATIONS))
def test_a_kept_hidden_layer_gives_the_same_as_one_computed_again(activation, monkeypatch):
    layer = DMoE(128, hidden_dim=160, n_experts=3, activation=activation, noise="never")
    x = torch.randn(2, 100, 128, requires_grad=True)
    with blocks_of(40):
        found, kept = gradients_and_largest_saved(layer, x)
        # Before its activation; of a gated one both halves.
        assert kept == 2 * 200 * layer.w1_EHD.shape[1]
        monkeypatch.setattr(experts, "keeps_hidden", lambda *_: False)
        again, kept = gradients_and_largest_saved(layer, x)
    assert kept <= 2 * 200
    for a, b in zip(found, again, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("dim", "tokens", "keeps"), [(128, 500, True), (128, 520, False), (96, 40, False)]
)
def test_the_hidden_layer_is_kept_where_it_is_wide_and_no_larger_than_weights_and_gradients(
    dim, tokens, keeps
):
    layer = DMoE(dim, n_experts=2, k=2, noise="never")
    _, kept = gradients_and_largest_saved(layer, torch.randn(1, tokens, dim, requires_grad=True))
    assert (kept == 2 * tokens * 4 * dim) == keeps


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients_no_hidden_layer_is_kept(mode, monkeypatch):
    calls, original = [], experts._experts
    monkeypatch.setattr(experts, "_experts", lambda *a: calls.append(a[-1]) or original(*a))
    layer, x = DMoE(128), torch.randn(1, 9, 128)
    with mode():
        layer(x)
    layer.requires_grad_(False)(x)
    assert calls == [False, False]
    layer.requires_grad_(True)(x)
    assert calls[2]


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("spoiled", [0, 1])
def test_a_nan_in_one_expert_reaches_no_gradient_of_the_other(spoiled, keep, monkeypatch):
    monkeypatch.setattr(experts, "keeps_hidden", lambda *_: keep)
    layer, x = DMoE(128, n_experts=2, k=1, noise="never"), torch.randn(1, 301, 128)
    with torch.no_grad():
        layer.w1_bias[spoiled] = math.nan
    with blocks_of(50):
        y, routing = layer(x, return_routing=True)
        assert len(routing.expert_indices.unique()) == 2
        y.sum().backward()
    for parameter in (layer.w1_EHD, layer.w1_bias, layer.w2_EDH, layer.w2_bias):
        assert torch.isfinite(parameter.grad[1 - spoiled]).all()
    assert torch.isnan(layer.w2_EDH.grad[spoiled]).all()


def test_chunks_and_blocks_change_no_result():
    # The last chunk is shorter than the others, whose rows still stand in the buffers.
    layer = DMoE(24, n_experts=3, dropout=0.0, noise="never")
    x = torch.randn(2, 101, 24, requires_grad=True)
    one, _ = gradients_and_largest_saved(layer, x)
    with blocks_of(16):
        many, _ = gradients_and_largest_saved(layer, x)
    for i, (a, b) in enumerate(zip(many, one, strict=True)):
        assert_close(a, b, torch.float32, f"tensor {i}")


def test_dropout_of_many_entries_is_drawn_again_to_the_bit():
    rows, seed = torch.ones(1000, 701), torch.tensor(7)
    first = Dropout(0.3, seed, rows.device)(rows.clone())
    assert torch.equal(first, Dropout(0.3, seed, rows.device)(rows.clone()))
    assert abs(first.mean().item() - 0.7) < 0.003
    # Each part of the entries has other draws.
    parts = first.view(-1).split(2**18)
    assert len(parts) == 3
    assert not torch.equal(parts[0], parts[1])


def test_a_block_has_at_most_so_many_rows_however_narrow_the_hidden_layer_is(monkeypatch):
    sizes, original = [], dispatch.Block
    monkeypatch.setattr(dispatch, "Block", lambda *b: sizes.append(b[2] - b[1]) or original(*b))
    DMoE(2, n_experts=1, k=1, hidden_dim=1)(torch.randn(1, 40_000, 2))
    assert max(sizes) == experts.MOST_BLOCK_ROWS
