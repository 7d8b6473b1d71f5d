"""Loads trained weights into a TransUNet: Google's, and those of the paper's released 2D code.

Shapes: H hidden units, D features, T positions, h and w rows and columns of positions.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import torch
from einops import rearrange
from torch import Tensor

from .transunet import TransUNet
from .vit import resized_positions
from .weight_files import (
    Entries,
    Weights,
    WeightsError,
    google,
    layer_of,
    put,
    pytorch,
    read_npz,
    read_pth,
    released_moe,
    routers_advice,
)

# The entries of Google's files that only classification needs.
UNUSED = ("cls", "pre_logits/kernel", "pre_logits/bias", "head/kernel", "head/bias")

# The layers of the ViT by their names here; {} stands for the number of a block.
GOOGLE = {
    "patch_embedding": "embedding",
    "positions": "Transformer/posembed_input/pos_embedding",
    "norm": "Transformer/encoder_norm",
    "attention_norm": "Transformer/encoderblock_{}/LayerNorm_0",
    "query": "Transformer/encoderblock_{}/MultiHeadDotProductAttention_1/query",
    "key": "Transformer/encoderblock_{}/MultiHeadDotProductAttention_1/key",
    "value": "Transformer/encoderblock_{}/MultiHeadDotProductAttention_1/value",
    "out": "Transformer/encoderblock_{}/MultiHeadDotProductAttention_1/out",
    "mlp_norm": "Transformer/encoderblock_{}/LayerNorm_2",
    "mlp_1": "Transformer/encoderblock_{}/MlpBlock_3/Dense_0",
    "mlp_2": "Transformer/encoderblock_{}/MlpBlock_3/Dense_1",
}
RELEASED = {
    "patch_embedding": "transformer.embeddings.patch_embeddings",
    "positions": "transformer.embeddings.position_embeddings",
    "norm": "transformer.encoder.encoder_norm",
    "attention_norm": "transformer.encoder.layer.{}.attention_norm",
    "query": "transformer.encoder.layer.{}.attn.query",
    "key": "transformer.encoder.layer.{}.attn.key",
    "value": "transformer.encoder.layer.{}.attn.value",
    "out": "transformer.encoder.layer.{}.attn.out",
    "mlp_norm": "transformer.encoder.layer.{}.ffn_norm",
    "mlp_1": "transformer.encoder.layer.{}.ffn.fc1",
    "mlp_2": "transformer.encoder.layer.{}.ffn.fc2",
}
RELEASED_MOE = "transformer.encoder.sparseMoE"
MOE = "vit.moe.0"


def load_google_npz(model: TransUNet, path: str | Path) -> None:
    """Loads `ViT-B_16.npz` into a "vit_b16", or `R50+ViT-B_16.npz` into an "r50_vit_b16".

    Stem and ViT receive the file's weights; the position table is resized to the network's grid.
    Decoder, head and experts between blocks are not changed. With moe="mlp" each expert of a block
    becomes the file's MLP, so that in eval mode the network computes the same as with moe="none"
    (upcycling).

    Raises:
        WeightsError: the file is missing, damaged or pickled, or its entries do not fit the
            network. The text names everything that is wrong, and the network is unchanged.
    """
    path = Path(path)
    file = Entries(path, read_npz(path), google(model.config.heads))
    new = _vit(file, model, GOOGLE)
    if model.stem is not None:
        new |= layer_of(file, model, "stem.root.conv", "conv_root")
        new |= layer_of(file, model, "stem.root.gn", "gn_root")
        for stage, units in enumerate(model.config.stem_units):
            for unit in range(units):
                ours, theirs = f"stem.stages.{stage}.{unit}", f"block{stage + 1}/unit{unit + 1}"
                for layer in ("conv1", "gn1", "conv2", "gn2", "conv3", "gn3"):
                    new |= layer_of(file, model, f"{ours}.{layer}", f"{theirs}/{layer}")
                for layer in ("conv", "gn") if unit == 0 else ():
                    new |= layer_of(
                        file, model, f"{ours}.shortcut.{layer}", f"{theirs}/{layer}_proj"
                    )
    file.finish(UNUSED)
    put(model, new)


def load_released_2d(model: TransUNet, path: str | Path) -> None:
    """Loads a checkpoint of the paper's released 2D code into a whole "vit_b16" network.

    The "dMoE" of that code is moe="shared" here, with as many attribute values as the file has
    routers; its plain network is moe="none". That code adds routing noise in evaluation too, as
    noise="always" does here.

    Raises:
        WeightsError: the file is missing, damaged or pickled, or its entries do not fit the
            network. The text names everything that is wrong, and the network is unchanged.
    """
    path = Path(path)
    file = Entries(path, read_pth(path), pytorch)
    if not any(name.startswith("transformer.") for name in file.entries):
        raise WeightsError(
            f"{path}: this file is not of the paper's released 2D network, whose entries have "
            "names that begin with transformer, decoder and segmentation_head."
        )
    advice = _differences(file, model)
    new = _vit(file, model, RELEASED)
    if model.moe_mode == "shared":
        new |= released_moe(file, model, MOE, RELEASED_MOE)
    new |= layer_of(file, model, "decoder.entry.0", "decoder.conv_more.0")
    new |= layer_of(file, model, "decoder.entry.1", "decoder.conv_more.1")
    for n in range(len(model.decoder.blocks)):
        for conv in (0, 1):
            for layer in (0, 1):
                ours = f"decoder.blocks.{n}.{conv}.{layer}"
                new |= layer_of(file, model, ours, f"decoder.blocks.{n}.conv{conv + 1}.{layer}")
    new |= layer_of(file, model, "head", "segmentation_head.0")
    file.finish(advice=advice)
    put(model, new)


def _vit(file: Entries, model: TransUNet, names: Mapping[str, str]) -> Weights:
    """Takes the weights of the ViT, except those of experts between its blocks."""
    new = layer_of(file, model, "vit.patch_embedding", names["patch_embedding"])
    new |= layer_of(file, model, "vit.norm", names["norm"])
    new["vit.positions_1DHW"] = _positions(file, model, names["positions"])
    dim, hidden = model.config.dim, model.config.mlp_dim
    for n in range(model.config.depth):
        block = f"vit.blocks.{n}"
        theirs = {ours: name.format(n) for ours, name in names.items()}
        new |= layer_of(file, model, f"{block}.attention_norm", theirs["attention_norm"])
        new |= layer_of(file, model, f"{block}.mlp_norm", theirs["mlp_norm"])
        new |= layer_of(file, model, f"{block}.attention.out", theirs["out"])
        for kind, shape in (("weight", (dim, dim)), ("bias", (dim,))):
            parts = [file.take(theirs[part], kind, shape) for part in ("query", "key", "value")]
            new[f"{block}.attention.qkv.{kind}"] = torch.cat(parts)
        w1_HD = file.take(theirs["mlp_1"], "weight", (hidden, dim))
        b1_H = file.take(theirs["mlp_1"], "bias", (hidden,))
        w2_DH = file.take(theirs["mlp_2"], "weight", (dim, hidden))
        b2_D = file.take(theirs["mlp_2"], "bias", (dim,))
        # Every expert becomes the MLP: copying broadcasts over E.
        in_mlp = {"0.weight": w1_HD, "0.bias": b1_H, "3.weight": w2_DH, "3.bias": b2_D}
        in_experts = {"w1_EHD": w1_HD, "w1_bias": b1_H, "w2_EDH": w2_DH, "w2_bias": b2_D}
        mlp = in_experts if model.moe_mode == "mlp" else in_mlp
        new |= {f"{block}.mlp.{name}": value for name, value in mlp.items()}
    return new


def _positions(file: Entries, model: TransUNet, name: str) -> Tensor:
    """Takes the position table, resized to the network's grid, without Google's class token.

    Files give the number of positions but not their arrangement, which is a square.
    """
    dim, *grid = model.vit.positions_1DHW.shape[1:]
    table = file.entries.get(name)
    n = table.shape[1] if table is not None and table.ndim == 3 else math.prod(grid)
    side = max(math.isqrt(n), 1)
    table_1TD = file.entry(name, (1, side**2 + (n == side**2 + 1), dim))
    table_1DHW = rearrange(table_1TD[:, -(side**2) :], "1 (h w) d -> 1 d h w", h=side)
    return resized_positions(table_1DHW, (grid[0], grid[1]))


def _differences(file: Entries, model: TransUNet) -> tuple[str, ...]:
    """Says how to make the network so that the file fits; nothing if it fits already."""
    advice = []
    routers = file.count(f"{RELEASED_MOE}.router.")
    wanted = "shared" if routers else "none"
    if model.moe_mode != wanted:
        advice.append(f"It has {routers} routers: make the network with moe={wanted!r}.")
    elif routers:
        advice += routers_advice(routers, model.get_submodule(MOE))
    head = file.entries.get("segmentation_head.0.weight")
    if head is not None and head.shape[:1] != model.head.weight.shape[:1]:
        advice.append(f"It has {len(head)} classes: make the network with n_classes={len(head)}.")
    if model.stem is not None:
        advice.append('It has no stem: make the network with variant="vit_b16".')
    return tuple(advice)
