"""What the scope's tests share: a model of several calls, and what a scope recorded of them."""

import torch
from helpers import T
from torch import nn

from .layers import make_quiet


def by_token(attributes, tokens=T):
    return torch.as_tensor(attributes).repeat_interleave(tokens, dim=0).tolist()


def recorded(scope):
    """The attribute values of every recorded call."""
    return [None if r.attributes is None else r.attributes.tolist() for r in scope.routings]


class Model(nn.Module):
    """Two layers, the first of them called twice; ``pause`` runs before every call."""

    def __init__(self, pause=lambda: None, **options):
        super().__init__()
        self.shared, self.last = make_quiet(**options), make_quiet(**options)
        self.pause = pause

    def forward(self, x):
        for layer in (self.shared, self.shared, self.last):
            self.pause()
            x = x + layer(x)
        return x


def sends(layer, *experts_of_value):
    """Makes every token of value a go to the experts named in the a-th tuple."""
    with torch.no_grad():
        layer.router.w_A2ED.zero_()
        layer.router.bias.zero_()
        for value, experts in enumerate(experts_of_value):
            layer.router.bias[value, 0, list(experts)] = 5.0
    return layer
