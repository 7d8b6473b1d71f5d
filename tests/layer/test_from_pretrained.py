"""Hugging Face's from_pretrained: a model that swaps in its __init__, and layers that it lacks."""

import pytest
import torch
from harness.mlps import IMAGE, TEXT, images, words
from torch import nn
from transformers import BertConfig, BertModel, PreTrainedModel, ViTConfig, ViTModel

from dmoe_layer import DMoE, routing, swap_mlps
from dmoe_layer.pretrained import FORMER_NAMES

SITES = torch.tensor([0, 2])


class Swapped(ViTModel):
    """Swaps its MLPs for new experts."""

    upcycle = False

    def __init__(self, config):
        super().__init__(config)
        swap_mlps(self, "*.mlp", attribute_sizes=3, upcycle=self.upcycle)


class Upcycled(Swapped):
    upcycle = True


class SwappedBert(BertModel):
    """Its linear layers stand on their host."""

    def __init__(self, config):
        super().__init__(config)
        swap_mlps(self, "encoder.layer.*", attribute_sizes=3)


@pytest.fixture(autouse=True)
def _poisoned_memory(monkeypatch):
    """What nobody fills is NaN, and not by chance what another model left there."""
    empty_like = torch.empty_like

    def poisoned(x, **options):
        y = empty_like(x, **options)
        return y.fill_(torch.nan) if y.is_floating_point() and not y.is_meta else y

    monkeypatch.setattr(torch, "empty_like", poisoned)


@pytest.fixture
def checkpoint(tmp_path):
    """One of a model that has its MLPs still."""
    model = ViTModel(ViTConfig(**IMAGE)).eval()
    model.save_pretrained(tmp_path)
    return tmp_path, model


def layers_of(model):
    return [module for module in model.modules() if isinstance(module, DMoE)]


def run(model, x):
    with torch.no_grad(), routing(SITES):
        return model.eval()(x).last_hidden_state


def assert_drawn(layer):
    """Its parameters are drawn as those of a new layer are."""
    for module, width in ((layer, layer.dim), (layer.router, layer.dim)):
        for name, parameter in module.named_parameters(recurse=False):
            bound = (layer.hidden_dim if name.startswith("w2") else width) ** -0.5
            assert parameter.isfinite().all(), name
            assert 0.8 * bound < parameter.abs().max() <= bound, name


def test_layers_that_a_checkpoint_lacks_are_drawn(checkpoint):
    folder, old = checkpoint
    model = Swapped.from_pretrained(folder)
    layers = layers_of(model)
    assert len(layers) == 2
    for layer in layers:
        assert_drawn(layer)
    assert not torch.equal(layers[0].w1_EHD, layers[1].w1_EHD)
    assert torch.equal(model.embeddings.cls_token, old.embeddings.cls_token)
    assert run(model, images()).isfinite().all()


def test_layers_on_a_host_are_drawn_too(tmp_path):
    BertModel(BertConfig(vocab_size=20, **TEXT)).save_pretrained(tmp_path)
    model, info = SwappedBert.from_pretrained(tmp_path, output_loading_info=True)
    layers = layers_of(model)
    assert len(layers) == 2
    for layer in layers:
        assert_drawn(layer)
    # All that was there is where it was, but for the two linear layers of each host.
    assert len(info["unexpected_keys"]) == 4 * len(layers)
    assert run(model, words()).isfinite().all()


def test_zero_init_holds_there_too(checkpoint):
    class Zero(ViTModel):
        def __init__(self, config):
            super().__init__(config)
            swap_mlps(self, "*.mlp", zero_init=True, n_experts=2)

    for layer in layers_of(Zero.from_pretrained(checkpoint[0])):
        assert not layer.w2_EDH.any()
        assert layer.w1_EHD.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [Swapped, Upcycled, SwappedBert])
def test_a_swapped_model_is_saved_and_loaded_exactly(kind, dtype, tmp_path):
    if kind is SwappedBert:
        model, x = kind(BertConfig(vocab_size=20, **TEXT)).to(dtype), words()
    else:
        model, x = kind(ViTConfig(**IMAGE)).to(dtype), images().to(dtype)
    model.save_pretrained(tmp_path)
    loaded, info = kind.from_pretrained(tmp_path, dtype=dtype, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    for (name, was), now in zip(
        model.state_dict().items(), loaded.state_dict().values(), strict=True
    ):
        assert torch.equal(now, was), name
    assert torch.equal(run(loaded, x), run(model, x))


@pytest.mark.parametrize("lost", ["router", "w1_EHD"])
def test_of_a_layer_that_is_there_in_part_the_rest_alone_is_drawn(lost, tmp_path):
    model = Swapped(ViTConfig(**IMAGE))
    state = {n: p for n, p in model.state_dict().items() if lost not in n}
    assert len(state) < len(model.state_dict())
    model.save_pretrained(tmp_path, state_dict=dict(state))
    loaded = Swapped.from_pretrained(tmp_path)
    for name, parameter in loaded.state_dict().items():
        assert parameter.isfinite().all(), name
        assert torch.equal(parameter, model.state_dict()[name]) == (name in state), name
    for layer in layers_of(loaded):
        assert_drawn(layer)


def test_a_checkpoint_with_the_former_names_of_biases_is_not_drawn_over(tmp_path):
    model = Swapped(ViTConfig(**IMAGE))
    state = dict(model.state_dict())
    for former, name in FORMER_NAMES.items():
        for key in [k for k in state if k.endswith(f".mlp.{name}") or k.endswith(f"router.{name}")]:
            state[key.removesuffix(name) + former] = state.pop(key)
    model.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(
        RuntimeError, match=r"no .*bias.*key_mapping=\{'b1_EH': 'w1_bias'"
    ) as refusal:
        Swapped.from_pretrained(tmp_path)
    assert str(FORMER_NAMES) in str(refusal.value)
    loaded = Swapped.from_pretrained(tmp_path, key_mapping=FORMER_NAMES)
    for name, parameter in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], parameter), name


def test_upcycling_an_mlp_that_is_not_loaded_yet_fails_with_the_way(checkpoint):
    folder, old = checkpoint
    with pytest.raises(
        RuntimeError, match=r"no w1_EHD, .* Load the model with its MLPs first, and then swap"
    ):
        Upcycled.from_pretrained(folder)
    model, x = ViTModel.from_pretrained(folder), images()
    swap_mlps(model, "*.mlp", upcycle=True, attribute_sizes=3)
    torch.testing.assert_close(run(model, x), run(old, x), atol=1e-5, rtol=1e-5)


def test_an_upcycled_layer_that_lacks_its_router_alone_is_loaded(tmp_path):
    model = Upcycled(ViTConfig(**IMAGE))
    state = {n: p for n, p in model.state_dict().items() if "router" not in n}
    model.save_pretrained(tmp_path, state_dict=dict(state))
    loaded = Upcycled.from_pretrained(tmp_path)
    for was, now in zip(layers_of(model), layers_of(loaded), strict=True):
        assert torch.equal(now.w1_EHD, was.w1_EHD)
        assert now.router.w_A2ED.isfinite().all()
        assert now.router.w_A2ED.abs().max() <= now.dim**-0.5


class Around(PreTrainedModel):
    """A model around another one; its post_init draws what has no values yet."""

    config_class = ViTConfig

    def __init__(self, config, inner):
        super().__init__(config)
        self.inner = inner
        self.post_init()


@pytest.mark.parametrize("upcycle", [False, True])
@pytest.mark.parametrize("from_meta", [False, True])
def test_a_model_around_a_swapped_one_leaves_its_layers_alone(upcycle, from_meta):
    def build(device):
        with torch.device(device):
            model = nn.ModuleDict({"vit": ViTModel(ViTConfig(**IMAGE))})
            swap_mlps(model, "*.mlp", upcycle=upcycle)
        return model

    model = build("cpu")
    if from_meta:
        state, model = model.state_dict(), build("meta")
        model.to_empty(device="cpu").load_state_dict(state)
    before = {n: p.clone() for n, p in model.state_dict().items() if ".mlp." in n}
    Around(ViTConfig(**IMAGE), model["vit"])
    for name, parameter in before.items():
        assert torch.equal(model.state_dict()[name], parameter), name


def test_a_layer_of_ones_own_model_is_drawn_too(tmp_path):
    class Own(PreTrainedModel):
        config_class = ViTConfig

        def __init__(self, config, with_layer=True):
            super().__init__(config)
            self.inner = nn.Linear(4, 4)
            self.moe = DMoE(4, hidden_dim=8) if with_layer else None
            self.post_init()

    Own(ViTConfig(), with_layer=False).save_pretrained(tmp_path)
    assert_drawn(Own.from_pretrained(tmp_path).moe)
