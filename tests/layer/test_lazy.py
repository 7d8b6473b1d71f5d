"""A lazy layer learns its width from the first input or a state_dict, and from nothing else."""

import threading

import pytest
import torch
from harness.layers import A3
from helpers import HANG, run_threads
from torch import nn

from dmoe_layer import AttributeRouter, DMoE


def test_a_lazy_layer_learns_its_width_from_the_first_input():
    for channel_dim, shape in ((-1, (3, 5, 6)), (1, (3, 6, 4, 4))):
        layer = DMoE(n_experts=8, k=2, attribute_sizes=3, channel_dim=channel_dim)
        assert layer.dim is None
        y = layer(torch.randn(shape), A3)
        assert y.shape == shape
        assert layer.dim == layer.router.dim == 6
        assert layer.w1_EHD.shape == (8, 24, 6)
        y.sum().backward()
        assert layer.router.w_A2ED.grad is not None
    router = AttributeRouter(None, attribute_sizes=3)
    assert router(torch.randn(3, 5, 6), A3).logits.shape == (15, 8)


def test_an_optimizer_made_before_the_first_call_trains_a_lazy_layer():
    layer = DMoE(attribute_sizes=3)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1)
    x = torch.randn(3, 5, 6)
    layer(x, A3).sum().backward()
    before = layer.w1_EHD.detach().clone()
    optimizer.step()
    assert not torch.equal(layer.w1_EHD, before)


def test_a_lazy_layer_loads_a_state_dict_and_learns_its_width_from_it():
    trained = DMoE(6, attribute_sizes=3).eval()
    x = torch.randn(3, 5, 6)
    lazy = DMoE(attribute_sizes=3).eval()
    lazy.load_state_dict(trained.state_dict())
    assert lazy.dim == 6
    assert torch.equal(lazy(x, A3), trained(x, A3))
    model, lazy_model = (
        nn.Sequential(nn.Linear(6, 6), d) for d in (trained, DMoE(attribute_sizes=3))
    )
    lazy_model.load_state_dict(model.state_dict())
    assert torch.equal(lazy_model[1].w1_EHD, trained.w1_EHD)


@pytest.mark.parametrize("other", [{"n_experts": 4}, {"hidden_dim": 5}, {"attribute_sizes": 2}])
def test_a_lazy_layer_refuses_a_state_dict_of_other_options(other):
    lazy = DMoE(attribute_sizes=3)
    with pytest.raises(RuntimeError, match=r"w1_EHD: found|w_A2ED: found"):
        lazy.load_state_dict(DMoE(6, **{"attribute_sizes": 3, **other}).state_dict())


def test_bad_input_leaves_a_layer_alone_of_which_only_the_router_knows_the_width():
    layer = DMoE(attribute_sizes=3)
    layer.router.load_state_dict(DMoE(8, attribute_sizes=3).router.state_dict())
    with pytest.raises(ValueError, match="expected dim=8"):
        layer(torch.randn(3, 5, 12), A3)
    assert layer.dim is None
    assert layer(torch.randn(3, 5, 8), A3).shape == (3, 5, 8)


def test_a_lazy_layer_first_called_in_inference_mode_trains_later():
    layer, x = DMoE(attribute_sizes=3), torch.randn(3, 5, 6)
    with torch.inference_mode():
        layer(x, A3)
    layer(x, A3).sum().backward()
    assert layer.w1_EHD.grad is not None


def test_reset_parameters_draws_anew_and_leaves_a_lazy_layer_lazy():
    layer, lazy = DMoE(8), DMoE()
    before = layer.w1_EHD.detach().clone()
    for module in (*layer.modules(), *lazy.modules()):
        if any(True for _ in module.parameters(recurse=False)):
            module.reset_parameters()
    assert not torch.equal(layer.w1_EHD, before)
    assert lazy.dim is None


def test_replication_is_open_to_a_layer_that_knows_its_width():
    assert DMoE(6)._replicate_for_data_parallel() is not None
    with pytest.raises(RuntimeError, match="uninitialized"):
        DMoE()._replicate_for_data_parallel()


def test_a_state_dict_of_an_uninitialised_layer_loads_into_another():
    lazy = DMoE(attribute_sizes=3)
    lazy.load_state_dict(DMoE(attribute_sizes=3).state_dict())
    assert lazy.dim is None
    assert lazy(torch.randn(3, 5, 6), A3).shape == (3, 5, 6)


def test_two_threads_may_make_the_first_call_of_a_lazy_layer():
    for _ in range(20):
        layer, barrier = DMoE(attribute_sizes=3).eval(), threading.Barrier(2, timeout=HANG)
        x = torch.randn(3, 5, 6)

        def call(layer=layer, barrier=barrier, x=x):
            barrier.wait()
            return layer(x, A3)

        assert torch.equal(*run_threads(call, call, meeting=barrier))
