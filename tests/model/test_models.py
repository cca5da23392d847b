"""Every family of models: what packing, padding, the loss and the adapter do on it, and the table that says so.

The reference is that of test_gradients.py: one conversation at a time, the model's own attention, all logits.
`python -m tests.model.test_models --write` writes the table of docs/models.md anew.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AttentionInterface

from chatlora.config import LoraConfig, ModelConfig
from chatlora.data.collate import pack, pad_right
from chatlora.model import attention
from chatlora.model.attention import PACKED, packed_attention, why_not_packed
from chatlora.model.loading import load_base_model
from chatlora.model.lora import add_lora, kind_of, trainable
from chatlora.model.loss import TargetLoss
from chatlora.model.targets import adaptable_layers
from chatlora.rendering.examples import Example
from tests.model.test_gradients import TOLERANCE, conversations, one_by_one, relative, through_target_loss
from tests.model_families import FAMILIES, build_base

DOCS = Path(__file__).resolve().parents[2] / "docs" / "models.md"
BEGIN, END = "<!-- table: python -m tests.model.test_models --write -->", "<!-- end of the table -->"

# Why a family is padded: the start of the probe's verdict, and how the table says it.
KERNELS = ("`causal_conv1d_fn` can't keep packed sequences apart", "its convolution needs `causal-conv1d` to be packed")
LEAKS = ("a change in one conversation reaches the next one's logits", "its state flows from one row into the next")
PADDED = {
    "Qwen3-Next": KERNELS,
    "Qwen3.5": KERNELS,
    "Gemma-2": ("its attention takes softcap", "its attention is soft-capped"),
    "gpt-oss": ("its attention takes s_aux", "its attention has sinks"),
    "Granite-4 hybrid": KERNELS,
    "LFM2": KERNELS,
    "Falcon-H1": KERNELS,
    "Bamba": KERNELS,
    "Mamba": LEAKS,
    "Mamba-2": LEAKS,
}
# Whose logits are more than a projection of the last hidden state: soft-capped or scaled.
OWN_HEAD = {"Gemma-2", "Cohere", "Cohere 2", "Granite", "Granite-4 hybrid"}


def build(family: str) -> PeftModel:
    """With an adapter on all that can be reached, which already does something."""
    model = add_lora(build_base(family), LoraConfig(rank=4, alpha=4), seed=0)
    draw = torch.Generator().manual_seed(0)
    for name, parameter in trainable(model).items():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1, generator=draw)
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_or_padded_equals_one_by_one(family: str) -> None:
    model, examples = build(family), conversations()
    wanted = one_by_one(model, examples)
    verdict = why_not_packed(model.get_base_model(), exact=True)
    assert (verdict is None) == (family not in PADDED), verdict
    assert verdict is None or verdict.startswith(PADDED[family][0])
    loss = TargetLoss(model, packed=False, autocast_dtype=None).train()
    assert loss.fused == (family not in OWN_HEAD)
    layouts = {"padded": pad_right(examples)}
    if verdict is None:
        layouts["packed"] = pack(examples)
    for layout, batch in layouts.items():
        if layout == "packed":
            model.get_base_model().set_attn_implementation(PACKED)
        off = relative(through_target_loss(loss, batch), wanted)
        print(f"{family}, {layout}: loss {off[0]:.1e}, gradient {off[1]:.1e}")
        assert max(off) <= TOLERANCE


@pytest.mark.parametrize("family", ["Qwen3-MoE", "gpt-oss", "Qwen3.5", "Mamba"])
def test_gradient_checkpointing_changes_nothing(family: str) -> None:
    model, examples = build(family), conversations()
    wanted = one_by_one(model, examples)
    model.activation_checkpointing_enable({"use_reentrant": False})
    loss = TargetLoss(model, packed=False, autocast_dtype=None).train()
    assert max(relative(through_target_loss(loss, pad_right(examples)), wanted)) <= TOLERANCE


@pytest.mark.parametrize("family", ["Qwen3-MoE", "gpt-oss", "Qwen3.5", "DeepSeek-V3", "Falcon-H1", "Mamba"])
def test_bf16_follows_fp32(family: str) -> None:
    """A base in bf16 under autocast, adapters on everything that can be reached: the loss within 1 %."""
    losses = []
    for dtype in (torch.float32, torch.bfloat16):
        model = add_lora(build_base(family).to(dtype), LoraConfig(rank=4), seed=0)
        autocast_dtype = None if dtype == torch.float32 else dtype
        loss = TargetLoss(model, packed=False, autocast_dtype=autocast_dtype).train()
        summed = loss(**pad_right(conversations()))
        summed.backward()
        losses.append(float(summed))
        factors = {name: parameter.grad for name, parameter in trainable(model).items() if "lora_B" in name}
        assert all(grad is not None and grad.dtype == torch.float32 and grad.any() for grad in factors.values())
    assert abs(losses[1] / losses[0] - 1) < 0.01


def ignoring(*ignored: str) -> Callable[..., Any]:
    """Broken on purpose: our packed attention without what these keyword arguments ask for."""

    def broken(*tensors: Any, **keywords: Any) -> Any:
        return packed_attention(*tensors, **{name: given for name, given in keywords.items() if name not in ignored})

    return broken


@pytest.mark.parametrize(
    ("family", "ignored"),
    [("Gemma-2", "softcap"), ("gpt-oss", "s_aux"), ("Mistral with a window", "sliding_window")],
)
def test_an_attention_that_ignores_what_it_is_asked_for_is_caught(
    family: str, ignored: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, examples = build(family), conversations()
    wanted = one_by_one(model, examples)
    AttentionInterface.register("broken", ignoring(ignored))
    monkeypatch.setattr(attention, "PACKED", "broken")
    verdict = why_not_packed(model.get_base_model(), exact=True)
    assert verdict is not None
    assert verdict.startswith("two conversations in one row give other logits than each alone")
    loss = TargetLoss(model, packed=False, autocast_dtype=None)
    model.get_base_model().set_attn_implementation("broken")
    assert max(relative(through_target_loss(loss, pack(examples)), wanted)) > 100 * TOLERANCE  # and so does this test


@pytest.mark.parametrize("family", ["Qwen3.5", "Qwen3-Next", "LFM2", "Falcon-H1", "Bamba", "Granite-4 hybrid"])
def test_position_ids_alone_are_caught_on_a_hybrid(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers masks attention by them, and lets convolutions and states flow across."""
    model, examples = build(family), conversations()
    wanted = one_by_one(model, examples)

    def positions_only(examples: list[Example]) -> dict[str, Any]:
        kept = ("input_ids", "position_ids", "labels")
        return {name: value for name, value in pack(examples).items() if name in kept}

    monkeypatch.setattr(attention, "PACKED", "sdpa")
    monkeypatch.setattr(attention, "pack", positions_only)
    verdict = why_not_packed(model.get_base_model(), exact=True)
    assert verdict is not None
    assert verdict.startswith(LEAKS[0])
    loss = TargetLoss(model, packed=False, autocast_dtype=None)
    assert max(relative(through_target_loss(loss, positions_only(examples)), wanted)) > 100 * TOLERANCE


@pytest.mark.parametrize("family", ["Gemma-2", "gpt-oss"])
def test_what_scaled_dot_product_attention_lacks_is_loaded_with_eager_attention(family: str, tmp_path: Path) -> None:
    build_base(family).save_pretrained(tmp_path)
    base = load_base_model(ModelConfig(name_or_path=str(tmp_path)), dtype=torch.float32)
    assert base.config._attn_implementation == "eager"


def table() -> str:
    """What each family runs as, asked of the tiny models."""
    lines = ["| family | batches | loss | LoRA (`all-linear`) reaches | LoRA leaves out |", "|---|---|---|---|---|"]
    for family in FAMILIES:
        base = build_base(family)
        verdict = why_not_packed(base, exact=True)
        layers = adaptable_layers(base, base)
        model = add_lora(base, LoraConfig(), seed=0)
        fused = TargetLoss(model, packed=False, autocast_dtype=None).fused
        cells = (
            family,
            "packed" if verdict is None else f"padded: {_told(verdict)}",
            "fused" if fused else "own head",
            _kinds([*layers.linear, *layers.experts]),
            _kinds([*layers.refused]) or "-",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _told(verdict: str) -> str:
    return next(told for start, told in PADDED.values() if verdict.startswith(start))


def _kinds(names: list[str]) -> str:
    return ", ".join(f"`{kind}`" for kind in dict.fromkeys(kind_of(name) for name in names))


def test_the_table_in_docs_is_what_the_models_do() -> None:
    written = DOCS.read_text(encoding="utf-8").split(BEGIN)[1].split(END)[0].strip()
    assert written == table(), "write it anew: python -m tests.model.test_models --write"


if __name__ == "__main__" and "--write" in sys.argv:
    before, _, rest = DOCS.read_text(encoding="utf-8").partition(BEGIN)
    DOCS.write_text(f"{before}{BEGIN}\n{table()}\n{END}{rest.partition(END)[2]}", encoding="utf-8")
