"""TransUNets in little, for the tests of the model and of its weights."""

import dataclasses

import torch

from dmoe_layer import routing
from reference_models.models.transunet import TransUNet, TransUNetConfig

# The two networks of the papers in little: the same rooms, a hundredth of the size.
TINY_VIT = TransUNetConfig(
    dim=24, depth=3, heads=3, mlp_dim=40, decoder=(16, 12, 8, 8, 4), dropout=0.1
)
TINY_HYBRID = dataclasses.replace(TINY_VIT, stem_width=4, stem_units=(2, 1, 2), stem_groups=2)
TINIES = {"vit": TINY_VIT, "hybrid": TINY_HYBRID}
ATTRIBUTES = torch.tensor([2, 0, 1])


def make(config=TINY_VIT, **options):
    options = {"n_classes": 2, "image_size": 32, "attribute_sizes": 3, **options}
    return TransUNet(config, **options)


def images(*, batch=3, channels=3, size=(32, 32)):
    return torch.randn(batch, channels, *size)


def run(model, image, attributes=ATTRIBUTES):
    with routing(attributes):
        return model(image)


def stirred(model):
    """Every parameter and statistic random, so that none can be exchanged or left out unseen."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if name.endswith("running_var") or (name.endswith("weight") and value.ndim == 1):
                value.uniform_(0.5, 2, generator=generator)  # a norm's
            elif value.is_floating_point():
                value.copy_(0.3 * torch.randn(value.shape, generator=generator))
            else:
                value.fill_(7)
    return model
