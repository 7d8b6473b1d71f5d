"""Every provider computes what it says, in eval and in training."""

from types import SimpleNamespace

import naive
import pytest
import torch
from harness.benchmark_runs import SMALL, rows_of

from benchmarks import paper
from benchmarks.layer import ours
from benchmarks.layer import provider as provider_module
from benchmarks.layer.check import TOLERANCE, relative_error
from benchmarks.layer.ours import OURS
from benchmarks.layer.peers import PEERS, Transformers
from benchmarks.layer.plain import PLAIN, GemmLoop, bias_rows
from benchmarks.layer.problem import Problem, true_answer
from benchmarks.layer.provider import Unavailable
from benchmarks.layer.shapes import GPU_SHAPES

OWN = [*OURS, *PLAIN]
EXACT = [provider for provider in (*OWN, *PEERS) if provider.exact]
HERE = [provider for provider in (*OWN, PEERS[0]) if provider.name != "triton"]


def test_the_truth_equals_the_naive_loop():
    problem = Problem.random(SMALL, "cpu", torch.float64)
    params = {n: p.clone().requires_grad_() for n, p in problem.weights.items()}
    x_BTD = problem.x_BTD.detach().clone().requires_grad_()
    values = [[value] for value in problem.attributes_B.tolist()]
    y_BTD, *_ = naive.dmoe(
        x_BTD, values, params, sizes=(3,), unknown="error", k=2, activation="relu"
    )
    y_BTD.backward(problem.dy_BTD)
    got = true_answer(
        problem.x_BTD.detach().flatten(0, 1),
        problem.attributes_B.repeat_interleave(SMALL.tokens),
        problem.dy_BTD.flatten(0, 1),
        problem.weights,
    )
    for mine, true in (
        (got.y_TD, y_BTD.flatten(0, 1)),
        (got.dx_TD, x_BTD.grad.flatten(0, 1)),
        (got.dw1_EHD, params["w1_EHD"].grad),
    ):
        torch.testing.assert_close(mine, true.detach(), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("provider", EXACT, ids=lambda p: p.name)
def test_every_available_provider_is_right(provider, dtype):
    problem = Problem.random(SMALL, "cpu", dtype)
    try:
        layer = provider.build(problem)
    except (Unavailable, ImportError) as reason:
        pytest.skip(str(reason))
    assert relative_error(layer, problem, bias=provider.bias) <= TOLERANCE[dtype]
    assert len(problem.checked_tokens()) > 50


def test_those_that_need_nothing_more_are_available():
    here = {r.provider for r in rows_of(*OWN, PEERS[0]) if r.status == "timed"}
    assert here == {"eager", "mask-loop", "gemm-loop", "grouped-mm", "dense", "transformers"}


def test_biases_count_unless_a_provider_has_none():
    problem = Problem.random(SMALL, "cpu", torch.float32)
    layer = GemmLoop(problem)
    layer.w1_bias.data.zero_()
    layer.w2_bias.data.zero_()
    assert relative_error(layer, problem, bias=False) <= TOLERANCE[torch.float32]
    assert relative_error(layer, problem, bias=True) > 1e-2


class OnGpu(torch.Tensor):
    """Says that it is on a GPU, and computes where it is."""

    is_cuda = True


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_on_a_gpu_a_bias_is_added_by_a_product_which_gives_what_an_index_gives(dtype):
    row_R, dy_RN = torch.randint(8, (300,)), torch.randn(300, 24).to(dtype)
    table_EN = torch.randn(8, 24).to(dtype)
    on_gpu = table_EN.as_subclass(OnGpu).requires_grad_()
    rows_RN = bias_rows(on_gpu, row_R)
    assert "MmBackward" in str(rows_RN.grad_fn.next_functions)
    assert "Index" in str(bias_rows(table_EN.clone().requires_grad_(), row_R).grad_fn)
    assert torch.equal(torch.Tensor(rows_RN), table_EN[row_R])
    (found_EN,) = torch.autograd.grad(rows_RN, on_gpu, dy_RN)
    true_EN = torch.zeros(8, 24).double().index_add(0, row_R, dy_RN.double())
    error = (torch.Tensor(found_EN).double() - true_EN).abs().max() / true_EN.abs().max()
    assert error <= {torch.float32: 1e-6, torch.bfloat16: 4e-3}[dtype]


def test_transformers_is_left_out_on_a_gpu_where_its_biases_would_take_most_of_the_time():
    pytest.importorskip("transformers")
    gpu = SimpleNamespace(device=torch.device("cuda"), shape=GPU_SHAPES["goals"][1])
    with pytest.raises(Unavailable, match=r"4,718,592 rows are estimated to take 0\.7 s"):
        Transformers(gpu)


@torch.no_grad()
@pytest.mark.parametrize("provider", HERE, ids=lambda p: p.name)
def test_a_tenth_of_the_outputs_is_dropped_in_training_and_none_in_eval(provider):
    problem = Problem.random(SMALL, "cpu", torch.float32)
    problem.weights["w2_EDH"].zero_()
    problem.weights["w2_bias"].fill_(1.0)  # every expert says 1, whatever its input
    layer = provider.build(problem)
    x_BTD, attributes_B = problem.x_BTD, problem.attributes_B
    torch.testing.assert_close(layer.eval()(x_BTD, attributes_B), torch.ones_like(x_BTD))
    y_BTD = torch.stack([layer.train()(x_BTD, attributes_B) for _ in range(4)])
    assert float(y_BTD.mean()) == pytest.approx(1.0, abs=0.03)
    assert float(y_BTD.max()) == pytest.approx(1 / 0.9, rel=1e-3)
    # Of one expert's outputs a tenth is zero, of two experts' sum a hundredth.
    one = provider.name in ("dense", "transformers")
    share = float((y_BTD == 0).float().mean())
    assert share == pytest.approx(0.1 if one else 0.01, rel=0.4)


@pytest.mark.parametrize("provider", [p for p in HERE if p.routes], ids=lambda p: p.name)
def test_the_router_is_noisy_in_training_and_not_in_eval(provider, monkeypatch):
    for module in (paper, ours, provider_module):
        monkeypatch.setattr(module, "DROPOUT", 0.0)
    problem = Problem.random(SMALL, "cpu", torch.float32)
    layer = provider.build(problem)
    once, again = (layer.eval()(problem.x_BTD, problem.attributes_B) for _ in range(2))
    assert torch.equal(once, again)
    once, again = (layer.train()(problem.x_BTD, problem.attributes_B) for _ in range(2))
    assert (once != again).float().mean() > 0.9
