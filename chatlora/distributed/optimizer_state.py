"""A parameter and what the optimizer keeps for it: whole tensors out of whatever engine holds them, and in again.

An optimizer's state is every tensor of `optimizer.state[parameter]`, under the optimizer's own names. Under DeepSpeed
the optimizer knows flat pieces of many parameters instead: what it keeps for each element is cut out of those, and what
it keeps once for all of them (AdamW's `step`) is read for each parameter and written for all. Functions that read or
write tensors are collective: all ranks call them.
"""

from collections.abc import Mapping
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, is_deepspeed_available
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor
from torch.nn import functional

from chatlora.distributed.zero3 import is_sharded

State = dict[str, torch.Tensor]  # what the optimizer keeps for one parameter


def torch_optimizer(optimizer: Any) -> torch.optim.Optimizer:
    """torch's optimizer inside accelerate's and DeepSpeed's wrappers."""
    inner: torch.optim.Optimizer = optimizer.optimizer
    if not is_deepspeed_available():  # accelerate then has no such wrapper to ask for
        return inner
    from accelerate.utils import DeepSpeedOptimizerWrapper

    return inner.optimizer if isinstance(optimizer, DeepSpeedOptimizerWrapper) else inner  # type: ignore[attr-defined]


def reshard(model: nn.Module) -> None:
    """FSDP2 keeps the outermost parameters whole after a forward pass without a backward pass: a validation."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def has_places(accelerator: Accelerator, optimizer: torch.optim.Optimizer) -> bool:
    """Whether state can be written: under DeepSpeed the optimizer makes the places for it in its first step."""
    return accelerator.distributed_type != DistributedType.DEEPSPEED or bool(torch_optimizer(optimizer).state)


# ---- reading


@torch.no_grad()
def read_weight(accelerator: Accelerator, parameter: nn.Parameter) -> torch.Tensor:
    """The whole weight, an fp32 copy on the CPU."""
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        from deepspeed.utils import safe_get_full_fp32_param

        return _copy(safe_get_full_fp32_param(parameter))
    return _copy(parameter.detach())


@torch.no_grad()
def read_state(accelerator: Accelerator, optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> State:
    """What the optimizer keeps for a parameter: whole copies on the CPU; nothing for one that never had a gradient."""
    if accelerator.distributed_type != DistributedType.DEEPSPEED:
        return {kind: _copy(tensor) for kind, tensor in optimizer.state.get(parameter, {}).items()}
    from deepspeed.utils import safe_get_full_optimizer_state

    flat, kept = _flat(optimizer, parameter)
    return {
        kind: _copy(tensor)
        if _is_shared(tensor, flat)
        else _copy(safe_get_full_optimizer_state(parameter, kind)).to(tensor.dtype)
        for kind, tensor in kept.items()
    }


def _copy(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).to("cpu", copy=True)


def _flat(optimizer: Any, parameter: nn.Parameter) -> tuple[torch.Tensor, State]:
    """DeepSpeed's flat tensor that holds this process's part of a parameter, and what the optimizer keeps for it."""
    zero = optimizer.optimizer
    if is_sharded(parameter):
        groups, flats = zero.fp16_groups, zero.fp32_partitioned_groups_flat
    else:
        groups, flats = zero.bit16_groups, zero.single_partition_of_fp32_groups
    number = next(n for n, group in enumerate(groups) if any(each is parameter for each in group))
    kept: State = zero.optimizer.state[flats[number]]
    if not is_sharded(parameter):
        from deepspeed.utils import lazy_init_hp_params_optimizer_state

        # DeepSpeed links parameters to their state after its first parameter group's first step, when those of later
        # groups have none yet.
        lazy_init_hp_params_optimizer_state(groups[number], flats[number], zero.optimizer.state)
    return flats[number], kept


def _is_shared(tensor: torch.Tensor, flat: torch.Tensor) -> bool:
    """Whether the optimizer keeps a tensor once for all elements: a count of steps."""
    return tensor.numel() == 1 and flat.numel() != 1


# ---- writing


@torch.no_grad()
def write(
    accelerator: Accelerator,
    optimizer: torch.optim.Optimizer,
    parameter: nn.Parameter,
    weight: torch.Tensor,
    state: Mapping[str, torch.Tensor],
) -> None:
    """Put what was read, the same on every rank, into a parameter and what the optimizer keeps for it."""
    if accelerator.distributed_type != DistributedType.DEEPSPEED:
        parameter.copy_(_like(parameter, weight))
        if state:
            defaults = torch_optimizer(optimizer).defaults
            on_device = bool(defaults.get("fused") or defaults.get("capturable"))
            optimizer.state[parameter] = {
                # torch's own rule for where a count of steps is.
                kind: tensor.clone() if kind == "step" and not on_device else _like(parameter, tensor)
                for kind, tensor in state.items()
            }
        return
    if is_sharded(parameter):
        _write_zero3_weight(accelerator, parameter, weight)
    else:
        _write_zero12_weight(parameter, weight)
    flat, kept = _flat(optimizer, parameter)
    # Of parameters that went different numbers of steps, the furthest says how far they all are under DeepSpeed.
    furthest = "step" not in kept or bool(state.get("step", torch.tensor(-1.0)) >= kept["step"].cpu())
    for kind, place in kept.items():
        if not _is_shared(place, flat):
            value = state[kind] if kind in state else torch.zeros_like(weight, dtype=place.dtype)
            _write_elements(accelerator, parameter, value, kind)
        elif furthest and kind in state:
            place.copy_(state[kind])


def _like(parameter: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """A copy of a whole tensor where the parameter is, divided over the processes as the parameter is."""
    value = value.to(parameter.device, copy=True)
    if not isinstance(parameter, DTensor) or value.ndim == 0:
        return value
    mesh = parameter.device_mesh
    placements = parameter.placements if value.shape == parameter.shape else [Replicate()] * mesh.ndim
    return distribute_tensor(value, mesh, placements, src_data_rank=None)


def _write_zero12_weight(parameter: nn.Parameter, weight: torch.Tensor) -> None:
    from deepspeed.utils import safe_set_full_fp32_param

    parameter.copy_(weight)
    safe_set_full_fp32_param(parameter, weight.to(parameter.device))


def _write_zero3_weight(accelerator: Accelerator, parameter: nn.Parameter, weight: torch.Tensor) -> None:
    from deepspeed.runtime.zero import GatheredParameters
    from deepspeed.utils import safe_set_local_fp32_param

    with GatheredParameters([parameter], modifier_rank=0):
        parameter.data.copy_(weight)
    safe_set_local_fp32_param(parameter, _own_part(accelerator, parameter, weight))


def _write_elements(accelerator: Accelerator, parameter: nn.Parameter, value: torch.Tensor, kind: str) -> None:
    from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

    if is_sharded(parameter):
        safe_set_local_optimizer_state(parameter, _own_part(accelerator, parameter, value), kind)
    else:
        safe_set_full_optimizer_state(parameter, value.to(parameter.device), kind)


def _own_part(accelerator: Accelerator, parameter: Any, value: torch.Tensor) -> torch.Tensor:
    """This process's part under ZeRO-3.

    DeepSpeed's own setters of whole tensors fail where the size is no multiple of the number of processes.
    """
    size, rank = int(parameter.ds_tensor.numel()), accelerator.process_index
    flat = value.flatten().to(accelerator.device)
    padded = functional.pad(flat, (0, size * accelerator.num_processes - len(flat)))
    return padded[rank * size : (rank + 1) * size]
