"""The eager backend's matrix products: exact, and with the same bits beside any other rows."""

import math

import pytest
import torch
from harness.exactness import assert_close
from harness.saved import gradients_and_largest_saved

from dmoe_layer import DMoE
from dmoe_layer.eager import gemm


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="needs oneDNN")
@pytest.mark.parametrize(("inner", "out"), [(16, 64), (24, 96), (96, 24), (200, 40), (768, 192)])
@pytest.mark.parametrize("rows", [16, 80, 1024])
def test_onednns_products_are_exact_and_keep_a_rows_bits(inner, out, rows):
    x, w, b = torch.randn(rows + 64, inner), torch.randn(out, inner), torch.randn(out)
    true = (x.double() @ w.double().mT + b.double()).relu()
    for weight in (w, w.mT.contiguous().mT):
        assert gemm._by_onednn(x, weight) == gemm.ONEDNN_KEEPS_BITS
        y = gemm.linear(x, weight, b, relu=True)
        assert_close(y, true, torch.float32, "linear")
        assert torch.equal(gemm.linear(x[7 : 7 + rows], weight, b, relu=True), y[7 : 7 + rows])
    with_gaps = torch.stack([b, b + 1], dim=1)[:, 0]
    assert torch.equal(gemm.linear(x, w, with_gaps), gemm.linear(x, w, b))
    x[0, 0] = math.nan
    assert torch.isnan(gemm.linear(x, w, b, relu=True)[0]).all()
    g, x = torch.randn(rows, out), x[64:]
    dw = gemm.sum_of_products(g, x[:rows])
    assert_close(dw, g.double().mT @ x[:rows].double(), torch.float32, "dw")


def test_without_onednn_the_layer_gives_the_same():
    layer, x = DMoE(24, noise="never"), torch.randn(2, 300, 24, requires_grad=True)
    found, _ = gradients_and_largest_saved(layer, x)
    with torch.backends.mkldnn.flags(enabled=False):
        assert not gemm._by_onednn(layer.w1_EHD[0], layer.w1_EHD[0])
        other, _ = gradients_and_largest_saved(layer, x)
    for a, b in zip(found, other, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_the_rows_of_padded_blocks_are_few_sizes_and_little_more():
    for rows in range(1, 10_000):
        assert rows <= gemm.round_rows(rows) <= max(rows + 15, rows * 33 / 32)
        assert gemm.round_rows(rows) % 16 == 0
    assert len({gemm.round_rows(rows) for rows in range(4097, 8193)}) == 32
