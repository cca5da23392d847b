"""Models that DeepSpeed's stage 3 spreads over the processes while they are loaded: sizes, and forward passes.

An empty tensor stands in the place of such a parameter. Once the model is prepared for training, DeepSpeed gathers
what a layer needs; before that, and where a model is only looked at or asked to generate, `layer_by_layer` does.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.lora import ParamWrapper
from torch import nn

from chatlora.errors import LaunchError


def is_sharded(parameter: torch.Tensor) -> bool:
    """Whether DeepSpeed's stage 3 looks after it."""
    return hasattr(parameter, "ds_id")


def full_shape(parameter: torch.Tensor) -> torch.Size:
    shape: torch.Size = parameter.ds_shape if is_sharded(parameter) else parameter.shape  # type: ignore[attr-defined]
    return shape


def num_elements(parameter: torch.Tensor) -> int:
    """Of the whole parameter, over all processes."""
    return full_shape(parameter).numel()


def refuse_stacked_experts(adapted: nn.Module) -> None:
    """Raise LaunchError where a spread model has adapters on stacked experts: PEFT reads those past DeepSpeed."""
    wrapped = [module for module in adapted.modules() if isinstance(module, ParamWrapper)]
    if any(is_sharded(module.get_param()) for module in wrapped):
        names = ", ".join(sorted({module.parameter_name for module in wrapped}))
        raise LaunchError(
            f"the adapter reaches stacked experts ({names}), which DeepSpeed's stage 3 cannot spread under PEFT: use "
            f"accelerate_configs/fsdp2.yaml, or leave them out of lora.target_modules"
        )


@contextmanager
def layer_by_layer(model: nn.Module) -> Iterator[None]:
    """Within, a spread model computes like any other: a layer is whole for its own forward pass and no longer.

    Without gradients; collective: all ranks make the same passes. Nothing happens to a model that is whole anyway.
    """
    owners = [module for module in model.modules() if any(map(is_sharded, module.parameters(recurse=False)))]
    if not owners:
        yield
        return
    from deepspeed.runtime.zero import GatheredParameters

    gathered: dict[nn.Module, Any] = {}

    def gather(module: nn.Module, arguments: Any) -> None:
        gathered[module] = GatheredParameters(list(module.parameters(recurse=False)))
        gathered[module].__enter__()

    def let_go(module: nn.Module, arguments: Any, output: Any) -> None:
        gathered.pop(module).__exit__()

    hooks = [module.register_forward_pre_hook(gather) for module in owners]
    hooks += [module.register_forward_hook(let_go, always_call=True) for module in owners]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
