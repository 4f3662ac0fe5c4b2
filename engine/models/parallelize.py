"""Spreads one model over the ranks and decides what training keeps in memory: the wrap order on one screen.

    tensor parallelism -> checkpointing -> torch.compile -> offloading -> FSDP2

Each step wraps the result of the one before; nothing here changes the loss. The mesh has three axes: the ranks of
`replicate` and `shard` hold different groups of a step (the data axis), those of `tensor` split every layer.
"""

from __future__ import annotations

import os
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from peft import PeftModel
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard

from macpo.engine.config import ParallelSettings
from macpo.engine.distributed.world import World
from macpo.engine.errors import ConfigError
from macpo.engine.models.activations import blocks_of, checkpoint_block, compile_block, offload_block
from macpo.engine.models.policy import PolicyModule
from macpo.engine.models.tensor_parallel import split_layers


def parallelize(policy: PolicyModule, settings: ParallelSettings, world: World) -> PolicyModule:
    """Spread a policy over the ranks as the settings say, in place; call it once, before it scores or trains.

    With `replicate`, weights already in their compute dtype and everything off, the policy is returned unchanged.

    Raises:
        ConfigError: the ranks do not fit the settings, or the model, which the message names, cannot be split so.
    """
    devices = mesh(settings, world, policy.home)
    # where every weight is trained, they are float32 and FSDP2 casts what is computed with; an adapter is as it is
    full = not isinstance(policy.model, PeftModel) and any(p.requires_grad for p in policy.parameters())
    mixed = full and policy.compute_dtype != torch.float32
    if mixed and devices is None:
        devices = _mesh(world.size, 1, 1, policy.home)
    if settings.tensor > 1 and devices is not None:
        split_layers(policy.base, devices["tensor"], policy.home)
    wraps = settings.checkpointing != "off" or settings.compile or settings.offload_activations
    blocks = blocks_of(policy.base) if wraps or devices is not None else []
    for block in blocks:
        checkpoint_block(block, settings.checkpointing, policy.base)
        if settings.compile:
            compile_block(block)
        if settings.offload_activations:
            offload_block(block)
    if devices is not None:
        data = devices["replicate", "shard"] if devices["replicate"].size() > 1 else devices["shard"]
        precision = MixedPrecisionPolicy(
            policy.compute_dtype if mixed else None, torch.float32, cast_forward_inputs=False
        )
        across = partial(_across, ranks=devices["shard"].size())
        options: dict[str, Any] = {"mesh": data, "mp_policy": precision, "shard_placement_fn": across}
        for block in blocks:
            fully_shard(block, reshard_after_forward=True, **options)
        # embeddings and head: gathered once from the forward to the backward, because the loss reads the head
        fully_shard(policy, reshard_after_forward=False, ignored_params=policy.unsharded, **options)
        for part in policy.modules():
            if isinstance(part, FSDPModule):  # gradients are summed: the objective divides by the global count
                part.set_gradient_divide_factor(1.0)
                part.set_force_sum_reduction_for_comms(True)
        if mixed:
            policy.float()  # a model that was read for sharding is still in the dtype of its files
        policy.mesh, policy.data = devices, _data(devices, world)
    return policy


def _across(parameter: nn.Parameter, ranks: int) -> Shard | None:
    """Shard rows, or columns (which must divide evenly) of a matrix whose rows tensor parallelism has split."""
    if not isinstance(parameter, DTensor) or not parameter.placements[0].is_shard(0):
        return None
    return Shard(1) if parameter.dim() == 2 and parameter.shape[1] % ranks == 0 else None


def spreads(settings: ParallelSettings, world: World) -> bool:
    """Whether the settings split a model over these ranks."""
    return world.size > 1 and (settings.sharding != "replicate" or settings.tensor > 1)


def mesh(settings: ParallelSettings, world: World, device: torch.device) -> DeviceMesh | None:
    """The mesh (replicate, shard, tensor), `tensor` innermost; None if every rank holds a whole model.

    Raises:
        ConfigError: the settings do not divide the number of ranks.
    """
    tensor = settings.tensor
    if world.size % tensor:
        problem = f"{world.size} ranks cannot be split into groups of {tensor}"
        fix = "choose a number of ranks that compute.parallel.tensor divides"
        raise ConfigError(problem, fix, field="compute.parallel.tensor")
    data = world.size // tensor
    if not spreads(settings, world):
        return None
    shard = {"replicate": 1, "shard": data, "hybrid": data}[settings.sharding]
    if settings.sharding == "hybrid":
        shard = max(1, int(os.environ.get("LOCAL_WORLD_SIZE", str(world.size))) // tensor)
        if data % shard:
            problem = f"{data} data-parallel ranks cannot be split into nodes of {shard}"
            fix = "start the same number of ranks on every node"
            raise ConfigError(problem, fix, field="compute.parallel.sharding")
    return _mesh(data // shard, shard, tensor, device)


def _mesh(replicate: int, shard: int, tensor: int, device: torch.device) -> DeviceMesh:
    if not dist.is_initialized():  # one process is a group of one
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    return init_device_mesh(device.type, (replicate, shard, tensor), mesh_dim_names=("replicate", "shard", "tensor"))


def _data(devices: DeviceMesh, world: World) -> World | None:
    tensor = devices["tensor"].size()
    if tensor == 1:
        return None
    both = init_device_mesh(devices.device_type, (world.size // tensor, tensor), mesh_dim_names=("data", "tensor"))
    return World(world.rank // tensor, world.size // tensor, both.get_group("data"))


def data_world(policy: PolicyModule, world: World) -> World:
    """The ranks that hold different groups of a step; a tensor-parallel group counts as one."""
    return policy.data or world
