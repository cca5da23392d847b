"""Merged is base and adapter: the weights in the files against PEFT's own merge."""

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoTokenizer

from chatlora.errors import ModelError
from chatlora.merging.asked import asked_for
from chatlora.merging.changes import Change
from chatlora.merging.gate import reopened
from chatlora.merging.merge import files_of_base, merge, planned, served_by, written
from chatlora.model.loading import load_adapter, load_for_inference
from tests.merges import loaded, write_adapter, write_base, write_peft_adapter
from tests.model_families import FAMILIES

FP32, BF16 = torch.float32, torch.bfloat16
# Plain; tied; experts apart, under other names, under one name, and with their weights the other way round.
QUICK = ("Llama", "Qwen3", "Qwen3-MoE", "Mixtral", "Granite-4 hybrid", "gpt-oss")
SLOW = {True: (), False: (pytest.mark.slow,)}


def quietly(line: str) -> None:
    pass


def merged_weights(folder: Path, adapter: Path, base: Path) -> dict[str, torch.Tensor]:
    """What the files hold, opened by transformers under the checkpoint's own class."""
    config, served = served_by(base)
    files = files_of_base(base)
    folder.mkdir()
    written(planned(files, folder, adapter, config, served), files, adapter, quietly)
    for name in ("config.json", "model.safetensors.index.json"):
        if (base / name).is_file():
            (folder / name).write_bytes((base / name).read_bytes())
    return dict(reopened(folder, served, FP32).state_dict())


def weights_by_peft(adapter: Path, base: Path, stored: torch.dtype) -> dict[str, torch.Tensor]:
    model = load_adapter(loaded(base), adapter).merge_and_unload()
    return {name: tensor.to(stored).float() for name, tensor in model.state_dict().items()}


def apart(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor], stored: torch.dtype) -> list[str]:
    """Names of tensors that differ by more than a step of the type that they are stored in."""
    assert found.keys() == wanted.keys()
    step = torch.finfo(stored).eps
    return [name for name in wanted if not torch.allclose(found[name], wanted[name], rtol=2 * step, atol=1e-6)]


# ---- every family


@pytest.mark.parametrize("family", [pytest.param(each, marks=SLOW[each in QUICK]) for each in FAMILIES])
def test_merged_weights_are_those_of_peft_in_every_family(tmp_path: Path, family: str) -> None:
    stored = FP32 if list(FAMILIES).index(family) % 2 else BF16
    base = write_base(tmp_path / "base", family, stored)
    adapter = write_adapter(tmp_path / "adapter", base, variant="rslora" if stored == FP32 else None)
    found = merged_weights(tmp_path / "merged", adapter, base)
    assert not apart(found, weights_by_peft(adapter, base, stored), stored)
    plain = {name: tensor.float() for name, tensor in loaded(base).state_dict().items()}
    assert apart(found, plain, stored), "the adapter changed something"


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("stored", [FP32, BF16], ids=["fp32", "bf16"])
def test_every_family_passes_the_gate(tmp_path: Path, family: str, stored: torch.dtype) -> None:
    base = write_base(tmp_path / "base", family, stored)
    adapter = write_adapter(tmp_path / "adapter", base)
    verdict = merge(asked_for(adapter, None, None, FP32), tmp_path / "merged", quietly)
    assert not verdict.faults
    assert verdict.merged.kl < 0.1 * verdict.base.kl


def test_the_comparison_sees_one_expert_s_change_the_wrong_way_round(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = write_base(tmp_path / "base", "Qwen3-MoE", FP32, moe_intermediate_size=64)
    adapter = write_adapter(tmp_path / "adapter", base, target_modules=("experts.down_proj",))
    right, wanted = Change.delta, weights_by_peft(adapter, base, FP32)
    monkeypatch.setattr(Change, "delta", lambda change: torch.cat([right(change)[:1].mT, right(change)[1:]]))
    found = merged_weights(tmp_path / "merged", adapter, base)
    assert apart(found, wanted, FP32) == [f"model.layers.{layer}.mlp.experts.down_proj" for layer in (0, 1)]


def test_names_and_files_stay_and_what_the_adapter_leaves_alone_stays_to_the_byte(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", "Qwen3-MoE", BF16)
    adapter = write_adapter(tmp_path / "adapter", base, target_modules=("experts.down_proj",))
    merged_weights(tmp_path / "merged", adapter, base)
    changed = set()
    for file in sorted(base.glob("*.safetensors")):
        before, after = load_file(file), load_file(tmp_path / "merged" / file.name)
        assert before.keys() == after.keys()
        changed |= {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {f"model.layers.{i}.mlp.experts.{j}.down_proj.weight" for i in (0, 1) for j in range(4)}


def test_a_checkpoint_with_stacked_experts_keeps_them_stacked(tmp_path: Path) -> None:
    base = write_base(tmp_path / "old", "Qwen3-MoE", FP32)
    loaded(base).save_pretrained(tmp_path / "base", save_original_format=False)
    adapter = write_adapter(tmp_path / "adapter", tmp_path / "base")
    found = merged_weights(tmp_path / "merged", adapter, tmp_path / "base")
    assert not apart(found, weights_by_peft(adapter, tmp_path / "base", FP32), FP32)
    assert "model.layers.0.mlp.experts.gate_up_proj" in files_of_base(tmp_path / "merged").tensors


def test_a_checkpoint_of_another_class_than_was_trained(tmp_path: Path) -> None:
    """Qwen3.5's checkpoints name the class with vision; its language model is under other names there."""
    text = write_base(tmp_path / "text", "Qwen3.5", FP32)
    config = transformers.Qwen3_5Config(
        text_config=transformers.AutoConfig.from_pretrained(text).to_dict(),
        vision_config={"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 64},
    )
    torch.manual_seed(0)
    transformers.Qwen3_5ForConditionalGeneration(config).save_pretrained(tmp_path / "base")
    AutoTokenizer.from_pretrained(text).save_pretrained(tmp_path / "base")
    adapter = write_adapter(tmp_path / "adapter", tmp_path / "base")
    verdict = merge(asked_for(adapter, None, None, FP32), tmp_path / "merged", quietly)
    assert not verdict.faults
    found = json.loads((tmp_path / "merged/config.json").read_text())
    assert found["architectures"] == ["Qwen3_5ForConditionalGeneration"]


@pytest.mark.parametrize(
    "settings",
    [
        {"use_dora": True, "target_modules": ["q_proj", "down_proj"]},
        {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"down_proj": 3}, "target_modules": ["q_proj", "down_proj"]},
        {"target_modules": ["embed_tokens", "lm_head", "q_proj"], "use_rslora": True},
    ],
    ids=["dora", "patterns", "embeddings"],
)
def test_adapters_of_other_makers(tmp_path: Path, settings: dict[str, Any]) -> None:
    base = write_base(tmp_path / "base", "Llama", BF16)
    adapter = write_peft_adapter(tmp_path / "adapter", base, **settings)
    found = merged_weights(tmp_path / "merged", adapter, base)
    assert not apart(found, weights_by_peft(adapter, base, BF16), BF16)


def test_an_adapter_of_other_makers_is_opened_with_the_tokenizer_of_its_base(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", "Llama", FP32)
    adapter = write_peft_adapter(tmp_path / "adapter", base, target_modules=["q_proj"])
    model, tokenizer = load_for_inference(adapter)
    assert tokenizer.get_vocab() == AutoTokenizer.from_pretrained(base).get_vocab()
    assert not model.training
    settings = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(settings | {"base_model_name_or_path": None}))
    with pytest.raises(ModelError, match="does not name a base model"):
        load_for_inference(adapter)


def test_a_base_that_was_moved_is_no_reason_to_warn(tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", write_base(tmp_path / "base", "Llama", FP32))
    (tmp_path / "base").rename(tmp_path / "moved")
    base = loaded(tmp_path / "moved")
    with warnings.catch_warnings(action="error"):
        model = load_adapter(base, adapter)
    assert model.peft_config["default"].base_model_name_or_path == str(tmp_path / "moved")
