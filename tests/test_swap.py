"""What swap_mlps and DMoE.from_mlp promise, held against models that other people wrote."""

import contextlib
import copy
import functools
import re

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from monai.networks.blocks import MLPBlock, TransformerBlock
from monai.networks.nets import UNETR, SwinUNETR, ViT, ViTAutoEnc
from torch import nn
from torch.nn.utils import parametrizations, prune, weight_norm

from dmoe_layer import DMoE, carry_routing, routing, swap_mlps

D, H = 8, 16
TEXT = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
}
IMAGE = {"image_size": 16, "patch_size": 8, "num_channels": 1}
VIT = {"hidden_size": 16, "mlp_dim": 32, "num_heads": 2}


def images(size=16, dims=2):
    return torch.randn(2, 1, *(size,) * dims)


def words():
    return torch.randint(20, (2, 5))


def swin_unetr(dims):
    window = {"depths": (1, 1, 1, 1), "num_heads": (1, 1, 1, 1), "feature_size": 12}
    return SwinUNETR(1, 1, spatial_dims=dims, **window)


def swin():
    stages = {"embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "window_size": 2}
    return hf.SwinModel(hf.SwinConfig(image_size=16, patch_size=4, num_channels=1, **stages))


def dinov2(**options):
    return hf.Dinov2Model(hf.Dinov2Config(**{**TEXT, **IMAGE}, mlp_ratio=2, **options))


def mae():
    return hf.ViTMAEModel(hf.ViTMAEConfig(**TEXT, **IMAGE, mask_ratio=0.5))


def gpt2(**options):
    sizes = {
        "n_embd": 16,
        "n_layer": 1,
        "n_head": 2,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "use_cache": False,
    }
    return hf.GPT2Model(hf.GPT2Config(vocab_size=20, **sizes, **options))


def clip(act):
    return hf.CLIPVisionModel(hf.CLIPVisionConfig(**TEXT, **IMAGE, hidden_act=act))


class TimmMlp(nn.Module):
    """As timm writes it: every part a module, most of them idle."""

    def __init__(self, dim=D, hidden=H):
        super().__init__()
        self.fc1, self.act, self.drop1 = nn.Linear(dim, hidden), nn.GELU(), nn.Dropout(0.1)
        self.norm = nn.Identity()
        self.fc2, self.drop2 = nn.Linear(hidden, dim), nn.Dropout(0.2)

    def forward(self, x):
        x = self.drop1(self.act(self.fc1(x)))
        return self.drop2(self.fc2(self.norm(x)))


class TorchvisionMlp(nn.Sequential):
    """As torchvision writes it: a Sequential that works in place."""

    def __init__(self, dim=D, hidden=H):
        act, drop = nn.ReLU(inplace=True), functools.partial(nn.Dropout, 0.1, inplace=True)
        super().__init__(nn.Linear(dim, hidden), act, drop(), nn.Linear(hidden, dim), drop())


class FunctionalMlp(nn.Module):
    """Nothing but the linear layers is a module, and those are not called."""

    def __init__(self, dim=D, hidden=H):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, hidden, bias=False), nn.Linear(hidden, dim)

    def forward(self, x):
        x = F.linear(F.silu(F.linear(x, self.fc1.weight)), self.fc2.weight, self.fc2.bias)
        return F.dropout(x, 0.3, self.training)


class Block(nn.Module):
    """A pre-norm block around somebody's MLP."""

    def __init__(self, mlp):
        super().__init__()
        self.norm, self.mlp = nn.LayerNorm(D), mlp

    def forward(self, x):
        return x + self.mlp(self.norm(x))


def mlp(act=None, dim=D, hidden=H, **where):
    return nn.Sequential(
        nn.Linear(dim, hidden, **where), act or nn.GELU(), nn.Linear(hidden, dim, **where)
    )


def tokens():
    return torch.randn(2, 5, D)


# name: (the model, its input, the pattern, the number of blocks)
ZOO = {
    "monai UNETR 2D": (
        lambda: UNETR(1, 1, (16, 16), 4, spatial_dims=2, **VIT),
        images,
        "*.mlp",
        12,
    ),
    "monai UNETR 3D": (
        lambda: UNETR(1, 1, (16,) * 3, 4, **VIT),
        lambda: images(16, 3),
        "vit.*.mlp",
        12,
    ),
    "monai ViT": (
        lambda: ViT(1, 16, 8, num_layers=2, spatial_dims=2, classification=True, **VIT),
        images,
        "*.mlp",
        2,
    ),
    "monai ViTAutoEnc": (
        lambda: ViTAutoEnc(1, (16, 16), (4, 4), num_layers=2, spatial_dims=2, **VIT),
        images,
        "*.mlp",
        2,
    ),
    "monai SwinUNETR 2D": (lambda: swin_unetr(2), lambda: images(64), "*.mlp", 4),
    "monai Swin 3D": (lambda: swin_unetr(3).swinViT, lambda: images(32, 3), "*.mlp", 4),
    "monai TransformerBlock": (lambda: TransformerBlock(D, H, 2, 0.1), tokens, "mlp", 1),
    "hf ViT": (lambda: hf.ViTModel(hf.ViTConfig(**TEXT, **IMAGE)), images, "*.mlp", 2),
    "hf DeiT": (lambda: hf.DeiTModel(hf.DeiTConfig(**TEXT, **IMAGE)), images, "*.mlp", 2),
    "hf MAE": (mae, images, "*.mlp", 2),
    "hf DINOv2": (dinov2, images, "*.mlp", 2),
    "hf Swin": (swin, images, "*.mlp", 2),
    "hf BEiT": (lambda: hf.BeitModel(hf.BeitConfig(**TEXT, **IMAGE)), images, "*.mlp", 2),
    "hf CLIP": (lambda: clip("gelu"), images, "*.mlp", 2),
    "hf SigLIP": (
        lambda: hf.SiglipVisionModel(hf.SiglipVisionConfig(**TEXT, **IMAGE)),
        images,
        "*.mlp",
        3,
    ),
    "hf GPT-2": (gpt2, words, "h.*.mlp", 1),
    "hf DistilBERT": (
        lambda: hf.DistilBertModel(
            hf.DistilBertConfig(vocab_size=20, dim=16, hidden_dim=32, n_layers=2, n_heads=2)
        ),
        words,
        "*.ffn",
        2,
    ),
    "like timm": (lambda: Block(TimmMlp()), tokens, "mlp", 1),
    "like torchvision": (lambda: Block(TorchvisionMlp()), tokens, "mlp", 1),
    "functional": (lambda: Block(FunctionalMlp()), tokens, "mlp", 1),
}


class SwiGlu(nn.Module):
    """As Meta writes it: the second of the three is the one that leads back."""

    def __init__(self):
        super().__init__()
        self.w1, self.w2, self.w3 = nn.Linear(D, H), nn.Linear(H, D), nn.Linear(D, H)

    def forward(self, x):
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Residual(nn.Sequential):
    def forward(self, x):
        return x + super().forward(x)


class Scaled(nn.Module):
    """A scale that does nothing yet, as LayerScale and ReZero may start."""

    def __init__(self):
        super().__init__()
        self.mlp, self.gamma = mlp(), nn.Parameter(torch.ones(D))

    def forward(self, x):
        return self.mlp(x) * self.gamma


class MonteCarlo(nn.Sequential):
    """Drops in evaluation too."""

    def forward(self, x):
        return F.dropout(super().forward(x), 0.5, training=True)


class WithWeights(nn.Sequential):
    def forward(self, x):
        return super().forward(x), None


class Convolved(nn.Module):
    """A mix of tokens between the linear layers, as in SegFormer."""

    def __init__(self):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(D, H), nn.Linear(H, D)
        self.dwconv = nn.Conv1d(H, H, 3, padding=1, groups=H)

    def forward(self, x):
        return self.fc2(F.gelu(self.dwconv(self.fc1(x).mT).mT))


def segformer():
    widths = {"hidden_sizes": [8] * 4, "depths": [1] * 4, "num_attention_heads": [1] * 4}
    return hf.SegformerModel(hf.SegformerConfig(num_channels=1, **widths))


def poolformer():
    widths = {"hidden_sizes": [8] * 4, "depths": [1] * 4}
    return hf.PoolFormerModel(hf.PoolFormerConfig(num_channels=1, **widths))


def llama():
    sizes = {"num_key_value_heads": 2, "vocab_size": 20}
    return hf.LlamaModel(hf.LlamaConfig(**TEXT, **sizes))


# name: (the model, the pattern, what the error names)
NO_TWO_LAYER_MLP = {
    "monai GEGLU": (lambda: Block(MLPBlock(D, H, act="GEGLU")), "mlp", "'linear1' 8 -> 32.*GLU"),
    "hf DINOv2 SwiGLU": (
        lambda: dinov2(use_swiglu_ffn=True),
        "*.mlp",
        "encoder.layer.0.mlp.* 3 linear layers.*'gate_proj'.*GLU",
    ),
    "hf Llama": (llama, "*.mlp", "layers.0.mlp: LlamaMLP.*'gate_proj' 16 -> 32.*GLU"),
    "gated, w1 w2 w3": (lambda: Block(SwiGlu()), "mlp", "SwiGlu.*'w2' 16 -> 8.*GLU"),
    "hf BERT, half": (
        lambda: hf.BertModel(hf.BertConfig(vocab_size=20, **TEXT)),
        "*.intermediate",
        "encoder.layer.0.intermediate: BertIntermediate.* 1 linear layers .*'dense' 16 -> 32.*BERT",
    ),
    "hf BERT, layer": (
        lambda: hf.BertModel(hf.BertConfig(vocab_size=20, **TEXT)),
        "encoder.layer.?",
        "BertLayer.* 6 linear layers .*'intermediate.dense' 16 -> 32",
    ),
    "hf SegFormer": (segformer, "*.mlp", r"SegformerMixMLP.*\(hidden_states, height, width\)"),
    "hf PoolFormer": (poolformer, "*.output", "PoolFormerOutput.* 0 linear layers .*Conv2d"),
    "torch encoder layer": (
        lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(D, 2, H, batch_first=True), 1),
        "layers.0",
        "layers.0: TransformerEncoderLayer.*'linear1' 8 -> 16.*no module of its own",
    ),
    "one linear": (lambda: Block(mlp()), "mlp.0", "mlp.0: Linear.* 1 linear layers .*'itself'"),
    "norm before": (
        lambda: Block(nn.Sequential(nn.LayerNorm(D), *mlp())),
        "mlp",
        "'1' is not given the block's input .*'0' LayerNorm",
    ),
    "norm inside": (
        lambda: Block(nn.Sequential(nn.Linear(D, H), nn.GELU(), nn.LayerNorm(H), nn.Linear(H, D))),
        "mlp",
        "between '0' and '3' mixes hidden units or tokens .*'2' LayerNorm",
    ),
    "convolution inside": (
        lambda: Block(Convolved()),
        "mlp",
        "between 'fc1' and 'fc2' mixes hidden units or tokens .*'dwconv' Conv1d",
    ),
    "residual": (lambda: Block(Residual(*mlp())), "mlp", "output is not that of '2'.*residual"),
    "norm behind": (
        lambda: Block(nn.Sequential(*mlp(), nn.LayerNorm(D))),
        "mlp",
        "output is not that of '2' .*'3' LayerNorm",
    ),
    "a scale of 1": (lambda: Block(Scaled()), "mlp", "output is not that of 'mlp.2'.*scale"),
    "dropout in eval": (lambda: Block(MonteCarlo(*mlp())), "mlp", "output is not that of '2'"),
    "a tuple": (lambda: Block(WithWeights(*mlp())), "mlp", "returns one tensor.* tuple"),
    "lazy": (
        lambda: Block(nn.Sequential(nn.LazyLinear(H), nn.GELU(), nn.LazyLinear(D))),
        "mlp",
        "'0': it has no shape yet",
    ),
    "a list": (
        lambda: Block(nn.ModuleList([nn.Linear(D, H), nn.Linear(H, D)])),
        "mlp",
        "ModuleList.*forward",
    ),
    "a DMoE": (lambda: Block(DMoE(D)), "mlp", "mlp: is a DMoE already"),
}


class Squared(nn.Module):
    def forward(self, x):
        return F.relu(x).square()


# name: (the activation, how its module is called)
UNKNOWN_ACTIVATIONS = {
    "quick_gelu": (hf.activations.QuickGELUActivation, "QuickGELUActivation"),
    "relu2": (Squared, "Squared"),
    "hardswish, in place": (lambda: nn.Hardswish(inplace=True), "Hardswish"),
    "prelu": (nn.PReLU, "PReLU"),
    "none": (nn.Identity, ""),
    "gelu, cut at 10": (lambda: hf.activations.ACT2FN["gelu_10"], "ClippedGELUActivation"),
}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def tensors(output):
    """All tensors of a model's output, whatever it wraps them in."""
    if isinstance(output, torch.Tensor):
        return [output] if output.is_floating_point() else []
    values = output.values() if isinstance(output, dict) else output or ()
    return [tensor for value in values for tensor in tensors(value)]


def flat(parts):
    return torch.cat([part.flatten() for part in parts])


def run(model, x, attributes=None):
    torch.manual_seed(1)  # MAE masks at random, in eval too
    with routing(attributes) if attributes is not None else contextlib.nullcontext():
        return tensors(model(x))


def assert_close(a, b, tolerance=1e-5):
    assert a.shape == b.shape
    assert (a - b).abs().max() <= tolerance * b.abs().max()


def strong(model):
    """The model with weights large enough that its MLPs count, and biases that are not zero."""
    for module in model.modules():
        if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D":
            nn.init.normal_(module.weight, std=min(module.weight.shape) ** -0.5)
            if module.bias is not None:
                nn.init.normal_(module.bias)
    return model


def snapshot(model):
    modules = [(name, id(m), m.training) for name, m in model.named_modules()]
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    lazy = nn.parameter.UninitializedParameter
    values = [
        (name, None if isinstance(v, lazy) else v.clone()) for name, v in model.state_dict().items()
    ]
    return modules, hooks, values, torch.get_rng_state()


def assert_untouched(model, before):
    after = snapshot(model)
    assert after[:2] == before[:2]
    assert [name for name, _ in after[2]] == [name for name, _ in before[2]]
    for (_, new), (_, old) in zip(after[2], before[2], strict=True):
        assert new is old is None or torch.equal(new, old)
    assert torch.equal(after[3], before[3])


def blocks_of(model, names):
    return [model.get_submodule(name) for name in names]


# ---- models as they are ----


@pytest.mark.parametrize("model", ZOO)
def test_an_upcycled_model_computes_what_the_old_one_did_whatever_k_is(model):
    build, make_input, pattern, count = ZOO[model]
    old, x = strong(build()).eval(), make_input()
    expected = flat(run(old, x))
    for k in (1, 2, 8):
        new = copy.deepcopy(old)
        names = swap_mlps(new, pattern, upcycle=True, k=k, attribute_sizes=3)
        assert len(names) == count
        assert_close(flat(run(new, x, torch.tensor([0, 2]))), expected)
        # The whole model might hide an MLP behind a norm or a small scale: block by block too.
        for was, now in zip(blocks_of(old, names), blocks_of(new, names), strict=True):
            tokens_BTD = torch.randn(2, 7, now.dim)
            assert_close(now(tokens_BTD, torch.tensor([1, 0])), was(tokens_BTD.clone()))


@pytest.mark.parametrize("model", ZOO)
@pytest.mark.parametrize("upcycle", [False, True])
def test_a_swapped_model_trains(model, upcycle):
    build, make_input, pattern, _ = ZOO[model]
    model, x, attributes = build(), make_input(), torch.tensor([0, 2])
    names = swap_mlps(model, pattern, upcycle=upcycle, attribute_sizes=3)
    layers = blocks_of(model, names)
    assert all(isinstance(layer, DMoE) and layer.training for layer in layers)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with routing(attributes) as r:
        loss = flat(tensors(model(x))).square().mean() + 0.01 * r.load_balancing_loss()
    assert len(r.routings) == len(layers)
    loss.backward()
    for name, layer in zip(names, layers, strict=True):
        for key, parameter in layer.named_parameters():
            assert parameter.grad is not None, f"{name}.{key}"
            assert parameter.grad.isfinite().all(), f"{name}.{key}"
        absent = layer.router.w_A2ED.grad[1]
        assert not absent.any()
    optimizer.step()
    assert all(parameter.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize("model", ["monai UNETR 2D", "monai Swin 3D", "hf Swin", "hf ViT"])
def test_a_sample_is_routed_by_its_own_attribute(model):
    build, make_input, pattern, _ = ZOO[model]
    model, x = strong(build()).eval(), make_input()
    swap_mlps(model, pattern, attribute_sizes=3)
    together = run(model, x, torch.tensor([0, 2]))
    for sample, own, other in ((0, 0, 2), (1, 2, 0)):
        found = flat([part[sample] for part in together])
        assert_close(found, flat(run(model, x[sample : sample + 1], torch.tensor([own]))))
        elsewhere = flat(run(model, x[sample : sample + 1], torch.tensor([other])))
        assert (found - elsewhere).abs().max() > 1e-3 * found.abs().max()


@pytest.mark.parametrize("upcycle", [False, True])
@pytest.mark.parametrize("model", NO_TWO_LAYER_MLP)
def test_a_block_that_is_no_two_layer_mlp_is_named_and_nothing_changes(model, upcycle):
    build, pattern, words = NO_TWO_LAYER_MLP[model]
    model = build()
    before = snapshot(model)
    with pytest.raises(ValueError, match=f"(?s){words}"):
        swap_mlps(model, pattern, upcycle=upcycle)
    assert_untouched(model, before)


def test_one_unreadable_block_leaves_all_the_others_in_place():
    model = nn.Sequential(Block(mlp()), Block(mlp()), Block(SwiGlu()))
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"^2.mlp: SwiGlu: "):
        swap_mlps(model, "*.mlp", upcycle=True)
    after = snapshot(model)
    assert after[0] == before[0]  # the random state may move: two layers were drawn


@pytest.mark.parametrize("act", UNKNOWN_ACTIVATIONS)
def test_new_experts_may_take_the_place_of_any_activation(act):
    build, _ = UNKNOWN_ACTIVATIONS[act]
    model = Block(mlp(build()))
    assert swap_mlps(model, "mlp", activation="silu", dropout=0.0) == ["mlp"]
    assert (model.mlp.dim, model.mlp.hidden_dim) == (D, H)
    assert (model.mlp.activation, model.mlp.dropout) == ("silu", 0.0)
    assert model(tokens()).isfinite().all()


@pytest.mark.parametrize("act", UNKNOWN_ACTIVATIONS)
def test_upcycling_an_unknown_activation_is_refused_by_its_name(act):
    build, name = UNKNOWN_ACTIVATIONS[act]
    model = Block(mlp(build()))
    before = snapshot(model)
    with pytest.raises(ValueError, match=rf"mlp: .*between its linear layers stands none.*{name}"):
        swap_mlps(model, "mlp", upcycle=True)
    assert_untouched(model, before)


def test_clip_with_quick_gelu_takes_new_experts():
    model = clip("quick_gelu")
    with pytest.raises(ValueError, match=r"encoder.layers.0.mlp: CLIPMLP.*QuickGELUActivation"):
        swap_mlps(model, "*.mlp", upcycle=True)
    assert len(swap_mlps(model, "*.mlp")) == 2


@pytest.mark.parametrize(
    ("act", "name"),
    [
        ("gelu", "gelu"),
        ("gelu_python", "gelu"),
        ("gelu_new", "gelu_tanh"),
        ("gelu_fast", "gelu_tanh"),
        ("gelu_accurate", "gelu_tanh"),
        ("gelu_pytorch_tanh", "gelu_tanh"),
        ("silu", "silu"),
        ("swish", "silu"),
        ("relu", "relu"),
    ],
)
def test_an_activation_is_known_by_what_it_computes(act, name):
    assert DMoE.from_mlp(mlp(hf.activations.ACT2FN[act])).activation == name


@pytest.mark.parametrize("act", [nn.ReLU(), nn.GELU(), nn.GELU("tanh"), nn.SiLU()])
@pytest.mark.parametrize("size", [0.0, 1e-12, 1.0, 1e6])
def test_weights_of_any_size_hide_no_activation(act, size):
    block = mlp(act)
    for parameter in block.parameters():
        nn.init.constant_(parameter, size)
    expected = DMoE.from_mlp(mlp(act)).activation
    assert DMoE.from_mlp(block).activation == expected


@pytest.mark.parametrize("mode", ["vit", "swin", "vista3d"])
@pytest.mark.parametrize("act", ["GELU", "relu"])
def test_monai_blocks_upcycle_in_every_dropout_mode(mode, act):
    block = strong(MLPBlock(D, H, 0.25, act=act, dropout_mode=mode)).eval()
    layer = DMoE.from_mlp(block)
    assert layer.dropout == (0.0 if mode == "vista3d" else 0.25)
    x = tokens()
    assert_close(layer(x), block(x))


@pytest.mark.parametrize(
    ("block", "rate"),
    [
        (mlp(), 0.0),
        (nn.Sequential(*mlp(), nn.Dropout(0.4)), 0.4),
        (nn.Sequential(*mlp(), nn.Dropout(1.0)), 1.0),
        # This one drops hidden units, which an expert has no dropout for.
        (nn.Sequential(nn.Linear(D, H), nn.ReLU(), nn.Dropout(0.4), nn.Linear(H, D)), 0.0),
        (TimmMlp(), 0.2),
        (TorchvisionMlp(), 0.1),
        (FunctionalMlp(), 0.3),
    ],
)
def test_the_dropout_of_an_upcycled_block_is_the_one_at_its_end(block, rate):
    assert DMoE.from_mlp(block).dropout == rate
    assert DMoE.from_mlp(block, dropout=0.7).dropout == 0.7


# ---- what is kept of a block ----


@pytest.mark.parametrize("upcycle", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("training", [False, True])
def test_a_new_layer_keeps_widths_dtype_and_mode(upcycle, dtype, training):
    model = Block(mlp(dim=D, hidden=13)).to(dtype).train(training)
    swap_mlps(model, "mlp", upcycle=upcycle)
    layer = model.mlp
    assert (layer.dim, layer.hidden_dim) == (D, 13)
    assert {parameter.dtype for parameter in layer.parameters()} == {dtype}
    assert {module.training for module in layer.modules()} == {training}
    assert model(tokens().to(dtype)).dtype == dtype


@pytest.mark.parametrize("upcycle", [False, True])
@pytest.mark.parametrize("where", ["around", "on it"])
def test_a_model_on_meta_stays_there(upcycle, where):
    with torch.device("meta") if where == "around" else contextlib.nullcontext():
        model = Block(TimmMlp()).to("meta")
        swap_mlps(model, "mlp", upcycle=upcycle)
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    if upcycle:
        assert (model.mlp.activation, model.mlp.dropout) == ("gelu", 0.2)


def test_options_win_over_the_block_where_it_does_not_decide():
    model = Block(mlp())
    swap_mlps(model, "mlp", hidden_dim=5, bias=False, n_experts=3, k=1, dtype=torch.float64)
    assert model.mlp.w1_EHD.shape == (3, 5, D)
    assert model.mlp.w1_EHD.dtype == torch.float64
    assert model.mlp.b1_EH is None


@pytest.mark.parametrize("upcycle", [False, True])
@pytest.mark.parametrize(
    "options", [{"dim": 4}, {"n_expert": 4}, {"k": 9}, {"activation": "tanh"}, {"backend": "?"}]
)
def test_options_that_do_not_fit_change_nothing(upcycle, options):
    model = Block(mlp())
    old = model.mlp
    with pytest.raises((TypeError, ValueError), match=next(iter(options))):
        swap_mlps(model, "mlp", upcycle=upcycle, **options)
    assert model.mlp is old


def test_a_missing_bias_upcycles_to_zero():
    block = nn.Sequential(nn.Linear(D, H, bias=False), nn.ReLU(), nn.Linear(H, D)).eval()
    x = tokens()
    assert_close(DMoE.from_mlp(block)(x), block(x))
    assert DMoE.from_mlp(mlp()[:2].append(nn.Linear(H, D, bias=False))).b2_ED.abs().sum() == 0
    without = nn.Sequential(nn.Linear(D, H, bias=False), nn.ReLU(), nn.Linear(H, D, bias=False))
    assert DMoE.from_mlp(without).b1_EH is None


def test_experts_of_a_frozen_mlp_can_learn():
    model = Block(mlp()).requires_grad_(False)
    swap_mlps(model, "mlp", upcycle=True)
    assert all(parameter.requires_grad for parameter in model.mlp.parameters())
    assert not model.norm.weight.requires_grad


def test_reading_changes_no_weight_gradient_hook_or_random_state():
    block = Block(nn.Sequential(*mlp(), nn.Dropout(0.5)))
    block.mlp[0].register_forward_hook(lambda module, args, output: None)
    block(tokens()).sum().backward()
    gradients = [parameter.grad.clone() for parameter in block.parameters()]
    before = snapshot(block)
    with pytest.raises(ValueError, match="norm"):
        DMoE.from_mlp(block)
    assert_untouched(block, before)
    assert all(map(torch.equal, gradients, [parameter.grad for parameter in block.parameters()]))

    DMoE(D, hidden_dim=H)
    drawn = torch.get_rng_state()
    torch.set_rng_state(before[3])
    DMoE.from_mlp(block.mlp)
    assert torch.equal(torch.get_rng_state(), drawn)


def test_a_block_that_keeps_what_it_saw_can_be_read():
    class Remembering(nn.Sequential):
        def forward(self, x):
            self.last = super().forward(x)
            return self.last

    model = Block(Remembering(*mlp()))
    model(tokens())
    assert swap_mlps(model, "mlp", upcycle=True) == ["mlp"]


# ---- weights that are computed, linear layers that do more ----


class Lora(nn.Linear):
    """Starts as the linear layer it is, since b is zero, and learns to be another."""

    def __init__(self, n_in, n_out):
        super().__init__(n_in, n_out)
        self.a, self.b = nn.Parameter(torch.randn(2, n_in)), nn.Parameter(torch.zeros(n_out, 2))

    def forward(self, x):
        return super().forward(x) + x @ self.a.T @ self.b.T


def with_weight_norm():
    return nn.Sequential(parametrizations.weight_norm(nn.Linear(D, H)), *mlp()[1:])


def with_spectral_norm():
    return nn.Sequential(*mlp()[:2], parametrizations.spectral_norm(nn.Linear(H, D)))


def with_old_weight_norm():
    with pytest.warns(FutureWarning):
        return nn.Sequential(weight_norm(nn.Linear(D, H)), *mlp()[1:])


def pruned():
    block = mlp()
    prune.l1_unstructured(block[2], "weight", 0.5)
    return block


def with_a_hook():
    block = mlp()
    block[0].register_forward_hook(lambda module, args, output: output * 2)
    return block


COMPUTED = {
    with_weight_norm: "'0.weight'.*computed.*remove_parametrizations",
    with_spectral_norm: "'2.weight'.*computed",
    with_old_weight_norm: "'0.weight'.*computed",
    pruned: "'2.weight'.*computed",
    with_a_hook: "'0' does not compute what its weight and bias say",
    lambda: nn.Sequential(Lora(D, H), *mlp()[1:]): "'0' does not compute.*LoRA",
}


@pytest.mark.parametrize("build", COMPUTED)
def test_a_linear_that_is_more_than_its_weight_gives_way_to_new_experts_only(build):
    model = Block(build())
    before = snapshot(model)
    with pytest.raises(ValueError, match=f"mlp: Sequential: could not read .*{COMPUTED[build]}"):
        swap_mlps(model, "mlp", upcycle=True)
    assert_untouched(model, before)
    assert swap_mlps(model, "mlp") == ["mlp"]


@pytest.mark.parametrize("upcycle", [False, True])
@pytest.mark.parametrize("register", ["register_forward_hook", "register_forward_pre_hook"])
def test_a_hook_that_changes_what_the_block_computes_is_not_dropped(upcycle, register):
    model = Block(mlp())
    getattr(model.mlp, register)(lambda module, args, *output: (output or args[0])[0] + 1)
    with pytest.raises(ValueError, match="mlp: Sequential: "):
        swap_mlps(model, "mlp", upcycle=upcycle)


def test_linear_layers_of_two_dtypes_do_not_upcycle():
    model = nn.Sequential(nn.Linear(D, H), nn.ReLU(), nn.Linear(H, D).double())
    with pytest.raises(ValueError, match=r"'0' is torch.float32 on cpu and '2' is torch.float64"):
        DMoE.from_mlp(model)


# ---- what a pattern matches ----


def test_a_shared_block_is_replaced_once_wherever_it_stands():
    block = mlp()
    model = nn.ModuleDict({"a": Block(block), "b": Block(block), "other": Block(mlp())})
    assert swap_mlps(model, "a.mlp") == ["a.mlp", "b.mlp"]
    assert model["a"].mlp is model["b"].mlp
    assert isinstance(model["a"].mlp, DMoE)
    assert not isinstance(model["other"].mlp, DMoE)


def test_a_shared_layer_that_holds_a_block_counts_under_every_name():
    layer = Block(mlp())
    model = nn.Sequential(layer, nn.ReLU(), layer)
    assert swap_mlps(model, "*.mlp") == ["0.mlp", "2.mlp"]
    assert model[0].mlp is model[2].mlp


@pytest.mark.parametrize(
    "container",
    [
        lambda *blocks: nn.ModuleList(blocks),
        lambda *blocks: nn.Sequential(*blocks),
        lambda *blocks: nn.ModuleDict({"0": blocks[0], "1": blocks[1]}),
    ],
)
def test_a_block_may_stand_in_any_container(container):
    model = container(mlp(), mlp())
    order = list(model._modules)
    assert swap_mlps(model, "1", upcycle=True) == ["1"]
    assert isinstance(model._modules["1"], DMoE)
    assert list(model._modules) == order


def test_the_outermost_match_counts():
    model = nn.Sequential(mlp(), mlp())
    assert swap_mlps(model, "*") == ["0", "1"]
    model = Block(nn.ModuleDict({"mlp": mlp(), "deep": nn.ModuleDict({"mlp": mlp()})}))
    assert swap_mlps(model, "*.mlp") == ["mlp.mlp", "mlp.deep.mlp"]


def test_a_star_that_meets_something_else_first_says_so():
    model = Block(mlp())
    before = snapshot(model)
    with pytest.raises(ValueError, match="norm: LayerNorm: expected a two-layer MLP"):
        swap_mlps(model, "*")
    assert_untouched(model, before)


@pytest.mark.parametrize(
    "pattern",
    [
        lambda name, module: name.endswith("mlp"),
        lambda module: isinstance(module, nn.Sequential),
        lambda module, kind=nn.Sequential: isinstance(module, kind),
        lambda *name_and_module: name_and_module[0] == "mlp",
        lambda name, module: re.search("mlp$", name),  # true or not, as in filter()
        functools.partial(lambda kind, module: isinstance(module, kind), nn.Sequential),
    ],
)
def test_a_predicate_sees_name_and_module_or_the_module(pattern):
    model = Block(mlp())
    assert swap_mlps(model, pattern) == ["mlp"]


@pytest.mark.parametrize("pattern", [None, 3, b"*.mlp", ["*.mlp"], MLPBlock, nn.GELU(), {"*.mlp"}])
def test_a_pattern_of_another_kind_is_refused(pattern):
    with pytest.raises(TypeError, match=r"pattern: got .*expected a glob .*or a predicate"):
        swap_mlps(Block(mlp()), pattern)


def test_other_arguments_of_another_kind_are_refused():
    with pytest.raises(TypeError, match=r"model: got str, expected a torch.nn.Module"):
        swap_mlps("model", "*.mlp")
    with pytest.raises(TypeError, match="upcycle: got 'yes'"):
        swap_mlps(Block(mlp()), "mlp", upcycle="yes")
    with pytest.raises(TypeError, match=r"mlp: got int, expected a torch.nn.Module"):
        DMoE.from_mlp(3)


@pytest.mark.parametrize("pattern", ["*.mpl", "blocks.mlp", "mlp", lambda module: False])
def test_a_pattern_without_a_match_brings_up_the_mlps_of_the_model(pattern):
    model = ViT(1, 16, 8, num_layers=7, spatial_dims=2, **VIT)
    before = snapshot(model)
    first_five = ", ".join(f"blocks.{i}.mlp" for i in range(5))
    with pytest.raises(ValueError, match=f"matches no module. Close candidates: {first_five} and "):
        swap_mlps(model, pattern)
    assert_untouched(model, before)


def test_close_candidates_are_ranked_by_their_spelling():
    model = nn.ModuleDict({"encoder": nn.Sequential(mlp()), "decoder": nn.Sequential(mlp())})
    with pytest.raises(ValueError, match=r"candidates: decoder\.0, decoder, encoder\.0"):
        swap_mlps(model, "decoder.mlp")


def test_a_model_without_mlp_blocks_is_told_why():
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(D, 2, H, batch_first=True), 2)
    with pytest.raises(
        ValueError, match=r"no block that is a two-layer MLP.*TransformerEncoderLay"
    ):
        swap_mlps(model, "*.mlp")
    with pytest.raises(ValueError, match="matches no module"):
        swap_mlps(nn.Sequential(nn.LazyLinear(3)), "*.mlp")


@pytest.mark.parametrize("pattern", ["", lambda module: isinstance(module, MLPBlock)])
def test_the_model_itself_cannot_be_swapped_in_place(pattern):
    with pytest.raises(ValueError, match=r"Only the model itself does.*from_mlp"):
        swap_mlps(MLPBlock(D, H), pattern)


def test_what_is_swapped_already_is_named():
    model = nn.Sequential(Block(mlp()), Block(mlp()))
    swap_mlps(model, "0.mlp")
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"0.mlp: is a DMoE already"):
        swap_mlps(model, "*.mlp")
    assert_untouched(model, before)
    assert swap_mlps(model, "1.mlp") == ["1.mlp"]


# ---- a swapped model at work ----


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable`:FutureWarning")
@pytest.mark.parametrize("model", ["hf ViT", "hf DINOv2", "hf CLIP", "hf GPT-2"])
@pytest.mark.parametrize("scope", ["open", "closed"])
def test_hugging_face_checkpointing_leaves_loss_and_gradients_alone(model, scope):
    build, make_input, pattern, count = ZOO[model]
    model, x = build().train(), make_input()
    swap_mlps(model, pattern, attribute_sizes=3)
    kwargs = {"use_reentrant": False, "context_fn": carry_routing}
    results = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs)
        model.zero_grad()
        torch.manual_seed(2)
        with contextlib.ExitStack() as stack:
            r = stack.enter_context(routing(torch.tensor([0, 2])))
            loss = flat(tensors(model(x))).square().mean() + r.load_balancing_loss()
            if scope == "closed":
                stack.close()
            loss.backward()
        assert len(r.routings) == count
        gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        results.append((loss, gradients))
    (loss, gradients), (loss_again, gradients_again) = results
    assert torch.equal(loss, loss_again)
    assert gradients.keys() == gradients_again.keys()
    for name, gradient in gradients.items():
        assert_close(gradients_again[name], gradient, 1e-6)


def test_a_swapped_block_compiles_in_one_graph():
    model = TransformerBlock(D, H, 2)
    swap_mlps(model, "mlp", attribute_sizes=3)
    model.eval()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    x = tokens()
    with routing(torch.tensor([0, 2])):
        assert_close(compiled(x), model(x))


def test_a_compiled_model_follows_the_swap():
    model = Block(mlp()).eval()
    compiled = torch.compile(model, backend="aot_eager")
    x = tokens()
    compiled(x)
    swap_mlps(model, "mlp")
    assert_close(compiled(x), model(x))


@pytest.mark.parametrize("upcycle", [False, True])
def test_a_swapped_model_can_be_copied_and_stored(upcycle):
    build, make_input, pattern, _ = ZOO["hf ViT"]
    model, fresh, x = build().eval(), build().eval(), make_input()
    for each in (model, fresh):
        swap_mlps(each, pattern, upcycle=upcycle, attribute_sizes=3)
    attributes = torch.tensor([0, 2])
    expected = flat(run(model, x, attributes))
    assert torch.equal(flat(run(copy.deepcopy(model), x, attributes)), expected)
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(flat(run(fresh, x, attributes)), expected)


def test_an_upcycled_expert_is_its_own_copy():
    block = mlp()
    layer = DMoE.from_mlp(block)
    with torch.no_grad():
        layer.w1_EHD[0].zero_()
    assert layer.w1_EHD[1].any()
    assert block[0].weight.any()
    assert block[0].weight.untyped_storage().data_ptr() != layer.w1_EHD.untyped_storage().data_ptr()
