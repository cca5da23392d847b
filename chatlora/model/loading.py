"""Base models, tokenizers and adapters from a folder, the hub or the embedded model. No remote code, no pickle."""

import errno
import sys
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

from chatlora.config import DataConfig, ModelConfig
from chatlora.errors import ModelError
from chatlora.hub import why_unreachable
from chatlora.model.adapter_folder import as_adapter_was_trained, put_on, why_not_fitting
from chatlora.model.folder import base_of, fault_in_folder, find_adapter, is_adapter, locate, refuse_no_model
from chatlora.rendering.completion import embedded_template
from chatlora.rendering.embedded import embedded_name
from chatlora.rendering.renderer import Renderer
from chatlora.rendering.template import chat_template_of, resolve_template_kwargs


def load_tokenizer(model: ModelConfig, adapter: Path | None = None) -> PreTrainedTokenizerBase:
    """The model's tokenizer, with its own chat template.

    With an adapter, the one that was saved with it, if any: what it was trained with, template included; but not where
    `model.chat_template` is set, which may ask for the base's own.
    """
    refuse_no_model(model)
    if adapter is not None and model.chat_template is None and (adapter / "tokenizer_config.json").is_file():
        return _from_pretrained(AutoTokenizer, ModelConfig(name_or_path=str(adapter)))
    return _from_pretrained(AutoTokenizer, model)


def load_config(model: ModelConfig) -> PreTrainedConfig:
    """What config.json says. Raises ModelError where transformers does not know it without code of its own."""
    config: PreTrainedConfig = _from_pretrained(AutoConfig, model)
    return config


def load_base_model(model: ModelConfig, *, dtype: torch.dtype) -> PreTrainedModel:
    """The causal language model in `dtype`, with the attention that transformers chooses.

    That is the fastest one that is exact on it: eager where scaled-dot-product attention lacks soft-capping or sinks.
    """
    refuse_no_model(model)
    adapter_kwargs = {"local_files_only": _from_disk(locate(model.name_or_path))}  # it would ask the hub for one
    base = _from_pretrained(
        AutoModelForCausalLM, model, dtype=dtype, use_safetensors=True, adapter_kwargs=adapter_kwargs
    )
    if base._hf_peft_config_loaded:  # an adapter of the hub: transformers has put it on its base
        raise ModelError(is_adapter(model.name_or_path, base.config.name_or_path))
    assert base.dtype == dtype
    # transformers 5 keeps no record of it; under this name it is left out of what a configuration saves.
    base.config._commit_hash = model.revision
    return base


def renderer_for(
    tokenizer: PreTrainedTokenizerBase, model: ModelConfig, data: DataConfig, *, any_reasoning: bool
) -> Renderer:
    """The renderer that training, evaluation and chat share: one template, one date, one set of stop tokens."""
    template = chat_template_of(tokenizer, _given_template(model.chat_template, tokenizer))
    kwargs = resolve_template_kwargs(
        template, model.chat_template_kwargs, any_reasoning=any_reasoning and data.reasoning != "drop"
    )
    return Renderer(
        tokenizer,
        chat_template=template,
        chat_template_kwargs=kwargs,
        chat_template_date=model.chat_template_date,
        generation_stop_ids=generation_stop_ids(model),
        reasoning=data.reasoning,
        control_text=data.control_text,
    )


def _given_template(given: Path | None, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The text of `model.chat_template`; None where the tokenizer's own is to be used."""
    if given is None:
        return None
    name = embedded_name(given)
    if name is not None:
        return embedded_template(name, tokenizer)
    try:
        return given.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ModelError(f"model.chat_template: {given} cannot be read: {error}") from None


def generation_stop_ids(model: ModelConfig) -> tuple[int, ...]:
    """The stop tokens that the checkpoint's generation_config.json names; none where it has no such file."""
    where = locate(model.name_or_path)
    try:
        config = GenerationConfig.from_pretrained(where, revision=model.revision, local_files_only=_from_disk(where))
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
    name = base_of(adapter)
    if name is None:
        raise ModelError(f"{adapter}/adapter_config.json does not name a base model; write its folder or hub id there")
    base_model = as_adapter_was_trained(ModelConfig(name_or_path=name), adapter)
    base = load_base_model(base_model, dtype=dtype or torch.float32)
    model = load_adapter(base, adapter)
    tokenizer = load_tokenizer(base_model, adapter)
    return (model.merge_and_unload() if merge else model).eval(), tokenizer


def load_adapter(base: PreTrainedModel, adapter: Path) -> PeftModel:
    """The base with an adapter on it, frozen, in fp32.

    Raises ModelError where a tensor of the adapter has no place in this model, or a place gets none.
    """
    refuse_other_model(base, adapter)
    return put_on(base, adapter).eval()


def refuse_other_model(base: PreTrainedModel, adapter: Path) -> None:
    """Raise ModelError where a tensor of the adapter has no place in this model, or a place gets none."""
    try:
        fault = why_not_fitting(base, adapter)
    except (ValueError, KeyError, TypeError) as error:  # of PEFT: settings that this model cannot meet
        fault = " ".join(str(error).split())
    if fault:
        trained_on = base_of(adapter)
        hint = "" if trained_on is None else f". It was trained on {trained_on}; give that as the model"
        raise ModelError(f"the adapter {adapter} does not belong to the model {base.name_or_path}: {fault}{hint}")


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


def _from_pretrained(auto: Any, model: ModelConfig, **arguments: Any) -> Any:
    if not sys.stderr.isatty():  # a log file would keep every state of a progress bar
        logging.disable_progress_bar()
    where = locate(model.name_or_path)
    try:
        return auto.from_pretrained(
            where, revision=model.revision, local_files_only=_from_disk(where), trust_remote_code=False, **arguments
        )
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        if isinstance(error, OSError) and error.errno == errno.ENOMEM:
            raise MemoryError(str(error)) from error
        raise ModelError(f"model.name_or_path: {_explain(where, auto, error)}") from error


def _from_disk(where: str) -> bool:
    """Whether nothing is asked of the hub: of a folder never, of what is cached not where the hub does not answer."""
    return Path(where).is_dir() or why_unreachable() is not None


def _explain(where: str, auto: Any, error: Exception) -> str:
    reason = " ".join(str(error).split())
    if "trust_remote_code" in reason:
        return (
            f"{where} comes with code of its own, which chatlora never runs. Use a checkpoint that transformers knows "
            "natively: `chatlora convert-chatglm3` makes one of ChatGLM3, GLM-4 has them (glm-4-9b-chat-hf, GLM-4-0414)"
        )
    if Path(where).is_dir():
        what = "tokenizer" if auto is AutoTokenizer else "model"
        cut_off = (
            " (cut off while it was copied?); copy or download it again" if isinstance(error, SafetensorError) else ""
        )
        return fault_in_folder(Path(where), what) or f"no {what} can be read from {where}: {reason}{cut_off}"
    unreachable = why_unreachable()
    ways = (
        "Ways on: set HF_ENDPOINT to a mirror that can be reached, give the path of a local folder, or use "
        "embedded:smollm2-135m-instruct"
    )
    if unreachable is None:
        return f"{where} could not be fetched from the model hub. {ways}. The reason was: {reason}"
    return f"{where} is no folder here, it is not whole in the hub's local cache, and {unreachable}. {ways}"
