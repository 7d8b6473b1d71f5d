"""Models with MLP blocks that other people wrote, and how one is run, compared and left alone."""

import contextlib

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from monai.networks.blocks import TransformerBlock
from monai.networks.nets import UNETR, SwinUNETR, ViT
from torch import nn
from torch.nn.parameter import is_lazy

from dmoe_layer import routing

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
