"""The eager products: exact on every road, and with the same bits beside any other rows."""

import math

import pytest
import torch
from harness.exactness import assert_close
from harness.saved import gradients_and_largest_saved

from dmoe_layer import DMoE
from dmoe_layer._torch_private import has_onednn_linear
from dmoe_layer.eager import gemm
from dmoe_layer.eager.gemm import Roads
from dmoe_layer.eager.memory import Scratch
from dmoe_layer.eager.processor import Processor, processor

needs_onednn = pytest.mark.skipif(
    not (has_onednn_linear() and gemm.ONEDNN_KEEPS_BITS and processor().architecture == "x86"),
    reason="needs a oneDNN that keeps bits, on x86",
)
# Every rule's road, whatever this machine's own is.
ROADS = [
    Roads(None),
    pytest.param(Roads(128), marks=needs_onednn),
    pytest.param(Roads(256, transposed_rows=128), marks=needs_onednn),
    pytest.param(Roads(16, gradients=True), marks=needs_onednn),
]


@pytest.fixture(params=ROADS, ids=str)
def roads(request, monkeypatch):
    monkeypatch.setattr(gemm, "roads", lambda: request.param)
    return request.param


def test_the_road_depends_on_the_processor():
    zen_5 = Processor("x86", "AuthenticAMD", 26, "AVX512")
    assert gemm.roads_of(zen_5) == Roads(16, gradients=True)
    assert gemm.roads_of(zen_5._replace(family=25)) == Roads(128)
    assert gemm.roads_of(zen_5._replace(vendor="GenuineIntel", family=6)) == Roads(128)
    assert gemm.roads_of(zen_5._replace(capability="AVX2")) == Roads(256, transposed_rows=128)
    assert gemm.roads_of(zen_5._replace(capability="DEFAULT")) == Roads(None)
    assert gemm.roads_of(Processor("aarch64", "", 0, "SVE256")) == Roads(None)


@pytest.fixture
def onednns_calls(monkeypatch):
    """The shapes of the products that go to oneDNN's linear operator."""
    calls, original = [], gemm.onednn_linear

    def spy(x, w, b):
        calls.append((x.shape[0], *w.shape))
        return original(x, w, b)

    monkeypatch.setattr(gemm, "onednn_linear", spy)
    return calls


@pytest.mark.parametrize(("inner", "out"), [(16, 64), (96, 24), (200, 140), (768, 256)])
@pytest.mark.parametrize("rows", [16, 80, 1024])
def test_products_are_exact_and_keep_a_rows_bits(inner, out, rows, roads, onednns_calls):
    x, w, b = torch.randn(rows + 64, inner), torch.randn(out, inner), torch.randn(out)
    scratch = Scratch(x, out, x.dtype)
    y = gemm.linear(x, w, b, scratch).clone()
    assert_close(y, x.double() @ w.double().mT + b.double(), torch.float32, "linear")
    assert torch.equal(gemm.linear(x[7 : 7 + rows], w, b, scratch), y[7 : 7 + rows])
    with_gaps = torch.stack([b, b + 1], dim=1)[:, 0]
    assert torch.equal(gemm.linear(x, w, with_gaps, scratch), y)
    by_onednn = roads.width is not None and min(inner, out) >= roads.width
    assert len(onednns_calls) == (3 if by_onednn else 0)
    onednns_calls.clear()
    dy = torch.randn(rows, out)
    dx = gemm.linear_backward(dy, w, Scratch(x, inner, x.dtype))
    assert_close(dx, dy.double() @ w.double(), torch.float32, "backward")
    few = roads.transposed_rows is None or rows <= roads.transposed_rows
    assert len(onednns_calls) == (1 if by_onednn and few else 0)


@pytest.mark.parametrize("width", [9, 24, 47])
def test_blas_keeps_a_rows_bits_with_many_threads(width):
    x, w, b = torch.randn(500, width), torch.randn(4 * width, width), torch.randn(4 * width)
    scratch, threads = Scratch(x, 4 * width, x.dtype), torch.get_num_threads()
    try:
        for many in (3, 32):
            torch.set_num_threads(many)
            y = gemm.linear(x, w, b, scratch).clone()
            for rows in (16, 48, 64, 208):
                assert torch.equal(gemm.linear(x[3 : 3 + rows], w, b, scratch), y[3 : 3 + rows])
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("rows", [0, 1, 511, 512, 100_000])
def test_a_weighted_sum_of_many_rows_keeps_its_digits(rows):
    values, weights = torch.rand(rows, 8), torch.rand(rows)
    true = (values.double() * weights.double()[:, None]).sum(dim=0)
    found = gemm.weighted_sum(values, weights)
    assert ((found - true).abs() <= 1e-6 * true).all()


@pytest.mark.parametrize(("inner", "out"), [(16, 64), (96, 24), (200, 140)])
@pytest.mark.parametrize("rows", [1, 15, 83, 1030])
def test_the_sum_of_products_is_exact_whether_it_is_the_first_or_not(inner, out, rows, roads):
    a, b = torch.randn(rows, out), torch.randn(rows, inner)
    true = a.double().mT @ b.double()
    total = torch.full((out, inner), math.nan)
    gemm.add_product(total, a, b, first=True)
    assert_close(total, true, torch.float32, "first")
    gemm.add_product(total, a, b, first=False)
    assert_close(total, 2 * true, torch.float32, "second")


@pytest.mark.parametrize(("dim", "tokens"), [(24, 300), (256, 900)])
def test_every_road_gives_the_layers_output_and_gradients(
    dim, tokens, roads, onednns_calls, monkeypatch
):
    # Not ReLU, whose kink a rounding may step over.
    layer = DMoE(dim, noise="never", activation="gelu")
    x = torch.randn(2, tokens, dim, requires_grad=True)
    found, _ = gradients_and_largest_saved(layer, x)
    assert bool(onednns_calls) == (roads.width is not None and dim >= roads.width)
    monkeypatch.setattr(gemm, "roads", lambda: Roads(None))
    plain, _ = gradients_and_largest_saved(layer, x)
    for i, (a, b) in enumerate(zip(found, plain, strict=True)):
        assert_close(a, b, torch.float32, f"tensor {i}")


@pytest.mark.parametrize("dim", [24, 256])
def test_a_sample_keeps_its_bits_beside_any_others_on_every_road(dim, roads):
    layer, x = DMoE(dim, attribute_sizes=3).eval(), torch.randn(5, 37, dim)
    attributes = torch.tensor([0, 1, 2, 1, 0])
    y = layer(x, attributes)
    for few in ([0], [3], [1, 4]):
        assert torch.equal(layer(x[few], attributes[few]), y[few])
    one_token = layer(x[:, :1], attributes)
    assert torch.equal(layer(x[2:3, :1], attributes[2:3]), one_token[2:3])


def test_a_nan_stays_a_nan_in_the_hidden_layer(roads):
    layer, x = DMoE(256, n_experts=2, k=1, noise="never"), torch.randn(1, 40, 256)
    x[0, 3, 0] = math.nan
    y = layer(x)
    assert torch.isnan(y[0, 3]).all()
    assert torch.isfinite(y[0, torch.arange(40) != 3]).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("dim", [7, 17, 18, 20, 129])
@pytest.mark.parametrize("hidden_dim", [5, None])
def test_a_sample_keeps_its_bits_where_experts_rows_start_in_odd_places(dim, hidden_dim, dtype):
    layer = DMoE(dim, hidden_dim=hidden_dim, k=2, dtype=dtype).eval()
    x = torch.randn(6, 23, dim, dtype=dtype)
    y, routing = layer(x, return_routing=True)
    # MKL rounds a row by its place among its expert's where few or odd numbers come out of a
    # product: there only the first samples' places are the same.
    by_place = hidden_dim == 5 or dtype == torch.float64
    for start, stop in ((0, 1), (0, 4)) if by_place else ((0, 4), (1, 3), (2, 6), (3, 5)):
        part, own = layer(x[start:stop], return_routing=True)
        rows = slice(23 * start, 23 * stop)
        # Nor are the router's scores of odd widths always the same: of tokens whose are.
        same = (own.logits == routing.logits[rows]).all(dim=1).view(part.shape[:2])
        assert torch.equal(part[same], y[start:stop][same])


def test_without_onednn_blas_computes(onednns_calls, monkeypatch):
    monkeypatch.setattr(gemm, "roads", lambda: Roads(16))
    with torch.backends.mkldnn.flags(enabled=False):
        DMoE(32)(torch.randn(1, 40, 32)).sum().backward()
    assert onednns_calls == []


@pytest.mark.parametrize("least", [2, 16])
def test_the_rows_of_padded_blocks_are_few_sizes_and_little_more(least):
    for rows in range(1, 10_000):
        padded = gemm.round_rows(rows, least)
        assert max(rows, least) <= padded <= max(2 * rows, rows * 33 / 32, 16)
        assert padded - rows <= gemm.most_padding(rows)
        assert padded % 16 == 0 or (padded < 16 and least == 2)
    assert len({gemm.round_rows(rows, least) for rows in range(4097, 8193)}) == 32
