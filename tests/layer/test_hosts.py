"""Hosts on which an MLP's linear layers stand: what takes their place, and what stays."""

import contextlib
import copy

import pytest
import torch
import transformers as hf
from harness.mlps import IMAGE, TEXT, assert_close, flat, hugging_face, images, strong, words
from torch import nn

from dmoe_layer import DMoE, carry_routing, routing, swap_mlps

SITES = torch.tensor([0, 2])
OPT = {"hidden_size": 16, "num_attention_heads": 2, "ffn_dim": 32, "num_hidden_layers": 2}
WHISPER = {
    **{f"{part}_{what}": n for part in ("encoder", "decoder") for what, n in
       (("layers", 1), ("attention_heads", 2), ("ffn_dim", 32))},
    "d_model": 16, "num_mel_bins": 8, "max_source_positions": 10, "decoder_start_token_id": 1,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "vocab_size": 20,
}  # fmt: skip
CONVNEXT = {"num_channels": 1, "num_stages": 2, "hidden_sizes": [8, 16], "depths": [1, 1]}


def encoder(layers=2, **options):
    layer = nn.TransformerEncoderLayer(16, 2, 32, **options)
    return nn.TransformerEncoder(layer, layers, enable_nested_tensor=options.get("batch_first"))


def decoder(**options):
    return nn.TransformerDecoder(nn.TransformerDecoderLayer(16, 2, 32, **options), 2)


class Permute(nn.Module):
    def __init__(self, *axes):
        super().__init__()
        self.axes = axes

    def forward(self, x):
        return x.permute(self.axes)


class ConvBlock(nn.Module):
    """A ConvNeXt block as torchvision has it."""

    def __init__(self, dim=8):
        super().__init__()
        self.block = nn.Sequential(
            nn.Conv2d(dim, dim, 3, padding=1, groups=dim), Permute(0, 2, 3, 1), nn.LayerNorm(dim),
            nn.Linear(dim, 4 * dim), nn.GELU(), nn.Dropout(0.1), nn.Linear(4 * dim, dim),
            Permute(0, 3, 1, 2),
        )  # fmt: skip
        self.scale = nn.Parameter(torch.rand(dim, 1, 1))

    def forward(self, x):
        return x + self.scale * self.block(x)


def spoken():
    return {"input_features": torch.randn(2, 8, 20), "decoder_input_ids": words()}


def masked_words():
    return {"input_ids": words(), "attention_mask": torch.tensor([[1] * 5, [1, 1, 1, 0, 0]])}


def sequences(batch_first, *lengths):
    return [torch.randn(2, n, 16) if batch_first else torch.randn(n, 2, 16) for n in lengths]


# name: (the model, its input, the pattern, where the layers stand)
HOSTS = {
    "torch encoder": (
        lambda: encoder(batch_first=True), lambda: sequences(True, 5), "layers.*",
        ["layers.0.linear1", "layers.1.linear1"],
    ),
    "torch encoder, sequence first": (
        lambda: encoder(norm_first=True, activation="gelu"), lambda: sequences(False, 5),
        "layers.*", ["layers.0.linear1", "layers.1.linear1"],
    ),
    "torch decoder": (
        lambda: decoder(batch_first=True), lambda: sequences(True, 5, 4), "layers.1",
        ["layers.1.linear1"],
    ),
    "torch decoder, sequence first": (
        decoder, lambda: sequences(False, 5, 4), "layers.0", ["layers.0.linear1"]
    ),
    "hf BERT": (
        hugging_face("Bert", vocab_size=20, **TEXT), masked_words, "encoder.layer.*",
        [f"encoder.layer.{i}.intermediate.dense" for i in range(2)],
    ),
    "hf VideoMAE": (
        hugging_face("VideoMAE", **IMAGE, num_frames=2), lambda: [torch.randn(2, 2, 1, 16, 16)],
        "encoder.layer.1", ["encoder.layer.1.intermediate.dense"],
    ),
    "hf DPT": (
        hugging_face("DPT", **IMAGE), lambda: [images()], "encoder.layer.0",
        ["encoder.layer.0.intermediate.dense"],
    ),
    "hf Whisper": (
        hugging_face("Whisper", **WHISPER), spoken, "*.layers.*",
        ["encoder.layers.0.fc1", "decoder.layers.0.fc1"],
    ),
    "hf ConvNeXt": (
        hugging_face("ConvNext", **CONVNEXT, layer_scale_init_value=1.0),
        lambda: [torch.randn(2, 1, 32, 32)], "*.layers.?",
        ["encoder.stages.0.layers.0.pwconv1", "encoder.stages.1.layers.0.pwconv1"],
    ),
    "torchvision ConvNeXt": (
        lambda: nn.Sequential(ConvBlock(), ConvBlock()), lambda: [torch.randn(2, 8, 6, 6)], "?",
        ["0.block.3", "1.block.3"],
    ),
    "torchvision ConvNeXt, inside": (
        lambda: nn.Sequential(ConvBlock()), lambda: [torch.randn(2, 8, 6, 6)], "*.block",
        ["0.block.3"],
    ),
}  # fmt: skip


def run(model, given, sites=None):
    torch.manual_seed(1)
    with routing(sites) if sites is not None else contextlib.nullcontext():
        y = model(**given) if isinstance(given, dict) else model(*given)
    return y if isinstance(y, torch.Tensor) else y.last_hidden_state


@pytest.mark.parametrize("name", HOSTS)
def test_an_upcycled_host_computes_what_it_did_and_keeps_its_other_parts(name):
    build, make_input, pattern, places = HOSTS[name]
    old, given = strong(build()).eval(), make_input()
    expected = run(old, given)
    new = copy.deepcopy(old)
    assert swap_mlps(new, pattern, upcycle=True, attribute_sizes=3) == places
    assert_close(run(new, given, SITES), expected)
    layers = [new.get_submodule(place) for place in places]
    assert all(isinstance(layer, DMoE) and not layer.training for layer in layers)
    assert [layer.dropout.p for layer in layers] == [0.0] * len(places)
    # Of the host's parameters those of two linear layers went, and no others.
    left = {n for n, _ in old.named_parameters()} & {n for n, _ in new.named_parameters()}
    assert len(left) == len([*old.parameters()]) - 4 * len(places)
    for parameter in left:
        assert torch.equal(new.get_parameter(parameter), old.get_parameter(parameter))


@pytest.mark.parametrize("name", HOSTS)
def test_a_swapped_host_trains_and_routes_each_sample_by_its_own_attribute(name):
    build, make_input, pattern, places = HOSTS[name]
    model, given = strong(build()), make_input()
    swap_mlps(model, pattern, attribute_sizes=3, noise="never")
    with routing(SITES) as r:
        run(model.train(), given).square().mean().backward()
    assert len(r.routings) == len(places)
    for place in places:
        # The host's own dropouts act on what the layer puts out.
        assert model.get_submodule(place).dropout.p == 0.0
        for key, parameter in model.get_submodule(place).named_parameters():
            assert parameter.grad.isfinite().all(), f"{place}.{key}"
    model.eval()
    first, second = (run(model, given, torch.tensor([site])) for site in SITES)
    axis = 1 if "sequence first" in name else 0
    expected = torch.stack([first.select(axis, 0), second.select(axis, 1)], dim=axis)
    assert_close(run(model, given, SITES), expected)
    assert (first - second).abs().max() > 1e-3 * first.abs().max()


def test_tokens_that_the_host_moves_into_the_batch_are_told_one_by_one():
    old = strong(hf.OPTModel(hf.OPTConfig(vocab_size=20, word_embed_proj_dim=16, **OPT))).eval()
    new, given = copy.deepcopy(old), {"input_ids": words()}
    swap_mlps(new, "decoder.layers.*", upcycle=True, attribute_sizes=3)
    with pytest.raises(ValueError, match=r"for a batch of 10 samples.*repeat_interleave\(5"):
        run(new, given, SITES)
    assert_close(run(new, given, SITES.repeat_interleave(5)), run(old, given))
    plain = copy.deepcopy(old)
    swap_mlps(plain, "decoder.layers.*", upcycle=True)
    assert_close(run(plain, given), run(old, given))


def test_a_square_of_samples_and_tokens_is_routed_by_samples_in_either_order():
    torch.manual_seed(0)
    first = strong(encoder(batch_first=True)).eval()
    second = encoder().eval()
    second.load_state_dict(first.state_dict())
    for model in (first, second):
        torch.manual_seed(3)
        swap_mlps(model, "layers.*", attribute_sizes=3)
    second.load_state_dict(first.state_dict())
    assert [m.layers[0].linear1.batch_dim for m in (first, second)] == [0, 1]
    x, sites = torch.randn(4, 4, 16), torch.tensor([0, 1, 2, 2])
    assert_close(run(second, [x.transpose(0, 1)], sites).transpose(0, 1), run(first, [x], sites))


def test_a_causal_host_is_known_for_what_it_is_too():
    class Causal(nn.TransformerEncoderLayer):
        def forward(self, x):
            length = x.shape[1] if self.self_attn.batch_first else x.shape[0]
            mask = nn.Transformer.generate_square_subsequent_mask(length, dtype=x.dtype)
            return super().forward(x, mask, is_causal=True)

    for batch_first in (False, True):
        model = nn.Sequential(Causal(16, 2, 32, batch_first=batch_first))
        swap_mlps(model, "0", n_experts=2)
        assert model[0].linear1.batch_dim == int(not batch_first)


class Turned(nn.TransformerEncoderLayer):
    """Is called with the batch on one axis, and computes with it on the other."""

    def forward(self, x):
        return super().forward(x.transpose(0, 1)).transpose(0, 1)


class Backwards(Turned):
    """A token knows those behind it alone."""

    def forward(self, x):
        length = x.shape[0 if self.self_attn.batch_first else 1]
        mask = nn.Transformer.generate_square_subsequent_mask(length, dtype=x.dtype).T
        y = nn.TransformerEncoderLayer.forward(self, x.transpose(0, 1), mask)
        return y.transpose(0, 1)


@pytest.mark.parametrize("inside_batch_first", [False, True])
@pytest.mark.parametrize("kind", [Turned, Backwards])
def test_the_axis_is_that_of_the_tokens_where_the_layer_stands(kind, inside_batch_first):
    model = nn.Sequential(kind(16, 2, 32, batch_first=inside_batch_first)).eval()
    swap_mlps(model, "0", attribute_sizes=3)
    assert model[0].linear1.batch_dim == int(not inside_batch_first)
    x, sites = torch.randn(3, 3, 16), torch.tensor([0, 2, 1])
    with torch.no_grad(), routing(sites):
        together = model(x)
    for i, site in enumerate(sites):  # as many tokens as samples
        one = (slice(None), slice(i, i + 1)) if inside_batch_first else slice(i, i + 1)
        with torch.no_grad(), routing(site):
            assert_close(together[one], model(x[one]))


@pytest.mark.parametrize("dim", [6, 11, 14])
def test_a_softmax_of_large_tokens_does_not_hide_which_axis_is_the_samples(dim):
    model = nn.Sequential(nn.TransformerEncoderLayer(dim, 1, 8))
    swap_mlps(model, "0", n_experts=2)
    assert model[0].linear1.batch_dim == 1


def test_what_is_given_wins_over_what_was_found():
    model = nn.Sequential(nn.TransformerEncoderLayer(16, 2, 32))
    swap_mlps(model, "0", upcycle=True, batch_dim=0, dropout=0.25, n_experts=3)
    layer = model[0].linear1
    assert (layer.batch_dim, layer.dropout.p, layer.n_experts) == (0, 0.25, 3)


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("upcycle", [True, False])
def test_pytorchs_fused_encoder_is_left_in_eval(monkeypatch, upcycle, whole):
    model = strong(encoder(batch_first=True)).eval()
    x, padding = torch.randn(2, 5, 16), torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    old = copy.deepcopy(model)
    fused = []
    original = torch._transformer_encoder_layer_fwd
    monkeypatch.setattr(
        torch, "_transformer_encoder_layer_fwd", lambda *a: fused.append(a) or original(*a)
    )
    with torch.no_grad():
        expected = old(x, src_key_padding_mask=padding)[~padding]
        assert len(fused) == 2
        swap_mlps(model, "layers.*" if whole else "layers.1", upcycle=upcycle, attribute_sizes=3)
        with routing(SITES) as r:
            y = model(x, src_key_padding_mask=padding)[~padding]
    assert len(r.routings) == 1 + whole
    assert len(fused) == (2 if whole else 3)  # a layer that was not replaced may go on
    assert y.isfinite().all()
    assert not upcycle or (y - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.parametrize("upcycle", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_dtype_mode_and_meta_are_kept(upcycle, training):
    for dtype in (torch.bfloat16, torch.float64):
        model = hugging_face("Bert", vocab_size=20, **TEXT)().to(dtype).train(training)
        (place,) = swap_mlps(model, "encoder.layer.1", upcycle=upcycle)
        layer = model.get_submodule(place)
        assert {parameter.dtype for parameter in model.parameters()} == {dtype}
        assert {module.training for module in layer.modules()} == {training}
        assert (layer.dim, layer.hidden_dim) == (16, 32)
        assert run(model, [words()]).dtype == dtype
    # A Swin layer has buffers, whose values a copy of it on "meta" cannot have.
    sizes = {"image_size": 16, "patch_size": 4, "num_channels": 1, "window_size": 2}
    config = hf.Swinv2Config(**sizes, embed_dim=8, depths=[1, 1], num_heads=[1, 2])
    with torch.device("meta"):
        model = hf.Swinv2Model(config)
        assert len(swap_mlps(model, "*.blocks.*", upcycle=upcycle)) == 2
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}


def test_a_shared_host_holds_one_layer_under_both_names():
    host = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    model = nn.ModuleList([host, host])
    assert swap_mlps(model, "*") == ["0.linear1", "1.linear1"]
    assert model[0] is model[1]
    assert isinstance(model[0].linear1, DMoE)


def test_a_swapped_host_compiles_is_copied_and_stored():
    model, (x,) = strong(encoder(layers=1, batch_first=True)).eval(), sequences(True, 5)
    fresh = encoder(layers=1, batch_first=True).eval()
    for each in (model, fresh):
        swap_mlps(each, "layers.*", upcycle=True, attribute_sizes=3)
    expected = run(model, [x], SITES)
    assert torch.equal(run(copy.deepcopy(model), [x], SITES), expected)
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(run(fresh, [x], SITES), expected)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert_close(run(compiled, [x], SITES), expected)


def test_hugging_faces_checkpointing_leaves_gradients_alone():
    model = hugging_face("Bert", vocab_size=20, **TEXT)().train()
    swap_mlps(model, "encoder.layer.*", attribute_sizes=3)
    given, gradients = masked_words(), []
    for checkpointing in (False, True):
        if checkpointing:
            kwargs = {"use_reentrant": False, "context_fn": carry_routing}
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs)
        model.zero_grad()
        run(model, given, SITES).square().mean().backward()
        gradients.append(flat([p.grad for p in model.parameters() if p.grad is not None]))
    assert torch.equal(*gradients)
