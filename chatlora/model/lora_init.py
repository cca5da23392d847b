"""`lora.init_from`: an adapter to go on from, as the first weights of a new one of the same shape."""

import math

from peft import LoraConfig as PeftLoraConfig
from peft import (
    PeftConfig,
    PeftModel,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)

from chatlora.config import LoraConfig
from chatlora.disk import sha256_of
from chatlora.errors import ModelError
from chatlora.model.adapter_folder import WEIGHTS, read_adapter
from chatlora.model.folder import find_adapter
from chatlora.model.lora import kind_of, without_false_alarms
from chatlora.model.scales import Tensors, one_scale, one_scale_in, unfolded


def start_from(model: PeftModel, lora: LoraConfig) -> None:
    """Put the weights of `lora.init_from` into a fresh adapter.

    Raises ModelError that names the settings in which the two adapters differ.
    """
    assert lora.init_from is not None
    adapter = find_adapter(lora.init_from)
    settings, tensors = read_adapter(model.get_base_model(), adapter)
    problems = _other_settings(model, settings, tensors)
    if not problems:
        assert isinstance(settings, PeftLoraConfig)
        try:
            tensors = unfolded(model, tensors, settings)
        except ValueError as error:
            problems = [str(error)]
    problems = problems or _other_layers(model, {name: list(tensor.shape) for name, tensor in tensors.items()})
    if problems:
        raise ModelError(*(f"lora.init_from: {adapter} does not fit: {problem}" for problem in problems))
    with without_false_alarms():
        set_peft_model_state_dict(model, tensors)


def init_fingerprint(lora: LoraConfig) -> str | None:
    """sha256:... of the weights under `lora.init_from`; None where no adapter is named."""
    if lora.init_from is None:
        return None
    return f"sha256:{sha256_of(find_adapter(lora.init_from) / WEIGHTS)}"


def _other_settings(model: PeftModel, there: PeftConfig, tensors: Tensors) -> list[str]:
    here = model.peft_config["default"]
    if not isinstance(there, PeftLoraConfig):
        return ["it is no LoRA adapter"]
    if here.use_dora != there.use_dora:
        mine, theirs = ("dora" if each.use_dora else "not dora" for each in (here, there))
        return [f"lora.variant is {mine}, but {theirs} there"]
    rank, alpha = one_scale(model)
    found = one_scale_in(model, tensors, there)
    if found is None:
        return []  # no layer in common
    if rank != found[0]:
        return [f"lora.rank is {here.r}, but {found[0]} there"]
    scale = found[1] / found[0]
    if math.isclose(alpha / rank, scale, rel_tol=1e-9):
        return []
    needed = scale * (math.sqrt(rank) if here.use_rslora else rank)
    variant = " for lora.variant rslora" if here.use_rslora else ""
    return [f"lora.alpha is {here.lora_alpha}, but {needed}{variant} there"]


def _other_layers(model: PeftModel, found: dict[str, list[int]]) -> list[str]:
    state = get_peft_model_state_dict(model, save_embedding_layers=False)
    wanted = {name: list(tensor.shape) for name, tensor in state.items()}
    only_here, only_there = sorted(wanted.keys() - found.keys()), sorted(found.keys() - wanted.keys())
    misshapen = [name for name in wanted.keys() & found.keys() if wanted[name] != found[name]]
    if only_here or only_there:
        return [f"lora.target_modules reaches {_layers(only_here)} besides, and not {_layers(only_there)} as there"]
    return [f"{name} is {wanted[name]}, but {found[name]} there" for name in sorted(misshapen)[:3]]


def _layers(names: list[str]) -> str:
    return ", ".join(dict.fromkeys(kind_of(name.split(".lora_")[0]) for name in names)) or "nothing"
