"""What servers make of an adapter's folder: which tensors they take, and what each is multiplied with.

Told from their own loaders, in their own terms, and computed in fp32 on a plain base without PEFT.
"""

import json
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedModel

STACKED_IN_VLLM = {"gpt_oss", "qwen3_5_moe_text", "qwen3_vl_moe_text"}  # is_3d_moe_weight
PART = re.compile(r"base_model\.model\.(?P<module>.*)\.lora_(?P<side>A|B|magnitude_vector)(\.weight)?")
GATE, UP, DOWN = ("gate_proj", "w1"), ("up_proj", "w3"), ("down_proj", "w2")


class RefusedError(Exception):
    """The server says that it does not take this adapter."""


@dataclass(frozen=True)
class Adapter:
    settings: dict[str, Any]
    parts: dict[str, dict[str, torch.Tensor]]  # module -> side -> tensor

    @property
    def single(self) -> list[str]:
        return [name for name in self.parts if re.search(r"\.experts\.\d+\.", name)]

    @property
    def stacked(self) -> list[str]:
        return [name for name in self.parts if re.search(r"\.experts(\.base_layer)?$", name)]


Rule = Callable[[Adapter, str, PreTrainedModel], float]  # the scale of a module's B A


def adapter_in(folder: Path) -> Adapter:
    parts: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in load_file(folder / "adapter_model.safetensors").items():
        match = PART.fullmatch(name)
        assert match is not None, name
        parts.setdefault(match["module"], {})[match["side"]] = tensor
    return Adapter(json.loads((folder / "adapter_config.json").read_text()), parts)


def peft(adapter: Adapter, module: str, base: PreTrainedModel) -> float:
    """peft/tuners/lora/model.py, `_create_and_replace`, and layer.py, `update_layer` (0.21.2).

    Single experts are merged in utils/transformers_weight_conversion.py, with rank and alpha doubled alike.
    """
    return _by_patterns(adapter, module)


def vllm(adapter: Adapter, module: str, base: PreTrainedModel) -> float:
    """vllm/lora/peft_helper.py, `get_rank_and_scaling`, and model_manager.py, `_validate_moe_lora_format` (0.33.0)."""
    _refuse_in_vllm(adapter, base)
    return _by_patterns(adapter, module)


def old_vllm(adapter: Adapter, module: str, base: PreTrainedModel) -> float:
    """The same file before `rank_pattern` was read (until September 2026): `vllm_lora_scaling_factor` for all."""
    _refuse_in_vllm(adapter, base)
    rank = adapter.settings["r"]
    return float(adapter.settings["lora_alpha"] / (math.sqrt(rank) if adapter.settings["use_rslora"] else rank))


def sglang(adapter: Adapter, module: str, base: PreTrainedModel) -> float:
    """sglang/srt/lora/lora.py:71 (0.5.23), sgl-project/sglang#40835.

    lora_manager.py:349 refuses DoRA; lora/utils.py, `get_target_module_name`, raises for names of stacked experts.
    """
    _refuse(adapter, dora=True, stacked=True)
    return float(adapter.settings["lora_alpha"] / adapter.settings["r"])


def llama_cpp(adapter: Adapter, module: str, base: PreTrainedModel) -> float:
    """src/llama-adapter.h, `get_scale`: alpha by the rank of the tensor at hand. `use_rslora` is not read.

    convert_lora_to_gguf.py, `get_base_tensor_name` and `map_tensor_name`: stacked names are no tensor of the base, and
    what is neither A nor B ends it. Single experts are stacked there as the base's are.
    """
    _refuse(adapter, dora=True, stacked=True)
    return float(adapter.settings["lora_alpha"] / adapter.parts[module]["B"].shape[-1])


SERVERS: dict[str, Rule] = {
    "PEFT": peft,
    "vLLM 0.33": vllm,
    "vLLM before September 2026": old_vllm,
    "SGLang 0.5.23": sglang,
    "llama.cpp": llama_cpp,
}


def scales(server: str, adapter: Adapter, base: PreTrainedModel) -> dict[str, float]:
    """Module -> what the server multiplies its B A with. Raises RefusedError."""
    return {module: SERVERS[server](adapter, module, base) for module in adapter.parts}


@torch.no_grad()
def serve(base: PreTrainedModel, adapter: Adapter, by_module: dict[str, float]) -> PreTrainedModel:
    """The base with every B A added to its weights, at these scales; under DoRA each row at its own length."""
    for module, scale in by_module.items():
        a, b = adapter.parts[module]["A"], adapter.parts[module]["B"]
        weight, transposed = _weight(base, module)
        for place, part_a, part_b in _placed(weight, module, a, b, transposed=transposed):
            delta = part_b @ part_a * scale
            place += delta.T if transposed else delta
            if "magnitude_vector" in adapter.parts[module]:
                place *= (adapter.parts[module]["magnitude_vector"] / place.norm(dim=1))[:, None]
    return base


def _by_patterns(adapter: Adapter, module: str) -> float:
    settings = adapter.settings
    stack = {".experts.base_layer": ".experts.gate_up_proj", ".experts": ".experts.down_proj"}
    ending = next((end for end in stack if module.endswith(end)), "")
    key = module.removesuffix(ending) + stack[ending] if ending else module

    def matched(patterns: dict[str, Any] | None, default: Any) -> Any:
        return next((v for k, v in (patterns or {}).items() if re.match(rf"(.*\.)?({k})$", key)), default)

    rank = matched(settings["rank_pattern"], settings["r"])
    alpha = matched(settings["alpha_pattern"], settings["lora_alpha"])
    return float(alpha / (math.sqrt(rank) if settings["use_rslora"] else rank))


def _refuse(adapter: Adapter, *, dora: bool, stacked: bool) -> None:
    if dora and adapter.settings.get("use_dora"):
        raise RefusedError("DoRA")
    if stacked and adapter.stacked:
        raise RefusedError(f"stacked experts: {adapter.stacked[0]}")


def _refuse_in_vllm(adapter: Adapter, base: PreTrainedModel) -> None:
    """Without --enable-mixed-moe-lora-format; lora/utils.py, `process_packed_modules_mapping`."""
    takes_stacked = _model_type(base) in STACKED_IN_VLLM
    _refuse(adapter, dora=True, stacked=not takes_stacked)
    if takes_stacked and adapter.single:
        raise RefusedError(f"single experts: {adapter.single[0]}")


def _model_type(base: PreTrainedModel) -> str:
    return str(base.config.get_text_config().model_type)


def _weight(base: PreTrainedModel, module: str) -> tuple[torch.Tensor, bool]:
    """The tensor in transformers' model that a module's change goes to, and whether it is [in, out]."""
    single = re.fullmatch(r"(.*)\.experts(?:\.(\d+)\.(\w+)|(\.base_layer)?)", module)
    if single is None:
        return base.get_submodule(module).get_parameter("weight"), False
    block = single[1].replace("block_sparse_moe", "mlp") if _model_type(base) == "mixtral" else single[1]
    experts = base.get_submodule(f"{block}.experts")
    gate_up = single[4] or (single[3] or "") in (*GATE, *UP)
    stack = experts.get_parameter("gate_up_proj" if gate_up else "down_proj")
    transposed = bool(getattr(experts, "is_transposed", False))
    if single[2] is None:
        return stack, transposed
    one = stack[int(single[2])]
    if not gate_up:
        return one, transposed
    half = one.shape[0] // 2
    return (one[:half] if single[3] in GATE else one[half:]), transposed


def _placed(
    weight: torch.Tensor, module: str, a: torch.Tensor, b: torch.Tensor, *, transposed: bool
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Each matrix of a stack with its own A and B (PEFT's ParamWrapper.get_delta_weight); or the one there is."""
    if weight.ndim == 2:
        yield weight.data, a, b
        return
    number = weight.shape[0]
    for expert, (one_a, one_b) in enumerate(
        zip(a.reshape(number, -1, a.shape[1]), b.reshape(b.shape[0], -1, number).permute(2, 0, 1), strict=True)
    ):
        yield weight.data[expert], one_a, one_b


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = model(input_ids=torch.arange(3, 23)[None], use_cache=False).logits
    return result
