"""Two processes (gloo): DDP and FSDP2 in their default settings give what one process gives."""

import copy

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from helpers import leave_group
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from dmoe_layer import DMoE, routing

RANKS, STEPS = 2, 3


def make_model():
    torch.manual_seed(0)
    dmoe = DMoE(8, n_experts=8, k=2, attribute_sizes=4)
    with torch.no_grad():  # value a goes to experts 2a and 2a+1: the others idle on every rank
        dmoe.router.bias[:, 0] = 9.0 * torch.eye(4).repeat_interleave(2, dim=1)
    return nn.Sequential(nn.Linear(8, 8), dmoe, nn.Linear(8, 4))


def batch_of(rank, step):
    generator = torch.Generator().manual_seed(10 * step + rank)
    x = torch.randn(3, 5, 8, generator=generator)
    return x, torch.tensor([[0, 0, 1], [2, 2, 2]])[rank]


def loss_of(model, rank, step):
    x, attributes = batch_of(rank, step)
    torch.manual_seed(10 * step + rank)  # noise and dropout
    with routing(attributes) as r:
        y = model(x)
    assert set(r.routings[0].expert_indices.unique().tolist()) <= {0, 1, 2, 3, 4, 5}
    return y.square().mean() + 0.01 * r.load_balancing_loss()


def train(model, rank):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(STEPS):
        optimizer.zero_grad()
        loss_of(model, rank, step).backward()
        optimizer.step()


def work(rank, kind, store, results):
    dist.init_process_group("gloo", init_method=store.as_uri(), rank=rank, world_size=RANKS)
    model = make_model()
    if kind == "ddp":
        wrapped = DistributedDataParallel(model)
    else:
        mesh = dist.init_device_mesh("cpu", (RANKS,))
        fully_shard(model[1], mesh=mesh)
        wrapped = fully_shard(model, mesh=mesh)
    train(wrapped, rank)
    state = {n: getattr(p, "full_tensor", lambda p=p: p)() for n, p in model.named_parameters()}
    if rank == 0:
        torch.save({n: t.detach() for n, t in state.items()}, results)
    leave_group()


def train_in_one_process():
    """The gradient of both ranks' mean loss, with each rank's balance loss its own."""
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(STEPS):
        optimizer.zero_grad()
        for rank in range(RANKS):
            (loss_of(model, rank, step) / RANKS).backward()
        optimizer.step()
    return {n: p.detach() for n, p in model.named_parameters()}


needs_averages = pytest.mark.skipif(
    torch.__version__ < "2.10", reason="FSDP2 of PyTorch 2.8 averages no model's gradients on gloo"
)


@pytest.mark.parametrize("kind", ["ddp", pytest.param("fsdp2", marks=needs_averages)])
def test_two_processes_with_idle_experts_and_routers_train_as_one(kind, tmp_path):
    results = tmp_path / "state.pt"
    mp.spawn(work, args=(kind, tmp_path / "store", results), nprocs=RANKS)
    found, true = torch.load(results, weights_only=True), train_in_one_process()
    assert found.keys() == true.keys()
    for name in true:
        torch.testing.assert_close(found[name], true[name], rtol=1e-5, atol=1e-6)
    start = copy.deepcopy(make_model())
    assert not torch.equal(found["1.w1_EHD"], start[1].w1_EHD)
