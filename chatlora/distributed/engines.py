"""What differs between engines, and nothing else: how one is started, and how whole tensors come out of it and go in.

    single, ddp     every process holds the whole model and torch's own optimizer
    zero1, zero2    DeepSpeed: the optimizer's moments are spread over the processes; zero2: gradients too
    zero3           DeepSpeed: parameters are spread as well, from the moment they are loaded
    fsdp2           torch: parameters, gradients and moments are spread, layer by layer

`accelerate launch` names the engine by its configuration file. Everything here is tried out with accelerate 1.15,
torch 2.13 and DeepSpeed 0.19.8. Functions that read or write tensors are collective: all ranks call them.
"""

import os
import warnings
from collections.abc import Mapping
from datetime import timedelta
from typing import Any, TypeVar

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import (
    DeepSpeedPlugin,
    DistributedType,
    FullyShardedDataParallelPlugin,
    GradientAccumulationPlugin,
    InitProcessGroupKwargs,
)
from torch import nn
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn import functional

from chatlora.distributed.zero3 import full_shape

TIMEOUT = timedelta(minutes=30)  # that one collective may take; work that is longer happens outside of them
PATIENCE = timedelta(days=1)  # that the fastest process waits for the slowest to have its data
WEIGHT = "weight"
MOMENTS = ("exp_avg", "exp_avg_sq")

ModelT = TypeVar("ModelT", bound=nn.Module)


# ---- starting


def start_accelerator(deepspeed: Mapping[str, Any] | None) -> Accelerator:
    """The Accelerator for what `accelerate launch`, torchrun or python set up; without an accelerator over gloo.

    deepspeed: the settings of its JSON where DeepSpeed was asked for, complete.
    """
    on_cpu = not torch.accelerator.is_available()
    fsdp = deepspeed is None and os.environ.get("ACCELERATE_USE_FSDP") == "true"
    if deepspeed is not None:
        warnings.filterwarnings("ignore", "`torch.distributed", FutureWarning)  # of functions that DeepSpeed calls
        if on_cpu:
            _without_compiled_collectives()
    accelerator = Accelerator(
        cpu=on_cpu and deepspeed is None,  # DeepSpeed finds the CPU by itself; told so, accelerate drops DeepSpeed
        deepspeed_plugin=None if deepspeed is None else DeepSpeedPlugin(hf_ds_config=dict(deepspeed)),
        mixed_precision="no",  # precision lives in the model: frozen base bf16, adapter fp32, autocast in TargetLoss
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1, sync_with_dataloader=False),
        kwargs_handlers=[
            InitProcessGroupKwargs(backend="gloo" if on_cpu and "LOCAL_RANK" in os.environ else None, timeout=TIMEOUT)
        ],
    )
    if fsdp and accelerator.distributed_type == DistributedType.MULTI_CPU:
        # accelerate 1.15 makes FSDP out of its GPU types alone.
        PartialState().distributed_type = accelerator.state.distributed_type = DistributedType.FSDP
        accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin()
    return accelerator


def slow_barrier_group(accelerator: Accelerator) -> Any:
    """A second connection between the processes, over gloo: to wait longer than a collective may take."""
    if accelerator.num_processes == 1:
        return None
    return torch.distributed.new_group(backend="gloo", timeout=PATIENCE)


def _without_compiled_collectives() -> None:
    """DeepSpeed would compile an operator for sums within one machine's memory: a minute and a compiler for nothing."""
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def engine_of(accelerator: Accelerator) -> str:
    """The engine that runs, whatever was asked for."""
    match accelerator.distributed_type:
        case DistributedType.NO:
            return "single"
        case DistributedType.DEEPSPEED:
            return f"zero{accelerator.deepspeed_plugin.zero_stage}"
        case DistributedType.FSDP:
            return "fsdp2" if accelerator.is_fsdp2 else "fsdp1"
        case _:
            return "ddp"


def load_sharded(accelerator: Accelerator, dtype: torch.dtype) -> Any:
    """Have transformers load models spread over the processes, in `dtype`, for as long as the returned object lives.

    For zero3 alone. Left to itself, transformers takes the dtype from DeepSpeed's bf16 section, which is off here, and
    returns a bf16 model in fp32, twice the size, without a word.
    """
    from transformers.integrations import HfDeepSpeedConfig

    return HfDeepSpeedConfig(
        {
            "train_micro_batch_size_per_gpu": 1,
            "zero_optimization": accelerator.deepspeed_plugin.deepspeed_config["zero_optimization"],
            "bf16": {"enabled": dtype == torch.bfloat16},
        }
    )


# ---- models


def shard_for_generation(accelerator: Accelerator, model: ModelT) -> ModelT:
    """FSDP2 around a model that is only asked to generate: accelerate's own `prepare` wants an optimizer."""
    from accelerate.utils.fsdp_utils import fsdp2_prepare_model

    sharded: ModelT = fsdp2_prepare_model(accelerator, model)
    register_fsdp_forward_method(sharded, "generate")  # else the outermost parameters are not gathered for it
    return sharded


# ---- state: one parameter at a time


def torch_optimizer(optimizer: Any) -> torch.optim.Optimizer:
    """torch's AdamW inside accelerate's and DeepSpeed's wrappers."""
    while not isinstance(optimizer, torch.optim.AdamW):
        optimizer = optimizer.optimizer
    return optimizer


def reshard(model: nn.Module) -> None:
    """FSDP2 keeps the outermost parameters whole after a forward pass without a backward pass: a validation."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def has_moments(accelerator: Accelerator, optimizer: torch.optim.Optimizer) -> bool:
    """Whether moments can be set: DeepSpeed makes the places for them in its first step."""
    return accelerator.distributed_type != DistributedType.DEEPSPEED or bool(torch_optimizer(optimizer).state)


@torch.no_grad()
def read(
    accelerator: Accelerator, optimizer: torch.optim.Optimizer, parameter: nn.Parameter
) -> dict[str, torch.Tensor]:
    """{"weight" | "exp_avg" | "exp_avg_sq": the whole fp32 tensor, a copy on the CPU}."""
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        found = {WEIGHT: safe_get_full_fp32_param(parameter)}
        found |= {kind: safe_get_full_optimizer_state(parameter, kind) for kind in MOMENTS}
    else:
        found = {WEIGHT: parameter.detach(), **optimizer.state[parameter]}
    # AdamW makes moments at a parameter's first gradient; a layer that no batch reaches never has one.
    empty = torch.zeros(full_shape(parameter))
    return {kind: _whole(found.get(kind, empty)).to("cpu", copy=True) for kind in (WEIGHT, *MOMENTS)}


@torch.no_grad()
def write(
    accelerator: Accelerator,
    optimizer: torch.optim.Optimizer,
    parameter: nn.Parameter,
    step: int,
    values: Mapping[str, torch.Tensor],
) -> None:
    """Put what `read` gave, the same on every rank, into a parameter and its moments; `step`: of its optimizer."""
    match engine_of(accelerator):
        case "zero1" | "zero2":
            _write_zero12(parameter, values)
        case "zero3":
            _write_zero3(accelerator, parameter, values)
        case _:
            parameter.copy_(_like(parameter, values[WEIGHT]))
            optimizer.state[parameter] = {
                "step": torch.tensor(float(step), device=parameter.device),
                **{kind: _like(parameter, values[kind]) for kind in MOMENTS},
            }
            return
    for entry in torch_optimizer(optimizer).state.values():
        entry["step"].fill_(step)


def _write_zero12(parameter: nn.Parameter, values: Mapping[str, torch.Tensor]) -> None:
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

    parameter.copy_(values[WEIGHT])
    safe_set_full_fp32_param(parameter, values[WEIGHT].to(parameter.device))
    for kind in MOMENTS:
        safe_set_full_optimizer_state(parameter, values[kind].to(parameter.device), kind)


def _write_zero3(accelerator: Accelerator, parameter: nn.Parameter, values: Mapping[str, torch.Tensor]) -> None:
    from deepspeed.runtime.zero import GatheredParameters
    from deepspeed.utils import safe_set_local_fp32_param, safe_set_local_optimizer_state

    with GatheredParameters([parameter], modifier_rank=0):
        parameter.data.copy_(values[WEIGHT])
    # DeepSpeed's own setters of whole tensors fail where the size is no multiple of the number of processes.
    size, rank = int(parameter.ds_tensor.numel()), accelerator.process_index  # type: ignore[attr-defined]
    for kind in (WEIGHT, *MOMENTS):
        flat = values[kind].flatten().to(accelerator.device)
        padded = functional.pad(flat, (0, size * accelerator.num_processes - len(flat)))
        mine = padded[rank * size : (rank + 1) * size]
        if kind == WEIGHT:
            safe_set_local_fp32_param(parameter, mine)
        else:
            safe_set_local_optimizer_state(parameter, mine, kind)


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _like(parameter: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """A copy of a whole tensor where the parameter is, spread as the parameter is."""
    value = value.to(parameter.device, copy=True)
    if not isinstance(parameter, DTensor):
        return value
    return distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)
