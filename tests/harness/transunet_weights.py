"""Files of weights as Google and the authors of the paper write them, and what they compute."""

import numpy as np
import torch
import torch.nn.functional as F

from dmoe_layer import routing
from harness.transunets import ATTRIBUTES


def google_entries(config, *, class_token=True, grid=(2, 2), channels=3):
    """Random arrays by the names and in the shapes of `ViT-B_16.npz` and `R50+ViT-B_16.npz`."""
    d, h, hidden = config.dim, config.heads, config.mlp_dim
    shapes = {
        "cls": (1, 1, d),
        "head/kernel": (d, 10),
        "head/bias": (10,),
        "pre_logits/kernel": (d, d),
        "pre_logits/bias": (d,),
        "Transformer/posembed_input/pos_embedding": (1, class_token + grid[0] * grid[1], d),
        "Transformer/encoder_norm/scale": (d,),
        "Transformer/encoder_norm/bias": (d,),
        "embedding/kernel": (16, 16, channels, d),
        "embedding/bias": (d,),
    }
    for n in range(config.depth):
        block = f"Transformer/encoderblock_{n}"
        attention = f"{block}/MultiHeadDotProductAttention_1"
        for part in ("query", "key", "value"):
            shapes[f"{attention}/{part}/kernel"] = (d, h, d // h)
            shapes[f"{attention}/{part}/bias"] = (h, d // h)
        shapes[f"{attention}/out/kernel"] = (h, d // h, d)
        shapes[f"{attention}/out/bias"] = (d,)
        for norm in ("LayerNorm_0", "LayerNorm_2"):
            shapes[f"{block}/{norm}/scale"] = shapes[f"{block}/{norm}/bias"] = (d,)
        shapes[f"{block}/MlpBlock_3/Dense_0/kernel"] = (d, hidden)
        shapes[f"{block}/MlpBlock_3/Dense_0/bias"] = (hidden,)
        shapes[f"{block}/MlpBlock_3/Dense_1/kernel"] = (hidden, d)
        shapes[f"{block}/MlpBlock_3/Dense_1/bias"] = (d,)
    if config.stem_width is not None:
        width = cin = config.stem_width
        shapes["embedding/kernel"] = (1, 1, 16 * width, d)
        shapes["conv_root/kernel"] = (7, 7, channels, width)
        shapes["gn_root/scale"] = shapes["gn_root/bias"] = (1, 1, 1, width)
        for stage, units in enumerate(config.stem_units):
            cmid = width * 2**stage
            for unit in range(1, units + 1):
                name, cout = f"block{stage + 1}/unit{unit}", 4 * cmid
                shapes[f"{name}/conv1/kernel"] = (1, 1, cin, cmid)
                shapes[f"{name}/conv2/kernel"] = (3, 3, cmid, cmid)
                shapes[f"{name}/conv3/kernel"] = (1, 1, cmid, cout)
                norms = {"gn1": cmid, "gn2": cmid, "gn3": cout}
                if unit == 1:
                    shapes[f"{name}/conv_proj/kernel"] = (1, 1, cin, cout)
                    norms["gn_proj"] = cout
                for norm, c in norms.items():
                    shapes[f"{name}/{norm}/scale"] = shapes[f"{name}/{norm}/bias"] = (1, 1, 1, c)
                cin = cout
    rng = np.random.default_rng(0)
    return {n: rng.standard_normal(s).astype(np.float32) for n, s in shapes.items()}


def released_entries(config, *, n_classes=2, routers=3, n_experts=8):
    """Random tensors by the names and in the shapes of the paper's released 2D checkpoints."""
    d, hidden, top = config.dim, config.mlp_dim, config.decoder[0]
    shapes = {
        "transformer.embeddings.position_embeddings": (1, 4, d),
        "transformer.embeddings.patch_embeddings.weight": (d, 3, 16, 16),
        "transformer.embeddings.patch_embeddings.bias": (d,),
        "transformer.encoder.encoder_norm.weight": (d,),
        "transformer.encoder.encoder_norm.bias": (d,),
        "segmentation_head.0.weight": (n_classes, config.decoder[-1], 3, 3),
        "segmentation_head.0.bias": (n_classes,),
    }

    def linear(name, n_in, n_out):
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (n_out, n_in), (n_out,)

    def convolution(name, n_in, n_out):
        shapes[f"{name}.0.weight"] = (n_out, n_in, 3, 3)
        for part in ("weight", "bias", "running_mean", "running_var"):
            shapes[f"{name}.1.{part}"] = (n_out,)
        shapes[f"{name}.1.num_batches_tracked"] = ()

    for n in range(config.depth):
        layer = f"transformer.encoder.layer.{n}"
        for norm in ("attention_norm", "ffn_norm"):
            shapes[f"{layer}.{norm}.weight"] = shapes[f"{layer}.{norm}.bias"] = (d,)
        linear(f"{layer}.ffn.fc1", d, hidden)
        linear(f"{layer}.ffn.fc2", hidden, d)
        for part in ("query", "key", "value", "out"):
            linear(f"{layer}.attn.{part}", d, d)
    for a in range(routers):
        for part in ("topkroute_linear", "noise_linear"):
            linear(f"transformer.encoder.sparseMoE.router.{a}.{part}", d, n_experts)
    for e in range(n_experts if routers else 0):
        linear(f"transformer.encoder.sparseMoE.experts.{e}.net.0", d, 4 * d)
        linear(f"transformer.encoder.sparseMoE.experts.{e}.net.2", 4 * d, d)
    convolution("decoder.conv_more", d, top)
    for n, n_out in enumerate(config.decoder[1:]):
        convolution(f"decoder.blocks.{n}.conv1", config.decoder[n], n_out)
        convolution(f"decoder.blocks.{n}.conv2", n_out, n_out)
    generator = torch.Generator().manual_seed(0)
    state = {}
    for name, shape in shapes.items():
        value = 0.3 * torch.randn(shape, generator=generator)
        if name.endswith("running_var") or (name.endswith("weight") and len(shape) == 1):
            value = value.abs() + 0.5
        state[name] = value if shape else torch.tensor(11)
    return state


def released_logits(state, config, image, attributes):
    """What the paper's network computes from such a state, said once more, sample by sample."""

    def linear(name, x):
        return F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])

    def norm(name, x):
        weight, bias = state[f"{name}.weight"], state[f"{name}.bias"]
        return F.layer_norm(x, weight.shape, weight, bias, 1e-6)

    def convolution(name, x):
        x = F.conv2d(x, state[f"{name}.0.weight"], padding=1)
        mean, variance = state[f"{name}.1.running_mean"], state[f"{name}.1.running_var"]
        weight, bias = state[f"{name}.1.weight"], state[f"{name}.1.bias"]
        return F.batch_norm(x, mean, variance, weight, bias).relu()

    def attend(name, x):
        heads = (config.heads, config.dim // config.heads)
        q, k, v = (
            linear(f"{name}.{part}", x).unflatten(1, heads).transpose(0, 1)
            for part in ("query", "key", "value")
        )
        share = torch.softmax(q @ k.mT / heads[1] ** 0.5, -1)
        return linear(f"{name}.out", (share @ v).transpose(0, 1).flatten(1))

    def experts(x, a):
        name = "transformer.encoder.sparseMoE"
        y = torch.zeros_like(x)
        for t, token in enumerate(x):
            scores, chosen = linear(f"{name}.router.{a}.topkroute_linear", token).topk(2)
            for gate, e in zip(scores.softmax(0), chosen.tolist(), strict=True):
                hidden = linear(f"{name}.experts.{e}.net.0", token).relu()
                y[t] += gate * linear(f"{name}.experts.{e}.net.2", hidden)
        return y

    logits = []
    for sample, a in zip(image, attributes.tolist(), strict=True):
        patches = F.conv2d(
            sample[None],
            state["transformer.embeddings.patch_embeddings.weight"],
            state["transformer.embeddings.patch_embeddings.bias"],
            stride=16,
        )
        x = patches[0].flatten(1).T + state["transformer.embeddings.position_embeddings"][0]
        for n in range(config.depth):
            layer = f"transformer.encoder.layer.{n}"
            x = x + attend(f"{layer}.attn", norm(f"{layer}.attention_norm", x))
            hidden = F.gelu(linear(f"{layer}.ffn.fc1", norm(f"{layer}.ffn_norm", x)))
            x = x + linear(f"{layer}.ffn.fc2", hidden)
            x = x + experts(x, a)
        x = norm("transformer.encoder.encoder_norm", x).T.reshape(1, -1, *patches.shape[2:])
        x = convolution("decoder.conv_more", x)
        for n in range(4):
            x = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=True)
            x = convolution(f"decoder.blocks.{n}.conv1", x)
            x = convolution(f"decoder.blocks.{n}.conv2", x)
        head = state["segmentation_head.0.weight"], state["segmentation_head.0.bias"]
        logits.append(F.conv2d(x, *head, padding=1))
    return torch.cat(logits)


def save_npz(path, entries):
    np.savez(path, **entries)
    return path


def save_pth(path, state):
    torch.save(state, path)
    return path


def snapshot(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_unchanged(model, before):
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def google_map(entries, config, image):
    """The ViT's normalised tokens, as a map, from Google's arrays in Google's order of axes.

    And the stem's maps: its root's and those of its stages.
    """
    w = {name: torch.from_numpy(array).double() for name, array in entries.items()}

    def norm(name, x):
        scale, bias = w[f"{name}/scale"], w[f"{name}/bias"]
        return F.layer_norm(x, scale.shape, scale, bias, 1e-6)

    def convolution(name, x, stride=1):
        kernel = w[f"{name}/kernel"].permute(3, 2, 0, 1)
        mean, std = kernel.mean((1, 2, 3)), (kernel.var((1, 2, 3), correction=0) + 1e-5).sqrt()
        kernel = (kernel - mean[:, None, None, None]) / std[:, None, None, None]
        return F.conv2d(x, kernel, stride=stride, padding=kernel.shape[-1] // 2)

    def group_norm(name, x, groups, epsilon=1e-6):
        scale, bias = w[f"{name}/scale"].flatten(), w[f"{name}/bias"].flatten()
        return F.group_norm(x, groups, scale, bias, epsilon)

    x, maps = image, []
    if config.stem_width is not None:
        x = group_norm("gn_root", convolution("conv_root", x, 2), config.stem_groups).relu()
        maps.append(x)
        x = F.max_pool2d(x, 3, 2)
        for stage, units in enumerate(config.stem_units, start=1):
            for unit in range(1, units + 1):
                name, stride = f"block{stage}/unit{unit}", 2 if stage > 1 and unit == 1 else 1
                y = x
                for n, step in ((1, 1), (2, stride), (3, 1)):
                    y = convolution(f"{name}/conv{n}", y, step)
                    y = group_norm(f"{name}/gn{n}", y, config.stem_groups)
                    y = y.relu() if n < 3 else y
                if unit == 1:
                    x = convolution(f"{name}/conv_proj", x, stride)
                    x = group_norm(f"{name}/gn_proj", x, x.shape[1], 1e-5)
                x = (x + y).relu()
            maps.append(x)
    kernel = w["embedding/kernel"].permute(3, 2, 0, 1)
    x = F.conv2d(x, kernel, w["embedding/bias"], stride=kernel.shape[-1])
    grid = x.shape[2:]
    x = x.flatten(2).mT + w["Transformer/posembed_input/pos_embedding"][:, 1:]
    for n in range(config.depth):
        block = f"Transformer/encoderblock_{n}"
        name = f"{block}/MultiHeadDotProductAttention_1"
        y = norm(f"{block}/LayerNorm_0", x)
        q, k, v = (
            torch.einsum("btd,dhe->bhte", y, w[f"{name}/{part}/kernel"])
            + w[f"{name}/{part}/bias"][:, None]
            for part in ("query", "key", "value")
        )
        y = torch.softmax(q @ k.mT / q.shape[-1] ** 0.5, -1) @ v
        y = torch.einsum("bhte,hed->btd", y, w[f"{name}/out/kernel"]) + w[f"{name}/out/bias"]
        x = x + y
        name = f"{block}/MlpBlock_3"
        y = norm(f"{block}/LayerNorm_2", x)
        y = F.gelu(y @ w[f"{name}/Dense_0/kernel"] + w[f"{name}/Dense_0/bias"])
        x = x + y @ w[f"{name}/Dense_1/kernel"] + w[f"{name}/Dense_1/bias"]
    return norm("Transformer/encoder_norm", x).mT.unflatten(2, grid), maps


def vit_of(model, image):
    """What enters the decoder from the ViT."""
    with routing(ATTRIBUTES):
        return model.vit(image if model.stem is None else model.stem(image)[0])
