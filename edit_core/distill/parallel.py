"""The processes that share a training, as `accelerate launch` or `torchrun` starts them.

accelerate finds the processes, their devices and FSDP's settings. Gradients are averaged here, by one all-reduce per
tensor and step: `transfer` takes its gradients inside the forward pass, where the hooks of DistributedDataParallel do
not see them, and the trained weights are small beside the base.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..errors import EDiTError
from ..runtime import usable_device

__all__ = ["Processes", "sharded"]


class Processes:
    """One process's view of all that train together; alone, it does nothing.

    Args:
        device: `cpu`, `cuda`, `cuda:1` or `auto`.

    Raises:
        EDiTError: a device that cannot be used, or FSDP in its first version.
    """

    def __init__(self, device: str) -> None:
        from accelerate import PartialState

        cuda = torch.cuda.is_available() and not device.startswith("cpu")
        state = PartialState(cpu=not cuda)
        self.world: int = state.num_processes
        self.rank: int = state.process_index
        self.sharded = sharded(self.world)
        """Whether the base is to be split among the processes."""
        if self.world > 1 and cuda:
            self.device: torch.device = state.device
        else:
            self.device = usable_device("cuda" if cuda and device == "auto" else device.replace("auto", "cpu"))

    @property
    def first(self) -> bool:
        """Whether this process writes the files."""
        return self.rank == 0

    def average(self, tensors: Iterable[Tensor]) -> None:
        """Replaces each tensor by its mean over the processes."""
        if self.world == 1:
            return
        tensors = list(tensors)
        for work in [dist.all_reduce(tensor, async_op=True) for tensor in tensors]:
            work.wait()
        torch._foreach_div_(tensors, self.world)

    def any(self, flag: bool) -> bool:
        """Whether any process says so."""
        if self.world == 1:
            return flag
        flags = torch.tensor(int(flag), device=self.device)
        dist.all_reduce(flags, dist.ReduceOp.MAX)
        return bool(flags)

    def wait(self) -> None:
        """Until all processes are here."""
        if self.world > 1:
            dist.barrier()

    def shard(self, transformer: Any, whole: Iterable[nn.Parameter]) -> None:
        """FSDP2: splits the frozen base's parameters, block by block, with accelerate's settings.

        Args:
            transformer: the base, a diffusers transformer.
            whole: parameters that every process keeps: those that are trained.

        Raises:
            EDiTError: accelerate was told to use FSDP's first version.
        """
        from accelerate.utils import FullyShardedDataParallelPlugin
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        plugin = FullyShardedDataParallelPlugin()
        if plugin.fsdp_version != 2:
            raise EDiTError("the first version of FSDP is not supported; set fsdp_version to 2")
        arguments: dict[str, Any] = {
            "mesh": init_device_mesh(self.device.type, (self.world,)),
            "reshard_after_forward": plugin.reshard_after_forward,
            "offload_policy": plugin.cpu_offload,
            "ignored_params": set(whole),
        }
        for block in transformer.transformer_blocks:
            fully_shard(block, **arguments)
        fully_shard(transformer, **arguments)


def sharded(world: int) -> bool:
    """Whether so many processes were started to split the base among them, by accelerate's word."""
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true" and world > 1
