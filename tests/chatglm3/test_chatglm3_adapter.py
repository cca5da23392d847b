"""Old LoRA adapters: on every module the native adapter adds to the weights what the old one added.

Run: pytest tests/chatglm3/test_chatglm3_adapter.py
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from chatlora.chatglm3.adapter import convert_adapter
from chatlora.chatglm3.checkpoint import convert_checkpoint
from chatlora.chatglm3.naming import MODULES, known_tensors
from chatlora.errors import ModelError
from tests.chatglm3_checkpoints import TINY, write_checkpoint

RANK, ALPHA = 4, 12
SETTINGS = {
    "peft_type": "LORA",
    "r": RANK,
    "lora_alpha": ALPHA,
    "lora_dropout": 0.1,
    "task_type": "CAUSAL_LM",
    "bias": "none",
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    write_checkpoint(folder / "old", TINY, dtype=torch.float32)
    convert_checkpoint(folder / "old", folder / "new", lambda line: None)
    return folder / "new"


def write_adapter(
    folder: Path, places: list[tuple[int, str]], *, suffix: str = "safetensors", **settings: Any
) -> dict[str, torch.Tensor]:
    """A random old adapter on (layer, module); returns what it adds to each of the old weights, before scaling."""
    folder.mkdir(parents=True)
    known, generator = known_tensors(TINY), torch.Generator().manual_seed(1)
    factors: dict[str, torch.Tensor] = {}
    added: dict[str, torch.Tensor] = {}
    for layer, module in places:
        name = f"transformer.encoder.layers.{layer}.{module}"
        rows, columns = known[f"{name}.weight"].shape
        a, b = torch.rand(RANK, columns, generator=generator), torch.rand(rows, RANK, generator=generator)
        factors |= {f"base_model.model.{name}.lora_A.weight": a, f"base_model.model.{name}.lora_B.weight": b}
        added[f"{name}.weight"] = b @ a
    if suffix == "safetensors":
        save_file(factors, folder / "adapter_model.safetensors")
    else:
        torch.save(factors, folder / "adapter_model.bin")
    targets = sorted({module.rpartition(".")[2] for _, module in places})
    (folder / "adapter_config.json").write_text(json.dumps({**SETTINGS, "target_modules": targets, **settings}))
    return added


def assert_adds(base: Path, adapter: Path, added: dict[str, torch.Tensor], scale: float) -> None:
    before = AutoModelForCausalLM.from_pretrained(base).state_dict()
    merged = (
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).merge_and_unload().state_dict()
    )
    changed = {name for name, weight in merged.items() if not torch.equal(weight, before[name])}
    known = known_tensors(TINY)
    assert changed == {part.name for name in added for part in known[name].parts}
    for name, delta in added.items():
        rows = torch.cat([merged[part.name] - before[part.name] for part in known[name].parts])
        assert torch.allclose(rows, scale * delta, atol=1e-5), name


ALL = [(layer, module) for layer in range(TINY["num_layers"]) for module in MODULES]


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_every_target_adds_what_it_added(base: Path, tmp_path: Path, suffix: str) -> None:
    added = write_adapter(tmp_path / "old", ALL, suffix=suffix)
    convert_adapter(tmp_path / "old", tmp_path / "new", base, lambda line: None)
    assert_adds(base, tmp_path / "new", added, ALPHA / RANK)
    config = json.loads((tmp_path / "new/adapter_config.json").read_text())
    assert config["target_modules"] == ["down_proj", "gate_up_proj", "k_proj", "o_proj", "q_proj", "v_proj"]
    assert config["base_model_name_or_path"] == str(base)


def test_an_adapter_on_some_layers_stays_on_them(base: Path, tmp_path: Path) -> None:
    places = [(1, "self_attention.query_key_value")]
    added = write_adapter(tmp_path / "old", places, layers_to_transform=[1], layers_pattern="layers")
    convert_adapter(tmp_path / "old", tmp_path / "new", base, lambda line: None)
    assert_adds(base, tmp_path / "new", added, ALPHA / RANK)


def test_rank_stabilised_scaling_is_kept(base: Path, tmp_path: Path) -> None:
    added = write_adapter(tmp_path / "old", ALL[:1] + ALL[4:5], use_rslora=True)
    convert_adapter(tmp_path / "old", tmp_path / "new", base, lambda line: None)
    assert_adds(base, tmp_path / "new", added, ALPHA / RANK**0.5)


def test_the_three_share_a_and_split_b(tmp_path: Path) -> None:
    write_adapter(tmp_path / "old", ALL)
    convert_adapter(tmp_path / "old", tmp_path / "new", None, lambda line: None)
    old, new = (load_file(tmp_path / folder / "adapter_model.safetensors") for folder in ("old", "new"))
    fused = "base_model.model.transformer.encoder.layers.0.self_attention.query_key_value"
    parts = [f"base_model.model.model.layers.0.self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj")]
    assert all(torch.equal(new[f"{part}.lora_A.weight"], old[f"{fused}.lora_A.weight"]) for part in parts)
    assert torch.equal(torch.cat([new[f"{part}.lora_B.weight"] for part in parts]), old[f"{fused}.lora_B.weight"])


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"peft_type": "PREFIX_TUNING"}, "an adapter of the kind PREFIX_TUNING"),
        ({"bias": "all"}, "trains biases"),
        ({"modules_to_save": ["output_layer"]}, "modules_to_save is"),
        ({"rank_pattern": {"dense": 2}}, "rank_pattern is"),
        ({"init_lora_weights": "pissa_niter_4"}, "belongs to a changed base model"),
        ({"init_lora_weights": "lora_ga"}, "belongs to a changed base model"),
    ],
)
def test_what_cannot_be_carried_over_is_refused(tmp_path: Path, settings: dict[str, Any], reason: str) -> None:
    write_adapter(tmp_path / "old", ALL, **settings)
    with pytest.raises(ModelError, match=reason):
        convert_adapter(tmp_path / "old", tmp_path / "new", None, lambda line: None)
    assert not (tmp_path / "new").exists()


def test_another_model_s_adapter_is_refused(base: Path, tmp_path: Path) -> None:
    write_adapter(tmp_path / "old", ALL)
    weights = load_file(tmp_path / "old/adapter_model.safetensors")

    def refused(changed: dict[str, torch.Tensor], reason: str) -> None:
        save_file(changed, tmp_path / "old/adapter_model.safetensors")
        with pytest.raises(ModelError, match=reason):
            convert_adapter(tmp_path / "old", tmp_path / "new", base, lambda line: None)

    refused({**weights, "base_model.model.model.layers.0.q_proj.lora_A.weight": torch.ones(4, 4)}, "no LoRA factors")
    refused({name.replace("layers.1", "layers.7"): weight for name, weight in weights.items()}, "has 2 layers only")
    fused = "base_model.model.transformer.encoder.layers.0.self_attention.query_key_value.lora_B.weight"
    refused({**weights, fused: torch.ones(9, RANK)}, "cannot be those of q, k and v")
    refused({**weights, fused: torch.ones(20, RANK)}, "another model's")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match="holds no adapter"):
        convert_adapter(tmp_path / "empty", tmp_path / "new", base, lambda line: None)
