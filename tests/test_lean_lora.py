"""The short way through a LoRA layer against PEFT's own, and where PEFT's is taken."""

import copy
from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners import lora
from torch import nn
from transformers.pytorch_utils import Conv1D

from chatlora.model.lean_lora import LeanLinear, make_lean

TOLERANCE = 1e-6  # relative, in norm, fp32


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.plain = nn.Linear(24, 40, bias=False)
        self.biased = nn.Linear(40, 24)
        self.of_gpt2 = Conv1D(32, 24)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.of_gpt2(torch.tanh(self.biased(torch.tanh(self.plain(x)))))


def build(**settings: object) -> PeftModel:
    torch.manual_seed(0)
    targets = ["plain", "biased", "of_gpt2"]
    model = get_peft_model(Net(), LoraConfig(r=4, lora_alpha=10, target_modules=targets, **settings))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    return model


def lean(model: PeftModel) -> PeftModel:
    other = copy.deepcopy(model)
    make_lean(other)
    return other


def unscaled(model: PeftModel) -> PeftModel:
    """Broken on purpose: the adapter's scaling is left out."""
    other = lean(model)
    for module in other.modules():
        if isinstance(module, LeanLinear):
            module.scaling["default"] = 1.0
    return other


def output_and_gradients(model: PeftModel, *, autocast: bool = False) -> torch.Tensor:
    """fp64, flat: what the model computes, and its gradient by the adapter and by the input."""
    torch.manual_seed(1)
    x = torch.randn(2, 7, 24, requires_grad=True)
    torch.manual_seed(2)  # of dropout
    with torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
        output = model(x)
    output.float().square().sum().backward()
    trained = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    model.zero_grad()
    assert x.grad is not None
    return torch.cat([tensor.detach().flatten().double() for tensor in (output, x.grad, *trained)])


def distance(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).norm() / other.norm())


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_it_computes_what_peft_computes(dropout: float) -> None:
    model = build(lora_dropout=dropout)
    wanted = output_and_gradients(model)
    assert distance(output_and_gradients(lean(model)), wanted) < TOLERANCE
    assert distance(output_and_gradients(unscaled(model)), wanted) > 1000 * TOLERANCE


def test_under_autocast_it_is_no_farther_from_fp32() -> None:
    model = build()
    for module in model.modules():
        if isinstance(module, lora.Linear):
            module.cast_input_dtype_enabled = False
    exact = output_and_gradients(model)
    pefts, ours = (output_and_gradients(each, autocast=True) for each in (model, lean(model)))
    print(f"from fp32: PEFT {distance(pefts, exact):.1e}, lean {distance(ours, exact):.1e}")
    assert distance(ours, exact) < 1.1 * distance(pefts, exact)


def two_adapters(model: PeftModel) -> None:
    model.add_adapter("second", LoraConfig(r=2, target_modules=["plain"], init_lora_weights=False))
    model.base_model.set_adapter(["default", "second"])


def in_bf16(model: PeftModel) -> None:
    """A base in another precision than the adapter, and no autocast: PEFT casts between them."""
    for name, parameter in model.named_parameters():
        if "lora" not in name:
            parameter.data = parameter.data.bfloat16()
    model.register_forward_pre_hook(lambda module, arguments: (arguments[0].bfloat16(),))


@pytest.mark.parametrize(
    ("settings", "change"),
    [
        ({"use_dora": True}, None),
        ({"lora_bias": True}, None),
        ({}, lambda model: model.base_model.disable_adapter_layers()),
        ({}, lambda model: model.merge_adapter()),
        ({}, two_adapters),
        ({}, in_bf16),
    ],
    ids=["dora", "bias", "disabled", "merged", "two adapters", "two precisions"],
)
def test_everything_else_goes_pefts_way(
    settings: dict[str, object], change: Callable[[PeftModel], None] | None
) -> None:
    if settings:
        settings["target_modules"] = ["plain", "biased"]
    model = build() if not settings else get_peft_model(Net(), LoraConfig(r=4, init_lora_weights=False, **settings))
    other = lean(model)
    for each in (model, other):
        if change is not None:
            torch.manual_seed(3)
            change(each)
    results = []
    for each in (model, other):
        torch.manual_seed(1)
        with torch.no_grad():
            results.append(each(torch.randn(2, 7, 24)))
    assert torch.equal(*results)
    assert results[0].abs().sum() > 0


def test_only_pefts_plain_layer_is_changed() -> None:
    class Quantised(lora.Linear):
        """As bitsandbytes' and GPTQ's layers are, which PEFT derives from its own."""

    model = build()
    odd = model.base_model.model.plain
    odd.__class__ = Quantised
    make_lean(model)
    assert type(odd) is Quantised
    assert type(model.base_model.model.biased) is LeanLinear
