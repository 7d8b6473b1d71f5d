"""Small layers, inputs and attributes that the layer's tests share; sizes as in helpers."""

import torch
from helpers import A, B, D, E, T

from dmoe_layer import DMoE

OTHER = torch.tensor([1, 1, 0, 0])  # as good as helpers.GOOD
GOOD_PAIRS = [[2, 1], [0, 0], [1, 1], [2, 0]]  # for attribute_sizes=(3, 2)
A3 = torch.tensor([0, 2, 1])  # for a batch of three


def make(dim=D, **options):
    options = {"n_experts": E, "attribute_sizes": A, "hidden_dim": 5, "dropout": 0.0, **options}
    return DMoE(dim, **options)


def make_quiet(**options):
    """A layer without noise."""
    return make(**{"noise": "never", **options})


def make_x(batch=B, tokens=T, dim=D, **options):
    return torch.randn(batch, tokens, dim, **options)


def eval_layer(**options):
    return DMoE(16, attribute_sizes=3, **options).eval()
