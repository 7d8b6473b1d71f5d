"""Hosts whose MLP nothing can stand in for: they are named, with the cause, and left alone."""

import threading

import pytest
import torch
from harness.mlps import hugging_face, refused
from torch import nn
from torch.nn.utils import parametrizations

from dmoe_layer import swap_mlps


class Host(nn.Module):
    """Has its linear layers on itself, a norm before them and a residual around."""

    def __init__(self, activation=None, hidden=16):
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.linear1, self.linear2 = nn.Linear(8, hidden), nn.Linear(hidden, 8)
        self.activation = activation or nn.GELU()

    def mlp(self, x):
        return self.linear2(self.activation(self.linear1(x)))

    def forward(self, x):
        return x + self.mlp(self.norm(x))


class Gated(Host):
    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(8, 16)

    def mlp(self, x):
        return self.linear2(self.activation(self.linear1(x)) * self.gate(x))


class ActsTwice(Host):
    def forward(self, x):
        return super().forward(self.activation(x))


class ReadsWeight(Host):
    def forward(self, x):
        return super().forward(x.to(self.linear1.weight.dtype))


class Twice(Host):
    def mlp(self, x):
        return super().mlp(super().mlp(x))


class Bypasses(Host):
    """Works with the second one's weight, and not by calling it."""

    def mlp(self, x):
        return torch.nn.functional.linear(self.activation(self.linear1(x)), self.linear2.weight)


class Demands(Host):
    def forward(self, x, geometry):
        return super().forward(x) * geometry.scale


class Locked(Host):
    def __init__(self):
        super().__init__()
        self.lock = threading.Lock()


def two():
    return nn.ModuleDict({part: nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 16), nn.GELU(),
                          nn.Linear(16, 8)) for part in ("tokens", "channels")})  # fmt: skip


CONVNEXT_V2 = {"num_channels": 1, "num_stages": 1, "hidden_sizes": [8], "depths": [1]}
BETWEEN = ".*could not replace its MLP .*between 'linear1' and 'linear2' is none of relu"

# name: (the host, what the error says)
REFUSED = {
    "a gate": (Gated, f"{BETWEEN}.*'activation' GELU, 'gate' Linear"),
    "another activation": (lambda: Host(nn.Hardswish()), f"{BETWEEN}.*ion' Hardswish"),
    # One hidden unit too many for two halves.
    "another activation, odd": (lambda: Host(nn.Mish(), 13), f"{BETWEEN}.*ion' Mish"),
    "an activation that works elsewhere too": (
        ActsTwice,
        "ActsTwice: .*the output of the host is different, as if it used one of the parts",
    ),
    "a weight that is read": (ReadsWeight, "ReadsWeight: .*is different: .* attribute 'weight'"),
    "further arguments": (
        Demands,
        r"Demands: could not try .*\(batch, tokens, 8\).*no attribute 'scale'.*module of its own",
    ),
    "what cannot be copied": (Locked, "Locked: could not copy it to try its MLP .*lock"),
    "two MLPs": (
        two, r"ModuleDict contains 2 MLPs \('tokens.1', 'tokens.2', 'tokens.3'; .*Match a module"
    ),
}  # fmt: skip


@pytest.mark.parametrize("upcycle", [False, True])
@pytest.mark.parametrize("name", REFUSED)
def test_a_host_is_refused_with_the_cause_and_nothing_changes(name, upcycle):
    build, words = REFUSED[name]
    model = nn.Sequential(Host(), build())
    with refused(model, f"(?s)^1: {words}"):
        swap_mlps(model, "1", upcycle=upcycle)
    before = [*model.modules()]
    with pytest.raises(ValueError, match=f"(?s)^1: {words}"):
        swap_mlps(model, "?", upcycle=upcycle)
    assert [*model.modules()] == before  # the first one too
    assert swap_mlps(model, "0", upcycle=upcycle) == ["0.linear1"]


@pytest.mark.parametrize("build", [Twice, Bypasses])
def test_linear_layers_that_do_not_run_once_each_are_no_mlp(build):
    model = nn.Sequential(build())
    with refused(model, f"{build.__name__}: .*'linear1' and 'linear2' do not run once each"):
        swap_mlps(model, "0", upcycle=True)


def test_a_norm_of_the_hidden_units_is_no_part_of_an_mlp():
    model = hugging_face("ConvNextV2", **CONVNEXT_V2)()
    with refused(model, "ConvNextV2Layer: .*between 'pwconv1' and 'pwconv2' .*'grn' ConvNextV2GRN"):
        swap_mlps(model, "*.layers.?")


def test_options_that_do_not_fit_are_named_with_their_host():
    model = nn.Sequential(Host())
    with refused(model, r"0: Host: its MLP \('linear1', 'activation', 'linear2'\): k: got 9"):
        swap_mlps(model, "0", k=9)


def test_computed_weights_upcycle_no_better_than_elsewhere():
    model = nn.Sequential(Host())
    parametrizations.weight_norm(model[0].linear1)
    with pytest.raises(ValueError, match=r"0: Host: its MLP .*computed.*remove_parametrizations"):
        swap_mlps(model, "0", upcycle=True)
    assert swap_mlps(model, "0") == ["0.linear1"]


@pytest.mark.parametrize("pattern", ["0", "*"])
def test_a_host_that_holds_a_layer_already_says_so(pattern):
    model = nn.Sequential(Host(), Host())
    swap_mlps(model, "0")
    with pytest.raises(ValueError, match=r"^0: Host contains a DMoE already. Match only modules"):
        swap_mlps(model, pattern)
    assert swap_mlps(model, "1") == ["1.linear1"]


def test_a_sequential_that_is_an_mlp_goes_as_a_whole():
    block = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Dropout(0.1), nn.Linear(16, 8))
    model = nn.ModuleDict({"mlp": block})
    assert swap_mlps(model, "mlp", upcycle=True) == ["mlp"]
    assert model["mlp"].dropout.p == 0.0


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_hosts_are_tried_in_every_grad_mode(mode):
    model = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16))
    with mode():
        swap_mlps(model, "0")
    assert model[0].linear1.batch_dim == 1
