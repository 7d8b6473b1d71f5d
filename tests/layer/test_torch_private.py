"""Where PyTorch lacks a private name, the layer takes a slower road or says so."""

import sys
from types import SimpleNamespace

import pytest
import torch

from dmoe_layer import DMoE, _torch_private, routing
from dmoe_layer.eager import gemm


def layer_and_input(**options):
    return DMoE(16, noise="never", dropout=0.0, attribute_sizes=2, **options), torch.randn(2, 3, 16)


A2 = torch.tensor([0, 1])


def test_without_the_number_of_the_backward_pass_a_scope_refuses_to_open(monkeypatch):
    monkeypatch.delattr(torch._C, "_current_graph_task_id")
    layer, x = layer_and_input()
    with (
        pytest.raises(
            RuntimeError, match=r"routing: PyTorch .*pass the attributes .*layer\(x, attributes\)"
        ),
        routing(A2),
    ):
        layer(x)
    layer(x, A2).sum().backward()


@pytest.mark.parametrize("lost", ["get_interpreter_stack", "TransformType"])
def test_without_functorchs_stack_its_derivatives_are_refused_all_the_same(monkeypatch, lost):
    layer, x = layer_and_input()
    expected = layer(x, A2)
    monkeypatch.setattr(
        torch._C,
        "_functorch",
        SimpleNamespace(
            **{
                name: getattr(torch._C._functorch, name)
                for name in ("get_interpreter_stack", "TransformType")
                if name != lost
            }
        ),
    )
    assert not _torch_private.in_functional_derivative(x)
    assert torch.equal(layer(x, A2), expected)
    monkeypatch.undo()
    seen = []

    def look(x):
        with monkeypatch.context() as patch:
            patch.delattr(torch._C._functorch, lost)
            seen.append(_torch_private.in_functional_derivative(x))
        return x.sum()

    torch.func.grad(look)(x)
    torch.func.jvp(look, (x,), (x,))
    assert seen == [True, True]


def test_without_onednns_operator_products_go_to_blas(monkeypatch):
    monkeypatch.setattr(torch.ops, "mkldnn", SimpleNamespace())
    assert not _torch_private.has_onednn_linear()
    assert gemm.roads.__wrapped__() == gemm.Roads(None)
    monkeypatch.setattr(gemm, "roads", gemm.roads.__wrapped__)
    layer, x = DMoE(256, n_experts=2).eval(), torch.randn(3, 21, 256, requires_grad=True)
    y = layer(x)
    assert torch.equal(layer(x[1:2, :1]), y[1:2, :1])
    y.sum().backward()


def test_without_knowledge_of_open_sizes_the_hidden_layer_is_computed_again(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.fx.experimental.symbolic_shapes", None)
    assert _torch_private.known_while_compiling(True) is False


def test_hooks_under_other_names_leave_a_lazy_layer_usable():
    layer = DMoE(n_experts=2)
    for module in (layer, layer.router):
        for name in ("_initialize_hook", "_load_hook"):
            vars(module)[f"other{name}"] = vars(module).pop(name)
    for _ in range(2):
        assert layer(torch.randn(2, 3, 16)).shape == (2, 3, 16)
    with pytest.raises(ValueError, match="expected dim=16"):
        layer(torch.randn(2, 3, 8))


@pytest.mark.parametrize("renamed", ["_forward_hooks", "_forward_pre_hooks"])
def test_hooks_under_another_name_count_as_hooks(renamed):
    names = {"_forward_hooks": {}, "_forward_pre_hooks": {}}
    assert not _torch_private.has_forward_hooks(SimpleNamespace(**names))
    del names[renamed]
    assert _torch_private.has_forward_hooks(SimpleNamespace(**names))
