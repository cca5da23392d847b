"""The adapter that was saved is the one that others load, and the one that another run goes on from."""

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
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen3_5Config,
    Qwen3_5ForConditionalGeneration,
)

from chatlora.config import LoraConfig, ModelConfig
from chatlora.data.collate import pad_right
from chatlora.errors import ConfigError, ModelError
from chatlora.model.adapter_check import why_not_served
from chatlora.model.adapter_folder import WEIGHTS, save_adapter, served_class
from chatlora.model.loading import load_adapter, load_base_model, load_for_inference, load_tokenizer
from chatlora.model.lora import add_lora, trainable
from chatlora.model.lora_init import init_fingerprint, start_from
from chatlora.model.loss import TargetLoss
from chatlora.run_log import read_log
from tests.model.test_gradients import conversations
from tests.model_families import FAMILIES, SHAPE, build_base
from tests.tiny_models import tiny_llama
from tests.tiny_tokenizers import tiny_tokenizer

IDS = torch.arange(3, 23)[None]
VISION = {"hidden_size": 32, "intermediate_size": 32}
WITH_EYES: dict[str, Callable[..., PreTrainedModel]] = {
    "Qwen3.5": lambda **changes: Qwen3_5ForConditionalGeneration(
        Qwen3_5Config(
            text_config={**SHAPE, **FAMILIES["Qwen3.5"][2], **changes},
            vision_config={**VISION, "depth": 1, "num_heads": 2, "out_hidden_size": 64, "num_position_embeddings": 16},
            **{f"{name}_token_id": 310 + i for i, name in enumerate(("image", "video", "vision_start", "vision_end"))},
        )
    ),
    "Gemma-3": lambda **changes: Gemma3ForConditionalGeneration(
        Gemma3Config(
            text_config={**SHAPE, **FAMILIES["Gemma-3"][2], **changes},
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


def saved(family: str, folder: Path, **changes: int) -> Path:
    """A checkpoint as it is published; `family with eyes` is the multimodal one."""
    torch.manual_seed(0)
    name = family.removesuffix(" with eyes")
    model = WITH_EYES[name](**changes) if name != family else build_base(name)
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


def test_train_py_leaves_an_adapter_that_the_multimodal_model_takes(run: Callable[..., Path], tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    checkpoint = saved("Qwen3.5 with eyes", tmp_path, vocab_size=len(tokenizer))
    tokenizer.save_pretrained(checkpoint)
    folder = run("--model.name_or_path", str(checkpoint), "--optim.max_steps", "2", "--lora.dropout", "0")
    base = Qwen3_5ForConditionalGeneration.from_pretrained(checkpoint).eval()
    alone = logits(base)
    opened = logits(PeftModel.from_pretrained(base, folder / "adapter").eval())
    assert float((opened - alone).norm() / alone.norm()) > 1e-3
    assert "Qwen3_5ForConditionalGeneration.from_pretrained" in (folder / "adapter" / "README.md").read_text()
    ours, _ = load_for_inference(folder)
    assert float((logits(ours) - opened).norm() / alone.norm()) < 1e-5


def test_train_py_writes_experts_as_servers_take_them_and_says_who_refuses(
    run: Callable[..., Path], tmp_path: Path
) -> None:
    tokenizer = tiny_tokenizer()
    for family, single in (("Qwen3-MoE", True), ("gpt-oss", False)):
        checkpoint = tmp_path / family
        build_base(family, vocab_size=len(tokenizer)).save_pretrained(checkpoint)
        tokenizer.save_pretrained(checkpoint)
        flags = ("--lora.dropout", "0", "--lora.variant", "rslora", "--optim.max_steps", "2")
        folder = run("--model.name_or_path", str(checkpoint), *flags, name=family)
        names = load_file(folder / "adapter" / WEIGHTS).keys()
        assert any(".mlp.experts.3.gate_proj.lora_A" in name for name in names) == single
        settings = json.loads((folder / "adapter" / "adapter_config.json").read_text())
        assert (settings["use_rslora"], settings["rank_pattern"], settings["r"]) == (False, {}, 4)
        model, _ = load_for_inference(folder)
        assert isinstance(model, PeftModel)
        with model.disable_adapter():
            alone = logits(model)
        assert float((logits(model) - alone).norm() / alone.norm()) > 1e-4


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


# ---- going on from an adapter


def fresh(checkpoint: Path, **settings: Any) -> tuple[PeftModel, LoraConfig]:
    lora = LoraConfig(**{"rank": 4, "alpha": 8, **settings})
    base = load_base_model(ModelConfig(name_or_path=str(checkpoint)), dtype=torch.float32)
    return add_lora(base, lora, seed=1), lora


@pytest.mark.parametrize("family", ["Llama", "Qwen3-MoE", "Qwen3.5 with eyes"])
def test_init_from_starts_where_the_other_adapter_ended(family: str, tmp_path: Path) -> None:
    checkpoint = saved(family, tmp_path)
    before = trained(checkpoint)
    save_adapter(before, weights_of(before), tmp_path / "adapter")
    model, lora = fresh(checkpoint, init_from=tmp_path / "adapter")
    start_from(model, lora)
    assert (init_fingerprint(lora) or "").startswith("sha256:")
    assert all(torch.equal(tensor, weights_of(model)[name]) for name, tensor in weights_of(before).items())
    assert torch.equal(logits(model.eval()), logits(before))
    assert all(parameter.requires_grad for parameter in trainable(model).values())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 8}, "does not fit: lora.rank is 8, but 4 there"),
        ({"alpha": 4}, "does not fit: lora.alpha is 4.0, but 8.0 there"),
        ({"variant": "rslora"}, "does not fit: lora.alpha is 8.0, but 4.0 for lora.variant rslora there"),
        (
            {"target_modules": ("q_proj", "lm_head")},
            "reaches lm_head besides, and not down_proj, gate_proj, up_proj, k_proj, o_proj, v_proj",
        ),
    ],
)
def test_init_from_another_shape_is_refused_by_name(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    checkpoint = saved("Llama", tmp_path)
    before = trained(checkpoint)
    save_adapter(before, weights_of(before), tmp_path / "adapter")
    model, lora = fresh(checkpoint, init_from=tmp_path / "adapter", **settings)
    with pytest.raises(ModelError) as told:
        start_from(model, lora)
    assert message in str(told.value)


def test_a_run_goes_on_from_another_runs_adapter(run: Callable[..., Path]) -> None:
    first = run()
    second = run("--lora.init_from", str(first), name="second")
    ended, began = read_log(first / "log.jsonl")[-1]["loss"], read_log(second / "log.jsonl")[0]["loss"]
    assert abs(began / ended - 1) < 0.3 < 1 - began / read_log(first / "log.jsonl")[0]["loss"]
    assert json.loads((second / "environment.json").read_text())["init_from"].startswith("sha256:")
    altered(first / "adapter")
    resume = ("--checkpoint.resume", str(second / "checkpoints" / "step-000005"))
    with pytest.raises(ConfigError, match=r"the adapter under lora\.init_from changed since the run in .*second was"):
        run("--lora.init_from", str(first), *resume, name="third")


# ---- added tokens


def test_tokens_without_a_row_in_the_embeddings_are_told(run: Callable[..., Path], tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(tmp_path / "short")
    tiny_llama(len(tokenizer) - 2).save_pretrained(tmp_path / "short")  # as if its control tokens had been added
    with pytest.raises(
        ModelError, match=r"the rows become token \d+ \(<\|im_end\|>\), but the model has embeddings for"
    ):
        run("--model.name_or_path", str(tmp_path / "short"))


def test_embeddings_and_head_can_be_reached_for_added_tokens(tmp_path: Path) -> None:
    checkpoint = saved("Llama", tmp_path)
    model = trained(checkpoint, target_modules=("embed_tokens", "lm_head", "q_proj"))
    save_adapter(model, weights_of(model), tmp_path / "adapter")
    assert why_not_served(model, weights_of(model), tmp_path / "adapter", None) is None
    base = load_base_model(ModelConfig(name_or_path=str(checkpoint)), dtype=torch.float32)
    assert torch.allclose(logits(load_adapter(base, tmp_path / "adapter")), logits(model), atol=1e-4)


# ---- what does not belong together


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"hidden_size": 32}, "another shape"),
        ({"num_hidden_layers": 1}, "would ignore"),
        ({"num_hidden_layers": 3}, "and lack"),
    ],
)
def test_an_adapter_of_another_model_is_refused(change: dict[str, int], said: str, tmp_path: Path) -> None:
    model = trained(saved("Llama", tmp_path))
    save_adapter(model, weights_of(model), tmp_path / "adapter")
    other = LlamaForCausalLM(LlamaConfig(**{**SHAPE, **change}))
    with pytest.raises(ModelError, match=f"does not belong.*{said}"):
        load_adapter(other, tmp_path / "adapter")


def test_an_adapter_for_layers_that_the_model_has_not_is_refused(tmp_path: Path) -> None:
    model = trained(saved("Llama", tmp_path))
    save_adapter(model, weights_of(model), tmp_path / "adapter")
    settings = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    settings["target_modules"] = ["query_key_value"]
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(ModelError, match=r"does not belong.*query_key_value"):
        load_adapter(tiny_llama(320), tmp_path / "adapter")


def test_an_adapter_or_a_run_is_no_base_model(tmp_path: Path) -> None:
    model = trained(saved("Llama", tmp_path))
    save_adapter(model, weights_of(model), tmp_path / "run" / "adapter")
    (tmp_path / "run" / "config.yaml").write_text("model: {}")
    for folder, said in (("run/adapter", r"--adapter.*lora\.init_from"), ("run", r"run directory.*lora\.init_from")):
        given = ModelConfig(name_or_path=str(tmp_path / folder))
        with pytest.raises(ModelError, match=said):
            load_base_model(given, dtype=torch.float32)
        with pytest.raises(ModelError, match=said):
            load_tokenizer(given)
