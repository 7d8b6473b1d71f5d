"""3D residual U-Nets in little, and the released 3D network said once more in plain functions."""

import torch
import torch.nn.functional as F

from dmoe_layer import routing
from reference_models.models.resunet3d import ResUNet3D

ATTRIBUTES = torch.tensor([2, 0])
SIZE = (64, 32, 32)  # the smallest that there is: two voxels are left at the last stage


def make(features=2, **options):
    return ResUNet3D(features, **{"n_classes": 2, "attribute_sizes": 3, **options})


def volumes(*, batch=2, channels=1, size=SIZE):
    return torch.randn(batch, channels, *size)


def run(model, image, attributes=ATTRIBUTES, mask=None):
    with routing(attributes):
        return model(image, mask)


def stirred(model):
    """Experts and routers that are seen in the logits; no two parameters alike."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for value in model.parameters():
            value.copy_(0.5 * torch.randn(value.shape, generator=generator))
    return model


def released_entries(
    features=2, *, channels=1, classes=2, routers=5, experts=8, stages=(0, 1, 2, 3, 4)
):
    """Random tensors by the names and in the shapes of the paper's released 3D checkpoints."""
    f = features
    shapes = {}

    def block(name, n_in, n_out):
        shapes[f"{name}.conv1.conv.weight"] = (n_out, n_in, 3, 3, 3)
        shapes[f"{name}.conv2.conv.weight"] = (n_out, n_out, 3, 3, 3)
        shapes[f"{name}.conv3.conv.weight"] = (n_out, n_in, 1, 1, 1)

    for name, n_in, n_out in (
        ("encoder1", channels, f),
        ("encoder2", f, f),
        ("encoder3", f, 2 * f),
        ("encoder4", 2 * f, 4 * f),
        ("encoder10", 4 * f, 8 * f),
    ):
        block(f"{name}.layer", n_in, n_out)
    for name, n_in, n_out in (
        ("decoder4", 8 * f, 4 * f),
        ("decoder3", 4 * f, 2 * f),
        ("decoder2", 2 * f, f),
        ("decoder1", f, f),
    ):
        shapes[f"{name}.transp_conv.conv.weight"] = (n_in, n_out, 2, 2, 2)
        block(f"{name}.conv_block", 2 * n_out, n_out)
    shapes["out.transp_conv.conv.weight"] = (f, classes, 2, 2, 2)
    for stage in stages:
        d = (f, f, 2 * f, 4 * f, 8 * f)[stage]
        for a in range(routers):
            for part in ("topkroute_linear", "noise_linear"):
                shapes[f"sparseMoE.{stage}.router.{a}.{part}.weight"] = (experts, d)
                shapes[f"sparseMoE.{stage}.router.{a}.{part}.bias"] = (experts,)
        for e in range(experts):
            shapes[f"sparseMoE.{stage}.experts.{e}.net.0.weight"] = (4 * d, d)
            shapes[f"sparseMoE.{stage}.experts.{e}.net.0.bias"] = (4 * d,)
            shapes[f"sparseMoE.{stage}.experts.{e}.net.2.weight"] = (d, 4 * d)
            shapes[f"sparseMoE.{stage}.experts.{e}.net.2.bias"] = (d,)
    generator = torch.Generator().manual_seed(0)
    return {name: 0.4 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def released_logits(state, image, attributes):
    """What the paper's network computes from such a state without noise, sample by sample."""

    def norm(x):
        mean, variance = (s(x, (2, 3, 4), keepdim=True) for s in (torch.mean, _variance))
        return (x - mean) / (variance + 1e-5).sqrt()

    def leaky(x):
        return torch.where(x > 0, x, 0.01 * x)

    def block(name, x, stride):
        y = leaky(norm(F.conv3d(x, state[f"{name}.conv1.conv.weight"], None, stride, 1)))
        y = norm(F.conv3d(y, state[f"{name}.conv2.conv.weight"], None, 1, 1))
        return leaky(y + norm(F.conv3d(x, state[f"{name}.conv3.conv.weight"], None, stride)))

    def experts(name, x, a):
        x_TD = x[0].flatten(1).T

        def linear(layer, x):
            return x @ state[f"{name}.{layer}.weight"].T + state[f"{name}.{layer}.bias"]

        scores, chosen = linear(f"router.{a}.topkroute_linear", x_TD).topk(2)
        answers = torch.stack(
            [
                linear(f"experts.{e}.net.2", linear(f"experts.{e}.net.0", x_TD).relu())
                for e in range(8)
            ]
        )
        tokens = torch.arange(len(x_TD))
        y_TD = sum(
            gate[:, None] * answers[expert, tokens]
            for gate, expert in zip(scores.softmax(1).T, chosen.T, strict=True)
        )
        return x + y_TD.T.reshape(x.shape)

    logits = []
    for sample, a in zip(image, attributes.tolist(), strict=True):
        x, maps = sample[None], []
        for stage, name in enumerate(("encoder1", "encoder2", "encoder3", "encoder4", "encoder10")):
            x = experts(f"sparseMoE.{stage}", block(f"{name}.layer", x, 2), a)
            maps.append(x)
        for skip, name in zip(
            maps[3::-1], ("decoder4", "decoder3", "decoder2", "decoder1"), strict=True
        ):
            x = F.conv_transpose3d(x, state[f"{name}.transp_conv.conv.weight"], stride=2)
            x = block(f"{name}.conv_block", torch.cat([x, skip], 1), 1)
        logits.append(F.conv_transpose3d(x, state["out.transp_conv.conv.weight"], stride=2))
    return torch.cat(logits)


def _variance(x, axes, keepdim):
    return x.var(axes, correction=0, keepdim=keepdim)
