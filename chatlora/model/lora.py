"""The adapter: put onto a base model, described."""

import re
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from peft import LoraConfig as PeftLoraConfig
from peft import PeftModel, get_peft_model
from peft.tuners.lora import ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedModel

from chatlora.config import LoraConfig
from chatlora.distributed.zero3 import num_elements
from chatlora.errors import ModelError
from chatlora.model.experts import is_per_expert
from chatlora.model.targets import WRAPPED, adaptable_layers, find_targets


def add_lora(base: PreTrainedModel, lora: LoraConfig, seed: int, revision: str | None = None) -> PeftModel:
    """The base model, frozen, with an adapter in fp32 whatever the base is; the same for the same seed.

    A fresh one, or `lora.init_from`'s to go on from. revision: of the base, for adapter_config.json.
    Raises ModelError where the model or that adapter does not fit.
    """
    targets = find_targets(base, lora.target_modules)
    if targets.parameters and lora.dropout:
        raise ModelError(
            f"lora.dropout is {lora.dropout:g}, but PEFT cannot drop inputs of adapters on stacked experts: set it to "
            f"0, or lora.target_modules to layers that are none of {', '.join(targets.parameters)}"
        )
    if targets.parameters and lora.variant == "dora":
        raise ModelError(
            f"lora.variant is dora, but PEFT has none for adapters on stacked experts: set it to rslora or null, or "
            f"lora.target_modules to layers that are none of {', '.join(targets.parameters)}"
        )
    if targets.expert_parameters:
        is_per_expert(base, lora.expert_format)  # what cannot be written is told before it is trained
    # A token goes through several experts, each with an adapter of its own: together they have the rank that was asked
    # for (https://thinkingmachines.ai/blog/lora/).
    rank = max(1, lora.rank // targets.active_experts)
    settings = PeftLoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        use_rslora=lora.variant == "rslora",
        use_dora=lora.variant == "dora",
        target_modules=targets.modules,
        target_parameters=targets.parameters or None,
        rank_pattern={re.escape(name): rank for name in targets.expert_parameters},
        task_type="CAUSAL_LM",
        revision=revision,
    )
    torch.manual_seed(seed)
    with without_false_alarms():
        try:
            model = get_peft_model(base, settings, autocast_adapter_dtype=True)
        except ValueError as error:
            raise ModelError(f"lora.target_modules: {error}") from None
    assert all(parameter.dtype == torch.float32 for parameter in trainable(model).values())
    return model


@contextmanager
def without_false_alarms() -> Iterator[None]:
    """Within, PEFT 0.21 keeps two warnings to itself that are of its own making."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        # It looks for them among layers only, and they are of experts, which are tensors.
        warnings.filterwarnings("ignore", r"The following (rank|alpha)_pattern keys did not match", RuntimeWarning)
        yield


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The adapter's parameters by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def describe_lora(model: PeftModel) -> list[str]:
    """What the adapter touches by kind of layer, the share of the base that it reaches, and what it leaves out."""
    kinds: Counter[str] = Counter()
    reached, touched = 0, set()
    for name, module in model.named_modules():
        if isinstance(module, ParamWrapper):
            name, size = f"{name}.{module.parameter_name}", num_elements(module.get_param())
        elif isinstance(module, BaseTunerLayer):
            size = sum(num_elements(parameter) for parameter in module.get_base_layer().parameters())
        else:
            continue
        reached += size
        touched.add(name.replace(WRAPPED, ""))
        kinds[kind_of(name)] += 1
    adapter = sum(num_elements(parameter) for parameter in trainable(model).values())
    total = sum(num_elements(parameter) for parameter in model.parameters()) - adapter
    return [
        f"LoRA touches {_counted(kinds)}",
        f"LoRA trains {adapter:,} parameters and reaches {reached / total:.1%} of the base's {total:,}",
        *_left_out(model, touched),
    ]


def _left_out(model: PeftModel, touched: set[str]) -> list[str]:
    """A warning where experts, MLPs or other layers are left out, with the reason if it is not the user's own."""
    layers = adaptable_layers(model, model.get_base_model())
    touched = touched | {name.removesuffix(".weight") for name in touched}
    missed = Counter(kind_of(name) for name in (*layers.linear, *layers.experts) if name not in touched)
    refused: dict[str, Counter[str]] = {}
    for name, reason in layers.refused.items():
        refused.setdefault(reason, Counter())[kind_of(name)] += 1
    lines = [f"LoRA leaves out {_counted(kinds)}: {reason}" for reason, kinds in refused.items()]
    if missed:
        lines.append(
            f"warning: LoRA leaves out {_counted(missed)}. Adapters on all layers, MLPs and experts included, learn "
            f"more; lora.target_modules all-linear reaches them"
        )
    return lines


def kind_of(name: str) -> str:
    """`q_proj`, or `experts.gate_up_proj` for a tensor of a layer."""
    words = name.replace(WRAPPED, "").removesuffix(".weight").split(".")
    return ".".join(words[-2:]) if "experts" in words[-2:-1] else words[-1]


def _counted(kinds: Counter[str]) -> str:
    return ", ".join(f"{kind} x {count}" for kind, count in kinds.items())
