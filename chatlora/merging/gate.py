"""The gate: the merged files, opened as others open them, against the base with the adapter on it.

Three things are asked in turn, so that one model is in memory at a time: base and adapter, the same merged by PEFT and
rounded in memory, and what is on the disk.
"""

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer, ParamWrapper
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from chatlora.config import ModelConfig
from chatlora.errors import MergeError
from chatlora.merging.answers import Answers, answers_of, logits_of
from chatlora.merging.judgement import Verdict, judge
from chatlora.merging.probes import Probe
from chatlora.model.loading import (
    generation_stop_ids,
    load_adapter,
    load_base_model,
    load_tokenizer,
    refuse_ids_without_row,
)

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Trained:
    """What the merged model has to be: a base, an adapter on it, and the tokenizer that it was trained with."""

    base: ModelConfig
    adapter: Path
    tokenizer: PreTrainedTokenizerBase


def pass_gate(
    trained: Trained,
    merged: Path,
    served: type[PreTrainedModel],
    stored: torch.dtype,
    probes: Sequence[Probe],
    precision: torch.dtype,
    say: Say,
) -> Verdict:
    """The verdict on the folder `merged`, whatever it is. Raises MergeError where nothing can be asked of it.

    served: the class that its config.json names. stored: the type of the weights that changed. precision: of all
    computing.
    """
    refuse_other_tokenizer(trained.tokenizer, merged)
    stop_ids = sorted({*stops_of_training(trained, merged), *_eos(trained.tokenizer)})

    def asked(model: Any) -> Answers:
        return answers_of(model, probes, trained.tokenizer, stop_ids)

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    say(f"asking base and adapter {len(probes)} times")
    base = load_base_model(trained.base, dtype=precision).to(device)
    refuse_ids_without_row(base, trained.tokenizer, max(max(probe.prompt + probe.answer) for probe in probes))
    model = load_adapter(base, trained.adapter)
    reference = asked(model)
    with model.disable_adapter():
        alone = logits_of(model, probes)
    merge_in_memory(model, stored)
    rounded = asked(model)
    del model, base
    gc.collect()
    say(f"asking the merged model, reopened as {served.__name__}")
    return judge(reference, rounded, alone, asked(reopened(merged, served, precision).to(device)))


def reopened(folder: Path, served: type[PreTrainedModel], precision: torch.dtype) -> PreTrainedModel:
    """Raises MergeError where the files do not hold all that the class needs."""
    model, told = served.from_pretrained(
        folder, dtype=precision, use_safetensors=True, local_files_only=True, output_loading_info=True
    )
    lacking = [*told["missing_keys"], *(str(each) for each in told["mismatched_keys"])]
    if lacking:
        raise MergeError(f"{folder}: {served.__name__} finds no value there for {', '.join(sorted(lacking)[:3])}")
    return model.eval()


def refuse_other_tokenizer(trained: PreTrainedTokenizerBase, merged: Path) -> None:
    """Raises MergeError where the folder's tokenizer has another vocabulary or chat template than training's."""
    found = load_tokenizer(ModelConfig(name_or_path=str(merged)))
    if found.chat_template != trained.chat_template:
        raise MergeError(f"{merged}: its chat template is not the one of training")
    if found.get_vocab() != trained.get_vocab():
        raise MergeError(f"{merged}: its tokenizer is not the one of training")


def stops_of_training(trained: Trained, merged: Path) -> tuple[int, ...]:
    """What generation_config.json names beside the adapter, else beside its base.

    Raises MergeError where the merged folder's names others.
    """
    beside = ModelConfig(name_or_path=str(trained.adapter))
    has_own = (trained.adapter / "generation_config.json").is_file()
    wanted = generation_stop_ids(beside if has_own else trained.base)
    found = generation_stop_ids(ModelConfig(name_or_path=str(merged)))
    if set(found) != set(wanted):
        raise MergeError(f"{merged}: its stop tokens are {list(found)}, and those of training {list(wanted)}")
    return wanted


def merge_in_memory(model: PeftModel, stored: torch.dtype) -> None:
    """PEFT's own merge, with every weight that changed rounded once to `stored`, as a file would have it."""
    model.merge_adapter()
    for module in model.modules():
        if isinstance(module, LoraLayer):
            base = module.get_base_layer()
            weight = getattr(base, module.parameter_name if isinstance(module, ParamWrapper) else "weight")
            weight.data = weight.data.to(stored).to(weight.dtype)


def _eos(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    return [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
