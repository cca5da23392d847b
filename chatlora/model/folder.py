"""The folder of a model or an adapter: what it holds, what is missing, and what to do. Read without torch."""

import json
from pathlib import Path
from typing import Any

from chatlora.config import ModelConfig
from chatlora.embedded_model import EMBEDDED, embedded_model, source_of
from chatlora.errors import ModelError, similar_beside

TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")
WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
LFS = b"version https://git-lfs.github.com/spec/"  # how a file begins that `git clone` without LFS leaves
CHANGE_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")  # init_lora_weights that take a part out of the base
PICKLES = ("pytorch_model*.bin", "*.pt", "*.pth", "*.ckpt")


def locate(name_or_path: str) -> str:
    """What transformers is asked for: a local folder, or a name on the hub."""
    if name_or_path.startswith(EMBEDDED):
        return str(embedded_model(name_or_path))
    return name_or_path


def refuse_no_model(model: ModelConfig) -> None:
    """Raise ModelError where `model.name_or_path` is no model, or an adapter's folder or a run directory instead."""
    name = model.name_or_path
    if name.startswith(EMBEDDED):
        source_of(name)
        return
    folder = Path(name)
    if folder.is_file():
        raise ModelError(f"model.name_or_path: {name} is a file; name the folder with config.json and the weights")
    if not folder.is_dir() and (name.startswith((".", "/", "~")) or name.count("/") > 1):
        raise ModelError(f"model.name_or_path: the folder {name} does not exist{similar_beside(folder)}")
    if (folder / "adapter_config.json").is_file():
        raise ModelError(is_adapter(name, _adapter_settings(folder).get("base_model_name_or_path")))
    if (folder / "config.yaml").is_file() and not (folder / "config.json").is_file():
        raise ModelError(
            f"model.name_or_path: {folder} is a run directory, not a model: `evaluate.py {folder}` evaluates it, and "
            f"training goes on from its adapter with lora.init_from"
        )


def is_adapter(name: str, base: str | None) -> str:
    return (
        f"model.name_or_path: {name} is an adapter, not a model. Name its base model there ({base}), and the adapter "
        f"with `--adapter {name}` of evaluate.py, or in lora.init_from to train on from it"
    )


def fault_in_folder(folder: Path, wanted: str) -> str | None:
    """What is wrong with a folder's files for a model (`wanted`: model or tokenizer), and what to copy there."""
    pointers = [path.name for path in sorted(folder.glob("*")) if _is_pointer(path)]
    if pointers:
        return f"{folder} holds Git LFS pointers in place of {', '.join(pointers)}: run `git lfs pull` in it"
    broken = [fault for path in sorted(folder.glob("*.json")) if (fault := _fault_in_json(path))]
    if broken:
        return f"{'; '.join(broken)}: copy it again from the folder or hub page that the model comes from"
    if wanted == "tokenizer":
        if _any(folder, TOKENIZERS) or _any(folder, ("*.tiktoken", "*.model")):
            return None
        return (
            f"{folder} holds no tokenizer: none of {', '.join(TOKENIZERS)} is there. Copy tokenizer.json and "
            "tokenizer_config.json (and chat_template.jinja where there is one) into it from the folder or hub page "
            "that the model comes from; a fine-tuned model has its base model's"
        )
    if not (folder / "config.json").is_file():
        return (
            f"{folder} holds no model: config.json is not there. Name the folder that has it beside the weights, or "
            "copy it from the folder or hub page that the model comes from"
        )
    if _any(folder, (*WEIGHTS, "*.safetensors")):
        return None
    if _any(folder, PICKLES):
        return (
            f"{folder} holds pickled weights only, which can run code and are not read: take the model's safetensors "
            "files, or write them with save_pretrained of transformers"
        )
    return f"{folder} holds no weights: {WEIGHTS[0]}, or {WEIGHTS[1]} with its shards, are to be copied there"


def find_adapter(folder: Path) -> Path:
    """The adapter in a run directory (its adapter/), or the folder itself."""
    for candidate in (folder / "adapter", folder):
        if (candidate / "adapter_config.json").is_file():
            if not (candidate / "adapter_model.safetensors").is_file():
                raise ModelError(f"{candidate} holds no adapter_model.safetensors (pickled adapters are not read)")
            _adapter_settings(candidate)
            return candidate
    raise ModelError(f"{folder} holds no adapter: a finished run has adapter/adapter_config.json in it")


def base_of(adapter: Path) -> str | None:
    """The base model that an adapter's settings name; None where they name none, as other makers may leave it."""
    name = _adapter_settings(adapter).get("base_model_name_or_path")
    return name if isinstance(name, str) and name else None


def _adapter_settings(folder: Path) -> dict[str, Any]:
    path = folder / "adapter_config.json"
    fault, settings = _fault_in_json(path), None
    if fault is None:
        settings = json.loads(path.read_bytes())
    if not isinstance(settings, dict):
        raise ModelError(f"{fault or f'{path} holds no object of settings'}: copy the adapter's folder again")
    return settings


def _is_pointer(path: Path) -> bool:
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(len(LFS)) == LFS


def _fault_in_json(path: Path) -> str | None:
    try:
        json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        return f"{path} cannot be read ({error})"
    return None


def _any(folder: Path, patterns: tuple[str, ...]) -> bool:
    return any(next(folder.glob(pattern), None) is not None for pattern in patterns)
