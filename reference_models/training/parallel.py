"""Starts one or many processes, and sums over all of them."""

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
    """Starts the processes that a recipe asks for, or joins them under torchrun or SLURM.

    Raises:
        RunError: this machine cannot do what the recipe asks for, or the launcher started another
            number of processes.
    """
    gpus = torch.cuda.device_count()
    if recipe.precision == "16-mixed" and not gpus:
        raise RunError(
            "precision: got 16-mixed, which needs a GPU, but there is none here; choose bf16-mixed."
        )
    if gpus and recipe.devices > gpus:
        raise RunError(
            f"devices: got {recipe.devices}, but this machine has {gpus} GPUs; choose {gpus} or "
            "fewer."
        )
    if recipe.strategy == "fsdp" and not gpus and torch.__version__ < "2.10":
        raise RunError(
            f"strategy: got fsdp, but PyTorch {torch.__version__} does not average the processes' "
            "gradients on CPUs; choose ddp, or install PyTorch 2.10 or newer."
        )
    processes = recipe.devices * recipe.nodes
    strategy: str | ModelParallelStrategy = recipe.strategy
    if recipe.strategy == "fsdp":
        strategy = ModelParallelStrategy(_shard, processes, 1)
    elif processes > 1 or dist.is_torchelastic_launched() or SLURMEnvironment.detect():
        # A launcher may have started more processes than the recipe says.
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
        raise RunError(
            f"devices, nodes: the recipe asks for {processes} processes, but the launcher started "
            f"{started}; give both the same number."
        )
    return fabric


def setup(fabric: Fabric, network: nn.Module) -> nn.Module:
    """Moves the network to its device, and wraps it for several processes."""
    if fabric.world_size > 1 and fabric.device.type == "cuda":
        # Otherwise each GPU would normalise by its own part of the batch. CPUs have no such norm.
        network = nn.SyncBatchNorm.convert_sync_batchnorm(network)
    return fabric.setup_module(network)


def on_rank_0(fabric: Fabric, act: Callable[..., None], *arguments: Any) -> None:
    """Calls `act` on rank 0 while the others wait; if it fails, rank 0 raises and all others "
    "end."""
    problem: RunError | None = None
    if fabric.is_global_zero:
        try:
            act(*arguments)
        except RunError as error:
            problem = error
    if fabric.broadcast(problem is not None):
        raise problem or SystemExit(1)


def global_sum(local: Tensor) -> Tensor:
    """Sums over all ranks; the sum is differentiable.

    The gradient that reaches each rank's share is multiplied by the number of ranks, since DDP and
    FSDP then average gradients over ranks. The result is the gradient of a single process with the
    whole batch.
    """
    if not dist.is_initialized():
        return local
    total = local.detach().clone()
    dist.all_reduce(total)
    return total + dist.get_world_size() * (local - local.detach())


def global_max(local: Tensor) -> Tensor:
    """Gives the largest value over all ranks, without gradient."""
    largest = local.detach().clone()
    if dist.is_initialized():
        dist.all_reduce(largest, dist.ReduceOp.MAX)
    return largest


def _shard(network: nn.Module, mesh: DeviceMesh) -> nn.Module:
    """Applies FSDP2 to each block, so that only one block is complete at a time, then to the "
    "rest."""
    for module in reversed(list(network.modules())):  # inner ones first
        if isinstance(module, nn.ModuleList):
            for block in module:
                fully_shard(block, mesh=mesh["data_parallel"])
    fully_shard(network, mesh=mesh["data_parallel"])
    return network
