"""Programs of torch.export, AOTInductor and torch.jit.trace, which run without this package."""

import pytest
import torch
from harness.exports import exported, operators, run_without_package
from harness.layers import OTHER, make_quiet, make_x
from helpers import GOOD, A, E, T, needs_compiler
from torch import nn

from dmoe_layer import DMoE, backend, routing
from dmoe_layer.export import with_attributes

both_forms = pytest.mark.parametrize("form", ["sparse", "dense"])
both_ways = pytest.mark.parametrize("strict", [False, True])


@pytest.fixture
def model():
    layers = make_quiet(n_experts=2, k=1), make_quiet(n_experts=3)
    return nn.Sequential(layers[0], nn.Tanh(), layers[1]).eval().requires_grad_(False)


def test_a_model_is_a_function_of_two_tensors(model):
    x, two = make_x(), with_attributes(model)
    with routing(GOOD):
        expected = model(x)
    with routing(OTHER) as around:
        assert torch.equal(two(x, GOOD), expected)
    assert around.routings == []
    assert two.model is model
    assert not two.training
    model[1].train()  # a mode that a part has stays
    assert model[1].training
    assert not with_attributes(model).training
    assert model[1].training
    assert with_attributes(DMoE(6)).training


def test_what_is_a_function_of_two_tensors_already_is_taken_as_its_model(model):
    dense = with_attributes(model, experts="dense")
    for given, form in (({}, "dense"), ({"experts": "sparse"}, "sparse")):
        again = with_attributes(dense, **given)
        assert (again.model, again.experts) == (model, form)


def test_what_is_no_model_and_no_form_is_refused(model):
    with pytest.raises(TypeError, match=r"model: got .*expected a torch\.nn\.Module"):
        with_attributes(lambda x: x)
    with pytest.raises(ValueError, match="experts: got 'all', expected one of 'auto', 'sparse'"):
        with_attributes(model, experts="all")


@both_forms
@both_ways
def test_a_program_is_plain_aten_of_open_sizes_and_refuses_wrong_values(model, form, strict):
    x = make_x()
    program = exported(model, x, GOOD, axes=(0, 1), strict=strict, experts=form)
    names = operators(program)
    assert not any("dmoe_layer" in name for name in names)
    assert ("aten.nonzero.default" in names) is (form == "sparse")
    run, two = program.module(), with_attributes(model)
    for batch, tokens in ((4, T), (7, 2), (2, 9)):
        x, attributes = make_x(batch, tokens), torch.arange(batch) % A
        torch.testing.assert_close(run(x, attributes), two(x, attributes))
    for wrong in (A, -1):
        message = (
            rf"attributes: got a value out of range, expected 0 \.\. {A - 1} \(attribute_sizes=3"
        )
        with pytest.raises(RuntimeError, match=message):
            run(make_x(), torch.tensor([0, 1, wrong, 0]))


@pytest.mark.parametrize("strict", [False, True])
def test_of_fixed_sizes_the_rule_chooses_the_form(strict):
    few = exported(make_quiet().eval(), make_x(), GOOD, axes=(), strict=strict)
    assert "aten.nonzero.default" not in operators(few)
    one = make_quiet(k=E).eval()
    assert "aten.nonzero.default" not in operators(exported(one, make_x(), GOOD, strict=strict))


def test_a_layer_that_was_told_another_backend_is_exported_alike(model):
    model[0].backend = "triton"
    assert backend.explain(make_quiet(), make_x()).startswith("eager")
    names = operators(exported(model, make_x(), GOOD))
    assert not any("dmoe_layer" in name for name in names)


def test_masks_and_several_attributes_are_inputs_too():
    layer = make_quiet(attribute_sizes=(3, 2), unknown="average").eval()
    x, mask = make_x(), torch.rand(4, T) < 0.6
    pairs = torch.tensor([[2, 1], [-1, 0], [1, -1], [0, 1]])
    program = torch.export.export(layer, (x, pairs), {"mask": mask})
    assert not any("dmoe_layer" in name for name in operators(program))
    run, x, pairs = program.module(), make_x(), pairs.flip(0)
    for inside in (~mask, torch.ones_like(mask), torch.zeros_like(mask)):
        torch.testing.assert_close(run(x, pairs, mask=inside), layer(x, pairs, mask=inside))


def test_a_program_trains_as_the_layer_does():
    layer, x = make_quiet(activation="quick_gelu"), make_x()
    run = exported(layer, x, GOOD).module()
    found = torch.autograd.grad(run(x, GOOD).square().sum(), [*run.parameters()])
    expected = torch.autograd.grad(layer(x, GOOD).square().sum(), [*layer.parameters()])
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


RUNS = """
import torch
program, x, attributes, expected = argv
run = {load}
x, attributes, expected = torch.load(x), torch.load(attributes), torch.load(expected)
torch.testing.assert_close(run(x, attributes), expected)
try:
    run(x, torch.full_like(attributes, {wrong}))
except Exception as error:
    print(error)
"""


def saved(tmp_path, model):
    """The files of a batch that the example did not have, and of what the model says of it."""
    x, attributes = make_x(batch=6), torch.tensor([2, 0, 1, 1, 0, 2])
    tensors = {"x": x, "attributes": attributes, "y": with_attributes(model)(x, attributes)}
    for name, tensor in tensors.items():
        torch.save(tensor, tmp_path / name)
    return [tmp_path / name for name in tensors]


def test_a_saved_program_runs_where_the_package_is_not(model, tmp_path):
    torch.export.save(exported(model, make_x(), GOOD), tmp_path / "model.pt2")
    code = RUNS.format(load="torch.export.load(program).module()", wrong=A)
    said = run_without_package(code, tmp_path / "model.pt2", *saved(tmp_path, model))
    assert f"expected 0 .. {A - 1}" in said


def test_without_the_package_there_is_none(tmp_path):
    """What the tests around rest on."""
    assert "dmoe_layer is refused" in run_without_package("import dmoe_layer", expect=1)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
def test_a_traced_program_runs_where_the_package_is_not(model, tmp_path):
    traced = torch.jit.trace(with_attributes(model), (make_x(), GOOD), check_trace=False)
    traced.save(tmp_path / "model.ts")
    code = RUNS.format(load="torch.jit.load(program)", wrong=-1)
    said = run_without_package(code, tmp_path / "model.ts", *saved(tmp_path, model))
    assert "index out of range" in said


@needs_compiler
def test_a_package_of_aotinductor_takes_other_batches_and_refuses_wrong_values(tmp_path):
    # A compilation: some 15 s.
    model = make_quiet(n_experts=2, k=1).eval().requires_grad_(False)
    program = exported(model, make_x(), GOOD)
    package = torch._inductor.aoti_compile_and_package(
        program, package_path=str(tmp_path / "model.pt2")
    )
    run = torch._inductor.aoti_load_package(package)
    x, attributes = make_x(batch=6), torch.tensor([2, 0, 1, 1, 0, 2])
    torch.testing.assert_close(run(x, attributes), model(x, attributes))
    # Up to PyTorch 2.8 at least, the words themselves go to stderr.
    with pytest.raises(
        RuntimeError, match=rf"out of range, expected 0 \.\. {A - 1}|API call failed"
    ):
        run(x, torch.tensor([2, 0, -1, 1, 0, 2]))
