"""What insert_after leaves as it was, and the model copied, compiled, checkpointed, masked."""

import contextlib
import copy
import io
import pickle
import random

import pytest
import torch
from harness.convnets import ATTRIBUTES, outputs
from helpers import run_threads
from torch import nn
from torch.utils.checkpoint import checkpoint

from dmoe_layer import DMoE, carry_routing, insert_after, routing


class Block(nn.Module):
    def __init__(self, cin, cout):
        super().__init__()
        self.conv = nn.Conv2d(cin, cout, 3, padding=1)

    def forward(self, x, *, mask=None):
        return self.conv(x).relu()


class Net(nn.Module):
    """One stage that a hook follows, and one that runs the layer as its last child."""

    def __init__(self):
        super().__init__()
        self.stages = nn.ModuleList(
            [Block(1, 4), nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), nn.ReLU())]
        )
        self.head = nn.Conv2d(8, 2, 1)

    def forward(self, x, mask=None):
        x = self.stages[0](x) if mask is None else self.stages[0](x, mask=mask)
        return self.head(self.stages[1](x))


OPTIONS = {"n_experts": 4, "k": 2, "attribute_sizes": 3}


def net(**options):
    model = Net()
    insert_after(model, "stages.*", **OPTIONS, **options)
    return model


def image(batch=2):
    return torch.randn(batch, 1, 8, 8)


def test_hooks_that_are_there_stay_and_see_what_they_saw():
    model, x, seen = Net(), image(), []
    block = model.stages[0]
    block.register_forward_hook(lambda module, args, output: seen.append(output))
    with torch.no_grad():
        model(x)
        _, undo = insert_after(model, "stages.0", n_experts=4)
        block.register_forward_hook(lambda module, args, output: seen.append(output))
        model(x)
        assert len(seen) == 3  # none ran while the layer's width was found
        assert torch.equal(seen[0], seen[1])  # before the experts
        assert not torch.equal(seen[2], seen[1])  # after them
        undo()
        model(x)
    assert all(torch.equal(output, seen[0]) for output in seen[3:])
    assert len(seen) == 5


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copies_have_layers_of_their_own(how):
    model, x = net().eval(), image()
    if how == "deepcopy":
        twin = copy.deepcopy(model)
    elif how == "pickle":
        twin = pickle.loads(pickle.dumps(model))
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    expected = outputs(model, x)
    assert torch.equal(outputs(twin, x), expected)
    with torch.no_grad():
        for parameter in model.stages[0].moe.parameters():
            parameter.zero_()
    assert torch.equal(outputs(twin, x), expected)
    assert not torch.equal(outputs(model, x), expected)


def test_two_pending_forwards_and_two_threads_do_not_mix():
    model, x = net(dropout=0.0, noise="never"), image()
    one, other = torch.tensor([0, 1]), torch.tensor([2, 2])

    def gradient(y):
        return torch.autograd.grad(y.sum(), model.head.weight)[0]

    alone = [gradient(outputs(model, x, attributes)) for attributes in (one, other)]
    assert not torch.equal(*alone)
    pending = [outputs(model, x, attributes) for attributes in (one, other)]
    assert torch.equal(gradient(pending[1]), alone[1])
    assert torch.equal(gradient(pending[0]), alone[0])
    found = run_threads(lambda: outputs(model, x, one), lambda: outputs(model, x, other))
    assert all(torch.equal(*pair) for pair in zip(found, pending, strict=True))


def test_a_compiled_model_stays_in_one_graph_and_follows_insertion_and_undoing():
    model, x = nn.Sequential(Block(1, 4)).eval(), image()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    before = compiled(x)
    _, undo = insert_after(model, "0", **OPTIONS)
    with routing(ATTRIBUTES):
        with_experts = compiled(x)
        torch.testing.assert_close(with_experts, model(x))
    assert not torch.allclose(with_experts, before)
    undo()
    torch.testing.assert_close(compiled(x), before)


@pytest.mark.parametrize("reader", ["carry_routing(stage)", "context_fn"])
def test_a_recomputed_stage_gives_the_same_gradients(reader):
    model, x, results = net(), image().requires_grad_(), []
    for recomputed in (False, True):
        torch.manual_seed(1)
        with routing(ATTRIBUTES) as r:
            y = x
            for stage in model.stages:
                if not recomputed:
                    y = stage(y)
                elif reader == "context_fn":
                    y = checkpoint(stage, y, use_reentrant=False, context_fn=carry_routing)
                else:
                    y = checkpoint(carry_routing(stage), y, use_reentrant=False)
            loss = y.square().mean() + r.load_balancing_loss()
        gradients = torch.autograd.grad(loss, [x, *model.stages.parameters()])
        results.append((len(r.routings), gradients))
    assert results[0][0] == results[1][0] == 2
    assert all(torch.equal(a, b) for a, b in zip(results[0][1], results[1][1], strict=True))


def test_a_mask_with_which_a_module_is_called_is_the_experts_too():
    model, x = net().eval(), image()
    mask = torch.rand(2, 8, 8) < 0.5
    with routing(ATTRIBUTES):
        plain = model.stages[0].conv(x).relu()
        masked, whole = model.stages[0](x, mask=mask), model.stages[0](x)
    changed = (masked != plain).any(1)
    assert torch.equal(changed, mask)
    torch.testing.assert_close(masked.movedim(1, -1)[mask], whole.movedim(1, -1)[mask])


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_new_layer_keeps_dtype_and_mode_and_learns_though_the_model_is_frozen(training, dtype):
    model = Net().to(dtype).train(training).requires_grad_(False)
    insert_after(model, "stages.*", attribute_sizes=3)
    for stage in model.stages:
        assert {parameter.dtype for parameter in stage.moe.parameters()} == {dtype}
        assert {module.training for module in stage.moe.modules()} == {training}
        assert all(parameter.requires_grad for parameter in stage.moe.parameters())
    assert not model.stages[0].conv.weight.requires_grad
    assert outputs(model, image().to(dtype)).dtype == dtype


@pytest.mark.parametrize("where", ["around", "on it"])
def test_a_model_on_meta_stays_there(where):
    with torch.device("meta") if where == "around" else contextlib.nullcontext():
        model = Net().to("meta")
        insert_after(model, "stages.*")
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    assert [stage.moe.dim for stage in model.stages] == [4, 8]


def test_options_win_over_what_is_taken_from_the_module():
    model = Net()
    options = {"k": 1, "hidden_dim": 5, "bias": False, "dtype": torch.float64, "residual": False}
    insert_after(model, "stages.0", **options)
    layer = model.stages[0].moe
    assert (layer.k, layer.hidden_dim, layer.residual) == (1, 5, False)
    assert layer.w1_EHD.dtype == torch.float64


def test_experts_follow_maps_whose_channels_come_last():
    class Stage(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(1, 6, 4, 4)

        def forward(self, x):
            return self.conv(x).movedim(1, -1)

    model = nn.Sequential(Stage())
    insert_after(model, "0", channel_dim=-1, attribute_sizes=3)
    assert model[0].moe.dim == 6
    assert outputs(model, image()).shape == (2, 2 * 2 * 6)


def test_where_the_width_cannot_be_found_the_layer_learns_it_at_the_first_call():
    class Merge(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(4, 6, 1)

        def forward(self, x, skip):
            return self.conv(torch.cat([x, skip], 1))

    for module, inputs in (
        (Merge(), (torch.randn(2, 2, 8, 8), torch.randn(2, 2, 8, 8))),  # a second input
        (nn.Sequential(nn.LazyConv2d(6, 1)), (torch.randn(2, 3, 8, 8),)),
        (nn.MaxPool2d(2), (torch.randn(2, 6, 8, 8),)),  # no convolution
    ):
        model = nn.ModuleDict({"decoder": module})
        (name,), _ = insert_after(model, "decoder", n_experts=4)
        layer = model.get_submodule(name)
        assert layer.dim is None
        assert model["decoder"](*inputs).shape[1] == layer.dim == 6


def test_a_width_is_found_without_a_trace():
    """Of a module that draws numbers, keeps statistics and a weight with a history, and skips."""

    class Skipping(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.utils.spectral_norm(nn.Conv2d(1, 4, 3))
            self.norm = nn.BatchNorm2d(4)

        def forward(self, x):
            if self.training:
                drawn.append(random.random())
            return self.norm(self.conv(x)) * (1 + torch.rand(()).item())

    drawn, model = [], nn.ModuleDict({"stage": Skipping()})
    model["stage"](image())
    kept, drawn = copy.deepcopy(model.state_dict()), []
    torch.manual_seed(0)
    insert_after(model, "stage", n_experts=4, k=2)
    after = torch.rand(1)
    assert model["stage"].moe.dim == 4
    assert model["stage"].training
    assert not drawn
    assert all(torch.equal(model.state_dict()[key], kept[key]) for key in kept)
    torch.manual_seed(0)
    DMoE(4, n_experts=4, k=2, channel_dim=1, residual=True)
    assert torch.equal(after, torch.rand(1))  # the layer's weights, and nothing else


def test_a_shared_module_gets_one_layer_that_runs_wherever_it_stands():
    block = Block(4, 4)
    model = nn.Sequential(nn.Conv2d(1, 4, 1), block, block)
    names, undo = insert_after(model, lambda module: module is block, attribute_sizes=3)
    assert names == ["1.moe"]
    with routing(ATTRIBUTES) as r:
        model(image())
    assert len(r.routings) == 2
    undo()
    assert not hasattr(block, "moe")


def test_two_insertions_are_undone_in_any_order():
    model = Net()
    shown = repr(model)
    (_, first), (_, second) = insert_after(model, "stages.0"), insert_after(model, "stages.1")
    first()
    assert [hasattr(stage, "moe") for stage in model.stages] == [False, True]
    second()
    assert repr(model) == shown


def test_undo_takes_out_what_has_come_in_a_layers_place_too():
    model = Net()
    shown = repr(model)
    for change in (lambda stage: delattr(stage, "moe"), lambda s: setattr(s, "moe", nn.ReLU())):
        _, undo = insert_after(model, "stages.*")
        change(model.stages[0])
        undo()
        assert repr(model) == shown
        assert not any(module._forward_hooks for module in model.modules())
