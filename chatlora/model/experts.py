"""Adapters on experts: stacked, as transformers 5 and PEFT hold them, or a tensor for each expert, as most servers do.

Stacked, a layer's experts are `experts.base_layer.lora_A` (gate and up, one after the other) and `experts.lora_A`
(down). vLLM 0.33 takes that where its class says `is_3d_moe_weight`, SGLang 0.5.23 and llama.cpp's converter never do;
they know `experts.3.gate_proj.lora_A`, under the checkpoint's own names. Both hold the same numbers: gate and up share
A, and each has its half of B's rows.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from peft import LoraConfig as PeftLoraConfig
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightConverter

from chatlora.config import ExpertFormat
from chatlora.errors import ModelError
from chatlora.model.scales import is_a, one_by_one

OURS = "mlp"  # how transformers 5 calls the layer around the experts where a checkpoint has another name
GATE_UP, DOWN = "gate_up_proj", "down_proj"
# What SGLang 0.5.23 renames layers to before it looks for them in `target_modules` (`_rename_expert_w_to_proj`).
SGLANG_CALLS = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
STACK = re.compile(r"(?P<block>.*)\.experts(?P<inner>\.base_layer)?\.lora_(?P<side>[AB])\.weight")
ONE = re.compile(r"(?P<block>.*)\.experts\.(?P<expert>\d+)\.(?P<leaf>\w+)\.lora_(?P<side>[AB])\.weight")

# Model types whose class in vLLM 0.33 has `is_3d_moe_weight` (grep over vllm/model_executor/models).
SERVED_STACKED = frozenset(
    {
        "gpt_oss",
        "interns1_pro",
        *(f"qwen3_{name}_moe{part}" for name in ("5", "vl", "omni") for part in ("", "_text", "_thinker")),
    }
)


@dataclass(frozen=True)
class ExpertNames:
    """How one expert's layers are called in checkpoints of a family, and so by servers."""

    gate: str
    up: str
    down: str
    block: str = ""  # the layer around the experts; "" where it is called the same


# What transformers' own table of conversions leaves out: checkpoints that are stacked, and servers that are not.
# vllm/model_executor/models/granitemoehybrid.py, get_expert_mapping.
GRANITE = ExpertNames("gate_proj", "up_proj", "down_proj")
BY_HAND = {"granitemoe": GRANITE, "granitemoeshared": GRANITE, "granitemoehybrid": GRANITE}
# PEFT 0.21 opens single experts for the families of transformers' table; of the others it leaves them out with a
# warning, where a server that cannot take stacked ones refuses: the louder of the two is what `auto` risks.
STAY_STACKED = SERVED_STACKED | BY_HAND.keys()


def expert_names(base: PreTrainedModel) -> ExpertNames | None:
    """None where no checkpoint of this family has a tensor for each expert."""
    model_type = model_type_of(base)
    if model_type in BY_HAND:
        return BY_HAND[model_type]
    leaves: dict[str, list[str]] = {}
    block = ""
    for conversion in get_checkpoint_conversion_mapping(model_type) or []:
        if isinstance(conversion, WeightConverter):
            target = conversion.target_patterns[0].rpartition(".")[2]
            leaves[target] = [source.split(".")[-2] for source in conversion.source_patterns if ".experts.*." in source]
        elif ".mlp." in conversion.target_patterns:  # Mixtral: .block_sparse_moe.
            block = conversion.source_patterns[0].strip(".")
    found = [*leaves.get(GATE_UP, []), *leaves.get(DOWN, [])]
    if len(found) != 3:
        return None
    gate, up, down = found
    return ExpertNames(gate, up, down, block)


def is_per_expert(base: PreTrainedModel, wanted: ExpertFormat) -> bool:
    """What `lora.expert_format` comes to for this model. Raises ModelError where it cannot be had."""
    known = expert_names(base) is not None
    if wanted == "per_expert" and not known:
        raise ModelError(
            f"lora.expert_format is per_expert, but no names of single experts are known for {model_type_of(base)}: "
            f"set it to stacked or auto"
        )
    return known and (wanted == "per_expert" or (wanted == "auto" and model_type_of(base) not in STAY_STACKED))


def with_sglangs_names(target_modules: Iterable[str]) -> list[str]:
    """`target_modules` with those names besides, which no layer has: without them SGLang refuses the adapter."""
    names = {*target_modules}
    words = {name: name.rpartition(".") for name in names}
    return sorted(
        names | {head + dot + SGLANG_CALLS[leaf] for head, dot, leaf in words.values() if leaf in SGLANG_CALLS}
    )


def has_stacked(settings: PeftLoraConfig) -> bool:
    """Whether an adapter of these settings, as in its folder, is on stacked experts."""
    return bool(_stacks(settings))


def has_single(base: PreTrainedModel, settings: PeftLoraConfig) -> bool:
    """Whether it has tensors for each expert, in a model of this family."""
    names, modules = expert_names(base), {*(settings.target_modules or [])}
    return names is not None and bool(modules & {names.gate, names.down}) and not has_stacked(settings)


def split(
    settings: PeftLoraConfig, tensors: Mapping[str, torch.Tensor], names: ExpertNames
) -> tuple[PeftLoraConfig, dict[str, torch.Tensor]]:
    """A file's tensors, all of rank `settings.r`, with stacked experts taken apart, and the settings for them."""
    both = {match["block"] for name in tensors if (match := STACK.fullmatch(name)) and match["inner"]}
    parameters = settings.target_parameters or []
    result = {}
    for name, tensor in tensors.items():
        match = STACK.fullmatch(name)
        if match is None:
            result[name] = tensor
            continue
        alone = f"{match['block']}.experts.{GATE_UP}".endswith(tuple(parameters))
        kind = GATE_UP if match["inner"] or (alone and match["block"] not in both) else DOWN
        block = _renamed(match["block"], names.block)
        of_a = is_a(name)
        experts = tensor.shape[0 if of_a else 1] // settings.r
        for expert, one in enumerate(one_by_one(tensor, experts, of_a=of_a)):
            for leaf, part in _parts(one, kind, names, of_a=of_a):
                result[f"{block}.experts.{expert}.{leaf}.lora_{match['side']}.weight"] = part.clone()
    stacks = _stacks(settings)
    leaves = [names.gate, names.up] if any(name.endswith(GATE_UP) for name in stacks) else []
    leaves += [names.down] if any(name.endswith(DOWN) for name in stacks) else []
    settings.target_modules = sorted({*(settings.target_modules or []), *leaves})
    settings.target_parameters = sorted({*parameters} - {*stacks}) or None
    return settings, result


def stacked(
    settings: PeftLoraConfig, tensors: Mapping[str, torch.Tensor], names: ExpertNames | None
) -> tuple[PeftLoraConfig, dict[str, torch.Tensor]]:
    """`split` undone; what is no such adapter comes back as it is.

    So does one whose gate and up have an A each, as other trainers write them: it is none of one rank when stacked.
    """
    found = {name: match for name in tensors if (match := ONE.fullmatch(name))}
    if names is None or not found:
        return settings, dict(tensors)
    groups: dict[tuple[str, str, str], dict[int, torch.Tensor]] = {}
    for name, match in found.items():
        groups.setdefault((match["block"], match["leaf"], match["side"]), {})[int(match["expert"])] = tensors[name]
    stacks: set[str] = set()
    result = {name: tensor for name, tensor in tensors.items() if name not in found}
    for (block, leaf, side), single in groups.items():
        if leaf == names.up:
            continue
        experts = torch.stack([single[expert] for expert in sorted(single)])
        if leaf == names.gate:
            other = groups.get((block, names.up, side), {})
            up = torch.stack([other[expert] for expert in sorted(other)]) if other else experts.new_zeros(0)
            if up.shape != experts.shape or (side == "A" and not torch.equal(up, experts)):
                return settings, dict(tensors)
            experts = experts if side == "A" else torch.cat([experts, up], dim=1)
        inner = ".base_layer" if leaf == names.gate and (block, names.down, side) in groups else ""
        flat = experts.flatten(0, 1) if side == "A" else experts.permute(1, 2, 0).flatten(1)
        of = f"{_renamed(block, OURS if names.block else '')}.experts"
        result[f"{of}{inner}.lora_{side}.weight"] = flat
        stacks.add(f"{of.removeprefix('base_model.model.')}.{GATE_UP if leaf == names.gate else DOWN}")
    leaves = {leaf for _, leaf, _ in groups}
    also = {SGLANG_CALLS.get(leaf, leaf) for leaf in leaves}
    settings.target_modules = sorted({*(settings.target_modules or [])} - leaves - also)
    settings.target_parameters = sorted({*(settings.target_parameters or [])} | stacks)
    return settings, result


def _parts(one: torch.Tensor, kind: str, names: ExpertNames, *, of_a: bool) -> Iterator[tuple[str, torch.Tensor]]:
    if kind == DOWN:
        yield names.down, one
        return
    gate, up = (one, one) if of_a else one.chunk(2)
    yield names.gate, gate
    yield names.up, up


def _stacks(settings: PeftLoraConfig) -> list[str]:
    parameters = settings.target_parameters or []
    return [name for name in parameters if name.endswith((f"experts.{GATE_UP}", f"experts.{DOWN}"))]


def _renamed(block: str, last: str) -> str:
    return f"{block.rpartition('.')[0]}.{last}" if last else block


def model_type_of(base: PreTrainedModel) -> str:
    return str(base.config.get_text_config().model_type)
