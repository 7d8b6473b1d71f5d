"""A pattern without a match brings up what would be taken, or what to do where nothing would."""

import pytest
import torch
from harness.blocks import Chunked, Paired, convolutional_mlp
from harness.mlps import SMALL, TEXT, Block, D, H, hugging_face, mlp, refused
from monai.networks.nets import DynUNet, SegResNet, UNet
from torch import nn

from dmoe_layer import swap_mlps
from dmoe_layer.foreign import trial

CONVNEXT = {"num_channels": 1, "hidden_sizes": [8, 8], "depths": [2, 2], "num_stages": 2}


class Residual(nn.Sequential):
    def forward(self, x):
        return x + super().forward(x)


class Permuted(nn.Sequential):
    """A block of torchvision's ConvNeXt in short: its MLP stands between two permutations."""

    def forward(self, x):
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


def test_only_what_would_be_taken_is_named():
    blocks = {"good": mlp(), "gated": Paired(), "chunked": Chunked(), "maps": convolutional_mlp()}
    blocks |= {"residual": Residual(*mlp()), "permuted": Permuted(*mlp()), "one": nn.Linear(D, D)}
    model = nn.ModuleDict(blocks)
    with refused(model, r"matches no module\. Close candidates: good, gated, chunked, maps\.$"):
        swap_mlps(model, lambda module: False)
    for name in ("good", "gated", "chunked", "maps"):
        assert swap_mlps(model, name) == [name]
    for name in ("residual", "permuted", "one"):
        with pytest.raises(ValueError, match=f"^{name}: "):
            swap_mlps(model, name)


def test_where_nothing_can_be_upcycled_new_experts_are_offered():
    model = nn.ModuleDict({"mlp": mlp(nn.Mish())})
    with refused(model, r"No module can be upcycled\. Without upcycle=True: Close candidates: mlp"):
        swap_mlps(model, "ffn", upcycle=True)


def test_what_would_not_be_upcycled_is_named_only_without_upcycling():
    model = nn.ModuleDict({"known": mlp(), "unknown": mlp(nn.Mish())})
    with refused(model, r"Close candidates: known\.$"):
        swap_mlps(model, "no", upcycle=True)
    with refused(model, r"Close candidates: known, unknown\.$"):
        swap_mlps(model, "no")


def test_names_of_a_similar_spelling_that_would_not_be_taken_are_not_named():
    model = nn.ModuleDict({"encoder": nn.ModuleList([Block(mlp())]), "norm": nn.LayerNorm(D)})
    with refused(model, r"Close candidates: encoder\.0\.mlp\.$"):
        swap_mlps(model, "encode")


@pytest.mark.parametrize(
    ("build", "names"),
    [
        (
            lambda: nn.TransformerEncoder(
                nn.TransformerEncoderLayer(D, 2, H, batch_first=True), 7, False
            ),
            r"'layers\.\*'\.",
        ),
        (hugging_face("Bert", vocab_size=20, **TEXT), r"'encoder\.layer\.\*'\."),
        (hugging_face("ConvNext", **CONVNEXT), r"'encoder\.stages\.\*\.layers\.\*'\."),
        # A glob that would match more is not named.
        (
            lambda: nn.Sequential(
                nn.TransformerEncoderLayer(D, 2, H, batch_first=True), nn.LayerNorm(D)
            ),
            r"0\.$",
        ),
    ],
)
def test_layers_on_which_an_mlp_stands_are_named_themselves(build, names):
    model = build()
    words = "no module that is a two-layer MLP by itself, .*EncoderLayer does. Match those layers: "
    with refused(model, f"matches no module. The model has {words}{names}"):
        swap_mlps(model, "*.mlp")
    glob = names.replace("\\", "").strip("'.$")
    assert swap_mlps(model, glob)


@pytest.mark.parametrize(
    "build",
    [
        lambda: UNet(2, 1, 2, (4, 8), (2,)),
        lambda: SegResNet(2, 8),
        lambda: DynUNet(2, 1, 2, [3] * 3, [1, 2, 2], [2, 2]),
        hugging_face("ResNet", num_channels=1, embedding_size=8, hidden_sizes=[8], depths=[1]),
    ],
)
def test_networks_of_convolutions_are_told_of_experts_behind_a_stage(build):
    model = build()
    with refused(
        model, "no module that is a two-layer MLP.*insert_after.*channel_dim=1, residual="
    ):
        swap_mlps(model, "*.mlp")
    with pytest.raises(ValueError, match="matches no module") as caught:
        swap_mlps(model, "*.mlp")
    assert "BERT" not in str(caught.value)
    name = next(n for n, m in model.named_children() if any(m.children()))
    with refused(model, f"^{name}: .*insert_after"):
        swap_mlps(model, name)


def test_a_model_whose_mlps_are_none_is_told_to_move_them():
    model = hugging_face("Segformer", num_channels=1, **SMALL)()
    with refused(model, "no module that is a two-layer MLP.*move it into a module first"):
        swap_mlps(model, "*.no")


def test_looking_for_a_hint_draws_nothing_and_tries_one_of_a_kind(monkeypatch):
    tried, probe = [], trial.Probe
    monkeypatch.setattr(trial, "Probe", lambda mlp, names: tried.append(mlp) or probe(mlp, names))
    model = nn.Sequential(*(Block(mlp()) for _ in range(4)))
    before = torch.get_rng_state()
    with refused(model, "Close candidates"):
        swap_mlps(model, "no", upcycle=True)
    assert torch.equal(torch.get_rng_state(), before)
    assert [type(each).__name__ for each in tried] == ["Block", "Sequential"]
