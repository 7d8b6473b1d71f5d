"""What PyTorch's ecosystem takes for granted of a module: its names, dropout, lazy parameters."""

import copy

import pytest
import torch
import torch.distributed as dist
from harness.layers import A3
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel
from transformers import Trainer

from dmoe_layer import AttributeRouter, DMoE, routing

FORMER = {"w1_bias": "b1_EH", "w2_bias": "b2_ED", "router.bias": "router.b_A2E"}


def host(**options):
    return nn.Sequential(nn.LayerNorm(6), DMoE(6, attribute_sizes=3, **options), nn.Linear(6, 6))


def told(model, x=None, attributes=A3):
    x = torch.linspace(-1, 1, 90).view(3, 5, 6) if x is None else x
    with routing(attributes):
        return model(x)


def test_rules_of_weight_decay_spare_every_bias_and_no_weight():
    model = host()
    biases = {"1.w1_bias", "1.w2_bias", "1.router.bias", "0.bias", "2.bias"}
    weights = {"1.w1_EHD", "1.w2_EDH", "1.router.w_A2ED", "2.weight"}
    by_name = {n for n, p in model.named_parameters() if p.ndim > 1 and not n.endswith("bias")}
    assert by_name == weights
    decayed = set(Trainer.get_decay_parameter_names(None, model))
    assert decayed == weights
    assert {n for n, _ in model.named_parameters()} == biases | weights | {"0.weight"}


def test_a_module_s_bias_is_a_tensor_or_none():
    def zero_biases(module):
        if getattr(module, "bias", None) is not None:
            nn.init.zeros_(module.bias)

    model = host().apply(zero_biases)
    assert not model[1].router.bias.any()
    host(bias=False).apply(zero_biases)


@pytest.mark.parametrize("lazy", [False, True])
def test_a_state_dict_with_the_former_names_loads(lazy):
    trained = DMoE(6, attribute_sizes=3).eval()
    state = {FORMER.get(name, name): value for name, value in trained.state_dict().items()}
    assert not state.keys() & FORMER.keys()
    layer = DMoE(None if lazy else 6, attribute_sizes=3).eval()
    layer.load_state_dict(state)
    assert torch.equal(told(layer), told(trained))
    assert set(FORMER.values()) <= state.keys()  # the caller's dict is left alone
    model, router = host(), AttributeRouter(6, attribute_sizes=3)
    others = {n: v for n, v in model.state_dict().items() if not n.startswith("1.")}
    model.load_state_dict({**others, **{f"1.{n}": v for n, v in state.items()}})
    assert torch.equal(model[1].w2_bias, trained.w2_bias)
    router.load_state_dict(
        {n.removeprefix("router."): v for n, v in state.items() if "router" in n}
    )
    assert torch.equal(router.bias, trained.router.bias)
    with pytest.raises(RuntimeError, match="w1_bias"):
        DMoE(6, attribute_sizes=3, hidden_dim=5).load_state_dict(state)


def test_a_former_name_beside_its_new_one_is_not_passed_over():
    layer = DMoE(6, attribute_sizes=3)
    both = {**layer.state_dict(), "b1_EH": torch.ones(8, 24)}
    with pytest.raises(RuntimeError, match=r'Unexpected key.*"b1_EH"'):
        layer.load_state_dict(both)


def test_dropout_is_found_by_its_class_and_switched_by_itself():
    model = host(dropout=0.5).eval()
    assert torch.equal(told(model), told(model))
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.train()
    assert not torch.equal(told(model), told(model))
    model.train()
    quiet = host(dropout=0.5, noise="never").train()
    assert not torch.equal(told(quiet), told(quiet))
    for module in quiet.modules():
        if isinstance(module, nn.Dropout):
            module.eval()
    assert torch.equal(told(quiet), told(quiet))


def test_the_rate_of_the_dropout_module_counts():
    layer = DMoE(6, attribute_sizes=3, noise="never", dropout=0.0)
    assert torch.equal(told(layer), told(layer))
    layer.dropout.p = 1.0
    assert not told(layer).any()
    for nothing in (nn.Identity(), None):
        layer.train().dropout = nothing
        assert torch.equal(told(layer), told(layer.eval()))


def test_a_lazy_layer_says_that_it_must_run_once():
    for what in (
        lambda layer: sum(p.numel() for p in layer.parameters()),
        lambda layer: [p.shape for p in layer.parameters()],
        lambda layer: [p for p in layer.parameters() if p.ndim <= 1],
        lambda layer: layer.share_memory(),
        lambda layer: layer.to_empty(device="cpu"),
        lambda layer: AveragedModel(layer).update_parameters(layer),
        lambda layer: nn.utils.parameters_to_vector(layer.parameters()),
    ):
        for layer in (DMoE(attribute_sizes=3), AttributeRouter(None, attribute_sizes=3)):
            with pytest.raises((ValueError, RuntimeError), match=r"Run the model once.*DMoE\(dim"):
                what(layer)
            assert layer.dim is None
            assert layer(torch.randn(3, 5, 6), A3) is not None


def test_a_lazy_layer_may_be_copied_and_averaged_once_it_has_run():
    layer = DMoE(attribute_sizes=3).eval()
    twin = copy.deepcopy(layer)
    told(layer)
    average = AveragedModel(layer)
    average.update_parameters(layer)
    assert torch.equal(told(average), told(layer))
    assert torch.equal(told(twin), told(layer))  # equal weights, as of any copy


def test_distributed_training_of_a_lazy_layer_is_refused():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with pytest.raises(RuntimeError, match="Run a dummy forward pass"):
            DistributedDataParallel(DMoE(attribute_sizes=3))
    finally:
        dist.destroy_process_group()


def test_what_cannot_capture_a_layer_is_told_what_can():
    for model in (DMoE(6), host(), AttributeRouter(6)):
        with pytest.raises(RuntimeError, match=r"Use torch\.export"):
            torch.jit.script(model)
        with pytest.raises(TypeError, match="is_leaf_module"):
            torch.fx.symbolic_trace(nn.Sequential(nn.Linear(6, 6), model))


def test_a_symbolic_trace_may_keep_the_layer_whole():
    class Tracer(torch.fx.Tracer):
        def is_leaf_module(self, module, name):
            return isinstance(module, DMoE) or super().is_leaf_module(module, name)

    model = host().eval()
    traced = torch.fx.GraphModule(model, Tracer().trace(model))
    assert torch.equal(told(traced), told(model))
