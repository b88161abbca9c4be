"""Parameters of which each of several processes has some rows: what tuning end to end takes the memory of, divided among all.

FSDP2 (`torch.distributed.fsdp.fully_shard`) brings the rows of a linear together when it runs, forward and backward, and adds up its
gradients, each process keeping its own rows'. Every trained linear is a unit of its own, since decoder layers are also called without
being run (`sweeps.layers`). Norms, biases and embeddings are whole in each process, and `Steps` adds up their gradients: they are small,
or tied to each other. In one process nothing is sharded and all of this does nothing.

Cost: for each linear and pass three messages of its size.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from roundel import processes

__all__ = ["gradient_of", "local", "own_part", "shard", "summed", "turns", "whole"]


def shard(modules: Iterable[nn.Module], device: torch.device) -> None:
    """Leaves each process its rows of these modules' parameters."""
    if processes.world() == 1:
        return
    mesh = init_device_mesh(device.type, (processes.world(),))
    for module in modules:
        biases = {parameter for name, parameter in module.named_parameters() if name == "bias"}
        fully_shard(module, mesh=mesh, ignored_params=biases)
        assert isinstance(module, FSDPModule)
        module.set_gradient_divide_factor(1.0)  # sums: each process's loss is its part of all tokens'
        module.set_force_sum_reduction_for_comms(True)  # gloo knows no other


def local(parameter: Tensor) -> Tensor:
    """This process's rows of a parameter, in its memory."""
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


def gradient_of(parameter: Tensor) -> Tensor | None:
    """Of this process's rows, from the text of all processes."""
    gradient = parameter.grad
    if processes.world() > 1 and not isinstance(parameter, DTensor):
        gradient = torch.zeros_like(parameter) if gradient is None else gradient
        processes.merged(gradient)
    return None if gradient is None else local(gradient)


def whole(rows: Tensor, parameter: Tensor) -> Tensor:
    """All rows of something that has as many as a parameter, of which each process has its own."""
    if not isinstance(parameter, DTensor):
        return rows
    if rows.dtype in (torch.bool, torch.float16):  # which not every way between processes takes
        return whole(rows.float(), parameter).to(rows.dtype)
    together = DTensor.from_local(rows, parameter.device_mesh, parameter.placements, shape=parameter.shape, stride=parameter.stride())
    return together.full_tensor()


def own_part(values: Tensor, parameter: Tensor) -> Tensor:
    """Inverse of `whole`."""
    if not isinstance(parameter, DTensor):
        return values
    size = -(-len(values) // processes.world())
    return values[processes.rank() * size : (processes.rank() + 1) * size]


def summed(values: Sequence[float], parameters: Sequence[Tensor]) -> float:
    """The sum of a number of each parameter's rows over all parameters and processes."""
    found = torch.tensor([float(value) for value in values], dtype=torch.float64)
    shared = torch.tensor([isinstance(parameter, DTensor) for parameter in parameters], dtype=torch.bool)
    return float(torch.where(shared, processes.merged(torch.where(shared, found, 0.0)), found).sum())


def turns(rows: int, most: int) -> list[slice]:
    """Places of a step's sequences that this process passes through the model, at most `most` at a time; as many turns in all processes."""
    world, own = processes.world(), processes.rank()
    each = -(-rows // world)
    mine = range(rows)[own * rows // world : (own + 1) * rows // world]
    return [slice(mine.start + start, min(mine.start + start + most, mine.stop)) for start in range(0, each, most)]
