"""What insert_after refuses, before anything is changed, and which matches it counts."""

import re

import pytest
import torch
from harness.convnets import ZOO, outputs
from monai.networks.nets import SegResNet
from torch import nn

from dmoe_layer import DMoE, insert_after


class Stage(nn.Module):
    def __init__(self, *wrap):
        super().__init__()
        self.conv, self.wrap = nn.Conv2d(4, 4, 3, padding=1), wrap

    def forward(self, x):
        return self.wrap[0](self.conv(x)) if self.wrap else self.conv(x)


class Net(nn.Module):
    def __init__(self, *stages):
        super().__init__()
        self.stem, self.stages = nn.Conv2d(1, 4, 1), nn.ModuleList([Stage(), *stages])

    def forward(self, x):
        x = self.stem(x)
        for stage in self.stages:
            x = stage(x)
        return x


def refused(model, pattern, kind, message, **options):
    """The error; and the model is what it was."""
    shown, hooks = repr(model), [{**module._forward_hooks} for module in model.modules()]
    with pytest.raises(kind, match=message):
        insert_after(model, pattern, **options)
    assert repr(model) == shown
    assert [{**module._forward_hooks} for module in model.modules()] == hooks


def test_arguments_of_another_kind():
    with pytest.raises(TypeError, match=r"model: got dict, expected a torch\.nn\.Module"):
        insert_after({}, "stages.*")
    for pattern in (3, nn.Conv2d, ["stages.0"]):
        refused(Net(), pattern, TypeError, "pattern: got .*expected a glob")


@pytest.mark.parametrize(
    "options", [{"dim": 4}, {"n_expert": 4}, {"k": 9}, {"activation": "tanh"}, {"channel_dim": 0}]
)
def test_options_that_do_not_fit(options):
    refused(Net(), "stages.*", (TypeError, ValueError), next(iter(options)), **options)


def test_an_axis_that_the_map_does_not_have():
    refused(Net(), "stages.*", TypeError, "channel_dim: got '1'", channel_dim="1")
    model = Net()
    insert_after(model, "stages.*", channel_dim=4)  # what is no tensor of four axes elsewhere
    with pytest.raises(ValueError, match="channel_dim=4"):
        model(torch.randn(1, 1, 8, 8))


def test_a_block_that_may_return_tokens_without_their_axis():
    def model():
        return nn.Sequential(nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 4)), nn.ReLU())

    refused(model(), "0", ValueError, r"^0: channel_dim: got none\. .*channel_dim=-1")
    tokens = model()
    insert_after(tokens, "0", channel_dim=-1)
    assert tokens(torch.randn(2, 5, 4)).shape == (2, 5, 4)
    assert tokens[0].moe.dim == 4
    insert_after(model(), "1")  # What has no parameters may return anything.


def test_a_list_of_modules_which_is_never_called():
    for pattern in ("stages", "*"):
        refused(Net(), pattern, ValueError, "stages: this module is a ModuleList, .*never called")


@pytest.mark.parametrize("wrap", [lambda y: (y, y), lambda y: [y], lambda y: {"out": y}])
def test_a_module_that_gives_no_single_tensor(wrap):
    model = Net(Stage(wrap))
    refused(
        model, "stages.*", ValueError, r"^stages.1: insert_after: Stage returned (tuple|list|dict)"
    )


def test_nnunets_encoder_which_gives_a_list():
    pytest.importorskip("dynamic_network_architectures")
    model = ZOO["nnU-Net, plain"].build()
    refused(model, "encoder", ValueError, "encoder: insert_after: PlainConvEncoder returned list")


def test_a_module_that_was_not_tried_and_gives_no_single_tensor_is_refused_when_it_runs():
    class Split(nn.Module):
        def forward(self, x):
            return x, x

    model = nn.ModuleDict({"split": Split()})
    insert_after(model, "split")
    with pytest.raises(TypeError, match="Split returned tuple, but a layer can only follow"):
        model["split"](torch.randn(2, 4, 8, 8))


def test_what_has_experts_already():
    model = Net()
    _, undo = insert_after(model, "stages.*")
    refused(
        model,
        "stages.*",
        ValueError,
        r"stages.0: this module has an attribute 'moe' already \(DMoE\)",
    )
    refused(model, "stages.0.moe", ValueError, "stages.0.moe: this module is a DMoE itself")
    undo()
    insert_after(model, "stages.*")
    for taken in (None, 3):
        model = Net()
        model.stages[0].moe = taken
        refused(
            model, "stages.*", ValueError, "stages.0: this module has an attribute 'moe' already"
        )
        assert model.stages[0].moe is taken


def test_a_place_that_a_class_keeps_free_is_taken_and_left_free_again():
    model = Net()
    model.stages[0].register_module("moe", None)
    shown = repr(model)
    _, undo = insert_after(model, "stages.0")
    assert isinstance(model.stages[0].moe, DMoE)
    undo()
    assert repr(model) == shown
    assert model.stages[0].moe is None


class Twice(nn.Sequential):
    def forward(self, x):
        return super().forward(super().forward(x))


class Scaled(nn.Sequential):
    def forward(self, x):
        return 2 * super().forward(x)


class WithSkip(nn.Sequential):
    def forward(self, x, skip):
        for module in self:
            x = module(x, skip)
        return x


class Walk(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(4, 4, 1), nn.ReLU()

    def forward(self, x):
        for module in self.children():
            x = module(x)
        return x


@pytest.mark.parametrize("kind", [Twice, Scaled, WithSkip])
def test_a_module_that_would_run_the_experts_among_its_children(kind):
    model = Net(kind(nn.Conv2d(4, 4, 1)))
    refused(model, "stages.*", ValueError, f"^stages.1: {kind.__name__} runs its children")


def test_a_module_that_was_not_tried_and_may_run_its_children_in_a_row():
    class Behind(nn.Module):
        def forward(self, x, skip):
            for module in self.children():
                x = module(x)
            return x + skip

    refused(Net(Behind()), "stages.1", ValueError, "^stages.1: Behind runs its children")


def test_a_module_that_runs_its_children_in_a_row_runs_the_layer_once():
    model = nn.Sequential(nn.Conv2d(1, 4, 1), Walk()).eval()
    x = torch.randn(2, 1, 8, 8)
    before = model(x)
    (name,), _ = insert_after(model, "1", attribute_sizes=3)
    layer = DMoE(4, attribute_sizes=3, channel_dim=1, residual=True).eval()
    layer.load_state_dict(model.get_submodule(name).state_dict())
    torch.testing.assert_close(
        outputs(model, x), outputs(nn.Sequential(nn.Identity(), layer), before)
    )


def test_one_that_cannot_leaves_all_the_others_without():
    class Net2(Net):
        def __init__(self):
            super().__init__(nn.ModuleList(), Stage())

    refused(Net2(), "stages.*", ValueError, "stages.1: this module is a ModuleList")


@pytest.mark.parametrize("pattern", ["stages.*", "stages.?", "stages.[01]"])
def test_the_outermost_match_counts(pattern):
    names, _ = insert_after(Net(nn.Sequential(nn.Sequential(Stage()))), pattern)
    assert names == ["stages.0.moe", "stages.1.moe"]


@pytest.mark.parametrize(
    "pattern", [lambda name, module: name == "stages.1", lambda module: isinstance(module, Walk)]
)
def test_a_predicate_sees_name_and_module_or_the_module(pattern):
    names, _ = insert_after(Net(Walk()), pattern)
    assert names == ["stages.1.moe"]


def test_a_pattern_without_a_match_brings_up_names_that_can_be_taken():
    model = SegResNet(2, 8, 1, 2)
    refused(
        model, "down_layer.*", ValueError,
        r"^pattern: 'down_layer.\*' matches no module. Close candidates: .*down_layers\.\d",
    )  # fmt: skip
    with pytest.raises(ValueError, match="Close candidates") as error:
        insert_after(model, "down_layer.*")
    for name in re.search(r"candidates: (.*)\.$", str(error.value))[1].split(", "):
        insert_after(SegResNet(2, 8, 1, 2), name)
    for pattern in ("xyz", lambda module: False):
        refused(Net(), pattern, ValueError, "matches no module. model.named_modules")


@pytest.mark.parametrize("pattern", ["", lambda module: isinstance(module, Net)])
def test_the_model_itself_is_no_module_of_the_model(pattern):
    refused(Net(), pattern, ValueError, "Only the model itself matches")
