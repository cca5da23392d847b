"""The loss and its gradient against a plain reference; test_models.py asks the same of every family of models.

The reference: one conversation at a time, the model's own attention, all logits, cross-entropy in fp64.
"""

from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch.nn import functional
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from chatlora.data.collate import pack, pad_right
from chatlora.model.attention import PACKED, why_not_packed
from chatlora.model.lora import trainable
from chatlora.model.loss import LossHead, TargetLoss
from chatlora.rendering.examples import IGNORE_INDEX, Example
from tests.model_families import VOCABULARY, build_base

TOLERANCE = 1e-5  # relative, in norm


def build(family: str, *, dropout: float = 0.0, targets: str | list[str] = "all-linear") -> PeftModel:
    """A random model with an adapter that already does something."""
    base = build_base(family)
    settings = LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM", lora_dropout=dropout)
    model = get_peft_model(base, settings)
    for name, parameter in trainable(model).items():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def conversations(seed: int = 0) -> list[Example]:
    """Ragged ones; the first has targets from its second token on, one has none, one has gaps."""
    draw = torch.Generator().manual_seed(seed)
    examples = []
    for length, first in ((21, 1), (34, 11), (5, 2), (50, 25), (13, 13), (2, 1)):
        ids = torch.randint(VOCABULARY, (length,), generator=draw).tolist()
        labels = [IGNORE_INDEX if i < first or i % 9 == 8 else token for i, token in enumerate(ids)]
        examples.append(Example(input_ids=ids, labels=labels))
    return examples


def gradient(model: PeftModel) -> torch.Tensor:
    grads = [parameter.grad.flatten() for parameter in trainable(model).values() if parameter.grad is not None]
    assert len(grads) == len(trainable(model))
    model.zero_grad()
    return torch.cat(grads)


def one_by_one(model: PeftModel, examples: list[Example]) -> tuple[float, torch.Tensor]:
    total = torch.zeros((), dtype=torch.float64)
    for example in examples:
        logits = model(input_ids=torch.tensor([example.input_ids]), use_cache=False).logits[0]
        total = total + functional.cross_entropy(
            logits[:-1].double(), torch.tensor(example.labels[1:]), reduction="sum"
        )
    total.backward()
    return total.item(), gradient(model)


def through_target_loss(loss: TargetLoss, batch: dict[str, Any]) -> tuple[float, torch.Tensor]:
    summed = loss(**batch)
    summed.backward()
    return summed.item(), gradient(loss.model)


def relative(got: tuple[float, torch.Tensor], wanted: tuple[float, torch.Tensor]) -> tuple[float, float]:
    return abs(got[0] / wanted[0] - 1), float((got[1] - wanted[1]).norm() / wanted[1].norm())


def crossing(module: Any, query: Any, key: Any, value: Any, mask: Any, *, scaling: Any = None, **others: Any) -> Any:
    """Broken on purpose: a token sees the conversations in front of its own."""
    output = scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling, enable_gqa=True)
    return output.transpose(1, 2), None


def unscaled(module: Any, query: Any, key: Any, value: Any, mask: Any, *, cu_seq_lens_q: Any, **others: Any) -> Any:
    """Broken on purpose: the model's `scaling` is dropped."""
    lengths = cu_seq_lens_q.diff().tolist()
    parts = zip(query.split(lengths, 2), key.split(lengths, 2), value.split(lengths, 2), strict=True)
    outputs = [scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True) for q, k, v in parts]
    return torch.cat(outputs, 2).transpose(1, 2), None


@pytest.mark.parametrize("broken", [crossing, unscaled])
def test_a_broken_attention_is_caught(broken: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, examples = build("Granite"), conversations()
    wanted = one_by_one(model, examples)
    AttentionInterface.register("broken", broken)
    monkeypatch.setattr("chatlora.model.attention.PACKED", "broken")
    assert why_not_packed(model.get_base_model(), exact=True) is not None  # the probe sees it
    loss = TargetLoss(model, packed=False, autocast_dtype=None)
    model.get_base_model().set_attn_implementation("broken")
    assert max(relative(through_target_loss(loss, pack(examples)), wanted)) > 1000 * TOLERANCE  # and so does this test


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "lm_head"]])
def test_a_rank_without_work_gives_zero_loss_and_zero_gradients(targets: str | list[str]) -> None:
    model = build("Llama", targets=targets)
    loss = TargetLoss(model, packed=True, autocast_dtype=None)
    summed, grads = through_target_loss(loss, pack([]))
    assert summed == 0
    assert not grads.any()


def test_the_cache_is_off_in_training() -> None:
    model = build("Llama")
    assert model.config.use_cache
    loss = TargetLoss(model, packed=False, autocast_dtype=None)
    assert not loss.model.get_base_model().config.use_cache


@pytest.mark.parametrize("trained", ["lm_head"])
def test_a_trained_head_goes_through_the_models_own_head(trained: str) -> None:
    base = build_base("Llama")
    model = get_peft_model(base, LoraConfig(r=4, target_modules=[trained, "q_proj"], task_type="CAUSAL_LM"))
    examples = conversations()
    wanted = one_by_one(model, examples)
    loss = TargetLoss(model, packed=False, autocast_dtype=None)
    assert not loss.fused
    assert max(relative(through_target_loss(loss, pad_right(examples)), wanted)) <= TOLERANCE


def test_a_long_sum_in_bf16_stays_near_the_fp32_sum_of_the_same_logits() -> None:
    torch.manual_seed(0)
    head = torch.nn.Linear(64, 1000, bias=False, dtype=torch.bfloat16).requires_grad_(False)
    hidden = torch.randn(8192, 64).bfloat16()
    targets = torch.randint(1000, (8192,))
    wanted = functional.cross_entropy(functional.linear(hidden, head.weight).float(), targets, reduction="sum")
    got = LossHead(head)(hidden, targets)
    assert abs(float(got / wanted) - 1) < 1e-6  # the promise is 1e-3; a sum in bf16 misses it
    in_bf16 = torch.zeros((), dtype=torch.bfloat16)
    for rows, its_targets in zip(hidden.split(64), targets.split(64), strict=True):
        in_bf16 += LossHead(head)(rows, its_targets).bfloat16()
    assert abs(float(in_bf16 / wanted) - 1) > 1e-3


def test_the_number_of_targets_does_not_scale_a_bf16_gradient() -> None:
    """One over 600 rounds to bf16 with an error of 0.2 %: the norm must not show it."""
    torch.manual_seed(0)
    head = LossHead(torch.nn.Linear(64, 1000, bias=False, dtype=torch.bfloat16).requires_grad_(False))
    hidden = torch.randn(600, 64).bfloat16().requires_grad_()
    targets = torch.randint(1000, (600,))
    norms = []
    for divisor in (1, 600):
        (head(hidden, targets) / divisor).backward()
        assert hidden.grad is not None
        norms.append(float(hidden.grad.double().norm()) * divisor)
        hidden.grad = None
    assert norms[1] / norms[0] == pytest.approx(1, abs=3e-4)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_bf16_keeps_the_adapter_in_fp32_and_follows_fp32(checkpointing: bool) -> None:
    """20 AdamW steps on the CPU, a bf16 base under autocast against fp32: losses within 2 %."""
    losses: dict[torch.dtype, Any] = {}
    for dtype in (torch.float32, torch.bfloat16):
        model = build("Llama", dropout=0.0)
        adapter = trainable(model)
        for name, parameter in model.named_parameters():
            if name not in adapter:
                parameter.data = parameter.data.to(dtype)
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        loss = TargetLoss(model, packed=True, autocast_dtype=None if dtype == torch.float32 else dtype).train()
        optimizer = torch.optim.AdamW(adapter.values(), lr=3e-3)
        losses[dtype] = []
        for step in range(20):
            summed = loss(**pack(conversations(step % 4)))
            summed.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[dtype].append(summed.item())
        assert {parameter.dtype for parameter in trainable(model).values()} == {torch.float32}
    full, half = (torch.tensor(losses[dtype]) for dtype in (torch.float32, torch.bfloat16))
    assert full[-1] < full[0]
    assert float((half / full - 1).abs().max()) < 0.02


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, TOLERANCE), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize("family", ["Llama", "Qwen3", "GLM (ChatGLM3, GLM-4-9b)"])
def test_on_a_gpu_packed_equals_one_by_one(family: str, dtype: torch.dtype, tolerance: float) -> None:
    model, examples = build(family).cuda(), conversations()
    adapter = trainable(model)
    for name, parameter in model.named_parameters():
        if name not in adapter:
            parameter.data = parameter.data.to(dtype)
    loss = TargetLoss(model, packed=False, autocast_dtype=None if dtype == torch.float32 else dtype)
    on_gpu = {key: value.cuda() if isinstance(value, torch.Tensor) else value for key, value in pack(examples).items()}
    single = [{key: value.cuda() for key, value in pad_right([example]).items()} for example in examples]
    total = 0.0
    for batch in single:
        summed = loss(**batch)
        summed.backward()
        total += summed.item()
    wanted = (total, gradient(model))
    model.get_base_model().set_attn_implementation(PACKED)
    off = relative(through_target_loss(loss, on_gpu), wanted)
    print(f"{family}, {dtype}: loss {off[0]:.1e}, gradient {off[1]:.1e}")
    assert max(off) <= tolerance
