"""What a server computes from the file is what training computed, and where it is not, the export says so."""

import copy
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from peft import LoraConfig as PeftLoraConfig
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from chatlora.config import ExpertFormat, LoraConfig, ModelConfig
from chatlora.errors import ModelError
from chatlora.model.adapter_check import why_not_served
from chatlora.model.adapter_folder import WEIGHTS, save_adapter
from chatlora.model.loading import load_base_model
from chatlora.model.lora import add_lora
from chatlora.model.lora_init import start_from
from chatlora.model.serving_rule import too_far, why_base_moved
from tests.model.test_adapter_folder import fresh, logits, saved, trained, weights_of
from tests.model_families import build_base


def slow(*values: Any) -> Any:
    return pytest.param(*values, marks=pytest.mark.slow)


def opened(checkpoint: Path, dtype: torch.dtype = torch.float32) -> Any:
    return load_base_model(ModelConfig(name_or_path=str(checkpoint)), dtype=dtype)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_an_adapter_that_was_trained_on_a_moved_base_is_told(init: str, tmp_path: Path) -> None:
    """PiSSA takes B A out of the base's weights: on the checkpoint, where servers put it, it counts twice."""
    model = get_peft_model(
        opened(saved("Llama", tmp_path)),
        PeftLoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"], init_lora_weights=init),
    ).eval()
    assert isinstance(model, PeftModel)
    moved = "model.layers.0.self_attn.q_proj.base_layer"
    before = model.get_base_model().get_submodule(moved).weight.clone()
    save_adapter(model, weights_of(model), tmp_path / "adapter")
    told = why_not_served(model, weights_of(model), tmp_path / "adapter", None)
    assert told is not None
    assert "the base's own model.layers.0.self_attn.q_proj.weight is another one than in" in told
    assert torch.equal(
        model.get_base_model().get_submodule(moved).weight, before
    )  # opened again without being moved again


@pytest.mark.parametrize(
    ("family", "moved", "named"),
    [
        ("Qwen3-MoE", "gate_up_proj", "model.layers.0.mlp.experts.0.gate_proj.weight"),
        slow("gpt-oss", "down_proj", "model.layers.0.mlp.experts.down_proj"),
        slow("Mixtral", "q_proj.base_layer.weight", "model.layers.0.self_attn.q_proj.weight"),
        ("Qwen3.5 with eyes", "q_proj.base_layer.weight", "model.language_model.layers.1.self_attn.q_proj.weight"),
    ],
)
def test_a_base_that_changed_in_training_is_told(family: str, moved: str, named: str, tmp_path: Path) -> None:
    """One number of one weight, under the name that it has in the checkpoint."""
    model = trained(saved(family, tmp_path))
    save_adapter(model, weights_of(model), tmp_path / "adapter")
    assert why_not_served(model, weights_of(model), tmp_path / "adapter", None) is None
    weight = next(parameter for name, parameter in model.named_parameters() if name.endswith(moved))
    weight.view(-1)[0] += 1e-3
    told = why_not_served(model, weights_of(model), tmp_path / "adapter", None)
    assert told is not None
    assert f"the base's own {named} is another one than in" in told


def test_a_weight_that_is_quantised_in_the_checkpoint_is_no_moved_one(tmp_path: Path) -> None:
    """What stands there in 8 bits is a part of the weight: its scale is another tensor."""
    model = trained(saved("Llama", tmp_path))
    path = next(file for file in tmp_path.rglob("model.safetensors"))
    weights = load_file(path)
    name = "model.layers.0.self_attn.q_proj.weight"
    save_file(weights | {name: (100 * weights[name]).to(torch.float8_e4m3fn)}, path, metadata={"format": "pt"})
    assert why_base_moved(model.get_base_model()) is None
    save_file(weights | {name: 100 * weights[name]}, path, metadata={"format": "pt"})
    assert name in str(why_base_moved(model.get_base_model()))


@pytest.mark.parametrize("variant", [None, "rslora"])
def test_the_trained_tensors_under_peft_s_own_settings_are_right_in_peft_alone(
    variant: str | None, tmp_path: Path
) -> None:
    """What PEFT would write by itself, with the file's rank and alpha read as a server reads them."""
    model = trained(saved("Qwen3-MoE", tmp_path), variant=variant)
    folder = tmp_path / "adapter"
    save_adapter(model, weights_of(model), folder, "stacked")
    model.peft_config["default"].save_pretrained(str(folder))
    tensors = {name.replace(".default", ""): tensor for name, tensor in weights_of(model).items()}
    save_file(tensors, folder / WEIGHTS)
    told = why_not_served(model, weights_of(model), folder, None)
    assert told is not None


def test_the_best_adapter_is_compared_with_its_own_logits(tmp_path: Path) -> None:
    """It is exported when the model holds the last step's."""
    model = trained(saved("Llama", tmp_path), variant="rslora")
    best = {name: tensor * 0.5 for name, tensor in weights_of(model).items()}
    last = logits(model)
    save_adapter(model, best, tmp_path / "adapter")
    assert why_not_served(model, best, tmp_path / "adapter", None) is None
    assert why_not_served(model, weights_of(model), tmp_path / "adapter", None) is not None
    assert torch.equal(logits(model), last)


@pytest.mark.parametrize("family", ["Llama", "gpt-oss"])
def test_in_bf16_rounding_alone_is_no_fault(family: str, tmp_path: Path) -> None:
    checkpoint = saved(family, tmp_path)
    full = trained(checkpoint)
    model = copy.deepcopy(full).to(torch.bfloat16)
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            parameter.data = dict(full.named_parameters())[name].data
    save_adapter(model, weights_of(model), tmp_path / "adapter")
    assert why_not_served(model, weights_of(model), tmp_path / "adapter", torch.bfloat16) is None


def test_a_scale_four_times_too_large_is_seen_in_bf16_too() -> None:
    """As rslora of rank 16 under a server's alpha / r: an adapter of a tenth of the logits."""
    alone = torch.randn(1, 32, 320, generator=torch.Generator().manual_seed(0)).bfloat16()
    effect = 0.1 * alone.roll(1, dims=-1)
    assert too_far(alone + effect, alone + effect, alone) is None
    assert too_far(alone + effect / 4, alone + effect, alone) is not None


def test_dora_is_exported_as_it_was_trained_and_gone_on_from(tmp_path: Path) -> None:
    checkpoint = saved("Qwen2.5", tmp_path)
    model = trained(checkpoint, variant="dora")
    save_adapter(model, weights_of(model), tmp_path / "adapter")
    assert why_not_served(model, weights_of(model), tmp_path / "adapter", None) is None
    again, lora = fresh(checkpoint, variant="dora", init_from=tmp_path / "adapter")
    start_from(again, lora)
    assert all(torch.equal(tensor, weights_of(again)[name]) for name, tensor in weights_of(model).items())
    plain, lora = fresh(checkpoint, init_from=tmp_path / "adapter")
    with pytest.raises(ModelError, match=r"lora\.variant is not dora, but dora there"):
        start_from(plain, lora)
    lengths = load_file(tmp_path / "adapter" / WEIGHTS)
    save_file({n: t * 1.01 if "magnitude" in n else t for n, t in lengths.items()}, tmp_path / "adapter" / WEIGHTS)
    assert "is another tensor" in (why_not_served(model, weights_of(model), tmp_path / "adapter", None) or "")


def test_dora_on_stacked_experts_is_refused_before_training() -> None:
    with pytest.raises(ModelError, match=r"lora\.variant is dora, but PEFT has none.*mlp\.experts\.gate_up_proj"):
        add_lora(build_base("Qwen3-MoE"), LoraConfig(variant="dora"), seed=0)


@pytest.mark.parametrize(
    ("family", "expert_format", "variant"),
    [
        ("Qwen3-MoE", "stacked", None),
        ("DeepSeek-V3", "per_expert", "rslora"),
        slow("Qwen3-MoE", "per_expert", "rslora"),
        slow("DeepSeek-V3", "stacked", None),
    ],
)
def test_init_from_reads_folded_experts_and_the_form_of_before(
    family: str, expert_format: ExpertFormat, variant: Literal["rslora"] | None, tmp_path: Path
) -> None:
    """Ranks cut back, scales taken out of B again: to the bit, since 4 over 2 active experts is a power of two."""
    checkpoint = saved(family, tmp_path)
    model = trained(checkpoint, variant=variant, rank=8)
    save_adapter(model, weights_of(model), tmp_path / "new", expert_format)
    model.save_pretrained(tmp_path / "old", save_embedding_layers=False)
    for form in ("new", "old"):
        again, lora = fresh(checkpoint, variant=variant, rank=8, init_from=tmp_path / form)
        start_from(again, lora)
        for name, tensor in weights_of(model).items():
            here = weights_of(again)[name]
            exact = form == "old" or variant is None
            assert torch.equal(here, tensor) if exact else torch.allclose(here, tensor, rtol=2.0**-22, atol=0), name
        assert torch.allclose(logits(again.eval()), logits(model), atol=1e-5)
