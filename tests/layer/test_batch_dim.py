"""batch_dim: a layer in a model whose samples stand on another axis than the first."""

import pytest
import torch
from harness.layers import A3

from dmoe_layer import DMoE, routing
from dmoe_layer.backend import explain

LAYOUTS = {  # batch_dim, channel_dim, and how to come there from (batch, height, width, dim)
    "sequence first": (1, -1, lambda x: x.flatten(1, 2).transpose(0, 1)),
    "channels before the batch": (2, 1, lambda x: x.flatten(1, 2).permute(1, 2, 0)),
    "channels first of all": (1, 0, lambda x: x.permute(3, 0, 1, 2)),
    "batch last": (3, 0, lambda x: x.permute(3, 1, 2, 0)),
    "batch between, channels from behind": (1, -2, lambda x: x.permute(1, 0, 3, 2)),
}


def pair(batch_dim, channel_dim, **options):
    options = {"attribute_sizes": 3, "noise": "never", "dropout": 0.0, **options}
    plain = DMoE(6, **options)
    other = DMoE(6, batch_dim=batch_dim, channel_dim=channel_dim, **options)
    other.load_state_dict(plain.state_dict())
    return plain, other


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("name", LAYOUTS)
def test_a_layout_gives_what_its_samples_give(name, residual):
    batch_dim, channel_dim, move = LAYOUTS[name]
    plain, other = pair(batch_dim, channel_dim, residual=residual)
    x = torch.randn(3, 2, 4, 6, requires_grad=True)
    mask = torch.rand(3, 2, 4) < 0.6
    moved_mask = move(mask[..., None]).squeeze(channel_dim)
    for masks in ((None, None), (mask, moved_mask)):
        true, true_routing = plain(x, A3, mask=masks[0], return_routing=True)
        moved = move(x.detach()).requires_grad_()
        found, routed = other(moved, A3, mask=masks[1], return_routing=True)
        assert torch.equal(found, move(true))
        assert found.stride() == torch.empty_like(moved).stride()
        assert all(torch.equal(a, b) for a, b in zip(routed, true_routing, strict=True))
        weight = torch.randn_like(true)
        (dx,) = torch.autograd.grad((true * weight).sum(), x)
        (found * move(weight)).sum().backward()
        assert torch.equal(moved.grad, move(dx))


def test_as_many_tokens_as_samples_are_not_mixed_up():
    plain, other = pair(1, -1)
    x = torch.randn(3, 3, 6)
    with routing(A3):
        assert torch.equal(other(x), plain(x.transpose(0, 1)).transpose(0, 1))
        assert not torch.equal(other(x), plain(x))


def test_a_lazy_layer_learns_its_width_beside_the_batch():
    layer = DMoE(batch_dim=1, attribute_sizes=3)
    assert layer(torch.randn(5, 3, 6), A3).shape == (5, 3, 6)
    assert layer.dim == 6
    with pytest.raises(ValueError, match="batch of 5"):
        DMoE(attribute_sizes=3)(torch.randn(5, 3, 6), A3)


def test_a_compiled_layer_has_it_too():
    _, other = pair(1, -1)
    x = torch.randn(5, 3, 6)
    compiled = torch.compile(other, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x, A3), other(x, A3))
    assert explain(other, x).startswith("eager")


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"batch_dim": -1}, ValueError, "batch_dim: got -1"),
        ({"batch_dim": "1"}, TypeError, "batch_dim: got '1'"),
        ({"batch_dim": True}, TypeError, "batch_dim: got True"),
        ({"batch_dim": 1, "channel_dim": 1}, ValueError, "channel_dim: got 1"),
    ],
)
def test_axes_that_do_not_fit_are_refused_at_construction(options, error, words):
    with pytest.raises(error, match=words):
        DMoE(6, **options)


def test_an_input_without_room_for_both_axes_is_refused():
    words = "expected .* with dim at channel_dim={} and the batch at batch_dim=1"
    for channel_dim, shape in ((-1, (5, 6)), (-2, (6, 6, 6)), (0, (6,)), (-4, (6, 3, 5))):
        with pytest.raises(ValueError, match=words.format(channel_dim)):
            DMoE(6, batch_dim=1, channel_dim=channel_dim)(torch.randn(shape))
