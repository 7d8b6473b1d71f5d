"""insert_after on other people's convolutional networks: where layers stand, and at work."""

import pytest
import torch
from harness.convnets import ATTRIBUTES, INSTALLED, ZOO, flat, images, made, outputs

from dmoe_layer import DMoE, insert_after, routing


@pytest.mark.parametrize("name", INSTALLED)
def test_each_stage_gets_one_layer_of_its_width_and_the_model_trains(name):
    net = ZOO[name]
    model, x, (names, _) = made(name)
    assert names == [f"{stage}.moe" for stage in net.stages]
    layers = [model.get_submodule(each) for each in names]
    assert [layer.dim for layer in layers] == list(net.stages.values())
    assert all(layer.residual and layer.channel_dim == 1 and layer.training for layer in layers)
    with routing(ATTRIBUTES) as r:
        loss = flat(model(x)).square().mean() + 0.01 * r.load_balancing_loss()
    assert len(r.routings) == len(layers)
    loss.backward()
    for parameter_name, parameter in model.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert parameter.grad.isfinite().all(), parameter_name
    for layer in layers:
        assert layer.w2_EDH.grad.any()
        assert not layer.router.w_A2ED.grad[1].any()  # an attribute value that is absent


@pytest.mark.parametrize("name", INSTALLED)
def test_experts_answers_are_added_to_what_the_stage_gives(name):
    """By hand: the same network, in which hooks add what loose layers of equal weights answer."""
    net = ZOO[name]
    model, x, (names, undo) = made(name)
    found = outputs(model.eval(), x)
    layers = {}
    for stage, each in zip(net.stages, names, strict=True):
        layer = DMoE(net.stages[stage], n_experts=4, k=2, attribute_sizes=3, channel_dim=1).eval()
        layer.load_state_dict(model.get_submodule(each).state_dict())
        layers[stage] = layer
    undo()
    assert (flat(model(x)) - found).abs().max() > 1e-3
    for stage, layer in layers.items():
        model.get_submodule(stage).register_forward_hook(
            lambda _, args, output, layer=layer: output + layer(output)
        )
    torch.testing.assert_close(outputs(model, x), found)


@pytest.mark.parametrize("name", INSTALLED)
def test_a_sample_is_routed_by_its_own_attribute(name):
    model, x, (names, _) = made(name)
    model.eval()
    with torch.no_grad():
        for each in names:  # strong experts and routers, so that their answers are seen at the end
            for parameter in model.get_submodule(each).parameters():
                parameter.mul_(3)
        together = outputs(model, x)
        for sample, own, other in ((0, 0, 2), (1, 2, 0)):
            alone = x[sample : sample + 1]
            found = outputs(model, alone, torch.tensor([own]))[0]
            torch.testing.assert_close(together[sample], found, rtol=1e-4, atol=1e-5)
            elsewhere = outputs(model, alone, torch.tensor([other]))[0]
            assert (elsewhere - found).abs().max() > 1e-3 * found.abs().max()


@pytest.mark.parametrize("name", INSTALLED)
def test_zero_init_leaves_the_output_what_it_was(name):
    model, x = ZOO[name].build().eval(), images(name)
    before = flat(model(x))
    insert_after(model, ZOO[name].pattern, attribute_sizes=3, zero_init=True)
    assert torch.equal(outputs(model, x), before)


@pytest.mark.parametrize("name", INSTALLED)
def test_names_stay_and_weights_of_the_network_without_experts_load(name):
    fresh = ZOO[name].build()
    state, modules = fresh.state_dict(), [each for each, _ in fresh.named_modules()]
    model, _, (names, _) = made(name)
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected
    # A network may list a module under several names (DynUNet does): all are the layer's.
    layers = [n for n, m in model.named_modules(remove_duplicate=False) if isinstance(m, DMoE)]
    assert {*names} <= {*layers}
    assert {key.rsplit(".moe.", 1)[0] + ".moe" for key in missing} == {*layers}
    assert [key for key in model.state_dict() if key not in missing] == list(state)
    kept = [each for each, _ in model.named_modules() if ".moe" not in each]
    assert kept == modules


@pytest.mark.parametrize("name", INSTALLED)
def test_undo_leaves_the_model_as_it_was(name):
    torch.manual_seed(1)
    model, x = ZOO[name].build().eval(), images(name)
    tensors, modules = dict(model.state_dict(keep_vars=True)), [*model.named_modules()]
    shown, before = repr(model), flat(model(x))
    _, undo = insert_after(model, ZOO[name].pattern, attribute_sizes=3)
    assert repr(model) != shown
    for _ in range(2):  # a second time does nothing
        undo()
        assert repr(model) == shown
        assert [*model.named_modules()] == modules
        now = model.state_dict(keep_vars=True)
        assert list(now) == list(tensors)
        assert all(now[key] is tensors[key] for key in now)
        assert not any(module._forward_hooks for module in model.modules())
        assert torch.equal(flat(model(x)), before)
    insert_after(model, ZOO[name].pattern, attribute_sizes=3)
