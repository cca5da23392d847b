"""Tiny bases on disk with an adapter each, for merging."""

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig as PeftLoraConfig
from peft import PeftModel, get_peft_model
from transformers import PreTrainedModel

from chatlora.config import LoraConfig, ModelConfig
from chatlora.model.adapter_folder import save_adapter
from chatlora.model.loading import load_base_model
from chatlora.model.lora import add_lora, trainable
from tests.model_families import FAMILIES, build_base
from tests.tiny_tokenizers import tiny_tokenizer

SHARD = "120KB"  # two to a dozen shards for a tiny model


def write_base(folder: Path, family: str, dtype: torch.dtype, **changes: Any) -> Path:
    """`folder` with a base of the family, whose embeddings have a row for every token, and a tokenizer."""
    tokenizer = tiny_tokenizer()
    stem, config, own = FAMILIES[family]
    FAMILIES["of this test"] = (stem, config, {**own, "vocab_size": len(tokenizer), **changes})
    base = build_base("of this test")
    del FAMILIES["of this test"]
    base.to(dtype).save_pretrained(folder, max_shard_size=SHARD)
    tokenizer.save_pretrained(folder)
    return folder


def write_adapter(folder: Path, base: Path, variant: Any = None, **lora: Any) -> Path:
    """An adapter as training saves it, with random numbers for what was learned."""
    model = add_lora(loaded(base), LoraConfig(rank=4, dropout=0.0, variant=variant, **lora), seed=0)
    save_adapter(model, random_weights(model), folder)
    return folder


def write_peft_adapter(folder: Path, base: Path, **settings: Any) -> Path:
    """An adapter of somebody else's making."""
    model = get_peft_model(loaded(base), PeftLoraConfig(r=4, task_type="CAUSAL_LM", **settings))
    assert isinstance(model, PeftModel)
    random_weights(model)
    model.save_pretrained(folder, save_embedding_layers=False)
    return folder


def loaded(base: Path) -> PreTrainedModel:
    return load_base_model(ModelConfig(name_or_path=str(base)), dtype=torch.float32)


def random_weights(model: PeftModel) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    weights = {}
    for name, parameter in trainable(model).items():
        if "magnitude" in name:
            parameter.data *= 1 + 0.1 * torch.rand_like(parameter)
        else:
            torch.nn.init.normal_(parameter, std=0.05)
        weights[name] = parameter.detach()
    return weights
