"""A program that is captured takes its attributes as an input; a scope around is not frozen in."""

import functools
import re

import pytest
import torch
from harness.layers import OTHER, make_quiet, make_x
from harness.recomputes import both_ways
from helpers import GOOD, A, in_a_thread
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint

from dmoe_layer import _torch_private, carry_routing, routing

WAYS = {
    "export": lambda model, inputs: torch.export.export(model, inputs, strict=False).module(),
    "strict_export": lambda model, inputs: torch.export.export(model, inputs, strict=True).module(),
    "trace": functools.partial(torch.jit.trace, check_trace=False),
    "make_fx": lambda model, inputs: make_fx(model)(*inputs),
    "make_fx_symbolic": lambda model, inputs: make_fx(
        model, tracing_mode="symbolic", _allow_non_fake_inputs=True
    )(*inputs),
}
all_ways = pytest.mark.parametrize("capture", WAYS.values(), ids=WAYS.keys())

pytestmark = [
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
    pytest.mark.filterwarnings("ignore:`torch.jit.trace:DeprecationWarning"),
]


class Opens(nn.Module):
    """The module of two inputs that the error shows."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x, attributes):
        with routing(attributes):
            return self.model(x)


class Hands(Opens):
    def forward(self, x, attributes):
        return self.model(x, attributes)


@pytest.fixture
def layer():
    return make_quiet().eval().requires_grad_(False)


def refused():
    ways = r"pass `layer\(x, attributes=\.\.\.\)`(.|\n)*with routing\(attributes\):\n"
    return pytest.raises(RuntimeError, match=ways)


@all_ways
def test_a_program_captured_inside_of_a_scope_is_refused(layer, capture):
    x = make_x()
    with routing(GOOD) as scope:
        with refused():
            capture(layer, (x,))
        y = layer(x)
    assert torch.equal(y, layer(x, GOOD))
    assert len(scope.routings) == 1


@pytest.mark.parametrize("model", [Opens, Hands])
@pytest.mark.parametrize("way", WAYS)
def test_a_program_follows_the_attributes_that_are_an_input_of_it(layer, way, model):
    x = make_x()
    with routing(OTHER) as scope:  # which has no part in it
        program = WAYS[way](model(layer), (x, GOOD))
    assert scope.routings == []
    for attributes in (GOOD, OTHER, torch.full((4,), A - 1)):
        torch.testing.assert_close(program(x, attributes), layer(x, attributes))
    for wrong in (A, -1):
        # A program that may run without Python has the words that it was exported with, or, of
        # TorchScript, which leaves a check without a result out, those of its index.
        words = f"got a value out of range, expected 0 .. {A - 1}"
        if "make_fx" in way:
            words = f"got {wrong} (sample 2), expected 0 .. {A - 1}"
        elif way == "trace":
            words = "index out of range"
        with pytest.raises(Exception, match=re.escape(words)):
            program(x, torch.tensor([0, 1, wrong, 0]))


@pytest.mark.parametrize("strict", [False, True])
def test_an_exported_program_of_open_sizes_opens_its_scope_for_any_batch(layer, strict):
    sizes = {0: torch.export.Dim.DYNAMIC}
    program = torch.export.export(
        Opens(layer), (make_x(), GOOD), dynamic_shapes=[sizes, sizes], strict=strict
    ).module()
    x, attributes = make_x(batch=7), torch.tensor([0, 1, 2, 2, 1, 0, 0])
    torch.testing.assert_close(program(x, attributes), layer(x, attributes))


@pytest.mark.parametrize("way", ["export", "trace", "make_fx"])  # Dynamo cannot open it at all
def test_a_scope_made_outside_of_a_program_freezes_nothing_by_being_opened_in_it(layer, way):
    scope = routing(GOOD)

    class Reopens(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer

        def forward(self, x):
            with scope:
                return self.layer(x)

    with refused():
        WAYS[way](Reopens(), (make_x(),))
    assert scope.routings == []


def test_what_a_scope_tells_modules_of_ones_own_is_not_frozen_either():
    def shifts(x):
        return x + routing.attribute_values(x, A)

    def opens(x, attributes):
        with routing(attributes):
            return shifts(x)

    x = torch.zeros(4, 1)
    with routing(GOOD) as scope, refused():
        make_fx(shifts)(x)
    with refused():
        make_fx(lambda x: x + scope.attributes[:, None])(x)
    program = make_fx(opens)(x, GOOD)
    assert program(x, OTHER).flatten().tolist() == OTHER.tolist()


def test_a_scope_that_tells_nothing_is_no_obstacle(layer):
    x = make_x()
    plain = make_quiet(attribute_sizes=None).eval()
    with routing() as scope:
        program = torch.jit.trace(plain, x, check_trace=False)
    assert scope.routings == []
    torch.testing.assert_close(program(x), plain(x))


@pytest.mark.parametrize("made_in", ["this_program", "another"])
def test_a_scope_belongs_to_the_program_in_which_it_was_made(layer, made_in):
    kept = []

    def first(x, attributes):
        kept.append(routing(attributes))
        return x

    def second(x, attributes):
        if made_in == "this_program":
            first(x, attributes)
        with kept[-1]:
            return layer(x)

    make_fx(first)(make_x(), GOOD)
    if made_in == "another":
        with refused():
            make_fx(second)(make_x(), GOOD)
        with refused(), kept[-1]:
            layer(make_x())
    else:
        program, x = make_fx(second)(make_x(), GOOD), make_x()
        torch.testing.assert_close(program(x, OTHER), layer(x, OTHER))


def test_a_captured_training_step_recomputes_with_the_attributes_of_its_input(layer):
    def step(x, attributes):
        with routing(attributes):
            y = checkpoint(carry_routing(layer), x, use_reentrant=False)
        return torch.autograd.grad(y.square().sum(), x)[0]

    x = make_x().requires_grad_()
    program = make_fx(step)(x, GOOD)
    for attributes in (GOOD, OTHER):
        torch.testing.assert_close(program(x, attributes), step(x, attributes))


@both_ways
def test_a_captured_backward_pass_does_not_freeze_what_a_recompute_is_told(layer, recompute):
    x = make_x().requires_grad_()
    with routing(GOOD):
        y = recompute(layer, x)
    with refused():
        make_fx(lambda grad: torch.autograd.grad(y, x, grad))(torch.ones_like(y))


def test_the_scope_of_another_thread_has_no_part_in_a_capture(layer):
    # A layer of its own, since torch.export puts other parameters into that which it captures.
    x, served, serving, seen = make_x(), make_quiet().eval(), routing(OTHER), []
    expected = served(x, OTHER)

    def serve():
        with serving:
            return served(x)

    class Meanwhile(Opens):
        def forward(self, x, attributes):
            seen.append(in_a_thread(serve))
            return super().forward(x, attributes)

    for way in ("export", "trace", "make_fx"):
        WAYS[way](Meanwhile(layer), (make_x(), GOOD))
    assert len(seen) == len(serving.routings) >= 3
    assert all(torch.equal(y, expected) for y in seen)


def test_compiling_inside_of_a_scope_is_no_capture(layer):
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    for batch, attributes in ((4, GOOD), (3, OTHER[:3])):
        x = make_x(batch).requires_grad_()
        with routing(attributes) as scope:
            y = compiled(x)
        assert len(scope.routings) == 1
        expected = layer(x, attributes)
        torch.testing.assert_close(y, expected)
        grads = [torch.autograd.grad(of.square().sum(), x)[0] for of in (y, expected)]
        torch.testing.assert_close(*grads)


def test_without_the_name_of_a_trace_its_calls_are_known_all_the_same(monkeypatch):
    seen = []

    def look(x):  # PyTorch's modules need the name themselves
        with monkeypatch.context() as patch:
            patch.delattr(torch._C, "_get_tracing_state")
            seen.append(_torch_private.program_capture())
        return x + 1

    torch.jit.trace(look, torch.zeros(1), check_trace=False)
    look(torch.zeros(1))
    assert seen == [True, None]


def test_without_word_of_captures_a_scope_refuses_to_open_in_what_may_be_one(layer, monkeypatch):
    monkeypatch.delattr(torch.fx.experimental.proxy_tensor, "get_proxy_mode")
    x = make_x()
    with routing(GOOD):
        layer(x)
    monkeypatch.delattr(torch._C, "_dispatch_tls_is_dispatch_key_included")
    with pytest.raises(
        RuntimeError, match=r"routing: PyTorch .*pass the attributes .*layer\(x, attributes\)"
    ):
        routing(GOOD)
    layer(x, GOOD)
