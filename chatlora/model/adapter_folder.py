"""An adapter as others load it: written and read, with names as the checkpoint has them.

A server loads the class that the checkpoint's `architectures` names. Where that is another one than was trained, as
for Qwen3.5 (`Qwen3_5ForConditionalGeneration`, whose layers are under `model.language_model`), an adapter under the
trained model's names is ignored without a word.
"""

import json
import re
from collections.abc import Mapping
from datetime import date
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import (
    LoraConfig,
    PeftConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    load_peft_weights,
    set_peft_model_state_dict,
)
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, GenerationConfig, PreTrainedModel

from chatlora.config import ExpertFormat, ModelConfig
from chatlora.errors import ModelError
from chatlora.model.experts import expert_names, is_per_expert, split, stacked, with_sglangs_names
from chatlora.model.lora import without_false_alarms
from chatlora.model.scales import folded, one_scale

WEIGHTS = "adapter_model.safetensors"
PEFT_PREFIX = "base_model.model."
SETTINGS = "chatlora.json"  # what the template was told: without it the same template writes other prompts
TOLD = ("chat_template_kwargs", "chat_template_date")  # all that stands there: a file of others names no other files

Tensors = Mapping[str, torch.Tensor]


def served_class(base: PreTrainedModel) -> type[PreTrainedModel]:
    """The class that the checkpoint's config.json names first; that of `base` where it names none that is known."""
    return _served(base)[0]


def names_from_checkpoint(base: PreTrainedModel) -> dict[str, str]:
    """PEFT's `key_mapping` from the names of a saved adapter to those in `base`; empty where they are the same."""
    ours, theirs = _prefixes(base)
    return {} if ours == theirs else {rf"^{re.escape(theirs)}\.": f"{ours}."}


def read_adapter(base: PreTrainedModel, folder: Path) -> tuple[PeftConfig, dict[str, torch.Tensor]]:
    """An adapter's settings and tensors for PEFT, under the names in `base`, with experts stacked as they are there.

    Raises ModelError where the file of tensors is cut off or none.
    """
    try:
        tensors = load_peft_weights(str(folder), device="cpu", key_mapping=names_from_checkpoint(base) or None)
    except SafetensorError as error:
        raise ModelError(f"{folder / WEIGHTS} cannot be read ({error}): copy the adapter's folder again") from None
    settings = PeftConfig.from_pretrained(str(folder))
    settings.inference_mode = True
    settings.base_model_name_or_path = None  # PEFT warns of a base that was moved, and writes where it is now
    return stacked(settings, tensors, expert_names(base)) if isinstance(settings, LoraConfig) else (settings, tensors)


def put_on(base: PreTrainedModel, folder: Path) -> PeftModel:
    """The base with the adapter in `folder` on it, frozen, in fp32: as PEFT opens it, in whichever form it is."""
    settings, tensors = read_adapter(base, folder)
    with without_false_alarms():
        model = get_peft_model(base, settings)
        set_peft_model_state_dict(model, tensors)
    assert isinstance(model, PeftModel)
    return model


def save_adapter(model: PeftModel, weights: Tensors, folder: Path, expert_format: ExpertFormat = "auto") -> None:
    """Write a PEFT adapter from full tensors by parameter name, as `trainable` names them.

    Under served names, and at one rank and one scale: alpha / r of the file, whatever it was in training.
    """
    base = model.get_base_model()
    # PEFT would reach for the hub to learn whether the embeddings were resized; they never are here.
    model.save_pretrained(folder, state_dict=folded(model, weights), save_embedding_layers=False)
    settings, tensors = PeftConfig.from_pretrained(str(folder)), load_file(folder / WEIGHTS)
    assert isinstance(settings, LoraConfig)
    settings.r, settings.lora_alpha = one_scale(model)
    settings.use_rslora, settings.rank_pattern, settings.alpha_pattern = False, {}, {}
    settings.init_lora_weights = True  # another one would be done again, to the base, by whoever opens the adapter
    names = expert_names(base)
    if names is not None and is_per_expert(base, expert_format):
        settings, tensors = split(settings, tensors, names)
    settings.target_modules = with_sglangs_names(settings.target_modules or [])
    settings.save_pretrained(str(folder))
    ours, theirs = (f"{PEFT_PREFIX}{prefix}." for prefix in _prefixes(base))
    if ours != theirs:
        tensors = {name.replace(ours, theirs, 1) if name.startswith(ours) else name: t for name, t in tensors.items()}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def save_template_settings(folder: Path, chat_template_kwargs: Mapping[str, Any], day: date | None) -> None:
    settings = {
        "chat_template_kwargs": dict(chat_template_kwargs),
        "chat_template_date": None if day is None else day.isoformat(),
    }
    text = json.dumps(settings, ensure_ascii=False, indent=2)
    (folder / SETTINGS).write_text(text + "\n", encoding="utf-8")


def as_adapter_was_trained(model: ModelConfig, adapter: Path) -> ModelConfig:
    """`model` with the template's settings from beside the adapter; as it is where none were saved.

    The revision is the adapter's too where it was trained on this model and `model` names none. Raises ModelError
    where the settings cannot be read.
    """
    trained = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    values = model.model_dump()
    if model.revision is None and trained.get("base_model_name_or_path") == model.name_or_path:
        values["revision"] = trained.get("revision")
    return with_template_settings(ModelConfig.model_validate(values), adapter)


def with_template_settings(model: ModelConfig, folder: Path) -> ModelConfig:
    """`model` with the template's settings from `folder`, of an adapter or a merged model; as it is where none are.

    Raises ModelError where they cannot be read.
    """
    path = folder / SETTINGS
    if not path.is_file():
        return model
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
        strange = sorted(told.keys() - {*TOLD})
        if strange:
            raise ValueError(f"{strange[0]} is none of {', '.join(TOLD)}")
        return ModelConfig.model_validate(model.model_dump() | told)
    except (ValueError, TypeError, AttributeError, ValidationError) as error:
        reason = " ".join(str(error).split())
        raise ModelError(f"{path} cannot be used: {reason}; bring it back, or remove it") from None


def save_generation_config(base: PreTrainedModel, stop_ids: tuple[int, ...], folder: Path) -> None:
    """The base's generation settings with every token that ends a reply."""
    settings = base.generation_config.to_diff_dict() | {"eos_token_id": list(stop_ids)}
    try:
        GenerationConfig(**settings).save_pretrained(folder)
    except ValueError:  # of a checkpoint whose settings contradict each other: that must not cost a trained adapter
        kept = ("bos_token_id", "eos_token_id", "pad_token_id")
        GenerationConfig(**{name: settings[name] for name in kept if name in settings}).save_pretrained(folder)


def why_not_fitting(base: PreTrainedModel, folder: Path) -> str | None:
    """None if every tensor of the adapter in `folder` has its place in `base` and none is left without one.

    Else half a sentence. Nothing is put on `base`: names and shapes are those of a copy without memory. Raises
    ValueError where the adapter's settings cannot be met by this model at all.
    """
    with torch.device("meta"):
        skeleton = type(base)(base.config)
    return compared(skeleton, *read_adapter(base, folder))


def compared(skeleton: PreTrainedModel, settings: PeftConfig, tensors: Tensors) -> str | None:
    """What is wrong with an adapter of these settings and tensors on `skeleton`."""
    served = type(skeleton).__name__
    found = {name: list(tensor.shape) for name, tensor in tensors.items()}
    with torch.device("meta"), without_false_alarms():
        opened = get_peft_model(skeleton, settings, low_cpu_mem_usage=True)
    wanted = {n: list(t.shape) for n, t in get_peft_model_state_dict(opened, save_embedding_layers=False).items()}
    # PEFT may save whole embeddings beside an adapter, and puts them in place of the model's own.
    known = wanted | {n: list(t.shape) for n, t in opened.state_dict().items() if "lora_" not in n}
    unknown, missing = sorted(found.keys() - known.keys()), sorted(wanted.keys() - found.keys())
    if unknown or missing:
        return (
            f"{served} would ignore {len(unknown)} of its tensors ({', '.join(unknown[:2])}) and lack {len(missing)} "
            f"({', '.join(missing[:2])})"
        )
    misshapen = [name for name, shape in found.items() if shape != known[name]]
    return f"{misshapen[0]} has another shape in {served}" if misshapen else None


def _served(base: PreTrainedModel) -> tuple[type[PreTrainedModel], transformers.PreTrainedConfig]:
    if not base.name_or_path:
        return type(base), base.config
    revision = vars(base.config).get("_commit_hash")  # as loading.load_base_model leaves it there
    config = AutoConfig.from_pretrained(
        base.name_or_path, revision=revision, local_files_only=True, trust_remote_code=False
    )
    found = getattr(transformers, (config.architectures or [""])[0], None)
    return (type(base), base.config) if found is None else (found, config)


def skeleton_of(base: PreTrainedModel) -> PreTrainedModel:
    """The served model on the meta device: names and shapes, no memory."""
    served, config = _served(base)
    with torch.device("meta"):
        skeleton = served(config)
    skeleton.name_or_path = ""  # its names are the served ones: there is nothing to look up
    return skeleton


def _prefixes(base: PreTrainedModel) -> tuple[str, str]:
    """Where the language model's layers are in `base`, and where in the served class."""
    if served_class(base) is type(base):
        return "", ""
    return _prefix(base), _prefix(skeleton_of(base))


def _prefix(model: PreTrainedModel) -> str:
    decoder = model.get_decoder()
    (prefix,) = (name for name, module in model.named_modules() if module is decoder)
    return str(prefix)
