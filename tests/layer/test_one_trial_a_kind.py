"""Blocks that differ in nothing but their weights are tried once; what else differs is found."""

import collections
import copy
import enum
import functools
import types

import pytest
import torch
import torch.nn.functional as F
from harness.blocks import Chunked, Paired, QuickGelu, convolutional_mlp
from harness.mlps import TEXT, VIT_2D, Block, D, FunctionalMlp, H, hugging_face, mlp, timm_mlp
from monai.networks.nets import ViT
from torch import nn
from torch.nn.utils import parametrizations, prune

from dmoe_layer import DMoE, swap_mlps
from dmoe_layer.foreign import kinds, read_mlp, trial
from dmoe_layer.foreign.kinds import kind_of


@pytest.fixture
def trials(monkeypatch):
    """The blocks that are tried from here on."""
    tried = []
    probe = trial.Probe
    monkeypatch.setattr(trial, "Probe", lambda mlp, names: tried.append(mlp) or probe(mlp, names))
    return tried


@pytest.mark.parametrize("upcycle", [False, True])
@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(
    "build", [mlp, timm_mlp, FunctionalMlp, Chunked, Paired, convolutional_mlp]
)
def test_blocks_that_differ_in_their_weights_alone_are_tried_once(build, device, upcycle, trials):
    model = nn.Sequential(*(Block(build()) for _ in range(5))).to(device)
    assert len(swap_mlps(model, "*.mlp", upcycle=upcycle)) == 5
    assert len(trials) == 1


@pytest.mark.parametrize(
    ("build", "count"),
    [
        (lambda: ViT(1, 16, 8, num_layers=4, dropout_rate=0.1, **VIT_2D), 4),
        (hugging_face("Llama", vocab_size=20, **TEXT), 2),
    ],
)
def test_blocks_of_models_that_other_people_wrote_are_of_one_kind(build, count, trials):
    assert len(swap_mlps(build(), "*.mlp", upcycle=True)) == count
    assert len(trials) == 1


def test_every_block_keeps_its_own_weights():
    model = nn.Sequential(*(Block(mlp()) for _ in range(3))).eval()
    old, x = copy.deepcopy(model), torch.randn(2, 5, D)
    swap_mlps(model, "*.mlp", upcycle=True)
    torch.testing.assert_close(model(x), old(x))
    assert not torch.equal(model[0].mlp.w1_EHD, model[1].mlp.w1_EHD)


class Parts(nn.Module):
    """An MLP, and behind it what does nothing, in ways that depend on attributes of all sorts."""

    def __init__(self, shift):
        super().__init__()
        self.first, self.act, self.second = nn.Linear(D, H), nn.LeakyReLU(0.0), nn.Linear(H, D)
        self.tail = nn.Sequential(nn.Identity())
        self.register_buffer("shift", shift)
        self.factors, self.options, self.function = [1.0], {"factor": 1.0}, None

    def forward(self, x):
        x = self.tail(self.second(self.act(self.first(x))))
        for factor in (*self.factors, self.options["factor"]):
            x = x * factor
        return (x if self.function is None else self.function(x)) + self.shift


class Residual(Parts):
    def forward(self, x):
        return x + super().forward(x)


def as_buffer(linear):
    weight = linear.weight.detach()
    del linear.weight
    linear.register_buffer("weight", weight)


def with_residual(self, x):
    return x + Parts.forward(self, x)


# What is done to one block of three, by which it is no MLP any more that can be upcycled.
SPOILED = {
    "an activation": lambda block: setattr(block, "act", nn.Mish()),
    "the slope of an activation": lambda block: setattr(block.act, "negative_slope", 0.5),
    "a hook": lambda block: block.act.register_forward_hook(lambda module, args, y: y + 1),
    "a hook before": lambda block: block.register_forward_pre_hook(lambda m, args: (args[0] + 1,)),
    "a patched forward": lambda block: setattr(
        block, "forward", lambda x: x + block.first(x).sum()
    ),
    "a bound forward": lambda block: setattr(
        block, "forward", types.MethodType(with_residual, block)
    ),
    "another class": lambda block: setattr(block, "__class__", Residual),
    "one more module": lambda block: block.tail.append(nn.LayerNorm(D)),
    "a buffer's values": lambda block: setattr(block, "shift", torch.ones(D)),
    "a list's values": lambda block: block.factors.append(2.0),
    "a dict's values": lambda block: block.options.update(factor=2.0),
    "a function": lambda block: setattr(block, "function", torch.sin),
    "a parametrization": lambda block: parametrizations.weight_norm(block.first),
    "pruning": lambda block: prune.l1_unstructured(block.second, "weight", 0.5),
    "a buffer for a weight": lambda block: as_buffer(block.first),
    "another dtype": lambda block: block.second.double(),
}
# By these it stays one, but another.
CHANGED = {
    "a missing bias": lambda block: setattr(block.second, "bias", None),
    "a dropout": lambda block: block.tail.append(nn.Dropout(0.3)),
}


def three_blocks():
    shift = torch.zeros(D)  # one buffer for all
    return nn.Sequential(*(Block(Parts(shift)) for _ in range(3)))


@pytest.mark.parametrize("place", [0, 2])
@pytest.mark.parametrize("spoil", SPOILED)
def test_a_block_that_differs_from_its_neighbours_is_found_out(spoil, place):
    model = three_blocks()
    assert len({kind_of(block.mlp) for block in model}) == 1
    SPOILED[spoil](model[place].mlp)
    assert len({kind_of(block.mlp) for block in model}) == 2
    with pytest.raises(ValueError, match=f"^{place}.mlp: "):
        swap_mlps(model, "*.mlp", upcycle=True)


@pytest.mark.parametrize("change", CHANGED)
def test_a_block_that_differs_and_can_be_read_has_a_trial_of_its_own(change, trials):
    model = three_blocks()
    CHANGED[change](model[1].mlp)
    assert len(swap_mlps(model, "*.mlp", upcycle=True)) == 3
    assert len(trials) == 2
    rates = [block.mlp.dropout.p for block in model]
    assert rates == [0.0, 0.3 * (change == "a dropout"), 0.0]
    assert [not block.mlp.w2_bias.any() for block in model][1] == (change == "a missing bias")


def test_each_block_keeps_its_own_activation_and_dropout():
    acts = [nn.ReLU(), nn.GELU(), nn.GELU("tanh"), QuickGelu(), nn.SiLU(), nn.SiLU()]
    rates = [0.1, 0.1, 0.1, 0.1, 0.2, 0.0]
    blocks = [
        nn.Sequential(*mlp(act), nn.Dropout(rate)) for act, rate in zip(acts, rates, strict=True)
    ]
    model = nn.Sequential(*map(Block, blocks))
    swap_mlps(model, "*.mlp", upcycle=True)
    found = [(block.mlp.activation, block.mlp.dropout.p) for block in model]
    names = ["relu", "gelu", "gelu_tanh", "quick_gelu", "silu", "silu"]
    assert found == list(zip(names, rates, strict=True))


class Colour(enum.Enum):
    RED, BLUE = 1, 2


class Slotted(nn.Identity):
    __slots__ = ("factor",)


def with_attribute(value):
    module = nn.Identity()
    module.value = value
    return module


def tied(module):
    module.first.weight = module.second.weight
    return module


def pair():
    return nn.ModuleDict({"first": nn.Linear(D, D), "second": nn.Linear(D, D)})


config, shared = types.SimpleNamespace(size=3), nn.Linear(D, D)
nested = [1, ["a", (2.0, None)], {"b": {3}}]
ALIKE = {
    "plain": lambda: with_attribute([1, 2.0, "a", None, torch.float32, torch.Size([3])]),
    "nested": lambda: with_attribute(copy.deepcopy(nested)),
    "a shared object": lambda: with_attribute(config),
    "a function": lambda: with_attribute(F.relu),
    "an enum": lambda: with_attribute(Colour.RED),
    "layers": lambda: nn.Sequential(*mlp()),
    "tied": lambda: tied(pair()),
    "hooks, none": lambda: mlp(nn.Dropout(0.1)),
}
# Two things each that are not of one kind.
UNLIKE = {
    "True and 1": (lambda: with_attribute(True), lambda: with_attribute(1)),
    "0.0 and -0.0": (lambda: with_attribute(0.0), lambda: with_attribute(-0.0)),
    "list and tuple": (lambda: with_attribute([1]), lambda: with_attribute((1,))),
    "enums": (lambda: with_attribute(Colour.RED), lambda: with_attribute(Colour.BLUE)),
    "two objects": (
        lambda: with_attribute(types.SimpleNamespace(a=1)),
        lambda: with_attribute(types.SimpleNamespace(a=1)),
    ),
    "two tensors": (lambda: with_attribute(torch.ones(2)), lambda: with_attribute(torch.ones(2))),
    "partials": (
        lambda: with_attribute(functools.partial(F.gelu)),
        lambda: with_attribute(functools.partial(F.gelu)),
    ),
    "order of keys": (
        lambda: with_attribute({"a": 1, "b": 2}), lambda: with_attribute({"b": 2, "a": 1})
    ),
    "ordered": (
        lambda: with_attribute({"a": 1}), lambda: with_attribute(collections.OrderedDict(a=1))
    ),
    "tied or not": (lambda: tied(pair()), pair),
    "shared or not": (
        lambda: nn.Sequential(shared, shared), lambda: nn.Sequential(shared, copy.deepcopy(shared))
    ),
    "shared or not, without parameters": (
        lambda: nn.Sequential(*[nn.ReLU()] * 2), lambda: nn.Sequential(nn.ReLU(), nn.ReLU())
    ),
    "1 and '1'": (lambda: with_attribute(1), lambda: with_attribute("1")),
    "sets": (lambda: with_attribute({1}), lambda: with_attribute({"1"})),
    "names": (
        lambda: nn.Sequential(collections.OrderedDict(a=nn.ReLU())),
        lambda: nn.Sequential(collections.OrderedDict(b=nn.ReLU())),
    ),
    "training": (nn.ReLU, lambda: nn.ReLU().eval()),
    "frozen": (lambda: nn.Linear(2, 2), lambda: nn.Linear(2, 2).requires_grad_(False)),
    "dtype": (lambda: nn.Linear(2, 2), lambda: nn.Linear(2, 2, dtype=torch.float64)),
    "device": (lambda: nn.Linear(2, 2), lambda: nn.Linear(2, 2, device="meta")),
    "slots": (Slotted, Slotted),
}  # fmt: skip


@pytest.mark.parametrize("build", ALIKE)
def test_two_that_are_alike_are_of_one_kind(build):
    a, b = ALIKE[build](), ALIKE[build]()
    assert kind_of(a) == kind_of(b)
    assert hash(kind_of(a)) == hash(kind_of(b))


@pytest.mark.parametrize("name", UNLIKE)
def test_two_that_are_not_alike_are_not_of_one_kind(name):
    a, b = (build() for build in UNLIKE[name])
    assert kind_of(a) != kind_of(b)
    assert kind_of(a) == kind_of(a)


def test_what_holds_itself_has_a_kind():
    for block in (mlp(), mlp()):
        block.add_module("again", block)
        assert kind_of(block) == kind_of(block)
    one, other = [1], [1]
    one.append(one)
    other.append(other)
    assert kind_of(with_attribute(one)) == kind_of(with_attribute(other))


def test_what_was_tried_stays_alive_as_long_as_its_kind_is_known():
    trials, told = kinds.Trials(), []
    for value in range(50):  # one that is freed leaves its place to the next
        told.append(trials.of(with_attribute(types.SimpleNamespace(a=value)), lambda v=value: v))
    assert told == list(range(50))


def test_the_dropout_of_one_kind_is_read_anew_where_it_was_not_asked_for():
    trials, block = kinds.Trials(), nn.Sequential(*mlp(), nn.Dropout(0.3))
    for _ in range(2):
        for rate, expected in ((0.7, 0.7), (None, 0.3)):
            read = read_mlp.read_mlp(block, upcycle=True, dropout=rate, trials=trials)
            assert read.dropout == expected
        assert read_mlp.read_mlp(block, upcycle=False, trials=trials).activation == ""


def test_experts_that_start_as_an_mlp_are_not_drawn(monkeypatch):
    drawn, uniform = [], nn.init.uniform_

    def noted(tensor, *args):
        drawn.append(tensor)
        return uniform(tensor, *args)

    monkeypatch.setattr(nn.init, "uniform_", noted)
    block = mlp()
    drawn.clear()
    torch.manual_seed(0)
    layer = DMoE.from_mlp(block, attribute_sizes=3)
    assert {id(tensor) for tensor in drawn} <= {id(p) for p in layer.router.parameters()}
    torch.manual_seed(0)
    fresh = DMoE(D, hidden_dim=H, attribute_sizes=3)
    torch.testing.assert_close(layer.router.state_dict(), fresh.router.state_dict(), rtol=0, atol=0)
    layer.reset_parameters()  # asked for, they are drawn as ever
    assert not torch.equal(layer.w1_EHD[0], layer.w1_EHD[1])
