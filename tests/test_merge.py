"""Merged experts: what holds of the layer holds with merge=True, where samples are routed.

That output and gradients equal the naive loop stands in test_exact.py.
"""

import copy
import math
import pickle

import pytest
import torch
from monai.data import MetaTensor
from torch import nn
from torch.utils.checkpoint import checkpoint

from dmoe_layer import DMoE, carry_routing, load_balancing_loss, routing, swap_mlps
from dmoe_layer.backend import explain
from reference_models.models.unet import UNet

A3 = torch.tensor([0, 2, 1])


def merging(**options):
    return DMoE(8, **{"attribute_sizes": 3, "merge": True} | options)


def grads(loss, layer, *inputs):
    return torch.autograd.grad(loss, [*inputs, *layer.parameters()])


def assert_all_close(found, true):
    for a, b in zip(found, true, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_in_eval_a_sample_does_not_depend_on_its_batch_mates():
    layer, x = merging().eval(), torch.randn(3, 11, 8)
    mask = torch.rand(3, 11) < 0.5
    mask[1, 3:] = False
    for m in (None, mask):
        together = layer(x, A3, mask=m)
        for i in range(3):
            one = slice(i, i + 1)
            alone = layer(x[one], A3[one], mask=None if m is None else m[one])
            torch.testing.assert_close(alone, together[one], rtol=1e-6, atol=1e-6)


def test_the_mask_gives_the_same_as_computing_the_kept_tokens_alone():
    for residual in (False, True):
        layer, x = merging(residual=residual).eval(), torch.randn(3, 9, 8)
        mask = torch.rand(3, 9) < 0.4
        y = layer(x, A3, mask=mask)
        for b in range(3):
            alone = layer(x[b : b + 1, mask[b]], A3[b])
            torch.testing.assert_close(y[b, mask[b]], alone[0], rtol=1e-5, atol=1e-6)
        outside = x[~mask] if residual else torch.zeros_like(x[~mask])
        assert torch.equal(y[~mask], outside)


@pytest.mark.parametrize("residual", [False, True])
def test_nan_outside_the_mask_reaches_nothing(residual):
    layer, x = merging(residual=residual), torch.randn(3, 6, 8)
    mask = torch.rand(3, 6) < 0.5
    mask[0] = False
    results = []
    for fill in (0.0, math.nan, math.inf):
        layer.zero_grad()
        torch.manual_seed(0)
        spoiled = x.masked_fill(~mask[..., None], fill).requires_grad_()
        y, routed = layer(spoiled, A3, mask=mask, return_routing=True)
        (y[mask].square().sum() + routed.logits.square().sum()).backward()
        results.append([y[mask], *routed, spoiled.grad, *(p.grad for p in layer.parameters())])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_a_sample_without_tokens_is_routed_nowhere_and_counts_in_no_loss():
    layer, x = merging().eval(), torch.randn(3, 5, 8)
    mask = torch.ones(3, 5, dtype=torch.bool)
    mask[1] = False
    with routing(A3) as r:
        y = layer(x, mask=mask)
    with routing(A3[[0, 2]]) as without:
        layer(x[[0, 2]])
    assert not y[1].any()
    assert r.routings[0].attributes.tolist() == [0, 1]
    assert r.routings[0].gates.shape == (2, 2)
    assert not r.load_table()[2].any()
    for loss in ("load_balancing_loss", "importance_loss", "router_z_loss"):
        torch.testing.assert_close(getattr(r, loss)(), getattr(without, loss)())


@pytest.mark.parametrize("shape", [(0, 5, 8), (3, 0, 8), (0, 0, 8), (3, 8), (1, 1, 8)])
@pytest.mark.parametrize("masked", [False, True])
def test_empty_and_tiny_batches_give_finite_gradients(shape, masked):
    layer, x = merging(), torch.randn(shape, requires_grad=True)
    mask = torch.zeros(shape[:-1], dtype=torch.bool) if masked else None
    with routing(torch.zeros(shape[0], dtype=torch.int64)) as r:
        y = layer(x, mask=mask)
    assert y.shape == shape
    assert len(r.routings[0].logits) == (0 if masked or not x.numel() else shape[0])
    (y.sum() + r.load_balancing_loss()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())
    assert x.grad.isfinite().all()


def test_nan_in_one_sample_stays_in_that_sample():
    layer, x = merging().eval(), torch.randn(3, 5, 8)
    clean = layer(x, A3)
    x[1, 2, 3] = math.nan
    x.requires_grad_()
    y = layer(x, A3)
    assert torch.isnan(y[1]).all()
    assert torch.equal(y[[0, 2]], clean[[0, 2]])
    y[[0, 2]].sum().backward()
    assert torch.isfinite(x.grad[[0, 2]]).all()
    assert torch.isfinite(layer.router.w_A2ED.grad[[0, 1]]).all()


def test_nan_in_an_expert_reaches_only_the_samples_that_chose_it():
    layer, x = merging(n_experts=3, k=1).eval(), torch.randn(16, 5, 8)
    _, routed = layer(x, 0, return_routing=True)
    spoiled = int(routed.expert_indices[0])
    chose_it = (routed.expert_indices == spoiled).any(dim=1)
    assert not chose_it.all()
    with torch.no_grad():
        layer.w1_EHD[spoiled] = math.nan
    y = layer(x, 0)
    assert torch.isnan(y[chose_it]).all()
    assert torch.isfinite(y[~chose_it]).all()
    y[~chose_it].sum().backward()
    others = [e for e in range(3) if e != spoiled]
    assert torch.isfinite(layer.w1_EHD.grad[others]).all()


def test_the_attribute_decides_the_merge_and_unknowns_follow_their_policy():
    layer, x = merging(noise="never", dropout=0.0), torch.randn(1, 5, 8).expand(3, 5, 8)
    y = layer(x, A3)
    assert not torch.allclose(y[0], y[1])
    with pytest.raises(ValueError, match=r"expected 0 \.\. 2"):
        layer(x, -1)
    with pytest.raises(ValueError, match="none"):
        layer(x)
    average = merging(noise="never", dropout=0.0, unknown="average", attribute_sizes=(3, 2))
    unknown = torch.tensor([[-1, 1]]).expand(3, 2)
    _, routed = average(x, unknown, return_routing=True)
    assert torch.equal(routed.attributes, unknown)
    w_A2ED, b_A2E = average.router.w_A2ED, average.router.b_A2E
    w, b = w_A2ED[:3, 0].mean(0) + w_A2ED[4, 0], b_A2E[:3, 0].mean(0) + b_A2E[4, 0]
    torch.testing.assert_close(routed.logits[0], w @ x[0].mean(0) + b)


def test_a_plain_layer_records_the_scopes_attributes_by_sample():
    layer, x = merging(attribute_sizes=None), torch.randn(3, 5, 8)
    mask = torch.ones(3, 5, dtype=torch.bool)
    mask[0] = False
    with routing(A3) as r:
        layer(x)
        layer(x, mask=mask)
    assert [routed.attributes.tolist() for routed in r.routings] == [[0, 2, 1], [2, 1]]
    assert r.load_table(per_call=True).sum(dim=-1).tolist() == [[1, 1, 1], [0, 1, 1]]
    assert load_balancing_loss(r.routings[0], per_attribute=True).isfinite()


def test_noise_and_dropout_are_drawn_in_training_only_and_from_the_seed():
    layer, x = merging(), torch.randn(3, 5, 8)
    found = []
    for _ in range(2):
        torch.manual_seed(3)
        found.append(layer(x, A3))
    assert torch.equal(*found)
    assert not torch.equal(layer(x, A3), found[0])
    dropped = (merging(dropout=0.5)(torch.randn(3, 400, 8), A3) == 0).float().mean()
    assert abs(dropped - 0.5) < 0.05
    layer.eval()
    assert torch.equal(layer(x, A3), layer(x, A3))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_computes_in_its_dtype_and_routes_in_fp32(dtype):
    layer, x = merging().eval(), torch.randn(3, 5, 8, requires_grad=True)
    exact, true = layer(x, A3, return_routing=True)
    with torch.autocast("cpu", dtype):
        y, routed = layer(x, A3, return_routing=True)
    assert y.dtype == torch.float32
    assert torch.equal(y, y.to(dtype).float())
    assert routed.gates.dtype == routed.logits.dtype == torch.float32
    assert torch.equal(routed.gates, true.gates)
    torch.testing.assert_close(y, exact, rtol=0, atol=0.02 * exact.abs().max().item())
    y.sum().backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.any() for p in layer.parameters())


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("residual", [False, True])
def test_channels_first_gives_what_its_tokens_give_in_its_own_memory_format(
    memory_format, residual
):
    layer = merging(channel_dim=1, residual=residual).eval()
    x = torch.randn(3, 8, 4, 5).to(memory_format=memory_format).requires_grad_()
    y = layer(x, A3)
    layer.channel_dim = -1
    tokens = layer(x.movedim(1, -1).reshape(3, 20, 8), A3)
    expected = tokens.reshape(3, 4, 5, 8).movedim(-1, 1)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-6)
    assert y.stride() == (x + 0).stride()
    assert_all_close(grads(y.square().sum(), layer, x), grads(expected.square().sum(), layer, x))


def test_a_metatensor_stays_one():
    layer, x = merging(channel_dim=1).eval(), torch.randn(3, 8, 4, 5)
    y = layer(MetaTensor(x), A3)
    assert isinstance(y, MetaTensor)
    assert torch.equal(torch.Tensor(y), layer(x, A3))


def test_a_state_dict_moves_between_merge_modes_and_tells_a_lazy_layer_its_width():
    by_token = DMoE(8, attribute_sizes=3, k=1).eval()
    by_sample = DMoE(attribute_sizes=3, k=1, merge=True).eval()
    by_sample.load_state_dict(by_token.state_dict())
    assert by_sample.dim == 8
    x = torch.randn(3, 1, 8)  # its mean is its one token, and of one expert nothing is merged
    torch.testing.assert_close(by_sample(x, A3), by_token(x, A3))
    by_token.load_state_dict(by_sample.state_dict())


def test_a_lazy_layer_learns_its_width_and_zero_init_starts_as_the_identity():
    layer = DMoE(attribute_sizes=3, merge=True, residual=True, zero_init=True, bias=False)
    x = torch.randn(3, 5, 6)
    assert torch.equal(layer(x, A3), x)
    assert layer.dim == 6


def test_the_meta_device_gives_shapes():
    layer = merging(device="meta")
    assert layer(torch.empty(3, 5, 8, device="meta"), A3).shape == (3, 5, 8)


@pytest.mark.parametrize("k", [1, 2, 8])
def test_an_upcycled_block_computes_what_it_did(k):
    mlp = nn.Sequential(nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 8, bias=False))
    model, x = nn.Sequential(nn.LayerNorm(8), mlp).eval(), torch.randn(3, 5, 8)
    expected = model(x)
    assert swap_mlps(model, "1", upcycle=True, k=k, attribute_sizes=3, merge=True) == ["1"]
    assert model[1].merge
    with routing(A3) as r:
        torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-6)
    assert r.routings[0].gates.shape == (3, k)


@pytest.mark.parametrize("how", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_copies_merge_too(how):
    layer, x = merging().eval(), torch.randn(3, 5, 8)
    assert torch.equal(how(layer)(x, A3), layer(x, A3))
    assert "merge=True" in repr(how(layer))


@pytest.mark.parametrize("masked", [False, True])
def test_a_recomputed_layer_gives_the_same_gradients_and_records_once(masked):
    layer, x = merging(), torch.randn(3, 5, 8, requires_grad=True)
    mask = torch.rand(3, 5) < 0.5 if masked else None
    found = []
    for recomputed in (False, True):
        torch.manual_seed(0)
        with routing(A3) as r:
            block = carry_routing(layer)
            run = checkpoint if recomputed else lambda f, *a, use_reentrant, **k: f(*a, **k)
            y = run(block, x, mask=mask, use_reentrant=False)
        found.append(grads(y.square().sum() + r.load_balancing_loss(), layer, x))
        assert len(r.routings) == 1
    assert_all_close(*found)


def test_compile_takes_the_layer_and_a_mask_whole_and_gives_the_same():
    layer = merging(dropout=0.0, noise="never", activation="gelu")
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x, mask, results = torch.randn(3, 7, 8, requires_grad=True), torch.rand(3, 7) < 0.5, []
    for call in (layer, compiled):
        with routing(A3) as r:
            y = call(x, mask=mask)
        loss = y.square().sum() + r.load_balancing_loss()
        results.append([y, r.routings[0].gates, *grads(loss, layer, x)])
    assert_all_close(*results)
    with pytest.raises(ValueError, match=r"expected 0 \.\. 2"):
        compiled(x, torch.tensor([0, 3, 1]), mask=mask)


def test_the_kernels_refuse_it_in_words():
    layer, x = merging(backend="triton"), torch.randn(3, 20, 8)
    assert "merge=True" in explain(layer, x)
    with pytest.raises(RuntimeError, match=r"backend='triton': merge=True; .* backend='auto'"):
        layer(x, A3)
    layer.backend = "auto"
    assert explain(layer, x).startswith("eager")
    with pytest.raises(TypeError, match="merge: got 1"):
        DMoE(8, merge=1)


def test_what_is_kept_for_backward_is_the_hidden_layer_and_the_merged_weights_whatever_k_is():
    x, sizes = torch.randn(2, 256, 8, requires_grad=True), []
    for k in (1, 2, 8):
        layer, kept = merging(k=k, noise="never", dropout=0.0), {}
        own = {p.untyped_storage().data_ptr() for p in layer.parameters()}

        def pack(tensor, own=own, kept=kept):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                kept[storage.data_ptr()] = storage.nbytes() // 4
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            y = layer(x, 0)
        sizes.append(sum(kept.values()))
        y.sum().backward()
    hidden, weights = 2 * 256 * 32, 2 * (2 * 32 * 8)
    assert max(sizes) < x.numel() + hidden + weights + 1000


def test_the_unets_merged_experts_have_the_active_units_of_the_dense_mlp():
    for k, placement, units in ((2, "mlp", 8), (8, "mlp", 8), (2, "after", 4)):
        options = {"in_channels": 1, "n_classes": 2, "attribute_sizes": (3,), "k": k}
        model = UNet((4, 8), placement=placement, merge=True, **options)
        for stage, width in zip(model.stages, (4, 8), strict=True):
            layer = stage.mlp if placement == "mlp" else stage.after
            assert layer.merge
            assert layer.hidden_dim == units * width
