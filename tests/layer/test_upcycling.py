"""Upcycling: every expert starts as the old MLP, and the model computes what it did."""

import copy

import pytest
import torch
from harness.mlps import ZOO, D, H, assert_close, flat, mlp, run, strong, tokens
from torch import nn

from dmoe_layer import DMoE, swap_mlps


@pytest.mark.parametrize("model", ZOO)
def test_an_upcycled_model_computes_what_the_old_one_did_whatever_k_is(model):
    build, make_input, pattern, count = ZOO[model]
    old, x = strong(build()).eval(), make_input()
    expected = flat(run(old, x))
    for k in (1, 2, 8) if model in ("monai ViT", "functional") else (2,):
        new = copy.deepcopy(old)
        names = swap_mlps(new, pattern, upcycle=True, k=k, attribute_sizes=3)
        assert len(names) == count
        assert_close(flat(run(new, x, torch.tensor([0, 2]))), expected)
        # The whole model might hide an MLP behind a norm or a small scale: block by block too.
        for was, now in ((old.get_submodule(name), new.get_submodule(name)) for name in names):
            tokens_BTD = torch.randn(2, 7, now.dim)
            assert_close(now(tokens_BTD, attributes=torch.tensor([1, 0])), was(tokens_BTD.clone()))


def test_a_missing_bias_upcycles_to_zero():
    block = nn.Sequential(nn.Linear(D, H, bias=False), nn.ReLU(), nn.Linear(H, D)).eval()
    x = tokens()
    assert_close(DMoE.from_mlp(block)(x), block(x))
    assert DMoE.from_mlp(mlp()[:2].append(nn.Linear(H, D, bias=False))).w2_bias.abs().sum() == 0
    without = nn.Sequential(nn.Linear(D, H, bias=False), nn.ReLU(), nn.Linear(H, D, bias=False))
    assert DMoE.from_mlp(without).w1_bias is None


def test_an_upcycled_expert_is_its_own_copy():
    block = mlp()
    layer = DMoE.from_mlp(block)
    with torch.no_grad():
        layer.w1_EHD[0].zero_()
    assert layer.w1_EHD[1].any()
    assert block[0].weight.untyped_storage().data_ptr() != layer.w1_EHD.untyped_storage().data_ptr()
