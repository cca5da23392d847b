"""Base models, tokenizers and adapters from a folder, the hub or the embedded model. No remote code, no pickle."""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

from chatlora.config import ModelConfig
from chatlora.embedded_model import EMBEDDED, embedded_model
from chatlora.errors import ModelError
from chatlora.model.adapter_folder import names_from_checkpoint, why_not_fitting
from chatlora.model.lora import without_false_alarms
from chatlora.rendering.renderer import Renderer
from chatlora.rendering.template import chat_template_of, resolve_template_kwargs


def locate(name_or_path: str) -> str:
    """What transformers is asked for: a local folder, or a name on the hub."""
    if name_or_path.startswith(EMBEDDED):
        return str(embedded_model(name_or_path))
    return name_or_path


def load_tokenizer(model: ModelConfig, adapter: Path | None = None) -> PreTrainedTokenizerBase:
    """The model's tokenizer, with `model.chat_template` in place of its own template where that is set.

    With an adapter, the one that was saved with it, if any: what it was trained with, template included.
    """
    _refuse_adapter(model)
    if adapter is not None and model.chat_template is None and (adapter / "tokenizer_config.json").is_file():
        return _from_pretrained(AutoTokenizer, ModelConfig(name_or_path=str(adapter)))
    tokenizer = _from_pretrained(AutoTokenizer, model)
    if model.chat_template is not None:
        try:
            tokenizer.chat_template = model.chat_template.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ModelError(f"model.chat_template: {model.chat_template} cannot be read: {error}") from None
    return tokenizer


def load_base_model(model: ModelConfig, *, dtype: torch.dtype) -> PreTrainedModel:
    """The causal language model in `dtype`, with the attention that transformers chooses.

    That is the fastest one that is exact on it: eager where scaled-dot-product attention lacks soft-capping or sinks.
    """
    _refuse_adapter(model)
    base = _from_pretrained(AutoModelForCausalLM, model, dtype=dtype, use_safetensors=True)
    if base._hf_peft_config_loaded:  # an adapter of the hub: transformers has put it on its base
        raise ModelError(_is_adapter(model.name_or_path, base.config.name_or_path))
    assert base.dtype == dtype
    # transformers 5 keeps no record of it; under this name it is left out of what a configuration saves.
    base.config._commit_hash = model.revision
    return base


def renderer_for(tokenizer: PreTrainedTokenizerBase, model: ModelConfig, *, any_reasoning: bool) -> Renderer:
    """The renderer that training, evaluation and chat share: one template, one date, one set of stop tokens."""
    kwargs = resolve_template_kwargs(
        chat_template_of(tokenizer, None), model.chat_template_kwargs, any_reasoning=any_reasoning
    )
    return Renderer(
        tokenizer,
        chat_template_kwargs=kwargs,
        chat_template_date=model.chat_template_date,
        generation_stop_ids=generation_stop_ids(model),
    )


def generation_stop_ids(model: ModelConfig) -> tuple[int, ...]:
    """The stop tokens that the checkpoint's generation_config.json names; none where it has no such file."""
    where = locate(model.name_or_path)
    try:
        config = GenerationConfig.from_pretrained(where, revision=model.revision, local_files_only=Path(where).is_dir())
    except OSError:
        return ()
    ids = config.eos_token_id
    return tuple(ids) if isinstance(ids, list) else () if ids is None else (ids,)


def load_for_inference(
    run_dir_or_adapter: str | Path, *, merge: bool = False, dtype: torch.dtype | None = None
) -> tuple[PeftModel | PreTrainedModel, PreTrainedTokenizerBase]:
    """The base model with a trained adapter (folded into it where `merge`), in evaluation mode, and its tokenizer.

    Takes a run directory or an adapter folder. Raises ModelError where there is no adapter. dtype: fp32 by default.
    """
    adapter = find_adapter(Path(run_dir_or_adapter))
    settings = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    base_model = ModelConfig(name_or_path=settings["base_model_name_or_path"], revision=settings.get("revision"))
    base = load_base_model(base_model, dtype=dtype or torch.float32)
    model = load_adapter(base, adapter)
    tokenizer = _from_pretrained(AutoTokenizer, ModelConfig(name_or_path=str(adapter)))
    return (model.merge_and_unload() if merge else model).eval(), tokenizer


def load_adapter(base: PreTrainedModel, adapter: Path) -> PeftModel:
    """The base with an adapter on it, frozen, in fp32.

    Raises ModelError where a tensor of the adapter has no place in this model, or a place gets none.
    """
    mapping = names_from_checkpoint(base)
    try:
        fault = why_not_fitting(base, adapter)
    except (ValueError, KeyError, TypeError) as error:  # of PEFT: settings that this model cannot meet
        fault = " ".join(str(error).split())
    if fault:
        trained_on = json.loads((adapter / "adapter_config.json").read_text("utf-8"))["base_model_name_or_path"]
        raise ModelError(
            f"the adapter {adapter} does not belong to the model {base.name_or_path}: {fault}. It was trained on "
            f"{trained_on}; give that as the model"
        )
    with without_false_alarms():
        model = PeftModel.from_pretrained(base, str(adapter), is_trainable=False, key_mapping=mapping or None)
    return model.eval()


def refuse_ids_without_row(base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, largest_id: int) -> None:
    """Raise ModelError where a token of the data has no row in the model's embeddings."""
    rows = base.get_input_embeddings().num_embeddings
    if largest_id >= rows:
        raise ModelError(
            f"the rows become token {largest_id} ({tokenizer.convert_ids_to_tokens(largest_id)}), but the model has "
            f"embeddings for {rows:,} tokens and the tokenizer knows {len(tokenizer):,}: tokenizer or chat template "
            f"belong to another model, or tokens were added to it. Take the model's own, or a checkpoint that was "
            f"resized (resize_token_embeddings); lora.target_modules can then reach embed_tokens and lm_head too"
        )


def find_adapter(folder: Path) -> Path:
    """The adapter in a run directory (its adapter/), or the folder itself."""
    for candidate in (folder / "adapter", folder):
        if (candidate / "adapter_config.json").is_file():
            if not (candidate / "adapter_model.safetensors").is_file():
                raise ModelError(f"{candidate} holds no adapter_model.safetensors (pickled adapters are not read)")
            return candidate
    raise ModelError(f"{folder} holds no adapter: a finished run has adapter/adapter_config.json in it")


def _refuse_adapter(model: ModelConfig) -> None:
    """Raise ModelError where `model.name_or_path` is an adapter's folder or a run directory, which hold no model."""
    folder = Path(model.name_or_path)
    if (folder / "adapter_config.json").is_file():
        settings = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        raise ModelError(_is_adapter(model.name_or_path, settings.get("base_model_name_or_path")))
    if (folder / "config.yaml").is_file() and not (folder / "config.json").is_file():
        raise ModelError(
            f"model.name_or_path: {folder} is a run directory, not a model: `evaluate.py {folder}` evaluates it, and "
            f"training goes on from its adapter with lora.init_from"
        )


def _is_adapter(name: str, base: str | None) -> str:
    return (
        f"model.name_or_path: {name} is an adapter, not a model. Name its base model there ({base}), and the adapter "
        f"with `--adapter {name}` of evaluate.py, or in lora.init_from to train on from it"
    )


def _from_pretrained(auto: Any, model: ModelConfig, **arguments: Any) -> Any:
    if not sys.stderr.isatty():  # a log file would keep every state of a progress bar
        logging.disable_progress_bar()
    where = locate(model.name_or_path)
    is_local = Path(where).is_dir()
    if not is_local and (where.startswith((".", "/", "~")) or where.count("/") > 1):
        raise ModelError(f"model.name_or_path: the folder {where} does not exist")
    try:
        return auto.from_pretrained(
            where, revision=model.revision, local_files_only=is_local, trust_remote_code=False, **arguments
        )
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(_explain(where, is_local, auto, error)) from error


def _explain(where: str, is_local: bool, auto: Any, error: Exception) -> str:
    reason = " ".join(str(error).split())
    if "trust_remote_code" in reason:
        return (
            f"{where} comes with code of its own, which chatlora never runs. Use a checkpoint that transformers knows "
            "natively: `chatlora convert-chatglm3` makes one of ChatGLM3, GLM-4 has them (glm-4-9b-chat-hf, GLM-4-0414)"
        )
    if is_local:
        what = "model" if auto in (AutoModelForCausalLM, AutoConfig) else "tokenizer"
        return f"model.name_or_path: no {what} can be read from {where}: {reason}"
    return (
        f"model.name_or_path: {where} could not be fetched from the model hub. Ways on: set HF_ENDPOINT to a mirror "
        f"that can be reached, give the path of a local folder, or use embedded:smollm2-135m-instruct. "
        f"The reason was: {reason}"
    )
