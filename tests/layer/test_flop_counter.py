"""PyTorch's FLOP counter sees what the layer computes, as the benchmarks state it."""

import subprocess
import sys

import pytest
import torch
from helpers import GOOD
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.layer.shapes import Shape, flops
from dmoe_layer import DMoE

SHAPE = Shape("", 4, 20, 16, 3)


def layer_and_x(**options):
    layer = DMoE(SHAPE.dim, attribute_sizes=SHAPE.values, **options)
    return layer, torch.randn(SHAPE.batch, SHAPE.tokens, SHAPE.dim, requires_grad=True)


def counted(work):
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


# With few of the gradients, what is computed of them alone. An expert's product is that of all
# tokens' pairs with one of its weights.
ROUTER = flops(SHAPE, "router")
PRODUCT = (flops(SHAPE, "forward") - ROUTER) // 2


def test_a_training_step_counts_what_the_benchmarks_state():
    layer, x = layer_and_x()
    assert counted(lambda: layer(x, GOOD)) == flops(SHAPE, "forward")
    assert counted(lambda: layer(x, GOOD).sum().backward()) == flops(SHAPE, "forward+backward")


def test_a_compiled_step_counts_the_same():
    layer, x = layer_and_x()
    compiled = torch.compile(layer, backend="aot_eager")
    compiled(x, GOOD).sum().backward()
    assert counted(lambda: compiled(x, GOOD).sum().backward()) == flops(SHAPE, "forward+backward")


def test_gated_experts_have_half_as_much_again():
    layer, x = layer_and_x(activation="swiglu")
    assert counted(lambda: layer(x, GOOD)) == ROUTER + 3 * PRODUCT
    assert counted(lambda: layer(x, GOOD).sum().backward()) == 3 * (ROUTER + 3 * PRODUCT)


def test_without_noise_its_router_is_not_counted():
    layer, x = layer_and_x(noise="never")
    step = flops(SHAPE, "forward+backward") - 3 * ROUTER // 2
    assert counted(lambda: layer(x, GOOD).sum().backward()) == step


def test_tokens_outside_of_a_mask_are_not_counted():
    layer, x = layer_and_x()
    mask = torch.arange(SHAPE.batch * SHAPE.tokens).view(x.shape[:2]) % 4 > 0
    step = 3 * flops(SHAPE, "forward+backward") // 4
    assert counted(lambda: layer(x, GOOD, mask=mask).sum().backward()) == step


@pytest.mark.parametrize(
    ("trained", "products"), [(["x"], 2), (["w2_EDH"], 2), (["w1_bias"], 1), (["x", "w1_EHD"], 3)]
)
def test_of_gradients_only_those_that_are_computed_are_counted(trained, products):
    layer, x = layer_and_x()
    for name, tensor in {"x": x, **dict(layer.named_parameters())}.items():
        tensor.requires_grad_(name in trained)
    backward = 2 * ROUTER if "x" in trained else 0
    forward = flops(SHAPE, "forward")
    step = counted(lambda: layer(x, GOOD).sum().backward())
    assert step == forward + backward + products * PRODUCT


def test_the_table_names_the_layer_and_its_router():
    layer, x = layer_and_x()
    network = nn.Sequential(nn.LayerNorm(SHAPE.dim), layer)
    with FlopCounterMode(display=False) as counter:
        network[1](network[0](x), GOOD).sum().backward()
    counts = {name: sum(of.values()) for name, of in counter.get_flop_counts().items()}
    assert counts["DMoE"] == flops(SHAPE, "forward+backward")
    assert counts["DMoE.router"] == 3 * ROUTER


IMPORTS = """
import sys, torch
{first}
import dmoe_layer
assert ("torch.utils.flop_counter" in sys.modules) == ({first!r} != "")
import torch.utils.flop_counter as counter
assert counter.__loader__ is counter.__spec__.loader and counter.__loader__.get_source
layer, x = dmoe_layer.DMoE(16), torch.randn(2, 3, 16)
for again in False, True:
    with counter.FlopCounterMode(display=False) as mode:
        layer(x)
    print(mode.get_total_flops())
    import importlib
    importlib.reload(counter)
"""


@pytest.mark.parametrize("first", ["", "import torch.utils.flop_counter"])
def test_formulas_are_known_whichever_is_imported_first_and_import_no_counter(first):
    run = [sys.executable, "-c", IMPORTS.format(first=first)]
    done = subprocess.run(run, capture_output=True, check=True, encoding="utf-8")
    forward = str(flops(Shape("", 2, 3, 16, 1), "forward"))
    assert done.stdout.split() == [forward, forward]
