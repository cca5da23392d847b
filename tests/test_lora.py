"""What an adapter reaches, how it is told, and that the adapter which was saved is the one that others load."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    PreTrainedModel,
    Qwen3_5Config,
    Qwen3_5ForConditionalGeneration,
)

from chatlora.config import LoraConfig, ModelConfig
from chatlora.data.collate import pad_right
from chatlora.errors import ModelError
from chatlora.model.loading import load_adapter, load_base_model
from chatlora.model.lora import add_lora, describe_lora, trainable
from chatlora.model.loss import TargetLoss
from chatlora.model.serving import WEIGHTS, save_adapter, served_class, why_not_served
from chatlora.model.targets import find_targets
from tests.model_families import FAMILIES, SHAPE, build_base
from tests.test_gradients import conversations

IDS = torch.arange(3, 23)[None]
VISION = {"hidden_size": 32, "intermediate_size": 32}
WITH_EYES: dict[str, Callable[[], PreTrainedModel]] = {
    "Qwen3.5": lambda: Qwen3_5ForConditionalGeneration(
        Qwen3_5Config(
            text_config={**SHAPE, **FAMILIES["Qwen3.5"][2]},
            vision_config={**VISION, "depth": 1, "num_heads": 2, "out_hidden_size": 64, "num_position_embeddings": 16},
            **{f"{name}_token_id": 310 + i for i, name in enumerate(("image", "video", "vision_start", "vision_end"))},
        )
    ),
    "Gemma-3": lambda: Gemma3ForConditionalGeneration(
        Gemma3Config(
            text_config={**SHAPE, **FAMILIES["Gemma-3"][2]},
            vision_config={
                **VISION,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "image_size": 28,
                "patch_size": 14,
            },
            mm_tokens_per_image=4,
            image_token_index=310,
            boi_token_index=311,
            eoi_token_index=312,
        )
    ),
}


def saved(family: str, folder: Path) -> Path:
    """A checkpoint as it is published; `family with eyes` is the multimodal one."""
    torch.manual_seed(0)
    name = family.removesuffix(" with eyes")
    model = WITH_EYES[name]() if name != family else build_base(name)
    model.save_pretrained(folder / "model")
    return folder / "model"


def train_steps(model: PeftModel, steps: int = 2) -> None:
    """A few steps on padded conversations, as train.py does them."""
    loss = TargetLoss(model, packed=False, autocast_dtype=None).train()
    optimizer = torch.optim.AdamW(trainable(model).values(), lr=1e-2)
    for _ in range(steps):
        loss(**pad_right(conversations()[:2])).backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


def trained(checkpoint: Path, **settings: Any) -> PeftModel:
    base = load_base_model(ModelConfig(name_or_path=str(checkpoint)), dtype=torch.float32)
    model = add_lora(base, LoraConfig(**{"rank": 4, "alpha": 8, **settings}), seed=0)
    train_steps(model)
    return model


def weights_of(model: PeftModel) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in trainable(model).items()}


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    result: torch.Tensor = model(input_ids=IDS, use_cache=False).logits
    return result


# ---- adapters that serve


@pytest.mark.parametrize(
    "family", ["Llama", "Qwen3-MoE", "Qwen3-Next", "gpt-oss", "Mamba", "Qwen3.5 with eyes", "Gemma-3 with eyes"]
)
def test_the_saved_adapter_works_under_the_class_that_the_checkpoint_names(family: str, tmp_path: Path) -> None:
    """In plain PEFT, on the class a server loads: the logits are those of training."""
    checkpoint = saved(family, tmp_path)
    model = trained(checkpoint)
    save_adapter(model, weights_of(model), tmp_path / "adapter")
    assert why_not_served(model, weights_of(model), tmp_path / "adapter", None) is None
    served = served_class(model.get_base_model())
    assert [served.__name__] == json.loads((checkpoint / "config.json").read_text())["architectures"]
    base = served.from_pretrained(checkpoint).eval()
    alone = logits(base)
    opened = logits(PeftModel.from_pretrained(base, tmp_path / "adapter").eval())
    assert float((opened - alone).norm() / alone.norm()) > 1e-2
    assert float((opened - logits(model)).norm() / alone.norm()) < 1e-5
    again = load_adapter(
        load_base_model(ModelConfig(name_or_path=str(checkpoint)), dtype=torch.float32), tmp_path / "adapter"
    )
    assert float((logits(again) - logits(model)).norm() / alone.norm()) < 1e-5  # evaluate.py's way


def test_under_the_trained_classs_names_a_server_ignores_the_adapter_and_the_check_says_so(tmp_path: Path) -> None:
    """What PEFT writes by itself."""
    checkpoint = saved("Qwen3.5 with eyes", tmp_path)
    model = trained(checkpoint)
    model.save_pretrained(tmp_path / "adapter")
    base = Qwen3_5ForConditionalGeneration.from_pretrained(checkpoint).eval()
    alone = logits(base)
    with pytest.warns(UserWarning, match="missing adapter keys"):
        opened = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    assert torch.equal(logits(opened), alone)
    reason = why_not_served(model, weights_of(model), tmp_path / "adapter", None)
    assert reason is not None
    assert "Qwen3_5ForConditionalGeneration would ignore 30 of its tensors" in reason


def scaled(folder: Path) -> None:
    settings = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**settings, "lora_alpha": 1}))


def shortened(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    save_file(dict(list(tensors.items())[1:]), folder / WEIGHTS)


def altered(folder: Path) -> None:
    save_file({name: tensor + 1 for name, tensor in load_file(folder / WEIGHTS).items()}, folder / WEIGHTS)


@pytest.mark.parametrize(
    ("breaks", "reason"),
    [(scaled, "has another scale"), (shortened, "lack 1"), (altered, "is another tensor")],
)
def test_a_saved_adapter_that_is_not_the_trained_one_is_told(
    breaks: Callable[[Path], None], reason: str, tmp_path: Path
) -> None:
    model = trained(saved("Llama", tmp_path))
    before = logits(model)
    save_adapter(model, weights_of(model), tmp_path / "adapter")
    breaks(tmp_path / "adapter")
    told = why_not_served(model, weights_of(model), tmp_path / "adapter", None)
    assert told is not None
    assert reason in told
    assert torch.equal(logits(model), before)  # the trained one is what it was
    assert {name for name, _ in model.named_parameters() if "reopened" in name} == set()


def test_an_adapter_that_does_nothing_is_told(tmp_path: Path) -> None:
    base = load_base_model(ModelConfig(name_or_path=str(saved("Llama", tmp_path))), dtype=torch.float32)
    model = add_lora(base, LoraConfig(), seed=0)
    save_adapter(model, weights_of(model), tmp_path / "adapter")
    assert why_not_served(model, weights_of(model), tmp_path / "adapter", None) == "it is zero"


# ---- what it reaches


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
