"""What differs between engines: how one is started. (How whole tensors come out and go in: optimizer_state.py.)

    single, ddp     every process holds the whole model and torch's own optimizer
    zero1, zero2    DeepSpeed: the optimizer's state is spread over the processes; zero2: gradients too
    zero3           DeepSpeed: parameters are spread as well, from the moment they are loaded
    fsdp2           torch: parameters, gradients and the optimizer's state are spread, layer by layer

`accelerate launch` names the engine by its configuration file. Everything here is tried out with accelerate 1.15,
torch 2.13 and DeepSpeed 0.19.8.
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
from torch.distributed.fsdp import register_fsdp_forward_method

TIMEOUT = timedelta(minutes=30)  # that one collective may take; work that is longer happens outside of them
PATIENCE = timedelta(days=1)  # that the fastest process waits for the slowest to have its data

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
