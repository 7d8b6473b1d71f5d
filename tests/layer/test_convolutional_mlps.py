"""MLPs on maps: two convolutions of size 1, channels first, or linear layers, channels last."""

import pytest
import torch
from harness.blocks import StarRelu, assert_upcycles, convolutional_mlp, maps, pointwise
from harness.mlps import SMALL, D, H, assert_close, hugging_face, mlp, refused, run, timm_mlp
from torch import nn

from dmoe_layer import DMoE, swap_mlps


class Stage(nn.Module):
    """A block of a conv net around somebody's MLP."""

    def __init__(self, mlp):
        super().__init__()
        self.mixer, self.norm, self.mlp = nn.AvgPool2d(3, 1, 1), nn.GroupNorm(1, D), mlp

    def forward(self, x):
        x = x + self.mixer(x)
        return x + self.mlp(self.norm(x))


@pytest.mark.parametrize("axes", [1, 2, 3])
def test_convolutions_of_size_1_upcycle_on_maps_of_any_number_of_axes(axes):
    x = maps(*(3, 5, 2)[:axes])
    for biases in ((True, True), (False, True), (True, False), (False, False)):
        assert_upcycles(convolutional_mlp(nn.ReLU(), axes, biases), "relu", x)


def test_a_stage_computes_what_it_did_in_any_memory_format():
    stage = Stage(convolutional_mlp()).eval()
    for x in (maps(), maps().to(memory_format=torch.channels_last)):
        expected = stage(x)
        new = Stage(convolutional_mlp()).eval()
        new.load_state_dict(stage.state_dict())
        new.to(memory_format=torch.channels_last)
        assert swap_mlps(new, "mlp", upcycle=True, attribute_sizes=3) == ["mlp"]
        assert new.mlp.channel_dim == 1
        assert_close(*run(new, x, torch.tensor([0, 2])), expected)


@pytest.mark.parametrize("upcycle", [False, True])
def test_a_swapped_convolutional_mlp_trains(upcycle):
    model = Stage(convolutional_mlp())
    swap_mlps(model, "mlp", upcycle=upcycle, attribute_sizes=3)
    assert (model.mlp.dim, model.mlp.hidden_dim, model.mlp.channel_dim) == (D, H, 1)
    run(model, maps(), torch.tensor([0, 2]))[0].square().mean().backward()
    assert all(p.grad.isfinite().all() for p in model.mlp.parameters())


def test_hugging_faces_poolformer_upcycles():
    build = hugging_face("PoolFormer", **SMALL, num_channels=1, drop_path_rate=0.0)
    old = build().eval()
    new = build().eval()
    new.load_state_dict(old.state_dict())
    names = swap_mlps(new, "*.output", upcycle=True, attribute_sizes=3)
    assert len(names) == 4
    for name in names:
        x = maps()
        assert_close(
            new.get_submodule(name)(x, attributes=torch.tensor([0, 2])), old.get_submodule(name)(x)
        )
    x = torch.randn(2, 1, 64, 64)
    for a, b in zip(run(new, x, torch.tensor([0, 2])), run(old, x), strict=True):
        assert_close(a, b)


def test_an_activation_that_learns_gives_way_to_new_experts():
    model = Stage(convolutional_mlp(StarRelu()))
    with refused(model, "mlp: Sequential: .*none of relu, .*'1' StarRelu"):
        swap_mlps(model, "mlp", upcycle=True)
    assert swap_mlps(model, "mlp") == ["mlp"]
    assert model.mlp.channel_dim == 1
    assert model(maps()).shape == (2, D, 3, 5)


@pytest.mark.parametrize(
    "options",
    [{"kernel_size": 3, "padding": 1}, {"kernel_size": 3, "groups": 2}, {"kernel_size": 3}],
)
@pytest.mark.parametrize("upcycle", [False, True])
def test_other_convolutions_are_no_linear_layers(options, upcycle):
    block = nn.Sequential(nn.Conv2d(D, H, **options), nn.GELU(), nn.Conv2d(H, D, **options))
    model = nn.Sequential(block)
    with refused(model, "0: Sequential: .*found 0 linear layers .*insert_after"):
        swap_mlps(model, "0", upcycle=upcycle)


@pytest.mark.parametrize("options", [{"stride": 2}, {"padding": 1}])
def test_a_convolution_of_size_1_that_moves_its_tokens_is_none_either(options):
    block = nn.Sequential(nn.Conv2d(D, H, 1, **options), nn.GELU(), nn.Conv2d(H, D, 1))
    with refused(block, "found 1 linear layers"):
        DMoE.from_mlp(block)


def test_a_grouped_convolution_is_no_linear_layer_but_may_stand_between_two():
    block = nn.Sequential(nn.Conv2d(D, H, 1, groups=2), nn.GELU(), nn.Conv2d(H, D, 1))
    with refused(block, "found 1 linear layers"):
        DMoE.from_mlp(block)
    between = nn.Sequential(pointwise(2)(D, H), nn.Conv2d(H, H, 1, groups=2), pointwise(2)(H, D))
    with refused(between, "between '0' and '2' mixes hidden units or tokens"):
        DMoE.from_mlp(between)
    assert swap_mlps(nn.Sequential(between), "0") == ["0"]


def test_padding_by_name_is_none_for_a_convolution_of_size_1():
    for padding in ("same", "valid"):
        block = convolutional_mlp()
        block[0] = nn.Conv2d(D, H, 1, padding=padding)
        assert_upcycles(block, "gelu", maps())


@pytest.mark.parametrize("upcycle", [False, True])
def test_convolution_and_linear_layer_do_not_make_one_mlp(upcycle):
    block = nn.Sequential(pointwise(2)(D, H), nn.GELU(), nn.Linear(H, D))
    with refused(block, "expected a two-layer MLP D -> H -> D, found 2 linear layers"):
        swap_mlps(nn.Sequential(block), "0", upcycle=upcycle)


class GlobalNorm(nn.Module):
    """ConvNeXt V2's, in short: a channel counts by its size in the whole map."""

    def forward(self, x):
        return x * x.flatten(2).norm(dim=2)[..., None, None]


class MixFfn(nn.Module):
    """SegFormer's and PVT v2's MLP, with a depthwise convolution; called with the map's size."""

    def __init__(self):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(D, H), nn.Linear(H, D)
        self.depthwise = nn.Conv2d(H, H, 3, 1, 1, groups=H)

    def forward(self, x, H, W):
        maps_BHHW = self.fc1(x).mT.unflatten(2, (H, W))
        return self.fc2(torch.relu(self.depthwise(maps_BHHW).flatten(2).mT))


@pytest.mark.parametrize("upcycle", [False, True])
@pytest.mark.parametrize(
    ("block", "words"),
    [
        (
            MixFfn(),
            "between 'fc1' and 'fc2' there is a depthwise 3x3 convolution .'depthwise' Conv2d., "
            "which mixes tokens",
        ),
        (
            nn.Sequential(pointwise(2)(D, H), nn.Conv2d(H, H, 3, padding=1), pointwise(2)(H, D)),
            "between '0' and '2' there is a 3x3 convolution .'1' Conv2d., which mixes tokens",
        ),
        (convolutional_mlp(GlobalNorm()), "between '0' and '2' mixes hidden units or tokens"),
    ],
)
def test_what_mixes_neighbours_is_no_mlp(block, words, upcycle):
    model = nn.Sequential(block)
    with refused(model, f"0: {type(block).__name__}: could not read .*{words}"):
        swap_mlps(model, "0", upcycle=upcycle)


class Shifted(nn.Module):
    """Moves some units on to the next token, and leaves the others."""

    def __init__(self, n_shifted):
        super().__init__()
        self.n_shifted = n_shifted

    def forward(self, x):
        return torch.cat([x[..., : self.n_shifted].roll(1, 1), x[..., self.n_shifted :]], -1)


@pytest.mark.parametrize("upcycle", [False, True])
@pytest.mark.parametrize("n_shifted", [1, H - 1])
def test_a_shift_of_some_units_is_found(n_shifted, upcycle):
    model = nn.Sequential(nn.ModuleDict({"mlp": mlp(Shifted(n_shifted))}))
    with refused(model, "between '0' and '2' mixes hidden units or tokens"):
        swap_mlps(model, "0.mlp", upcycle=upcycle)


class OnMaps(nn.Sequential):
    """Looks at its input's axes, which are four."""

    def forward(self, x):
        _, height, width, _ = x.shape
        return super().forward(x.flatten(1, 2)).unflatten(1, (height, width))


@pytest.mark.parametrize("build", [timm_mlp, lambda: OnMaps(*mlp())])
def test_linear_layers_on_channels_last_maps_work_as_on_tokens(build):
    model, x = nn.Sequential(build()).eval(), torch.randn(2, 3, 5, D)
    expected = model(x)
    assert swap_mlps(model, "0", upcycle=True, attribute_sizes=3) == ["0"]
    assert model[0].channel_dim == -1
    assert_close(*run(model, x, torch.tensor([0, 2])), expected)


def test_the_axis_of_the_channels_can_be_given():
    x = torch.randn(2, 3, 5, D)
    block = mlp().eval()
    layer = DMoE.from_mlp(block, channel_dim=1)
    assert_close(layer(x.movedim(-1, 1)).movedim(1, -1), block(x))
    assert DMoE.from_mlp(convolutional_mlp(), channel_dim=2).channel_dim == 2
