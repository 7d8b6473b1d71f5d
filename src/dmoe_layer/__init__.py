"""A mixture-of-experts layer for medical imaging and vision whose router knows the attribute."""

from . import flops  # noqa: F401  so that FLOP counters see the operators
from ._version import __version__ as __version__
from .attributes import MissingAttributesError
from .insert import insert_after
from .layer import DMoE
from .losses import importance_loss, load_balancing_loss, router_z_loss
from .router import AttributeRouter
from .scope import carry_routing, routing
from .swap import swap_mlps
from .tensors import Routing
from .windows import window_attributes

__all__ = [
    "AttributeRouter",
    "DMoE",
    "MissingAttributesError",
    "Routing",
    "carry_routing",
    "importance_loss",
    "insert_after",
    "load_balancing_loss",
    "router_z_loss",
    "routing",
    "swap_mlps",
    "window_attributes",
]
