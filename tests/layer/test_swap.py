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
from monai.networks.nets import UNETR, SwinUNETR, ViT
from torch import nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrizations, prune, weight_norm

from dmoe_layer import DMoE, carry_routing, routing, swap_mlps

D, H = 8, 16
TEXT = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32}
TEXT["num_hidden_layers"] = 2
IMAGE = {**TEXT, "image_size": 16, "patch_size": 8, "num_channels": 1}
VIT = {"hidden_size": 16, "mlp_dim": 32, "num_heads": 2}
VIT_2D = {**VIT, "spatial_dims": 2}
SWIN = {"depths": (1, 1, 1, 1), "num_heads": (1, 1, 1, 1), "feature_size": 12}
SMALL = {"hidden_sizes": [8] * 4, "depths": [1] * 4, "num_attention_heads": [1] * 4}


def images(*size):
    return torch.randn(2, 1, *(size or (16, 16)))


def words():
    return torch.randint(20, (2, 5))


def tokens():
    return torch.randn(2, 5, D)


def hugging_face(name, **options):
    """Builds one of Hugging Face's models from a small configuration."""
    config, model = getattr(hf, f"{name}Config"), getattr(hf, f"{name}Model")
    return lambda: model(config(**options))


GPT2 = {"n_embd": 16, "n_layer": 1, "n_head": 2, "bos_token_id": 0, "eos_token_id": 0}
SWIN_HF = {"embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "window_size": 2}
DISTIL = {"dim": 16, "hidden_dim": 32, "n_layers": 2, "n_heads": 2}


def mlp(act=None, hidden=H):
    return nn.Sequential(nn.Linear(D, hidden), act or nn.GELU(), nn.Linear(hidden, D))


def timm_mlp():
    parts = *mlp()[:2], nn.Dropout(0.1), nn.Identity(), nn.Linear(H, D), nn.Dropout(0.2)
    return nn.Sequential(*parts)


def torchvision_mlp():
    """A Sequential that works in place."""
    act, drop = nn.ReLU(inplace=True), nn.Dropout(0.1, inplace=True)
    return nn.Sequential(nn.Linear(D, H), act, drop, nn.Linear(H, D), drop)


class FunctionalMlp(nn.Module):
    """Nothing but the linear layers is a module, and those are not called."""

    def __init__(self):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(D, H, bias=False), nn.Linear(H, D)

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


# name: (the model, its input, the pattern, the number of blocks)
ZOO = {
    "monai UNETR 2D": (lambda: UNETR(1, 1, (16, 16), 4, **VIT_2D), images, "*.mlp", 12),
    "monai UNETR 3D": (
        lambda: UNETR(1, 1, (16,) * 3, 4, **VIT), lambda: images(16, 16, 16), "vit.*.mlp", 12
    ),
    "monai ViT": (
        lambda: ViT(1, 16, 8, num_layers=2, classification=True, **VIT_2D), images, "*.mlp", 2
    ),
    "monai Swin 3D": (
        lambda: SwinUNETR(1, 1, **SWIN).swinViT, lambda: images(32, 32, 32), "*.mlp", 4
    ),
    "monai TransformerBlock": (lambda: TransformerBlock(D, H, 2, 0.1), tokens, "mlp", 1),
    "hf ViT": (hugging_face("ViT", **IMAGE), images, "*.mlp", 2),
    "hf MAE": (hugging_face("ViTMAE", **IMAGE, mask_ratio=0.5), images, "*.mlp", 2),
    "hf DINOv2": (hugging_face("Dinov2", **IMAGE, mlp_ratio=2), images, "*.mlp", 2),
    "hf Swin": (
        hugging_face("Swin", image_size=16, patch_size=4, num_channels=1, **SWIN_HF), images,
        "*.mlp", 2,
    ),
    "hf CLIP": (hugging_face("CLIPVision", **IMAGE, hidden_act="gelu"), images, "*.mlp", 2),
    "hf SigLIP": (hugging_face("SiglipVision", **IMAGE), images, "*.mlp", 3),
    "hf GPT-2": (
        hugging_face("GPT2", vocab_size=20, use_cache=False, **GPT2), words, "h.*.mlp", 1
    ),
    "hf DistilBERT": (hugging_face("DistilBert", vocab_size=20, **DISTIL), words, "*.ffn", 2),
    "like timm": (lambda: Block(timm_mlp()), tokens, "mlp", 1),
    "like torchvision": (lambda: Block(torchvision_mlp()), tokens, "mlp", 1),
    "functional": (lambda: Block(FunctionalMlp()), tokens, "mlp", 1),
}  # fmt: skip


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
    "monai GEGLU": (lambda: MLPBlock(D, H, act="GEGLU"), "mlp", "'linear1' 8 -> 32.*GLU"),
    "hf DINOv2 SwiGLU": (
        hugging_face("Dinov2", **IMAGE, use_swiglu_ffn=True), "*.mlp",
        "encoder.layer.0.mlp.* 3 linear layers.*'gate_proj'.*GLU",
    ),
    "gated, w1 w2 w3": (sequential(*mlp(), nn.Linear(D, H)), "mlp", "'2' 16 -> 8, '3' .*GLU"),
    "hf BERT, half": (
        hugging_face("Bert", vocab_size=20, **TEXT), "*.intermediate",
        "encoder.layer.0.intermediate: BertIntermediate.* 1 linear layers .*'dense' 16 -> 32.*BERT",
    ),
    "hf SegFormer": (
        hugging_face("Segformer", num_channels=1, **SMALL), "*.mlp",
        r"SegformerMixMLP: could not run it on one tensor.*'height' and 'width'",
    ),
    "hf PoolFormer": (
        hugging_face("PoolFormer", **SMALL), "*.output",
        "PoolFormerOutput.* 0 linear layers .*Conv2d",
    ),
    "torch encoder layer": (
        lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(D, 2, H, batch_first=True), 1),
        "layers.0",
        "layers.0: TransformerEncoderLayer.*'linear1' 8 -> 16.*no module of its own",
    ),
    "one linear": (mlp, "mlp.0", "mlp.0: Linear.* 1 linear layers .*'itself'"),
    "norm before": (
        sequential(nn.LayerNorm(D), *mlp()), "mlp",
        "'1' is not given the block's input .*'0' LayerNorm",
    ),
    "norm inside": (
        sequential(nn.Linear(D, H), nn.GELU(), nn.LayerNorm(H), nn.Linear(H, D)), "mlp",
        "between '0' and '3' mixes hidden units or tokens .*'1' GELU, '2' LayerNorm",
    ),
    "tokens mixed inside": (
        sequential(nn.Linear(D, H), Do(lambda x: x.cumsum(1)), nn.GELU(), nn.Linear(H, D)), "mlp",
        "between '0' and '3' mixes hidden units or tokens .*'1' Do, '2' GELU",
    ),
    "residual": (lambda: Altered(lambda x, y: x + y), "mlp", "output is not that of '2'.*residual"),
    "norm behind": (
        sequential(*mlp(), nn.LayerNorm(D)), "mlp", "output is not that of '2' .*'3' LayerNorm"
    ),
    "a scale of 1": (Scaled, "mlp", "output is not that of '2': .*scale"),
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
    "quick_gelu": (hf.activations.QuickGELUActivation, "QuickGELUActivation"),
    "relu2": (lambda: Do(lambda x: F.relu(x).square()), "Do"),
    "hardswish, in place": (lambda: nn.Hardswish(inplace=True), "Hardswish"),
    "prelu": (nn.PReLU, "PReLU"),
    "none": (nn.Identity, ""),
    "gelu, cut at 10": (lambda: hf.activations.ACT2FN["gelu_10"], "ClippedGELUActivation"),
}


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
    modules = [(n, id(m), m.training, [*m._forward_hooks]) for n, m in model.named_modules()]
    state = {n: v.clone() for n, v in model.state_dict().items() if not is_lazy(v)}
    return modules, state, torch.get_rng_state()


@contextlib.contextmanager
def refused(model, words):
    """What is tried is refused in these words and leaves the model as it was."""
    modules, *values = snapshot(model)
    with pytest.raises(ValueError, match=words):
        yield
    modules_now, *values_now = snapshot(model)
    assert modules_now == modules
    torch.testing.assert_close(values_now, values, rtol=0, atol=0)


# ---- models as they are ----


@pytest.mark.parametrize("model", ZOO)
def test_an_upcycled_model_computes_what_the_old_one_did_whatever_k_is(model):
    build, make_input, pattern, count = ZOO[model]
    old, x = strong(build()).eval(), make_input()
    expected = flat(run(old, x))
    for k in (1, 2, 8) if model in ("monai ViT", "functional") else (2,):
        new = copy.deepcopy(old)
        names = swap_mlps(new, pattern, upcycle=True, k=k, attribute_sizes=3)
        assert len(names) == count
        assert_close(flat(run(new, x, torch.tensor([0, 2]))), expected)
        # The whole model might hide an MLP behind a norm or a small scale: block by block too.
        for was, now in ((old.get_submodule(name), new.get_submodule(name)) for name in names):
            tokens_BTD = torch.randn(2, 7, now.dim)
            assert_close(now(tokens_BTD, torch.tensor([1, 0])), was(tokens_BTD.clone()))


@pytest.mark.parametrize(
    ("model", "upcycle"), [*((model, False) for model in ZOO), ("monai ViT", True)]
)
def test_a_swapped_model_trains(model, upcycle):
    build, make_input, pattern, _ = ZOO[model]
    model, x, attributes = build(), make_input(), torch.tensor([0, 2])
    names = swap_mlps(model, pattern, upcycle=upcycle, attribute_sizes=3)
    layers = [model.get_submodule(name) for name in names]
    assert all(isinstance(layer, DMoE) and layer.training for layer in layers)
    with routing(attributes) as r:
        loss = flat(tensors(model(x))).square().mean() + 0.01 * r.load_balancing_loss()
    assert len(r.routings) == len(layers)
    loss.backward()
    for name, layer in zip(names, layers, strict=True):
        for key, parameter in layer.named_parameters():
            assert parameter.grad is not None, f"{name}.{key}"
            assert parameter.grad.isfinite().all(), f"{name}.{key}"
        assert not layer.router.w_A2ED.grad[1].any()  # an attribute value that is absent


@pytest.mark.parametrize("model", ["monai Swin 3D", "hf Swin", "hf ViT"])
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
    model = Block(build()) if pattern.startswith("mlp") else build()
    with refused(model, f"(?s){words}"):
        swap_mlps(model, pattern, upcycle=upcycle)


def test_one_unreadable_block_leaves_all_the_others_in_place():
    model = nn.Sequential(Block(mlp()), Block(mlp()), Block(nn.Linear(D, D)))
    modules = snapshot(model)[0]
    with pytest.raises(ValueError, match=r"^2.mlp: Linear: "):
        swap_mlps(model, "*.mlp", upcycle=True)
    assert snapshot(model)[0] == modules  # the random state may move: two layers were drawn


@pytest.mark.parametrize("act", UNKNOWN_ACTIVATIONS)
def test_an_unknown_activation_does_not_upcycle_but_gives_way_to_new_experts(act):
    build, name = UNKNOWN_ACTIVATIONS[act]
    model = Block(mlp(build()))
    with refused(model, rf"mlp: Seq.*between its linear layers stands none of relu, .*{name}"):
        swap_mlps(model, "mlp", upcycle=True)
    assert swap_mlps(model, "mlp", activation="silu", dropout=0.0) == ["mlp"]
    assert (model.mlp.dim, model.mlp.hidden_dim) == (D, H)
    assert (model.mlp.activation, model.mlp.dropout) == ("silu", 0.0)
    assert model(tokens()).isfinite().all()


@pytest.mark.parametrize(
    ("name", "acts"),
    [
        ("gelu", ["gelu", "gelu_python"]),
        ("gelu_tanh", ["gelu_new", "gelu_fast", "gelu_accurate", "gelu_pytorch_tanh"]),
        ("silu", ["silu", "swish"]),
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
    assert DMoE.from_mlp(block).dropout == rate
    assert DMoE.from_mlp(block, dropout=0.7).dropout == 0.7


def test_a_block_that_does_more_in_training_upcycles_with_a_rate_of_ones_own():
    class Noise(nn.Module):
        def forward(self, x):
            return x + torch.rand_like(x) if self.training else x

    block = nn.Sequential(*mlp(), Noise())
    with refused(block, "Sequential: could not read its dropout: in training, what follows '2'"):
        DMoE.from_mlp(block)
    assert DMoE.from_mlp(block, dropout=0.2).dropout == 0.2


@pytest.mark.parametrize("upcycle", [False, True])
def test_a_block_that_takes_its_tokens_apart_and_keeps_what_it_saw_is_read(upcycle):
    model = Block(Apart(*mlp(), nn.Dropout(0.3)))
    model(tokens())
    assert swap_mlps(model, "mlp", upcycle=upcycle) == ["mlp"]
    assert model.mlp.dropout == (0.3 if upcycle else 0.1)


# ---- what is kept of a block ----


@pytest.mark.parametrize("upcycle", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_a_new_layer_keeps_widths_dtype_and_mode(upcycle, training):
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        model = Block(mlp(hidden=13)).to(dtype).train(training)
        swap_mlps(model, "mlp", upcycle=upcycle)
        assert (model.mlp.dim, model.mlp.hidden_dim) == (D, 13)
        assert {parameter.dtype for parameter in model.mlp.parameters()} == {dtype}
        assert {module.training for module in model.mlp.modules()} == {training}
        assert model(tokens().to(dtype)).dtype == dtype


@pytest.mark.parametrize("upcycle", [False, True])
@pytest.mark.parametrize("where", ["around", "on it"])
def test_a_model_on_meta_stays_there(upcycle, where):
    with torch.device("meta") if where == "around" else contextlib.nullcontext():
        model = Block(timm_mlp()).to("meta")
        swap_mlps(model, "mlp", upcycle=upcycle)
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    if upcycle:
        assert (model.mlp.activation, model.mlp.dropout) == ("gelu", 0.2)


def test_options_win_over_the_block_where_it_does_not_decide():
    model = Block(mlp()).requires_grad_(False)
    swap_mlps(model, "mlp", hidden_dim=5, bias=False, n_experts=3, k=1, dtype=torch.float64)
    assert model.mlp.w1_EHD.shape == (3, 5, D)
    assert model.mlp.w1_EHD.dtype == torch.float64
    assert model.mlp.b1_EH is None
    # Experts of a frozen MLP can learn.
    assert all(parameter.requires_grad for parameter in model.mlp.parameters())
    assert not model.norm.weight.requires_grad


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


def test_reading_changes_no_weight_gradient_hook_or_random_state():
    block = Block(nn.Sequential(*mlp(), nn.Dropout(0.5)))
    block.mlp[0].register_forward_hook(lambda module, args, output: None)
    block(tokens()).sum().backward()
    gradients = [parameter.grad.clone() for parameter in block.parameters()]
    before = torch.get_rng_state()
    with refused(block, "norm"):
        DMoE.from_mlp(block)
    assert all(map(torch.equal, gradients, [parameter.grad for parameter in block.parameters()]))

    DMoE(D, hidden_dim=H)
    drawn = torch.get_rng_state()
    torch.set_rng_state(before)
    DMoE.from_mlp(block.mlp)
    assert torch.equal(torch.get_rng_state(), drawn)


# ---- weights that are computed, linear layers that do more ----


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
    "two dtypes": (lambda block: block[2].double(), "'0' is torch.float32 on cpu, '2' is .*64"),
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


# ---- what a pattern matches ----


def test_a_shared_block_is_replaced_once_wherever_it_stands():
    block, layer = mlp(), Block(mlp())
    model = nn.ModuleDict({"a": Block(block), "b": Block(block), "other": Block(mlp())})
    assert swap_mlps(model, "a.mlp") == ["a.mlp", "b.mlp"]
    assert model["a"].mlp is model["b"].mlp
    assert isinstance(model["a"].mlp, DMoE)
    assert not isinstance(model["other"].mlp, DMoE)
    # One in a shared layer counts under every name.
    model = nn.Sequential(layer, nn.ReLU(), layer)
    assert swap_mlps(model, "*.mlp") == ["0.mlp", "2.mlp"]
    assert model[0].mlp is model[2].mlp


def test_a_block_may_stand_in_any_container():
    for container in (nn.ModuleList, lambda two: nn.ModuleDict(zip("01", two, strict=True))):
        model = container([mlp(), mlp()])
        assert swap_mlps(model, "1", upcycle=True) == ["1"]
        assert isinstance(model._modules["1"], DMoE)
        assert list(model._modules) == ["0", "1"]


def test_the_outermost_match_counts():
    assert swap_mlps(nn.Sequential(mlp(), mlp()), "*") == ["0", "1"]
    model = Block(nn.ModuleDict({"mlp": mlp(), "deep": nn.ModuleDict({"mlp": mlp()})}))
    assert swap_mlps(model, "*.mlp") == ["mlp.mlp", "mlp.deep.mlp"]
    model = Block(mlp())
    with refused(model, "norm: LayerNorm: expected a two-layer MLP"):
        swap_mlps(model, "*")


@pytest.mark.parametrize(
    "pattern",
    [
        lambda name, module: re.search("mlp$", name),  # true or not, as in filter()
        lambda module, kind=nn.Sequential: isinstance(module, kind),
        lambda *name_and_module: name_and_module[0] == "mlp",
        functools.partial(lambda kind, module: isinstance(module, kind), nn.Sequential),
    ],
)
def test_a_predicate_sees_name_and_module_or_the_module(pattern):
    model = Block(mlp())
    assert swap_mlps(model, pattern) == ["mlp"]


def test_arguments_of_another_kind_are_refused():
    for pattern in (None, 3, b"*.mlp", ["*.mlp"], MLPBlock, nn.GELU(), {"*.mlp"}):
        with pytest.raises(TypeError, match=r"pattern: got .*expected a glob .*or a predicate"):
            swap_mlps(Block(mlp()), pattern)
    with pytest.raises(TypeError, match=r"model: got str, expected a torch.nn.Module"):
        swap_mlps("model", "*.mlp")
    with pytest.raises(TypeError, match="upcycle: got 'yes'"):
        swap_mlps(Block(mlp()), "mlp", upcycle="yes")
    with pytest.raises(TypeError, match=r"mlp: got int, expected a torch.nn.Module"):
        DMoE.from_mlp(3)


@pytest.mark.parametrize("pattern", ["*.mpl", "blocks.mlp", "mlp", lambda module: False])
def test_a_pattern_without_a_match_brings_up_the_mlps_of_the_model(pattern):
    model = ViT(1, 16, 8, num_layers=7, **VIT_2D)
    first_five = ", ".join(f"blocks.{i}.mlp" for i in range(5))
    with refused(model, f"matches no module. Close candidates: {first_five} and "):
        swap_mlps(model, pattern)
    # Ranked by their spelling.
    model = nn.ModuleDict({"encoder": nn.Sequential(mlp()), "decoder": nn.Sequential(mlp())})
    with refused(model, r"candidates: decoder\.0, decoder, encoder\.0"):
        swap_mlps(model, "decoder.mlp")


def test_a_model_without_mlp_blocks_is_told_why():
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(D, 2, H, batch_first=True), 2)
    with refused(model, r"no block that is a two-layer MLP.*TransformerEncoderLay"):
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
    with refused(model, r"0.mlp: is a DMoE already"):
        swap_mlps(model, "*.mlp")
    assert swap_mlps(model, "1.mlp") == ["1.mlp"]


# ---- a swapped model at work ----


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable`:FutureWarning")
@pytest.mark.parametrize("model", ["hf ViT", "hf GPT-2"])
@pytest.mark.parametrize("scope", ["open", "closed"])
def test_hugging_face_checkpointing_leaves_loss_and_gradients_alone(model, scope):
    build, make_input, pattern, count = ZOO[model]
    model, x = build().train(), make_input()
    swap_mlps(model, pattern, attribute_sizes=3)
    kwargs = {"use_reentrant": False, "context_fn": carry_routing}
    losses, gradients = [], []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs)
        model.zero_grad()
        torch.manual_seed(2)
        with contextlib.ExitStack() as stack:
            r = stack.enter_context(routing(torch.tensor([0, 2])))
            losses.append(flat(tensors(model(x))).square().mean() + r.load_balancing_loss())
            if scope == "closed":
                stack.close()
            losses[-1].backward()
        assert len(r.routings) == count
        found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        gradients.append(found)
    assert torch.equal(*losses)
    torch.testing.assert_close(*gradients)


def test_a_compiled_model_stays_in_one_graph_and_follows_the_swap():
    model, x = TransformerBlock(D, H, 2).eval(), tokens()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    compiled(x)
    swap_mlps(model, "mlp", attribute_sizes=3)
    with routing(torch.tensor([0, 2])):
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
    assert block[0].weight.untyped_storage().data_ptr() != layer.w1_EHD.untyped_storage().data_ptr()


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
    assert DMoE.from_mlp(DropPathMlp(), dropout=0.3).dropout == 0.3


def test_swapping_works_under_no_grad():
    class QuickGelu(nn.Module):
        def forward(self, x):
            return x * torch.sigmoid(1.702 * x)

    model = nn.Sequential(nn.Sequential(nn.Linear(4, 8), QuickGelu(), nn.Linear(8, 4)))
    with torch.no_grad():
        assert swap_mlps(model, "0") == ["0"]
