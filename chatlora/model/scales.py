"""One scale for a whole adapter: right for a server that knows `lora_alpha / r` and nothing else.

In training, modules differ: experts have a share of the rank, and rslora divides by its root. Servers read that
unequally. SGLang takes alpha / r of the file for every module (sgl-project/sglang#40835), as older vLLM does; llama.cpp
divides by each tensor's own rank; `use_rslora` is known to PEFT and vLLM alone. All of them are right only where all
modules have one rank and the scale is alpha over it: lower ranks are filled up with zeros, other scales go into B.

Weights: [r * experts, in] for A and [out, r * experts] for B, as PEFT has them; experts is 1 for a layer.
"""

import math
from collections.abc import Mapping

import torch
from peft import LoraConfig as PeftLoraConfig
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.utils.other import get_pattern_key

Tensors = Mapping[str, torch.Tensor]


def one_scale(model: PeftModel, adapter: str = "default") -> tuple[int, float]:
    """Rank and alpha for the whole file: those of the modules with the highest rank, whose tensors stay as they are."""
    settings = model.peft_config[adapter]
    assert isinstance(settings, PeftLoraConfig)
    layers = adapted_layers(model).values()
    rank = max(layer.r[adapter] for layer in layers)
    scale = max(layer.scaling[adapter] for layer in layers if layer.r[adapter] == rank)
    plain = scale == settings.lora_alpha / rank
    return rank, float(settings.lora_alpha) if plain else scale * rank


def one_scale_in(model: PeftModel, tensors: Tensors, settings: PeftLoraConfig) -> tuple[int, float] | None:
    """`one_scale` of a file's tensors, by the names in it; None where no layer of `model` is among them."""
    layers = adapted_layers(model)
    found = []
    for name, tensor in tensors.items():
        layer = layers.get(module_of(name))
        rank = None if layer is None else rank_of(name, tensor, _experts(layer))
        if layer is not None and rank:
            found.append((rank, scale_in(settings, name, layer, rank)))
    if not found:
        return None
    rank, scale = max(found)
    return rank, scale * rank


def folded(model: PeftModel, tensors: Tensors) -> dict[str, torch.Tensor]:
    """The adapter's tensors, by parameter name, at the one rank and scale."""
    rank, alpha = one_scale(model)
    layers = adapted_layers(model)
    result = {}
    for name, tensor in tensors.items():
        layer = layers[module_of(name)]
        resized = _with_rank(name, tensor, _experts(layer), rank)
        result[name] = _times(name, resized, layer.scaling["default"] / (alpha / rank))
    return result


def unfolded(model: PeftModel, tensors: Tensors, settings: PeftLoraConfig) -> dict[str, torch.Tensor]:
    """`folded` undone: a file's tensors, by the names in it, at the ranks and scales of `model`.

    settings: the file's own; it may be of any form that PEFT knows. Exact where the scales' ratio is a power of two,
    else to the last bit of fp32. Raises ValueError, half a sentence, where the two adapters cannot be the same.
    """
    layers = adapted_layers(model)
    result = {}
    for name, tensor in tensors.items():
        layer = layers.get(module_of(name))
        if layer is None:
            result[name] = tensor  # of a layer that the caller refuses by its name
            continue
        there = rank_of(name, tensor, _experts(layer))
        kept = _with_rank(name, tensor, _experts(layer), layer.r["default"])
        if there is not None and there > layer.r["default"] and kept.count_nonzero() != tensor.count_nonzero():
            raise ValueError(f"{name} has rank {there}, but {layer.r['default']} here")
        result[name] = kept
        if there is not None:
            ratio = scale_in(settings, name, layer, there) / layer.scaling["default"]
            result[name] = _times(name, kept, ratio)
    return result


def scale_in(settings: PeftLoraConfig, name: str, layer: LoraLayer, rank: int) -> float:
    """What PEFT multiplies B A with for a tensor of this name under a file's settings (its LoraModel)."""
    module = module_of(name).removeprefix("base_model.model.")
    parameter = getattr(layer, "parameter_name", None)  # PEFT's patterns are for the tensor, where it adapts one
    key = module.replace(".base_layer", "") + (f".{parameter}" if parameter else "")
    alpha = settings.alpha_pattern.get(get_pattern_key(list(settings.alpha_pattern), key), settings.lora_alpha)
    return float(alpha / math.sqrt(rank) if settings.use_rslora else alpha / rank)


def adapted_layers(model: PeftModel) -> dict[str, LoraLayer]:
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}


def module_of(name: str) -> str:
    """The layer that an adapter's tensor is of: its name in the PEFT model, and in a file."""
    return name.split(".lora_")[0]


def rank_of(name: str, tensor: torch.Tensor, experts: int) -> int | None:
    """None for what has no rank: DoRA's magnitudes."""
    if is_a(name):
        return tensor.shape[0] // experts
    return tensor.shape[1] // experts if is_b(name) else None


def one_by_one(tensor: torch.Tensor, experts: int, *, of_a: bool) -> torch.Tensor:
    """What a stacked tensor is for each expert: [experts, rank, in] of A, [experts, out, rank] of B."""
    if of_a:
        return tensor.reshape(experts, -1, tensor.shape[1])
    return tensor.reshape(tensor.shape[0], -1, experts).permute(2, 0, 1)


def is_a(name: str) -> bool:
    return ".lora_A." in name or ".lora_embedding_A" in name


def is_b(name: str) -> bool:
    return ".lora_B." in name or ".lora_embedding_B" in name


def _experts(layer: LoraLayer) -> int:
    return int(getattr(layer, "num_experts", 1))


def _with_rank(name: str, tensor: torch.Tensor, experts: int, rank: int) -> torch.Tensor:
    """Filled up with zeros, or cut, to `rank`. A holds its experts one after the other, B rank by rank (PEFT)."""
    there = rank_of(name, tensor, experts)
    if there is None or there == rank:
        return tensor
    common = min(there, rank)
    if is_a(name):
        a = tensor.new_zeros(experts, rank, tensor.shape[1])
        a[:, :common] = tensor.reshape(experts, there, -1)[:, :common]
        return a.flatten(0, 1)
    b = tensor.new_zeros(tensor.shape[0], rank, experts)
    b[:, :common] = tensor.reshape(-1, there, experts)[:, :common]
    return b.flatten(1)


def _times(name: str, tensor: torch.Tensor, ratio: float) -> torch.Tensor:
    """Scales of one formula may differ in their last bit: that is no reason to touch B."""
    return tensor * ratio if is_b(name) and not math.isclose(ratio, 1, rel_tol=1e-12) else tensor
