"""A layer in the place of somebody else's MLP: called as that was, and never told by a tensor."""

import copy
import io
import pickle

import pytest
import torch
from harness.mlps import D, H, assert_close, tokens
from torch import nn
from torch.utils.checkpoint import checkpoint

from dmoe_layer import DMoE, carry_routing, routing, swap_mlps
from dmoe_layer.swap import SwappedDMoE

SITES = torch.tensor([0, 2])


class Mlp(nn.Module):
    """Takes more than its tokens, and can do without."""

    def __init__(self):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(D, H), nn.Linear(H, D)

    def forward(self, hidden_states, height=None, width=None, *, mask=None, lengths=None):
        return self.fc2(torch.relu(self.fc1(hidden_states)))


class Host(nn.Module):
    """Calls its MLP as it is told to."""

    def __init__(self, call, mlp=None):
        super().__init__()
        self.mlp, self.call = mlp or Mlp(), call

    def forward(self, x):
        return x + self.call(self.mlp, x)


def swapped(call, mlp=None, **options):
    host = Host(call, mlp).eval()
    swap_mlps(host, "mlp", **{"attribute_sizes": 3, "n_experts": 4, **options})
    return host


def plain(layer):
    """A DMoE of the same parameters that nobody's block stood for."""
    twin = DMoE(D, hidden_dim=H, n_experts=4, attribute_sizes=3).eval()
    twin.load_state_dict(layer.state_dict())
    return twin


# How hosts call their MLPs without a second tensor.
CALLS = {
    "alone": lambda mlp, x: mlp(x),
    "by name": lambda mlp, x: mlp(hidden_states=x),
    "with its size": lambda mlp, x: mlp(x, 1, 5),
    "with its size by name": lambda mlp, x: mlp(hidden_states=x, height=1, width=5),
    "with no mask": lambda mlp, x: mlp(x, None, mask=None),
    "with a flag": lambda mlp, x: mlp(x, lengths=[1, (2, None)], width={"a": True}),
}


def call_by_name_and_size(mlp, x):
    return mlp(hidden_states=x, height=1, width=5)


@pytest.mark.parametrize("call", CALLS)
def test_it_takes_what_the_host_passes_and_routes_by_the_scope(call):
    host, x = swapped(CALLS[call]), tokens()
    assert isinstance(host.mlp, DMoE)
    with routing(SITES) as r:
        y = host(x)
    assert_close(y, x + plain(host.mlp)(x, SITES))
    assert r.routings[0].attributes.tolist() == [0] * 5 + [2] * 5


def test_state_dict_names_are_those_of_a_dmoe():
    assert [*swapped(CALLS["alone"]).mlp.state_dict()] == [*DMoE(D).state_dict()]


SECOND = torch.tensor([1, 2])


@pytest.mark.parametrize("sizes", [None, 3])
@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda mlp, x: mlp(x, SECOND), "height"),
        (lambda mlp, x: mlp(x, 1, SECOND), "width"),
        (lambda mlp, x: mlp(x, lengths=SECOND), "lengths"),
        (lambda mlp, x: mlp(x, lengths=(None, [SECOND])), "lengths"),
        (lambda mlp, x: mlp(x, width={"a": SECOND}), "width"),
        (lambda mlp, x: mlp(x, mask=torch.ones(2, 5, dtype=torch.bool)), "mask"),
        (lambda mlp, x: mlp(x, hidden_states=x), "hidden_states"),
    ],
)
def test_a_second_tensor_is_refused_by_its_name_and_tells_no_attribute(call, name, sizes):
    host = swapped(call, attribute_sizes=sizes)
    words = rf"got a second tensor, argument '{name}' .*with routing\(attributes\):"
    with routing(SITES) as r, pytest.raises(TypeError, match=words):
        host(tokens())
    assert not r.routings


def test_without_tokens_their_name_is_said():
    for call in (lambda mlp, x: mlp(), lambda mlp, x: mlp(y=x)):
        with pytest.raises(
            TypeError, match=r"got no tokens\. Pass them as the first argument or as hidden_s"
        ):
            swapped(call)(tokens())


def test_what_is_asked_for_by_name_is_given():
    block, x = nn.Sequential(nn.Linear(D, H), nn.ReLU(), nn.Linear(H, D)), tokens()
    layer = swapped(CALLS["alone"], block).mlp
    mask = torch.rand(2, 5) < 0.5
    y, routed = layer(x, attributes=SITES, mask=mask, return_routing=True)
    expected, expected_routed = plain(layer)(x, SITES, mask=mask, return_routing=True)
    assert torch.equal(y, expected)
    assert torch.equal(routed.attributes, expected_routed.attributes)
    assert torch.equal(layer(input=x, attributes=SITES), plain(layer)(x, SITES))


def test_a_block_of_starred_arguments_has_its_tokens_first_or_as_x():
    class Starred(Mlp):
        def forward(self, *args, **kwargs):
            return super().forward(*args, **kwargs)

    host, x = swapped(lambda mlp, x: mlp(x=x, scale=2.0), Starred()), tokens()
    with routing(SITES):
        assert_close(host(x), x + plain(host.mlp)(x, SITES))
    with pytest.raises(TypeError, match="got a second tensor, argument '2'"):
        swapped(lambda mlp, x: mlp(x, SECOND), Starred())(x)


def test_it_compiles_into_one_graph_and_follows_the_scope():
    host, x = swapped(call_by_name_and_size), tokens()
    compiled = torch.compile(host, backend="aot_eager", fullgraph=True)
    for sites in (SITES, torch.tensor([1, 1])):
        with routing(sites):
            assert_close(compiled(x), host(x))


def test_it_is_copied_and_stored_whole():
    host, x = swapped(call_by_name_and_size), tokens()
    stored = io.BytesIO()
    torch.save(host, stored)
    stored.seek(0)
    for twin in (
        copy.deepcopy(host),
        pickle.loads(pickle.dumps(host)),
        torch.load(stored, weights_only=False),
    ):
        assert isinstance(twin.mlp, SwappedDMoE)
        with routing(SITES):
            assert torch.equal(twin(x), host(x))


def test_it_is_recomputed_with_the_attributes_of_its_first_call():
    host = swapped(call_by_name_and_size, noise="never", dropout=0.0).train()
    gradients, same = [], tokens()
    for keep in (True, False):
        x = same.clone().requires_grad_()
        with routing(SITES):
            run = carry_routing(host)
            y = run(x) if keep else checkpoint(run, x, use_reentrant=False)
        y.square().sum().backward()
        gradients.append(x.grad)
    assert torch.equal(*gradients)


@pytest.mark.parametrize("sizes", [None, 3])
def test_tokens_that_were_moved_into_the_batch_name_the_cause_and_the_way(sizes):
    host = swapped(lambda mlp, x: mlp(x.flatten(0, 1)).view_as(x), attribute_sizes=sizes)
    x = tokens()
    words = r"shape \(2,\) for a batch of 10 samples.*attributes.repeat_interleave\(5, dim=0\)"
    with routing(SITES), pytest.raises(ValueError, match=words):
        host(x)
    with routing(SITES.repeat_interleave(5, dim=0)):
        y = host(x)
    if sizes:
        assert_close(y, x + plain(host.mlp)(x, SITES))
    # Where it cannot be the cause it is not said to be.
    with routing(torch.tensor([0, 1, 2])), pytest.raises(ValueError, match=r"every sample\.$"):
        host(x)


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda mlp, x: mlp(x, [0, 2]), "'2'"),
        (lambda mlp, x: mlp(x, attribute=[0, 2]), "'attribute'"),
        (lambda mlp, x: mlp(x, SITES.numpy()), "'2'"),
    ],
)
def test_what_the_old_block_did_not_take_is_refused(call, name):
    host = swapped(call, mlp=nn.Sequential(nn.Linear(D, H), nn.ReLU(), nn.Linear(H, D)))
    with (
        routing(SITES),
        pytest.raises(TypeError, match=f"got an argument {name} .*the parameters input"),
    ):
        host(tokens())
