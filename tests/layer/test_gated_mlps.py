"""Gated MLPs of other people: upcycled wherever the gate stands, and swapped by their widths."""

import itertools

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from harness.blocks import Chunked, Paired, assert_upcycles, maps, pointwise
from harness.mlps import IMAGE, TEXT, D, H, assert_close, hugging_face, refused, run, strong, tokens
from monai.networks.blocks import MLPBlock
from monai.networks.nets import DiffusionModelUNet
from torch import nn

from dmoe_layer import DMoE, swap_mlps


def gelu_tanh(x):
    return F.gelu(x, approximate="tanh")


ACTS = {"swiglu": F.silu, "geglu": F.gelu, "geglu_tanh": gelu_tanh}
BIASES = [(False, False), (True, True), (True, False), (False, True)]


@pytest.mark.parametrize("gate", [0, 1])
@pytest.mark.parametrize("name", ACTS)
def test_the_gate_of_one_linear_layer_is_either_half(name, gate):
    for biases in BIASES:
        assert_upcycles(Chunked(ACTS[name], gate, biases), name, tokens())


@pytest.mark.parametrize("name", ACTS)
def test_the_gate_of_two_linear_layers_is_the_one_that_is_activated(name):
    for order in itertools.permutations(("gate", "up", "down")):
        assert_upcycles(Paired(ACTS[name], order), name, tokens())


@pytest.mark.parametrize("biases", [("gate", "up", "down"), ("gate",), ("up",), ("down", "up")])
def test_each_linear_layer_may_have_a_bias_or_none(biases):
    for order in (("gate", "up", "down"), ("up", "gate", "down")):
        assert_upcycles(Paired(order=order, biases=biases), "swiglu", tokens())


def test_three_linear_layers_of_one_width_are_told_apart_by_what_runs_last():
    for order in itertools.permutations(("gate", "up", "down")):
        assert_upcycles(Paired(order=order, hidden=D), "swiglu", tokens(), hidden=D)


@pytest.mark.parametrize("axes", [1, 2, 3])
def test_a_gated_mlp_may_be_made_of_convolutions(axes):
    x = maps(*(3, 5, 2)[:axes])
    for gate in (0, 1):
        assert_upcycles(Chunked(gate=gate, linear=pointwise(axes)), "swiglu", x)


def test_gelu_and_its_tanh_form_are_not_mixed_up():
    exact = DMoE.from_mlp(Chunked(F.gelu))
    assert exact.activation == "geglu"
    assert DMoE.from_mlp(Chunked(gelu_tanh)).activation == "geglu_tanh"


# name: (model, its input, pattern, count, activation)
MODELS = {
    "hf DINOv2 giant": (
        hugging_face("Dinov2", **IMAGE, use_swiglu_ffn=True), "image", "*.mlp", 2, "swiglu"
    ),
    "hf DINOv3": (
        hugging_face("DINOv3ViT", **IMAGE, use_gated_mlp=True, hidden_act="silu"), "image",
        "*.mlp", 2, "swiglu",
    ),
    "hf Llama": (hugging_face("Llama", **TEXT, vocab_size=20), "words", "*.mlp", 2, "swiglu"),
    "hf T5 v1.1": (
        lambda: hf.T5EncoderModel(
            hf.T5Config(
                vocab_size=20, d_model=16, d_ff=32, d_kv=8, num_layers=1, num_heads=2,
                feed_forward_proj="gated-gelu",
            )
        ),
        "words", "*.DenseReluDense", 1, "geglu_tanh",
    ),
    "monai GEGLU": (lambda: nn.Sequential(MLPBlock(D, H, act="GEGLU")), "tokens", "0", 1, "geglu"),
}  # fmt: skip
INPUTS = {
    "image": lambda: torch.randn(2, 1, 16, 16),
    "words": lambda: torch.randint(20, (2, 5)),
    "tokens": tokens,
}


@pytest.mark.parametrize("model", MODELS)
def test_models_with_gated_mlps_upcycle_and_train(model):
    build, given, pattern, count, activation = MODELS[model]
    old, new, x = strong(build()).eval(), build(), INPUTS[given]()
    new.load_state_dict(old.state_dict())
    names = swap_mlps(new.eval(), pattern, upcycle=True, attribute_sizes=3)
    assert len(names) == count
    layers = [new.get_submodule(name) for name in names]
    assert {layer.activation for layer in layers} == {activation}
    found, expected = run(new, x, torch.tensor([0, 2])), run(old, x)
    for a, b in zip(found, expected, strict=True):
        assert_close(a, b, 1e-4)
    for name, layer in zip(names, layers, strict=True):
        x_BTD = torch.randn(2, 7, layer.dim)
        assert_close(layer(x_BTD, attributes=torch.tensor([1, 0])), old.get_submodule(name)(x_BTD))
    sum(part.square().mean() for part in found).backward()
    assert all(p.grad.isfinite().all() for layer in layers for p in layer.parameters())


def test_gated_mlps_give_way_to_new_experts_of_their_width():
    model = DiffusionModelUNet(
        2, 1, 1, channels=(8, 8), attention_levels=(False, True), num_res_blocks=1,
        norm_num_groups=4, num_head_channels=8, with_conditioning=True, cross_attention_dim=4,
    )  # fmt: skip
    layers = [model.get_submodule(n) for n in swap_mlps(model, "*.ff", attribute_sizes=3)]
    assert {(each.dim, each.hidden_dim, each.activation) for each in layers} == {(8, 32, "relu")}
    for block in (Paired(), Chunked(), Paired(order=("down", "up", "gate"))):
        model = nn.Sequential(block)
        assert swap_mlps(model, "0", activation="swiglu") == ["0"]
        assert model[0].hidden_dim == H
        assert model[0].w1_EHD.shape == (8, 2 * H, D)


@pytest.mark.parametrize(
    ("block", "words"),
    [
        # EVA02 and Primus scale what stands between.
        (
            Paired(between=nn.LayerNorm(H)),
            r"\('gate' 8 -> 16, 'up' 8 -> 16, 'down' 16 -> 8\) as a gated MLP \(GLU\): what lies "
            "between 'gate' and 'up' and 'down' mixes hidden units or tokens .*'between' Layer"
            "Norm.*Only new experts",
        ),
        (Chunked(between=nn.LayerNorm(H)), "'weights_in' and 'weights_out' mixes.*LayerNorm"),
        (Chunked(torch.sigmoid), r"is none of swiglu, geglu, geglu_tanh\. Only new experts"),
        (Paired(F.relu), r"is none of swiglu, geglu, geglu_tanh\. Only new experts"),
        (Paired(nn.Identity()), r"is none of swiglu, geglu, geglu_tanh\. Only new experts"),
    ],
)
def test_what_cannot_be_upcycled_says_so_and_gives_way_to_new_experts(block, words):
    model = nn.Sequential(block)
    with refused(model, words.replace("$", r"[ .]")):
        swap_mlps(model, "0", upcycle=True)
    assert swap_mlps(model, "0") == ["0"]
    assert (model[0].dim, model[0].hidden_dim) == (D, H)


class WithResidual(Paired):
    def forward(self, x):
        return x + super().forward(x)


class OfOther(Chunked):
    """The linear half is that of another token."""

    def forward(self, x):
        gate, linear = self.weights_in(x).chunk(2, -1)
        return self.weights_out(F.silu(gate) * linear.roll(1, 1))


class OfSum(Paired):
    """The second layer is not given the block's input."""

    def forward(self, x):
        return self.down(F.silu(self.gate(x)) * self.up(x + 1))


@pytest.mark.parametrize("upcycle", [False, True])
@pytest.mark.parametrize(
    ("block", "words"),
    [
        (WithResidual(), "its output is not that of 'down'.*residual"),
        (OfOther(), "between 'weights_in' and 'weights_out' mixes hidden units or tokens"),
        (OfSum(), "'up' does not get the block's input"),
    ],
)
def test_what_is_no_gated_mlp_is_refused(block, words, upcycle):
    model = nn.Sequential(block)
    with refused(model, f"0: {type(block).__name__}: could not read .*GLU.*{words}"):
        swap_mlps(model, "0", upcycle=upcycle)
