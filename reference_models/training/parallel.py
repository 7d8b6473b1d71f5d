"""One process or many: how they are started, and sums over all of them."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from lightning_fabric import Fabric
from lightning_fabric.plugins.environments import SLURMEnvironment
from lightning_fabric.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

from ..errors import RunError
from ..recipes.recipe import Recipe


def launch(recipe: Recipe) -> Fabric:
    """Starts the processes a recipe asks for, or joins them under torchrun or SLURM.

    Raises:
        RunError: this machine cannot do what the recipe asks, or the launcher started another
            number of processes.
    """
    gpus = torch.cuda.device_count()
    if recipe.precision == "16-mixed" and not gpus:
        raise RunError("precision: 16-mixed needs a GPU, there is none here; choose bf16-mixed.")
    if gpus and recipe.devices > gpus:
        raise RunError(f"devices: got {recipe.devices}, but this machine has {gpus} GPUs.")
    if recipe.strategy == "fsdp" and not gpus and torch.__version__ < "2.10":
        raise RunError(
            f"strategy: fsdp on CPUs needs PyTorch 2.10, here is {torch.__version__}, which does "
            "not average the processes' gradients there; choose ddp."
        )
    processes = recipe.devices * recipe.nodes
    strategy: str | ModelParallelStrategy = recipe.strategy
    if recipe.strategy == "fsdp":
        strategy = ModelParallelStrategy(_shard, processes, 1)
    elif processes > 1 or dist.is_torchelastic_launched() or SLURMEnvironment.detect():
        # Under a launcher also for one process: it may have started more than the recipe says.
        strategy = "ddp"
    logging.getLogger("lightning_fabric").setLevel(logging.WARNING)  # each rank's "initializing"
    try:
        fabric = Fabric(
            devices=recipe.devices,
            num_nodes=recipe.nodes,
            strategy=strategy,
            precision="32-true" if recipe.precision == "32" else recipe.precision,
        )
        fabric.launch()
    except ValueError as error:  # Fabric's, where a launcher has started another number
        raise RunError(f"devices, nodes: {error}") from error
    started = dist.get_world_size() if dist.is_initialized() else 1
    if started != processes:
        raise RunError(f"devices, nodes: {processes} processes asked for, {started} started.")
    return fabric


def setup(fabric: Fabric, network: nn.Module) -> nn.Module:
    """The network as it is to be called, its parameters on their devices."""
    if fabric.world_size > 1 and fabric.device.type == "cuda":
        # Without it each GPU would normalise by its own part of the batch. There is none for CPUs.
        network = nn.SyncBatchNorm.convert_sync_batchnorm(network)
    return fabric.setup_module(network)


def on_rank_0(fabric: Fabric, act: Callable[..., None], *arguments: Any) -> None:
    """Lets rank 0 act while the others wait; if it fails, it tells, and all of them end."""
    problem: RunError | None = None
    if fabric.is_global_zero:
        try:
            act(*arguments)
        except RunError as error:
            problem = error
    if fabric.broadcast(problem is not None):
        raise problem or SystemExit(1)


def global_sum(local: Tensor) -> Tensor:
    """The sum over all ranks, differentiable.

    The gradient of what follows reaches each rank's share times the number of ranks, since DDP and
    FSDP then average gradients over ranks: what comes out is the gradient of one process that had
    the whole batch.
    """
    if not dist.is_initialized():
        return local
    total = local.detach().clone()
    dist.all_reduce(total)
    return total + dist.get_world_size() * (local - local.detach())


def global_max(local: Tensor) -> Tensor:
    """The largest over all ranks, without gradient."""
    largest = local.detach().clone()
    if dist.is_initialized():
        dist.all_reduce(largest, dist.ReduceOp.MAX)
    return largest


def _shard(network: nn.Module, mesh: DeviceMesh) -> nn.Module:
    """FSDP2: the blocks one by one, so that only one of them is whole at a time; then the rest."""
    for module in reversed(list(network.modules())):  # inner ones first
        if isinstance(module, nn.ModuleList):
            for block in module:
                fully_shard(block, mesh=mesh["data_parallel"])
    fully_shard(network, mesh=mesh["data_parallel"])
    return network
