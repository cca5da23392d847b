"""What an adapter reaches, and how that is told."""

from pathlib import Path
from typing import Any

import pytest
import torch

from chatlora.config import LoraConfig, ModelConfig
from chatlora.errors import ModelError
from chatlora.model.loading import load_base_model
from chatlora.model.lora import add_lora, describe_lora, trainable
from chatlora.model.targets import find_targets
from tests.model.test_adapter_folder import saved, train_steps, weights_of
from tests.model_families import build_base


def test_experts_are_trained_and_routers_are_not(tmp_path: Path) -> None:
    for family in ("Qwen3-MoE", "gpt-oss", "Mixtral", "Qwen3-Next"):
        base = build_base(family)
        frozen = {name: tensor.clone() for name, tensor in base.state_dict().items()}
        model = add_lora(base, LoraConfig(rank=4), seed=0)
        start = weights_of(model)
        train_steps(model)
        end = weights_of(model)
        experts = [name for name in end if "experts." in name]
        assert len(experts) == 2 * 2 * 2  # layers, stacks, factors
        assert all(not torch.equal(start[name], end[name]) for name in experts)
        assert not any("router" in name or ".gate." in name or "shared_expert_gate" in name for name in end)
        for name, tensor in model.get_base_model().state_dict().items():
            if "lora_" not in name:
                assert torch.equal(tensor, frozen[name.replace(".base_layer", "")]), name


def test_the_rank_is_divided_over_the_experts_that_a_token_goes_to() -> None:
    model = add_lora(build_base("Qwen3-Next"), LoraConfig(rank=8, alpha=32), seed=0)
    shapes = {name: tuple(parameter.shape) for name, parameter in trainable(model).items()}
    (layer,) = {name.rpartition(".mlp.")[0] for name in shapes if ".layers.0." in name and ".mlp." in name}
    outer = model.get_submodule(f"{layer}.mlp.experts")
    assert outer.parameter_name == "down_proj"
    for wrapper in (outer, outer.base_layer):
        assert wrapper.r["default"] == 4  # 8, over 2 of the 4 experts
        assert wrapper.scaling["default"] == 32 / 4  # alpha stays
        assert wrapper.lora_A["default"].weight.shape[0] == 4 * 4
    assert shapes[f"{layer}.mlp.shared_expert.down_proj.lora_A.default.weight"][0] == 8


def test_a_plain_name_is_a_name_and_not_a_pattern_for_whole_names() -> None:
    base = build_base("Llama")
    assert find_targets(base, "q_proj") == find_targets(base, ("q_proj",))
    assert find_targets(base, "layers.0.self_attn.q_proj").modules == find_targets(base, r".*\.0\..*q_proj").modules
    with pytest.raises(ModelError) as refused:
        find_targets(base, "q_porj")
    assert "no layer is called 'q_porj'; did you mean 'q_proj'? Layers of this model" in str(refused.value)


def test_rslora_scales_by_the_root_of_the_rank() -> None:
    for variant, scale in ((None, 32 / 16), ("rslora", 32 / 4)):
        model = add_lora(build_base("Llama"), LoraConfig(rank=16, alpha=32, variant=variant), seed=0)
        assert model.get_submodule("base_model.model.model.layers.0.mlp.up_proj").scaling["default"] == scale


@pytest.mark.parametrize(
    ("family", "targets", "warning"),
    [
        ("Llama", ("q_proj", "v_proj"), "k_proj x 2, o_proj x 2, gate_proj x 2, up_proj x 2, down_proj x 2"),
        ("gpt-oss", ("q_proj", "k_proj", "v_proj", "o_proj"), "experts.gate_up_proj x 2, experts.down_proj x 2"),
        ("Qwen3-MoE", (r".*_proj",), None),
    ],
)
def test_layers_left_out_are_told(family: str, targets: tuple[str, ...], warning: str | None) -> None:
    wanted = targets[0] if warning is None else targets
    lines = describe_lora(add_lora(build_base(family), LoraConfig(target_modules=wanted), seed=0))
    told = [line for line in lines if line.startswith("warning: LoRA leaves out ")]
    assert told == [] if warning is None else warning in told[0]


def test_all_linear_leaves_vision_alone(tmp_path: Path) -> None:
    base = load_base_model(ModelConfig(name_or_path=str(saved("Gemma-3 with eyes", tmp_path))), dtype=torch.float32)
    names = trainable(add_lora(base, LoraConfig(), seed=0))
    assert names
    assert all(".language_model." in name for name in names)


@pytest.mark.parametrize(
    ("family", "targets", "message"),
    [
        ("Llama", ("q_porj",), "no layer is called 'q_porj'; did you mean 'q_proj'?"),
        ("Llama", ("q_proj", "upproj"), "no layer is called 'upproj'; did you mean 'up_proj'?"),
        ("Llama", "q_pro", "no layer is called 'q_pro'; did you mean 'q_proj'?"),
        (
            "Llama",
            ("zzz",),
            "Layers of this model: down_proj, embed_tokens, gate_proj, k_proj, lm_head, o_proj, q_proj",
        ),
        ("Llama", "(", "is no regular expression"),
        ("Qwen3-MoE", ("gate_proj",), "no layer is called 'gate_proj'; did you mean 'gate_up_proj'?"),
        ("Qwen3-Next", ("shared_expert_gate",), "shared_expert_gate cannot be adapted: it is a router"),
        ("Mamba", ("out_proj",), "out_proj cannot be adapted: Mamba kernels read its weight past the layer"),
    ],
)
def test_layers_that_are_not_there_are_told_with_those_that_are(family: str, targets: Any, message: str) -> None:
    with pytest.raises(ModelError) as told:
        find_targets(build_base(family), targets)
    assert message in str(told.value)


def test_dropout_on_experts_is_refused_by_name() -> None:
    with pytest.raises(
        ModelError, match=r"lora\.dropout is 0\.1, but PEFT cannot drop inputs .* mlp\.experts\.down_proj"
    ):
        add_lora(build_base("Qwen3-MoE"), LoraConfig(dropout=0.1), seed=0)
