"""PEFT's LoRA layer in fewer passes over its output: the same parameters, the same function, the same adapter file.

PEFT computes `result + lora_B(lora_A(x)) * scaling`: a product, a multiplication and an addition, each of the size of
the layer's output, and a multiplication of that size again in the backward pass. One product that adds to the result
does it all; in bf16 it also rounds once where those round three times.
"""

from typing import Any

import torch
from peft.tuners.lora import Linear
from torch import nn
from torch.distributed.tensor import DTensor
from transformers.pytorch_utils import Conv1D

from chatlora.distributed.zero3 import is_sharded


def make_lean(model: nn.Module) -> None:
    """Every LoRA layer on a plain projection becomes a LeanLinear, in place; others, quantised ones say, stay."""
    for module in model.modules():
        if type(module) is Linear and type(module.base_layer) in (nn.Linear, Conv1D):
            module.__class__ = LeanLinear


class LeanLinear(Linear):  # type: ignore[misc]
    """A LoRA layer of PEFT's that takes the short way where there is one."""

    def forward(self, x: torch.Tensor, *arguments: Any, **options: Any) -> torch.Tensor:
        """x [..., in] -> [..., out]."""
        adapter = self._only_adapter()
        if adapter is None or arguments or options or self._casts(x, adapter):
            return super().forward(x, *arguments, **options)  # type: ignore[no-any-return]
        # addmm_ wants a matrix that is no view of a larger tensor: the backward pass would copy that.
        rows = x.reshape(-1, x.shape[-1])
        result: torch.Tensor = self.base_layer(rows)
        hidden = self.lora_A[adapter](self.lora_dropout[adapter](rows))
        expand = self.lora_B[adapter].weight.to(hidden.dtype)
        result.addmm_(hidden, expand.T, alpha=self.scaling[adapter])
        return result.view(*x.shape[:-1], result.shape[-1])

    def _only_adapter(self) -> str | None:
        """The one adapter, if it is all there is to this layer and its weights are whole here."""
        if self.disable_adapters or self.merged or len(self.active_adapters) != 1:
            return None
        (adapter,) = self.active_adapters
        if adapter not in self.lora_B or adapter in self.lora_variant:
            return None
        expand = self.lora_B[adapter]
        # An engine may gather a layer's weights for that layer's own forward pass only, as DeepSpeed's stage 3 does.
        is_part = is_sharded(expand.weight) or isinstance(expand.weight, DTensor)
        return None if expand.bias is not None or is_part else adapter

    def _casts(self, x: torch.Tensor, adapter: str) -> bool:
        """Whether PEFT would cast: adapter and base then compute in different precisions."""
        return bool(self.cast_input_dtype_enabled) and x.dtype != self.lora_A[adapter].weight.dtype
