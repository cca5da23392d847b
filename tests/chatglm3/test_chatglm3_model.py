"""The converted model computes what the original computed: logits, text, gradients, a whole training run.

Run: pytest tests/chatglm3/test_chatglm3_model.py
"""

import json
import math
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from chatlora.chatglm3.adapter import convert_adapter
from chatlora.chatglm3.checkpoint import convert_checkpoint
from chatlora.chatglm3.configuration import native_config
from chatlora.chatglm3.naming import known_tensors
from chatlora.data.collate import pad_right
from chatlora.data.evaluation_set import EvalSample
from chatlora.evaluation.generation import collate, greedy_settings, only_these_settings
from chatlora.rendering.examples import IGNORE_INDEX, Example

TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def recordings(shared: Path) -> Path:
    return shared / "chatglm3"


@pytest.fixture(scope="module")
def native(recordings: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("native")
    convert_checkpoint(recordings / "tiny_model", folder, lambda line: None)
    return folder


def load_model(folder: Path, attention: str = "sdpa") -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation=attention, dtype=torch.float32).eval()


def load(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def recorded_batches(path: Path) -> Iterator[tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]]:
    """What went into the original, and `logits`, `labels`, `loss` of it, for each recorded batch."""
    with np.load(path) as arrays:
        batches: dict[str, dict[str, torch.Tensor]] = {}
        for key in arrays.files:
            batch, _, name = key.rpartition(".")
            batches.setdefault(batch, {})[name] = torch.tensor(arrays[key])
    for batch in batches.values():
        given: tuple[str, ...] = ("input_ids", "attention_mask", "position_ids")
        yield {name: batch.pop(name) for name in given if name in batch}, batch


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_logits_are_the_original_s(native: Path, recordings: Path, attention: str) -> None:
    model = load_model(native, attention)
    compared = 0
    for inputs, recorded in recorded_batches(recordings / "tiny_model/logits.npz"):
        if "logits" in recorded:
            real = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).bool()
            with torch.no_grad():
                difference = (model(**inputs).logits - recorded["logits"])[real]
            assert difference.abs().max() <= TOLERANCE
            compared += 1
    assert compared == 3


def test_greedy_text_is_the_original_s(native: Path, recordings: Path) -> None:
    model = load_model(native)
    for recorded in load(recordings / "tiny_model/greedy.json").values():
        settings = recorded["kwargs"]
        stop_ids = (
            settings["eos_token_id"] if isinstance(settings["eos_token_id"], list) else [settings["eos_token_id"]]
        )
        with only_these_settings(model):
            output = model.generate(
                input_ids=torch.tensor(recorded["input_ids"]),
                attention_mask=torch.tensor(recorded["attention_mask"]),
                generation_config=greedy_settings(settings["max_new_tokens"], stop_ids, 0),
            )
        assert output.tolist() == recorded["sequences"]


def test_loss_and_gradient_norms_are_the_original_s(native: Path, recordings: Path) -> None:
    model = load_model(native)
    ((inputs, recorded),) = [
        each for each in recorded_batches(recordings / "tiny_model/logits.npz") if "loss" in each[1]
    ]
    loss = mean_loss(model, inputs, recorded["labels"])
    assert loss.item() == pytest.approx(recorded["loss"].item(), rel=1e-6)
    loss.backward()
    norms = original_norms(recordings, {name: weight.grad for name, weight in model.named_parameters()})
    assert norms == pytest.approx(load(recordings / "tiny_model/grad_norms.json"), rel=2e-5)


def test_an_old_adapter_gives_the_same_logits(native: Path, recordings: Path, tmp_path: Path) -> None:
    convert_adapter(recordings / "tiny_lora", tmp_path / "adapter", native, lambda line: None)
    model = PeftModel.from_pretrained(load_model(native), tmp_path / "adapter").eval()
    ((inputs, recorded),) = recorded_batches(recordings / "tiny_lora/logits.npz")
    with torch.no_grad():
        assert (model(**inputs).logits - recorded["logits"]).abs().max() <= TOLERANCE
        with model.disable_adapter():
            assert (model(**inputs).logits - recorded["logits"]).abs().max() > 1, "the adapter does something"


def test_all_tensors_of_the_6b_model_have_their_place(recordings: Path) -> None:
    recorded = load(recordings / "chatglm3_6b_param_shapes.json")
    known = known_tensors(recorded["config"])
    assert {name: list(tensor.shape) for name, tensor in known.items()} == recorded["shapes"]
    assert len(known) == 200
    with torch.device("meta"):
        config = native_config(recorded["config"], "float16")
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
    native = {part.name: part.shape for tensor in known.values() for part in tensor.parts}
    assert native == {name: tuple(weight.shape) for name, weight in model.state_dict().items()}
    assert 2 * sum(math.prod(tensor.shape) for tensor in known.values()) == recorded["total_size_bytes"]


@pytest.mark.parametrize(("ratio", "length"), [(None, 8192), (50, 32768), (500, 131072)])
def test_the_long_variants_turn_slower(recordings: Path, ratio: int | None, length: int) -> None:
    original = load(recordings / "chatglm3_6b_param_shapes.json")["config"] | {"seq_length": length}
    config = AutoConfig.for_model(
        **native_config(original | ({} if ratio is None else {"rope_ratio": ratio}), "float16")
    )
    assert config.rope_parameters["rope_theta"] == 10_000 * (ratio or 1)
    assert config.rope_parameters["partial_rotary_factor"] == 0.5
    assert config.max_position_embeddings == length


# ---- the original's loops


def test_generated_tokens_are_the_original_s_without_the_prompt(native: Path, recordings: Path) -> None:
    recorded = load(recordings / "prediction_step.json")
    stops = recorded["generation_config"]["eos_token_id"]
    settings = greedy_settings(recorded["generation_config"]["max_new_tokens"], stops, 0)
    model = load_model(native)
    samples = [
        EvalSample(str(i), "", 0, row["input_ids"], [row["output_ids"]]) for i, row in enumerate(recorded["examples"])
    ]
    for number, step in enumerate(recorded["steps"]):
        size = recorded["per_device_eval_batch_size"]
        batch = collate(samples[number * size : (number + 1) * size], 0)
        references, _ = batch.pop("output_ids"), batch.pop("samples")
        assert batch["input_ids"].tolist() == step["inputs"]["input_ids"]
        assert batch["attention_mask"].tolist() == step["inputs"]["attention_mask"]
        with only_these_settings(model):
            output = model.generate(**batch, generation_config=settings)
        generated = output[:, batch["input_ids"].shape[1] :].tolist()
        assert [_unpadded(row) for row in generated] == [_unpadded(row) for row in step["generated_tokens"]]
        assert [_unpadded(row) for row in step["labels"]] == [reference for (reference,) in references]


def test_the_original_s_training_run_is_followed(native: Path, recordings: Path) -> None:
    """Its settings in a plain loop: all parameters, two micro-batches of two a step, their means averaged."""
    recorded = load(recordings / "train_trajectory.json")
    model = load_model(native).train()
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
    examples = [Example(row["input_ids"], row["labels"]) for row in recorded["examples"]]
    size, accumulation = recorded["per_device_train_batch_size"], recorded["gradient_accumulation_steps"]
    warmup, steps = recorded["warmup_steps"], recorded["max_steps"]
    for step in range(steps):
        share = step / warmup if step < warmup else (steps - step) / (steps - warmup)
        optimizer.param_groups[0]["lr"] = recorded["learning_rate"] * share
        total = 0.0
        for micro in range(step * accumulation, (step + 1) * accumulation):
            start = micro * size % len(examples)
            batch = pad_right(examples[start : start + size])
            loss = mean_loss(model, {"input_ids": batch["input_ids"]}, batch["labels"]) / accumulation
            loss.backward()
            total += loss.item()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), recorded["max_grad_norm"])
        optimizer.step()
        optimizer.zero_grad()
        assert total == pytest.approx(recorded["log"][step]["loss"], abs=1.01e-4), f"step {step + 1}"
        assert norm.item() == pytest.approx(recorded["log"][step]["grad_norm"], rel=1e-4), f"step {step + 1}"
    final = original_norms(recordings, dict(model.named_parameters()))
    # A bias of k hardly moves the loss; Adam makes steps of its rounding errors.
    assert final == pytest.approx(recorded["final_param_l2"], rel=1e-4)


def mean_loss(model: PreTrainedModel, inputs: Mapping[str, torch.Tensor], labels: torch.Tensor) -> torch.Tensor:
    logits = model(**inputs, use_cache=False).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORE_INDEX)


def original_norms(recordings: Path, tensors: Mapping[str, Any]) -> dict[str, float]:
    """The norm of each of the original's parameters, from those of the native tensors that it became."""
    known = known_tensors(load(recordings / "tiny_model/config.json"))
    return {
        name: math.hypot(*(tensors[part.name].norm().item() for part in tensor.parts))
        for name, tensor in known.items()
        if tensor.parts
    }


def _unpadded(ids: list[int]) -> list[int]:
    while ids and ids[-1] == 0:
        ids = ids[:-1]
    return ids


# ---- what is broken on purpose


def test_the_comparison_sees_a_wrong_conversion(native: Path, recordings: Path, tmp_path: Path) -> None:
    """k and v swapped, the wrong epsilon and the wrong rotation are each far outside the tolerance."""
    ((inputs, recorded), *_) = [
        each for each in recorded_batches(recordings / "tiny_model/logits.npz") if each[0]["input_ids"].shape[1] > 1
    ]

    def off(model: PreTrainedModel) -> float:
        with torch.no_grad():
            return float((model(**inputs).logits - recorded["logits"]).abs().max())

    swapped = load_model(native)
    for layer in swapped.model.layers:
        layer.self_attn.k_proj, layer.self_attn.v_proj = layer.self_attn.v_proj, layer.self_attn.k_proj
    assert off(swapped) > 100 * TOLERANCE
    for change in (
        {"rms_norm_eps": 1.5625e-07},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 20_000.0, "partial_rotary_factor": 0.5}},
    ):
        shutil.copytree(native, tmp_path / "changed", dirs_exist_ok=True)
        (tmp_path / "changed/config.json").write_text(json.dumps(load(native / "config.json") | change))
        assert off(load_model(tmp_path / "changed")) > TOLERANCE
