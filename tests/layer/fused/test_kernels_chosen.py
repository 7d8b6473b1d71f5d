"""Which calls the kernels take, and what is said of those that they cannot."""

import pytest
import torch
from harness.kernels import HERE, pair
from triton import knobs

from dmoe_layer import DMoE, backend
from dmoe_layer.activations import ACTIVATIONS

pytestmark = pytest.mark.usefixtures("poisoned")

REFUSED = [
    ({"dtype": torch.float64}, (2, 16, 16), "float64"),
    ({"n_experts": 65}, (2, 16, 16), "n_experts is 65"),
    ({"n_experts": 9, "k": 9}, (2, 16, 16), "k is 9"),
    ({}, (2, 15, 16), "a sample has 15 tokens"),
    ({}, (4097, 16, 16), "4097 samples"),
]


def test_an_activation_that_the_kernels_lack_is_left_to_the_eager_backend(monkeypatch):
    plain = ACTIVATIONS["silu"]._replace(fused=False)
    monkeypatch.setitem(ACTIVATIONS, "swish", plain)
    layer, x = DMoE(16, activation="swish", backend="triton"), torch.randn(2, 16, 16)
    with pytest.raises(RuntimeError, match="activation is swish, which the kernels do not support"):
        layer(x)
    layer.backend = "auto"
    assert layer(x).shape == x.shape
    # A row that says otherwise than the kernels is an error of theirs, and no other activation.
    monkeypatch.setitem(ACTIVATIONS, "swish", plain._replace(fused=True))
    layer.backend = "triton"
    with pytest.raises(Exception, match="no such activation"):
        layer.to(HERE)(x.to(HERE))


@pytest.mark.parametrize(("options", "shape", "words"), REFUSED)
def test_what_the_kernels_cannot_take_is_said_and_auto_takes_eager(options, shape, words):
    layer, _ = pair(**options)
    x = torch.randn(shape, device=HERE, dtype=layer.w1_EHD.dtype)
    with pytest.raises(RuntimeError, match=rf"backend='triton': .*{words}.*backend='auto'"):
        layer(x, 0)
    assert words in backend.explain(layer, x)
    layer.backend = "auto"
    assert layer(x, 0).shape == shape
    assert backend.explain(layer, x).startswith("eager: ")
    if HERE == "cuda":
        assert words in backend.explain(layer, x)


def test_more_pairs_than_have_numbers_are_left_to_the_eager_backend():
    layer, _ = pair(k=2)
    tokens = backend.MAX_PAIRS // 2
    x = torch.zeros(1, 1, 16, device=HERE)
    assert backend.explain(layer, x.expand(1, tokens, 16)).startswith("triton: ")
    refused = backend.explain(layer, x.expand(1, tokens + 1, 16))
    assert refused.startswith("error: ")
    assert f"{tokens + 1} tokens times k = 2 is more than the kernels take" in refused
    assert f", {2**31 - 2**22}" in refused


def test_explain_says_which_backend_and_why():
    narrow, eager = pair()
    x = torch.randn(2, 16, 16, device=HERE)
    assert backend.explain(narrow, x).startswith("triton: D = 16 is narrow")
    assert backend.explain(eager, x) == "eager: the layer has backend='eager'"
    wide = DMoE(200, channel_dim=1, backend="triton").to(HERE)
    volume = torch.randn(1, 200, 4, 2, 2, device=HERE)
    assert backend.explain(wide, volume).startswith("triton: D = 200 is wide")
    with pytest.raises(ValueError, match="dim=16"):
        backend.explain(narrow, torch.randn(2, 16, 17, device=HERE))
    eager.backend = "egaer"
    with pytest.raises(ValueError, match="expected one of 'auto', 'eager', 'triton'"):
        eager(x, 0)
    auto = DMoE(16).to(HERE)
    where = "triton" if HERE == "cuda" else "eager: x is on cpu"
    assert backend.explain(auto, x).startswith(where)


@pytest.mark.parametrize(
    ("machine", "words"),
    [
        ("triton", "Triton is not installed"),
        ("interpreter", "x is on cpu, but the kernels need a GPU"),
    ],
)
def test_a_machine_without_triton_or_gpu_is_told_so(machine, words, monkeypatch):
    if machine == "triton":
        monkeypatch.setattr(backend, "find_spec", lambda name: None)
    else:
        monkeypatch.setattr(knobs.runtime, "interpret", False)
    with pytest.raises(RuntimeError, match=words):
        DMoE(16, backend="triton")(torch.randn(1, 16, 16))


def test_a_hook_that_replaces_the_experts_is_refused_since_they_are_sorted_already():
    layer, _ = pair(noise="never", dropout=0.0)
    x, a = torch.randn(2, 16, 16, device=HERE), torch.tensor([0, 1])
    layer(x, a)
    layer.router.register_forward_hook(
        lambda module, inputs, routing: routing._replace(
            expert_indices=routing.expert_indices.flip(1)
        )
    )
    with pytest.raises(RuntimeError, match=r"replaced the router's experts.* Use backend='eager'"):
        layer(x, a)
