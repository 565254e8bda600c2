"""Training in several processes under torchrun. Each has the whole model and an equal share of every batch.

ITC compares with the features of all processes, and DistributedDataParallel averages the gradients. Masks, ITM
negatives, MLM and MIM stay within a process, as in ALBEF. Without torchrun these functions act as one process.
"""

import os
import sys
import traceback

import torch
import torch.distributed as dist
from torch import Tensor

from engine.flags import ConfigError


def join_processes(device: str) -> torch.device:
    """Join the processes of torchrun, by NCCL if each has a GPU and by Gloo on CPUs; silence all but the first.

    device: the value of --device
    -> the device of this process
    Raises ConfigError where there are fewer GPUs than processes, or where `device` names one GPU for all of them.
    """
    own_device = torch.device(device)
    if not dist.is_torchelastic_launched():
        return own_device
    if own_device.type == "cuda":
        local_rank = int(os.environ["LOCAL_RANK"])
        gpu_count = torch.cuda.device_count()
        if own_device.index is not None:
            raise ConfigError(f"--device {device}: torchrun gives each process its own GPU; use --device cuda")
        if local_rank >= gpu_count:
            raise ConfigError(
                f"torchrun started more processes than there are GPUs ({gpu_count}); lower --nproc-per-node"
            )
        own_device = torch.device("cuda", local_rank)
        torch.cuda.set_device(own_device)
    if not dist.is_initialized():
        dist.init_process_group("nccl" if own_device.type == "cuda" else "gloo")
    if not is_main_process():
        sys.stdout = sys.stderr = open(os.devnull, "w", encoding="utf-8", errors="replace")  # noqa: SIM115
        sys.excepthook = print_error
    return own_device


def print_error(*error) -> None:
    """Print a traceback, even from a process that is otherwise silent."""
    traceback.print_exception(*error, file=sys.__stderr__)


def rank() -> int:
    """Return the number of this process, counted from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Return the number of processes that train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main_process() -> bool:
    """Return whether this process is the one that writes and prints."""
    return rank() == 0


def gather(x: Tensor) -> Tensor:
    """Concatenate x (B, …) of all processes, by rank and without gradients. -> (world_size · B, …)"""
    if world_size() == 1:
        return x
    parts = [torch.empty_like(x) for _ in range(world_size())]
    dist.all_gather(parts, x.contiguous())
    return torch.cat(parts)


def average(values: dict[str, Tensor]) -> dict[str, float]:
    """Compute the mean of each scalar over all processes."""
    stacked = torch.stack([value.detach().float() for value in values.values()])
    if world_size() > 1:
        dist.all_reduce(stacked)
    return dict(zip(values, (stacked / world_size()).tolist(), strict=True))


def union(names: set[str]) -> set[str]:
    """Collect the names of all processes."""
    if world_size() == 1:
        return names
    parts: list = [None] * world_size()
    dist.all_gather_object(parts, names)
    return set().union(*parts)


def any_process(flag: bool, device: torch.device) -> bool:
    """Return whether `flag` is true in any process."""
    if world_size() == 1:
        return flag
    flags = torch.tensor(float(flag), device=device)
    dist.all_reduce(flags)
    return flags.item() > 0
