"""Which layers an adapter reaches: `lora.target_modules` -> names in a loaded model, asked of the model itself.

Linear layers are adapted by PEFT's `target_modules`, stacked experts, which are tensors and no layers, by its
`target_parameters`. Routers stay frozen: an adapter there changes which expert a token goes to and unbalances them.
"""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from chatlora.distributed.zero3 import full_shape
from chatlora.errors import ModelError, did_you_mean

ALL_LINEAR = "all-linear"
WRAPPED = ".base_layer"  # PEFT's name for what it put itself around

# In a model with stacked experts PEFT 0.21 takes linear layers of these names for experts as older checkpoints had them
# and leaves the layers themselves out (`_convert_peft_config_moe`). Named as tensors they are reached.
TAKEN_FOR_EXPERTS = frozenset({"gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3"})

# How transformers' configurations call the number of experts that a token goes to.
ACTIVE_EXPERTS = ("num_experts_per_tok", "top_k_experts", "moe_topk")


@dataclass(frozen=True)
class Layers:
    """What can be adapted, by full name. Together, less the refused ones: what all-linear reaches."""

    linear: tuple[str, ...]
    experts: tuple[str, ...]  # tensors [experts, in, out] or [experts, out, in]
    refused: dict[str, str]  # linear layers that may not be adapted, each with the reason


@dataclass(frozen=True)
class Targets:
    """What PEFT is told. Names are as short as they can be without reaching anything else."""

    modules: list[str]
    parameters: list[str]
    expert_parameters: list[str]  # those of `parameters` that are stacked experts
    active_experts: int  # that a token goes to


def adaptable_layers(model: nn.Module, base: PreTrainedModel) -> Layers:
    """The language model's layers, less its head, by their names in `model`, which is `base` or a PEFT model around it.

    Vision and audio towers are no part of it: no conversation that is read here reaches them.
    """
    decoder = base.get_decoder()
    prefix = next(name for name, module in model.named_modules() if module is decoder)
    inside = [(name, module) for name, module in _plain(decoder.named_modules(prefix=prefix)) if ".lora_" not in name]
    stacks = {f"{name}.{of}": size for name, module in inside for of, size in _stacked(module)}
    mixers = tuple(f"{name}." for name, module in inside if _is_mamba(module))
    linear, refused = [], {}
    for name, module in inside:
        if not isinstance(module, (nn.Linear, Conv1D)):
            continue
        reason = _why_refused(name, module, stacks, mixers)
        if reason:
            refused[name] = reason
        else:
            linear.append(name)
    return Layers(tuple(linear), tuple(stacks), refused)


def find_targets(base: PreTrainedModel, wanted: str | tuple[str, ...]) -> Targets:
    """Raises ModelError that lists the names there are where one of `wanted` matches nothing."""
    layers = adaptable_layers(base, base)
    chosen = {*layers.linear, *layers.experts}
    if wanted != ALL_LINEAR:
        others = {
            name for name, module in base.named_modules() if isinstance(module, (nn.Linear, Conv1D, nn.Embedding))
        }
        chosen = _matching(wanted, chosen | others - layers.refused.keys(), layers)
    stacked = [name for name in layers.experts if name in chosen]
    lookalikes = [name for name in layers.linear if name in chosen and _leaf(name) in TAKEN_FOR_EXPERTS]
    parameters = [*stacked, *(f"{name}.weight" for name in lookalikes if layers.experts)]
    modules = [name for name, _ in base.named_modules() if name in chosen and f"{name}.weight" not in parameters]
    tensors = [name for name, _ in base.named_parameters()]
    return Targets(
        modules=_shortened(modules, [name for name, _ in base.named_modules()], _leaf, _behind_number),
        parameters=_shortened(parameters, tensors, _behind_number),
        expert_parameters=_shortened(stacked, tensors, _behind_number),
        active_experts=_active_experts(base) if stacked else 1,
    )


def _why_refused(name: str, module: nn.Module, stacks: dict[str, int], mixers: tuple[str, ...]) -> str | None:
    if name.startswith(mixers) and _leaf(name) != "in_proj":
        return "Mamba kernels read its weight past the layer, so that an adapter on it would not be trained"
    for stack, experts in stacks.items():
        block = stack.rpartition(".")[0].rpartition(".")[0]
        if name.startswith(f"{block}.") and isinstance(module, nn.Linear) and module.out_features in (1, experts):
            return "it is a router, which stays frozen"
    return None


def _matching(wanted: str | tuple[str, ...], pool: set[str], layers: Layers) -> set[str]:
    """As PEFT matches: a string is a pattern for whole names unless it is a plain name; names may be ends."""
    if isinstance(wanted, str) and re.fullmatch(r"[\w.]+", wanted):
        wanted = (wanted,)  # one name; as a pattern it would have to be a whole one
    if isinstance(wanted, str):
        try:
            found = {name for name in pool if re.fullmatch(wanted, name)}
        except re.error as error:
            raise ModelError(f"lora.target_modules: {wanted!r} is no regular expression: {error}") from None
        missing = [] if found else [wanted]
    else:
        ends = {end: {name for name in pool if name == end or name.endswith(f".{end}")} for end in wanted}
        found = set().union(*ends.values())
        missing = [end for end, names in ends.items() if not names]
    if missing:
        raise ModelError(*(_no_such_layer(name, pool, layers) for name in missing))
    return found


def _no_such_layer(wanted: str, pool: set[str], layers: Layers) -> str:
    for name, reason in layers.refused.items():
        if name == wanted or name.endswith(f".{wanted}"):
            return f"lora.target_modules: {wanted} cannot be adapted: {reason}"
    known = sorted({_leaf(name) for name in pool})
    return (
        f"lora.target_modules: no layer is called '{wanted}'{did_you_mean(wanted, known) or '.'} "
        f"Layers of this model: {', '.join(known)}"
    )


def _plain(modules: Iterable[tuple[str, nn.Module]]) -> Iterable[tuple[str, nn.Module]]:
    """Without what PEFT put around them, under the names that they had before."""
    for name, module in modules:
        if not hasattr(module, "base_layer"):
            yield name.replace(WRAPPED, ""), module


def _stacked(module: nn.Module) -> list[tuple[str, int]]:
    """The tensors of a module that hold one matrix for each expert, and how many."""
    if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return []
    shapes = {name: full_shape(tensor) for name, tensor in module.named_parameters(recurse=False)}
    return [(name, shape[0]) for name, shape in shapes.items() if len(shape) == 3]


def _is_mamba(module: nn.Module) -> bool:
    own = {name for name, _ in module.named_parameters(recurse=False)}
    return own >= {"A_log", "D"}


def _active_experts(base: PreTrainedModel) -> int:
    settings = base.config.get_text_config().to_dict()
    return next((int(settings[name]) for name in ACTIVE_EXPERTS if settings.get(name)), 1)


def _shortened(names: list[str], everything: list[str], *shortenings: Callable[[str], str]) -> list[str]:
    """Ends of the names that match nothing else of `everything`; the names in full where there are none."""
    for shorten in shortenings:
        ends = sorted({shorten(name) for name in names})
        reached = {name for name in everything for end in ends if name == end or name.endswith(f".{end}")}
        if reached == set(names):
            return ends
    return names


def _behind_number(name: str) -> str:
    return re.sub(r"^.*?\.\d+\.", "", name)


def _leaf(name: str) -> str:
    return name.rpartition(".")[2]
