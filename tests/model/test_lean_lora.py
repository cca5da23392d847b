"""The short way through a LoRA layer against PEFT's own, and where PEFT's is taken."""

import copy
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners import lora
from torch import nn
from transformers.pytorch_utils import Conv1D

from chatlora.model.lean_lora import LeanLinear, make_lean

TOLERANCE = 1e-6  # relative, in norm, fp32
TARGETS = ["plain", "biased", "of_gpt2"]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.plain = nn.Linear(24, 400, bias=False)
        self.biased = nn.Linear(400, 24)
        self.of_gpt2 = Conv1D(320, 24)

    def forward(self, x: torch.Tensor) -> Any:
        return self.of_gpt2(torch.tanh(self.biased(torch.tanh(self.plain(x)))))


def build(**settings: object) -> PeftModel:
    torch.manual_seed(0)
    model = get_peft_model(Net(), LoraConfig(r=16, lora_alpha=40, target_modules=TARGETS, **settings))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
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
    x = torch.randn(2, 17, 24, requires_grad=True)
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


@pytest.mark.parametrize("shape", [(24,), (0, 24), (1, 0, 24), (5, 24)])
def test_inputs_of_any_shape(shape: tuple[int, ...]) -> None:
    model, x = build(), torch.randn(shape)
    assert torch.allclose(lean(model)(x), model(x), rtol=1e-5, atol=1e-5)


def test_the_short_way_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    model = lean(build())
    taken: list[torch.Tensor] = []
    monkeypatch.setattr(lora.Linear, "forward", lambda layer, x: taken.append(x))
    assert model(torch.randn(2, 24)).shape == (2, 320)
    assert not taken


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


def test_only_plain_layers_on_plain_projections_are_changed() -> None:
    class Odd(lora.Linear):
        """As PEFT's layers for bitsandbytes or GPTQ."""

    class Quantised(nn.Linear):
        """As transformers' layers in FP8, which PEFT wraps as it wraps any nn.Linear."""

    model = build()
    plain, biased, of_gpt2 = (model.get_submodule(f"base_model.model.{name}") for name in TARGETS)
    plain.__class__ = Odd
    biased.base_layer.__class__ = Quantised
    make_lean(model)
    assert [type(layer) for layer in (plain, biased, of_gpt2)] == [Odd, lora.Linear, LeanLinear]
