"""Which blocks are read as two-layer MLPs, and the words in which all others are refused."""

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from harness.mlps import (
    SMALL,
    TEXT,
    Block,
    D,
    FunctionalMlp,
    H,
    hugging_face,
    mlp,
    refused,
    timm_mlp,
    tokens,
    torchvision_mlp,
)
from monai.networks.blocks import MLPBlock
from torch import nn
from torch.nn.utils import parametrizations, prune, weight_norm

from dmoe_layer import AttributeRouter, DMoE, swap_mlps


class Altered(nn.Sequential):
    """An MLP with something done to its output."""

    def __init__(self, alter):
        super().__init__(*mlp())
        self.alter = alter

    def forward(self, x):
        return self.alter(x, super().forward(x))


class Scaled(nn.Sequential):
    """A scale that does nothing yet, as LayerScale and ReZero may start."""

    def __init__(self):
        super().__init__(*mlp())
        self.gamma = nn.Parameter(torch.ones(D))

    def forward(self, x):
        return super().forward(x) * self.gamma


class Do(nn.Module):
    """A function as a module."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


class Apart(nn.Sequential):
    """Sees its tokens without the batch, each half of them by itself, and keeps its output."""

    def forward(self, x):
        parts = x.flatten(0, 1).chunk(2)
        self.last = torch.cat([super(Apart, self).forward(part) for part in parts]).view_as(x)
        return self.last


def sequential(*modules):
    return lambda: nn.Sequential(*modules)


# name: (the block or the model that has it, its name there, what the error names)
NO_TWO_LAYER_MLP = {
    "gated, w1 w2 w3": (sequential(*mlp(), nn.Linear(D, H)), "mlp", "'2' 16 -> 8, '3' .*GLU"),
    "hf BERT, half": (
        hugging_face("Bert", vocab_size=20, **TEXT), "*.intermediate",
        "encoder.layer.0.intermediate: BertIntermediate.* 1 linear layers .*'dense' 16 -> 32.*BERT",
    ),
    "hf SegFormer": (
        hugging_face("Segformer", num_channels=1, **SMALL), "*.mlp",
        "SegformerMixMLP: .*between 'fc1' and 'fc2' .*'dwconv.dwconv' Conv2d",
    ),
    "one linear": (mlp, "mlp.0", "mlp.0: Linear.* 1 linear layers .*'itself'"),
    "tokens mixed inside": (
        sequential(nn.Linear(D, H), Do(lambda x: x.cumsum(1)), nn.GELU(), nn.Linear(H, D)), "mlp",
        "between '0' and '3' mixes hidden units or tokens .*'1' Do, '2' GELU",
    ),
    "residual": (lambda: Altered(lambda x, y: x + y), "mlp", "output is not that of '2'.*residual"),
    "a scale of 1": (Scaled, "mlp", r"output is not that of '2'\. .*scale"),
    "dropout in eval": (
        lambda: Altered(lambda x, y: F.dropout(y, 0.5)), "mlp", "output is not that of '2'"
    ),
    "a tuple": (
        lambda: Altered(lambda x, y: (y, None)), "mlp", "returned tuple, expected one tensor"
    ),
    "lazy": (
        sequential(nn.LazyLinear(H), nn.GELU(), nn.LazyLinear(D)), "mlp", "'0': it has no shape yet"
    ),
    "a list": (
        lambda: nn.ModuleList([nn.Linear(D, H), nn.Linear(H, D)]), "mlp", "ModuleList.*forward"
    ),
}  # fmt: skip

# name: (the activation, how its module is called)
UNKNOWN_ACTIVATIONS = {
    "relu2": (lambda: Do(lambda x: F.relu(x).square()), "Do"),
    "hardswish, in place": (lambda: nn.Hardswish(inplace=True), "Hardswish"),
    "prelu": (nn.PReLU, "PReLU"),
    "none": (nn.Identity, ""),
    "gelu, cut at 10": (lambda: hf.activations.ACT2FN["gelu_10"], "ClippedGELUActivation"),
}


@pytest.mark.parametrize("upcycle", [False, True])
@pytest.mark.parametrize("model", NO_TWO_LAYER_MLP)
def test_a_block_that_is_no_two_layer_mlp_is_named_and_nothing_changes(model, upcycle):
    build, pattern, words = NO_TWO_LAYER_MLP[model]
    model = Block(build()) if pattern.startswith("mlp") else build()
    with refused(model, f"(?s){words}"):
        swap_mlps(model, pattern, upcycle=upcycle)


@pytest.mark.parametrize(
    ("block", "words"),
    [
        (nn.Sequential(nn.LayerNorm(D), *mlp()), "'1' does not get the block's input .*'0' Layer"),
        (nn.Sequential(*mlp(), nn.LayerNorm(D)), "output is not that of '2' .*'3' LayerNorm"),
    ],
)
def test_a_norm_beside_the_mlp_is_not_read_as_part_of_it(block, words):
    with refused(block, words):
        DMoE.from_mlp(block)


@pytest.mark.parametrize("upcycle", [False, True])
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize(
    "mixes",
    [
        lambda h: h + h.roll(1, 1),
        lambda h: h * h.mean(1, keepdim=True).detach(),
        lambda h: h - h.amax(0, keepdim=True).detach(),
    ],
)
def test_what_mixes_tokens_is_found_in_every_mode_of_autograd(mixes, mode, upcycle):
    model = Block(mlp(Do(lambda h: mixes(F.gelu(h)))))
    with mode(), refused(model, "mlp: .*between '0' and '2' mixes hidden units or tokens"):
        swap_mlps(model, "mlp", upcycle=upcycle)


@pytest.mark.parametrize("act", UNKNOWN_ACTIVATIONS)
def test_an_unknown_activation_does_not_upcycle_but_gives_way_to_new_experts(act):
    build, name = UNKNOWN_ACTIVATIONS[act]
    model = Block(mlp(build()))
    with refused(
        model, rf"mlp: Seq.*the activation between its linear layers is none of relu, .*{name}"
    ):
        swap_mlps(model, "mlp", upcycle=True)
    assert swap_mlps(model, "mlp", activation="silu", dropout=0.0) == ["mlp"]
    assert (model.mlp.dim, model.mlp.hidden_dim) == (D, H)
    assert (model.mlp.activation, model.mlp.dropout.p) == ("silu", 0.0)
    assert model(tokens()).isfinite().all()


@pytest.mark.parametrize(
    ("name", "acts"),
    [
        ("gelu", ["gelu", "gelu_python"]),
        ("gelu_tanh", ["gelu_new", "gelu_fast", "gelu_accurate", "gelu_pytorch_tanh"]),
        ("silu", ["silu", "swish"]),
        ("quick_gelu", ["quick_gelu"]),
        ("relu", ["relu"]),
    ],
)
def test_an_activation_is_known_by_what_it_computes_whatever_the_weights(name, acts):
    for act in acts:
        block = mlp(hf.activations.ACT2FN[act])
        assert DMoE.from_mlp(block).activation == name
    for size in (0.0, 1e-12, 1.0, 1e6):
        for parameter in block.parameters():
            nn.init.constant_(parameter, size)
        assert DMoE.from_mlp(block).activation == name


@pytest.mark.parametrize(
    ("block", "rate"),
    [
        (mlp(), 0.0),
        (nn.Sequential(*mlp(), nn.Dropout(0.4)), 0.4),
        (nn.Sequential(*mlp(), nn.Dropout(1.0)), 1.0),
        # This one drops hidden units, which an expert has no dropout for.
        (nn.Sequential(nn.Linear(D, H), nn.ReLU(), nn.Dropout(0.4), nn.Linear(H, D)), 0.0),
        (timm_mlp(), 0.2),
        (torchvision_mlp(), 0.1),
        (FunctionalMlp(), 0.3),
        (MLPBlock(D, H, 0.25, dropout_mode="swin"), 0.25),
        (MLPBlock(D, H, 0.25, dropout_mode="vista3d", act="relu"), 0.0),
    ],
)
def test_the_dropout_of_an_upcycled_block_is_the_one_at_its_end(block, rate):
    assert DMoE.from_mlp(block).dropout.p == rate
    assert DMoE.from_mlp(block, dropout=0.7).dropout.p == 0.7


def test_a_block_that_does_more_in_training_upcycles_with_a_rate_of_ones_own():
    class Noise(nn.Module):
        def forward(self, x):
            return x + torch.rand_like(x) if self.training else x

    block = nn.Sequential(*mlp(), Noise())
    with refused(block, "Sequential: could not read its dropout: in training, what follows '2'"):
        DMoE.from_mlp(block)
    assert DMoE.from_mlp(block, dropout=0.2).dropout.p == 0.2


@pytest.mark.parametrize("upcycle", [False, True])
def test_a_block_that_takes_its_tokens_apart_and_keeps_what_it_saw_is_read(upcycle):
    model = Block(Apart(*mlp(), nn.Dropout(0.3)))
    model(tokens())
    assert swap_mlps(model, "mlp", upcycle=upcycle) == ["mlp"]
    assert model.mlp.dropout.p == (0.3 if upcycle else 0.1)


def test_reading_changes_no_weight_gradient_hook_or_random_state():
    block = Block(nn.Sequential(*mlp(), nn.Dropout(0.5)))
    block.mlp[0].register_forward_hook(lambda module, args, output: None)
    block(tokens()).sum().backward()
    gradients = [parameter.grad.clone() for parameter in block.parameters()]
    before = torch.get_rng_state()
    with refused(block, "norm"):
        DMoE.from_mlp(block)
    assert all(map(torch.equal, gradients, [parameter.grad for parameter in block.parameters()]))

    AttributeRouter(D)  # all that is drawn, since the experts are copies
    drawn = torch.get_rng_state()
    torch.set_rng_state(before)
    DMoE.from_mlp(block.mlp)
    assert torch.equal(torch.get_rng_state(), drawn)


class Lora(nn.Linear):
    """Starts as the linear layer it is, since b is zero, and learns to be another."""

    def __init__(self, n_in, n_out):
        super().__init__(n_in, n_out)
        self.a, self.b = nn.Parameter(torch.randn(2, n_in)), nn.Parameter(torch.zeros(n_out, 2))

    def forward(self, x):
        return super().forward(x) + x @ self.a.T @ self.b.T


# name: (what is done to an MLP, what the error names)
COMPUTED = {
    "weight_norm": (
        lambda block: parametrizations.weight_norm(block[0]),
        "'0.weight'.*computed.*remove_parametrizations",
    ),
    "spectral_norm": (
        lambda block: parametrizations.spectral_norm(block[2]), "'2.weight'.*computed"
    ),
    "old weight_norm": (lambda block: weight_norm(block[0]), "'0.weight'.*computed"),
    "pruned": (
        lambda block: prune.l1_unstructured(block[2], "weight", 0.5), "'2.weight'.*computed"
    ),
    "hook": (
        lambda block: block[0].register_forward_hook(lambda module, args, output: output * 2),
        "'0' does not compute what its weight and bias say",
    ),
    "two dtypes": (lambda block: block[2].double(), "'0' is torch.float32 on cpu, but '2' is .*64"),
    "LoRA": (lambda block: setattr(block, "0", Lora(D, H)), "'0' does not compute.*LoRA"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.parametrize("change", COMPUTED)
def test_a_linear_that_is_more_than_its_weight_gives_way_to_new_experts_only(change):
    model, (apply, words) = Block(mlp()), COMPUTED[change]
    apply(model.mlp)
    with refused(model, f"mlp: Sequential: could not read .*{words}"):
        swap_mlps(model, "mlp", upcycle=True)
    assert swap_mlps(model, "mlp") == ["mlp"]


@pytest.mark.parametrize("upcycle", [False, True])
@pytest.mark.parametrize("register", ["register_forward_hook", "register_forward_pre_hook"])
def test_a_hook_that_changes_what_the_block_computes_is_not_dropped(upcycle, register):
    model = Block(mlp())
    getattr(model.mlp, register)(lambda module, args, *output: (output or args[0])[0] + 1)
    with pytest.raises(ValueError, match="mlp: Sequential: "):
        swap_mlps(model, "mlp", upcycle=upcycle)


class DropPathMlp(nn.Module):
    """Ends with stochastic depth: a whole sample is dropped or kept."""

    def __init__(self):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(4, 8), nn.Linear(8, 4)

    def forward(self, x):
        y = self.fc2(torch.relu(self.fc1(x)))
        if self.training:
            y = y * (torch.rand(len(x), 1, 1) > 0.3) / 0.7
        return y


def test_stochastic_depth_is_not_taken_for_dropout():
    for _ in range(5):
        with pytest.raises(ValueError, match="could not read its dropout"):
            DMoE.from_mlp(DropPathMlp())
    assert DMoE.from_mlp(DropPathMlp(), dropout=0.3).dropout.p == 0.3


def test_dropout_of_whole_channels_is_not_taken_for_that_of_entries():
    convolutions = nn.Conv2d(D, H, 1), nn.GELU(), nn.Conv2d(H, D, 1)
    with pytest.raises(ValueError, match="could not read its dropout"):
        DMoE.from_mlp(nn.Sequential(*convolutions, nn.Dropout2d(0.3)))
    assert DMoE.from_mlp(nn.Sequential(*convolutions, nn.Dropout(0.3))).dropout.p == 0.3
