"""The adapter: put onto a base model, described, saved."""

import warnings
from collections import Counter
from pathlib import Path

import torch
from peft import LoraConfig as PeftLoraConfig
from peft import PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedModel

from chatlora.config import LoraConfig
from chatlora.errors import ModelError, did_you_mean


def add_lora(base: PreTrainedModel, lora: LoraConfig, seed: int) -> PeftModel:
    """The base model, frozen, with a fresh adapter in fp32 whatever the base is; the same for the same seed."""
    targets = lora.target_modules if isinstance(lora.target_modules, str) else list(lora.target_modules)
    settings = PeftLoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=targets,
        task_type="CAUSAL_LM",
    )
    torch.manual_seed(seed)
    try:
        with warnings.catch_warnings():  # PEFT 0.21 reads an attribute that transformers 5.23 calls deprecated
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
            model = get_peft_model(base, settings, autocast_adapter_dtype=True)
    except ValueError as error:
        raise ModelError(_no_such_modules(base, targets, error)) from None
    assert all(parameter.dtype == torch.float32 for parameter in trainable(model).values())
    return model


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The adapter's parameters by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def describe_lora(model: PeftModel) -> list[str]:
    """What the adapter touches by kind of layer, and the share of the base's parameters that it reaches."""
    kinds: Counter[str] = Counter()
    reached = 0
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer):
            kinds[name.rpartition(".")[2]] += 1
            reached += sum(parameter.numel() for parameter in module.get_base_layer().parameters())
    adapter = sum(parameter.numel() for parameter in trainable(model).values())
    total = sum(parameter.numel() for parameter in model.parameters()) - adapter
    touched = ", ".join(f"{kind} x {count}" for kind, count in kinds.items())
    return [
        f"LoRA touches {touched}",
        f"LoRA trains {adapter:,} parameters and reaches {reached / total:.1%} of the base's {total:,}",
    ]


def save_adapter(model: PeftModel, weights: dict[str, torch.Tensor], folder: Path) -> None:
    """Write a PEFT adapter from full tensors by parameter name, as `trainable` names them."""
    # PEFT would reach for the hub to learn whether the embeddings were resized; they never are here.
    model.save_pretrained(folder, state_dict=weights, save_embedding_layers=False)


def _no_such_modules(base: PreTrainedModel, targets: str | list[str], error: ValueError) -> str:
    known = sorted({name.rpartition(".")[2] for name, module in base.named_modules() if isinstance(module, nn.Linear)})
    wanted = [targets] if isinstance(targets, str) else targets
    hints = [f"'{name}'{did_you_mean(name, known)}" for name in wanted if name not in known]
    problem = (
        f"lora.target_modules: no layer is called {', '.join(hints)}" if hints else f"lora.target_modules: {error}"
    )
    return f"{problem}. Linear layers of this model: {', '.join(known)}"
