"""swap_mlps: which blocks it replaces, what it keeps of them, and the swapped model at work."""

import contextlib
import copy
import functools
import re

import pytest
import torch
from harness.mlps import (
    VIT_2D,
    ZOO,
    Block,
    D,
    H,
    assert_close,
    flat,
    mlp,
    refused,
    run,
    snapshot,
    strong,
    tensors,
    timm_mlp,
    tokens,
)
from monai.networks.blocks import MLPBlock, TransformerBlock
from monai.networks.nets import ViT
from torch import nn

from dmoe_layer import DMoE, carry_routing, routing, swap_mlps


@pytest.mark.parametrize(
    ("model", "upcycle"), [*((model, False) for model in ZOO), ("monai ViT", True)]
)
def test_a_swapped_model_trains(model, upcycle):
    build, make_input, pattern, _ = ZOO[model]
    model, x, attributes = build(), make_input(), torch.tensor([0, 2])
    names = swap_mlps(model, pattern, upcycle=upcycle, attribute_sizes=3)
    layers = [model.get_submodule(name) for name in names]
    assert all(isinstance(layer, DMoE) and layer.training for layer in layers)
    with routing(attributes) as r:
        loss = flat(tensors(model(x))).square().mean() + 0.01 * r.load_balancing_loss()
    assert len(r.routings) == len(layers)
    loss.backward()
    for name, layer in zip(names, layers, strict=True):
        for key, parameter in layer.named_parameters():
            assert parameter.grad is not None, f"{name}.{key}"
            assert parameter.grad.isfinite().all(), f"{name}.{key}"
        assert not layer.router.w_A2ED.grad[1].any()  # an attribute value that is absent


@pytest.mark.parametrize("model", ["monai Swin 3D", "hf Swin", "hf ViT"])
def test_a_sample_is_routed_by_its_own_attribute(model):
    build, make_input, pattern, _ = ZOO[model]
    model, x = strong(build()).eval(), make_input()
    swap_mlps(model, pattern, attribute_sizes=3)
    together = run(model, x, torch.tensor([0, 2]))
    for sample, own, other in ((0, 0, 2), (1, 2, 0)):
        found = flat([part[sample] for part in together])
        assert_close(found, flat(run(model, x[sample : sample + 1], torch.tensor([own]))))
        elsewhere = flat(run(model, x[sample : sample + 1], torch.tensor([other])))
        assert (found - elsewhere).abs().max() > 1e-3 * found.abs().max()


def test_one_unreadable_block_leaves_all_the_others_in_place():
    model = nn.Sequential(Block(mlp()), Block(mlp()), Block(nn.Linear(D, D)))
    modules = snapshot(model)[0]
    with pytest.raises(ValueError, match=r"^2.mlp: Linear: "):
        swap_mlps(model, "*.mlp", upcycle=True)
    assert snapshot(model)[0] == modules  # the random state may move: two layers were drawn


@pytest.mark.parametrize("upcycle", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_a_new_layer_keeps_widths_dtype_and_mode(upcycle, training):
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        model = Block(mlp(hidden=13)).to(dtype).train(training)
        swap_mlps(model, "mlp", upcycle=upcycle)
        assert (model.mlp.dim, model.mlp.hidden_dim) == (D, 13)
        assert {parameter.dtype for parameter in model.mlp.parameters()} == {dtype}
        assert {module.training for module in model.mlp.modules()} == {training}
        assert model(tokens().to(dtype)).dtype == dtype


@pytest.mark.parametrize("upcycle", [False, True])
@pytest.mark.parametrize("where", ["around", "on it"])
def test_a_model_on_meta_stays_there(upcycle, where):
    with torch.device("meta") if where == "around" else contextlib.nullcontext():
        model = Block(timm_mlp()).to("meta")
        swap_mlps(model, "mlp", upcycle=upcycle)
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    if upcycle:
        assert (model.mlp.activation, model.mlp.dropout.p) == ("gelu", 0.2)


def test_options_win_over_the_block_where_it_does_not_decide():
    model = Block(mlp()).requires_grad_(False)
    swap_mlps(model, "mlp", hidden_dim=5, bias=False, n_experts=3, k=1, dtype=torch.float64)
    assert model.mlp.w1_EHD.shape == (3, 5, D)
    assert model.mlp.w1_EHD.dtype == torch.float64
    assert model.mlp.w1_bias is None
    # Experts of a frozen MLP can learn.
    assert all(parameter.requires_grad for parameter in model.mlp.parameters())
    assert not model.norm.weight.requires_grad


@pytest.mark.parametrize("upcycle", [False, True])
@pytest.mark.parametrize(
    "options", [{"dim": 4}, {"n_expert": 4}, {"k": 9}, {"activation": "tanh"}, {"backend": "?"}]
)
def test_options_that_do_not_fit_change_nothing(upcycle, options):
    model = Block(mlp())
    old = model.mlp
    with pytest.raises((TypeError, ValueError), match=next(iter(options))):
        swap_mlps(model, "mlp", upcycle=upcycle, **options)
    assert model.mlp is old


def test_a_shared_block_is_replaced_once_wherever_it_stands():
    block, layer = mlp(), Block(mlp())
    model = nn.ModuleDict({"a": Block(block), "b": Block(block), "other": Block(mlp())})
    assert swap_mlps(model, "a.mlp") == ["a.mlp", "b.mlp"]
    assert model["a"].mlp is model["b"].mlp
    assert isinstance(model["a"].mlp, DMoE)
    assert not isinstance(model["other"].mlp, DMoE)
    # One in a shared layer counts under every name.
    model = nn.Sequential(layer, nn.ReLU(), layer)
    assert swap_mlps(model, "*.mlp") == ["0.mlp", "2.mlp"]
    assert model[0].mlp is model[2].mlp


def test_a_block_may_stand_in_any_container():
    for container in (nn.ModuleList, lambda two: nn.ModuleDict(zip("01", two, strict=True))):
        model = container([mlp(), mlp()])
        assert swap_mlps(model, "1", upcycle=True) == ["1"]
        assert isinstance(model._modules["1"], DMoE)
        assert list(model._modules) == ["0", "1"]


def test_the_outermost_match_counts():
    assert swap_mlps(nn.Sequential(mlp(), mlp()), "*") == ["0", "1"]
    model = Block(nn.ModuleDict({"mlp": mlp(), "deep": nn.ModuleDict({"mlp": mlp()})}))
    assert swap_mlps(model, "*.mlp") == ["mlp.mlp", "mlp.deep.mlp"]
    model = Block(mlp())
    with refused(model, "norm: LayerNorm: expected a two-layer MLP"):
        swap_mlps(model, "*")


@pytest.mark.parametrize(
    "pattern",
    [
        lambda name, module: re.search("mlp$", name),  # true or not, as in filter()
        lambda module, kind=nn.Sequential: isinstance(module, kind),
        lambda *name_and_module: name_and_module[0] == "mlp",
        functools.partial(lambda kind, module: isinstance(module, kind), nn.Sequential),
    ],
)
def test_a_predicate_sees_name_and_module_or_the_module(pattern):
    model = Block(mlp())
    assert swap_mlps(model, pattern) == ["mlp"]


def test_arguments_of_another_kind_are_refused():
    for pattern in (None, 3, b"*.mlp", ["*.mlp"], MLPBlock, nn.GELU(), {"*.mlp"}):
        with pytest.raises(TypeError, match=r"pattern: got .*expected a glob .*or a function"):
            swap_mlps(Block(mlp()), pattern)
    with pytest.raises(TypeError, match=r"model: got str, expected a torch.nn.Module"):
        swap_mlps("model", "*.mlp")
    with pytest.raises(TypeError, match="upcycle: got 'yes'"):
        swap_mlps(Block(mlp()), "mlp", upcycle="yes")
    with pytest.raises(TypeError, match=r"mlp: got int, expected a torch.nn.Module"):
        DMoE.from_mlp(3)


@pytest.mark.parametrize("pattern", ["*.mpl", "blocks.mlp", "mlp", lambda module: False])
def test_a_pattern_without_a_match_brings_up_the_mlps_of_the_model(pattern):
    model = ViT(1, 16, 8, num_layers=7, **VIT_2D)
    first_five = ", ".join(f"blocks.{i}.mlp" for i in range(5))
    with refused(model, f"matches no module. Close candidates: {first_five} and "):
        swap_mlps(model, pattern)
    # Ranked by their spelling.
    model = nn.ModuleDict({"encoder": nn.Sequential(mlp()), "decoder": nn.Sequential(mlp())})
    with refused(model, r"candidates: decoder\.0, decoder, encoder\.0"):
        swap_mlps(model, "decoder.mlp")


def test_a_model_without_mlp_blocks_is_told_why():
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(D, 2, H, batch_first=True), 2)
    with refused(model, r"no module that is a two-layer MLP.*TransformerEncoderLay"):
        swap_mlps(model, "*.mlp")
    with pytest.raises(ValueError, match="matches no module"):
        swap_mlps(nn.Sequential(nn.LazyLinear(3)), "*.mlp")


@pytest.mark.parametrize("pattern", ["", lambda module: isinstance(module, MLPBlock)])
def test_the_model_itself_cannot_be_swapped_in_place(pattern):
    with pytest.raises(ValueError, match=r"Only the model itself matches.*from_mlp"):
        swap_mlps(MLPBlock(D, H), pattern)


def test_what_is_swapped_already_is_named():
    model = nn.Sequential(Block(mlp()), Block(mlp()))
    swap_mlps(model, "0.mlp")
    with refused(model, r"0.mlp: this module is a DMoE already"):
        swap_mlps(model, "*.mlp")
    assert swap_mlps(model, "1.mlp") == ["1.mlp"]


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable`:FutureWarning")
@pytest.mark.parametrize("model", ["hf ViT", "hf GPT-2"])
@pytest.mark.parametrize("scope", ["open", "closed"])
def test_hugging_face_checkpointing_leaves_loss_and_gradients_alone(model, scope):
    build, make_input, pattern, count = ZOO[model]
    model, x = build().train(), make_input()
    swap_mlps(model, pattern, attribute_sizes=3)
    kwargs = {"use_reentrant": False, "context_fn": carry_routing}
    losses, gradients = [], []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs)
        model.zero_grad()
        torch.manual_seed(2)
        with contextlib.ExitStack() as stack:
            r = stack.enter_context(routing(torch.tensor([0, 2])))
            losses.append(flat(tensors(model(x))).square().mean() + r.load_balancing_loss())
            if scope == "closed":
                stack.close()
            losses[-1].backward()
        assert len(r.routings) == count
        found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        gradients.append(found)
    assert torch.equal(*losses)
    torch.testing.assert_close(*gradients)


def test_a_compiled_model_stays_in_one_graph_and_follows_the_swap():
    model, x = TransformerBlock(D, H, 2).eval(), tokens()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    compiled(x)
    swap_mlps(model, "mlp", attribute_sizes=3)
    with routing(torch.tensor([0, 2])):
        assert_close(compiled(x), model(x))


@pytest.mark.parametrize("upcycle", [False, True])
def test_a_swapped_model_can_be_copied_and_stored(upcycle):
    build, make_input, pattern, _ = ZOO["hf ViT"]
    model, fresh, x = build().eval(), build().eval(), make_input()
    for each in (model, fresh):
        swap_mlps(each, pattern, upcycle=upcycle, attribute_sizes=3)
    attributes = torch.tensor([0, 2])
    expected = flat(run(model, x, attributes))
    assert torch.equal(flat(run(copy.deepcopy(model), x, attributes)), expected)
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(flat(run(fresh, x, attributes)), expected)


def test_swapping_works_under_no_grad():
    class QuickGelu(nn.Module):
        def forward(self, x):
            return x * torch.sigmoid(1.702 * x)

    model = nn.Sequential(nn.Sequential(nn.Linear(4, 8), QuickGelu(), nn.Linear(8, 4)))
    with torch.no_grad():
        assert swap_mlps(model, "0") == ["0"]
