"""What a block may be called with and return, and linear layers that cannot be read."""

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from harness.blocks import QuickGelu, assert_upcycles
from harness.mlps import IMAGE, D, H, assert_close, hugging_face, mlp, refused, strong, tokens
from torch import nn

from dmoe_layer import DMoE, swap_mlps


class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(D, H), nn.Linear(H, D)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class OfSize(Mlp):
    """Makes a map of its tokens, and tokens of the map."""

    def forward(self, x, H, W):
        return super().forward(x.unflatten(1, (H, W))).flatten(1, 2)


class OfHeight(Mlp):
    """Has a default, and a keyword alone."""

    def forward(self, hidden_states, scale=None, *, height, width=4):
        x = hidden_states.unflatten(1, (height, width))
        return super().forward(x if scale is None else x * scale).flatten(1, 2)


class Unused(Mlp):
    def forward(self, x, mask, context):
        return super().forward(x)


class Starred(Mlp):
    def forward(self, x, *args, **kwargs):
        return super().forward(x)


@pytest.mark.parametrize("upcycle", [False, True])
@pytest.mark.parametrize("kind", [OfSize, OfHeight, Unused, Starred])
def test_a_block_that_is_called_with_more_than_its_tokens_is_read(kind, upcycle):
    model = nn.ModuleDict({"mlp": kind()})
    assert swap_mlps(model, "mlp", upcycle=upcycle) == ["mlp"]
    assert (model["mlp"].dim, model["mlp"].hidden_dim) == (D, H)


class Masked(Mlp):
    def forward(self, x, mask, H):
        return super().forward(x * mask)


class Looked(Mlp):
    def forward(self, x, context, height):
        return super().forward(x) + context.mean()


@pytest.mark.parametrize("upcycle", [False, True])
@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (
            Masked,
            r"'fc1' does not get the block's input. In the trial it got H=4, 4 for what could not "
            r"be made up \('mask'\)\.$",
        ),
        (
            Looked,
            r"could not run it on one tensor of shape \(batch, tokens, 8\) and height=4, 4 for "
            r"what could not be made up \('context'\): 'int' object has no attribute 'mean'",
        ),
    ],
)
def test_what_could_not_be_made_up_is_named(kind, words, upcycle):
    model = nn.ModuleDict({"mlp": kind()})
    with refused(model, f"mlp: {kind.__name__}: .*{words}"):
        swap_mlps(model, "mlp", upcycle=upcycle)


class Pair(Mlp):
    def forward(self, x):
        return super().forward(x), None


class Flat(Mlp):
    def forward(self, x):
        return super().forward(x).flatten(0, 1)


class Pooled(Mlp):
    def forward(self, x):
        return super().forward(x).mean(1, keepdim=True)


class InBuffers(nn.Linear):
    def __init__(self, *widths):
        super().__init__(*widths)
        for name in ("weight", "bias"):
            value = getattr(self, name).detach()
            delattr(self, name)
            self.register_buffer(name, value)


class WithoutParameters(nn.Linear):
    def __init__(self, *widths):
        super().__init__(*widths)
        self.values = [self.weight.detach(), self.bias.detach()]
        del self.weight, self.bias

    def forward(self, x):
        return F.linear(x, *self.values)


class WithoutBias(nn.Linear):
    """Does not even have the name."""

    def __init__(self, *widths):
        super().__init__(*widths, bias=False)
        del self.bias

    def forward(self, x):
        return x @ self.weight.T


class Broken(Mlp):
    """Overwrites what its backward needs."""

    def forward(self, x):
        z = self.fc1(x)
        return self.fc2(z.tanh().mul_(z))


@pytest.mark.parametrize("upcycle", [False, True])
@pytest.mark.parametrize(
    ("block", "words"),
    [
        (Pair(), "Pair: could not run it .*: it returned tuple, expected one tensor"),
        (Flat(), r"Flat: .*output for \(4, 16, 8\) has the shape \(64, 8\)"),
        (Pooled(), r"Pooled: .*output for \(4, 16, 8\) has the shape \(4, 1, 8\)"),
        (
            nn.Sequential(InBuffers(D, H), nn.ReLU(), nn.Linear(H, D)),
            "could not read '0': its weight is a buffer, expected an nn.Parameter.*requires_grad",
        ),
        (
            nn.Sequential(WithoutParameters(D, H), nn.ReLU(), nn.Linear(H, D)),
            "could not read '0.*: it .*no parameter",
        ),
    ],
)
def test_what_cannot_be_read_is_refused_in_clear_words(block, words, upcycle):
    model = nn.Sequential(block)
    with refused(model, f"0: .*{words}"):
        swap_mlps(model, "0", upcycle=upcycle)


def test_a_block_without_a_backward_gives_way_to_new_experts_only():
    model = nn.Sequential(Broken())
    with refused(model, "0: Broken: could not run it backward: .*modified by an inplace operation"):
        swap_mlps(model, "0", upcycle=True)
    assert swap_mlps(model, "0") == ["0"]


def test_a_linear_layer_without_the_name_of_a_bias_has_none():
    block = nn.Sequential(WithoutBias(D, H), nn.ReLU(), nn.Linear(H, D)).eval()
    x = tokens()
    assert_close(DMoE.from_mlp(block)(x), block(x))


class Functional(Mlp):
    """Its linear layers do not run as modules, so that what stands around them is not seen."""

    def __init__(self, act, around):
        super().__init__()
        self.act, self.around = act, around

    def forward(self, x):
        h = self.act(F.linear(x, self.fc1.weight, self.fc1.bias))
        return self.around(x, F.linear(h, self.fc2.weight, self.fc2.bias))


@pytest.mark.parametrize(
    ("around", "words"),
    [
        (
            lambda x, y: x + y,
            "with 'fc2' at zero its output is not zero. It may contain a residual",
        ),
        (lambda x, y: y.cumsum(1), "it mixes tokens"),
        (lambda x, y: y, None),
    ],
)
@pytest.mark.parametrize("act", [F.gelu, F.mish])
def test_a_block_of_functions_is_not_swapped_with_its_residual(act, around, words):
    model = nn.Sequential(Functional(act, around))
    if words is None:
        assert swap_mlps(model, "0") == ["0"]
        return
    with refused(model, f"0: Functional: could not read it as a two-layer MLP: {words}"):
        swap_mlps(model, "0")


@pytest.mark.parametrize("act", [QuickGelu, hf.activations.QuickGELUActivation])
def test_openai_clips_quick_gelu_upcycles(act):
    assert_upcycles(mlp(act()), "quick_gelu", tokens())


@pytest.mark.parametrize("act", ["gelu", "gelu_tanh", "quick_gelu", "silu", "relu"])
@pytest.mark.parametrize("gated", [False, True])
def test_a_block_that_casts_inside_is_read_at_any_width(act, gated):
    acts = {"gelu": F.gelu, "silu": F.silu, "relu": F.relu, "quick_gelu": QuickGelu()}
    acts["gelu_tanh"] = lambda z: F.gelu(z, approximate="tanh")

    class Casting(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.first, self.last = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
            if gated:
                self.linear = nn.Linear(width, 4 * width)

        def forward(self, x):
            h = acts[act](self.first(x).float())
            h = h * self.linear(x).float() if gated else h
            return self.last(h.to(x.dtype))

    names = {"silu": "swiglu", "gelu": "geglu", "gelu_tanh": "geglu_tanh"} if gated else {act: act}
    for width in (8, 64, 256):
        if act in names:
            assert DMoE.from_mlp(Casting(width), 2, 1).activation == names[act]
            continue
        with pytest.raises(ValueError, match="none of swiglu"):
            DMoE.from_mlp(Casting(width))


def test_openai_clips_image_tower_upcycles():
    old = strong(hugging_face("CLIPVision", **IMAGE)()).eval()
    assert old.config.hidden_act == "quick_gelu"
    for block in (layer.mlp for layer in old.encoder.layers):
        x = torch.randn(2, 7, 16)
        assert_close(DMoE.from_mlp(block)(x), block(x))


def test_stochastic_depth_that_drops_no_sample_is_not_taken_for_dropout():
    class Kept(Mlp):
        def forward(self, x):
            y = super().forward(x)
            return y / 0.7 if self.training else y  # as it does if it happens to keep them all

    with pytest.raises(ValueError, match="could not read its dropout"):
        DMoE.from_mlp(Kept())
    assert DMoE.from_mlp(Kept(), dropout=0.3).dropout.p == 0.3
