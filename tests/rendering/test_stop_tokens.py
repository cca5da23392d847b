"""Where replies end and sequences begin: training, evaluation and the adapter's own files agree, whatever the model.

Run: pytest tests/rendering/test_stop_tokens.py
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast

import evaluate
import train
from chatlora.rendering.renderer import IGNORE_INDEX, Example
from tests.tiny_models import tiny_llama
from tests.tiny_tokenizers import CHATML, GLM, GLM_TOKENS, LLAMA3, LLAMA3_TOKENS, tiny_tokenizer

ROWS = [
    {"messages": [{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": f"{n}."}] * (1 + n % 2)}
    for n in range(12)
]


def adding_bos() -> PreTrainedTokenizerFast:
    """A tokenizer that puts BOS in front of all that it encodes, as Llama's do, whose template does so too."""
    tokenizer = tiny_tokenizer(
        chat_template=LLAMA3, control_tokens=LLAMA3_TOKENS, eos="<|eot_id|>", bos="<|begin_of_text|>"
    )
    bos = "<|begin_of_text|>"
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, tokenizer.bos_token_id)]
    )
    assert tokenizer("x").input_ids[0] == tokenizer.bos_token_id
    return tokenizer


# What the model is; its tokenizer, the stop tokens of its generation config, a template by file; what must stop it.
MODELS: dict[str, tuple[Callable[[], PreTrainedTokenizerFast], list[str], str | None, list[str]]] = {
    "the stop token is the pad token": (tiny_tokenizer, [], None, ["<|im_end|>"]),
    "the stop token is not the eos": (
        lambda: tiny_tokenizer(eos="<|endoftext|>"),
        [],
        None,
        ["<|endoftext|>", "<|im_end|>"],
    ),
    "the stop token belongs to the next message": (
        lambda: tiny_tokenizer(chat_template=GLM, control_tokens=GLM_TOKENS, eos="<|endoftext|>"),
        [],
        None,
        ["<|endoftext|>", "<|user|>", "<|observation|>"],
    ),
    "the generation config names others": (
        lambda: tiny_tokenizer(control_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|eom|>"]),
        ["<|eom|>", "<|im_end|>"],
        None,
        ["<|im_end|>", "<|eom|>"],
    ),
    "a base model with a template by file": (
        lambda: tiny_tokenizer(chat_template=None, eos="<|endoftext|>"),
        ["<|endoftext|>"],
        CHATML,
        ["<|endoftext|>", "<|im_end|>"],
    ),
    "the tokenizer adds a beginning by itself": (adding_bos, [], None, ["<|eot_id|>"]),
    "it does, and the template does not": (adding_bos, [], LLAMA3.replace("{{ bos_token }}", ""), ["<|eot_id|>"]),
}


@pytest.mark.parametrize("name", MODELS)
def test_training_evaluation_and_the_adapter_agree(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, world: Path
) -> None:
    make, generation_stops, template, expected = MODELS[name]
    monkeypatch.setenv("CHATLORA_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    tokenizer = make()
    flags = make_model(tokenizer, generation_stops, template)
    examples = train_and_fetch(monkeypatch, flags)
    stop_ids = set(tokenizer.convert_tokens_to_ids(expected))

    saved = GenerationConfig.from_pretrained("run/adapter")
    assert set(saved.eos_token_id) == stop_ids
    evaluate.main(["run", "--data", "rows.jsonl", "--evaluation.max_new_tokens", "3"])
    scores = json.loads(Path("run/eval/rows/scores.json").read_text())
    assert set(scores["decoding"]["stop_ids"]) == stop_ids

    served = AutoTokenizer.from_pretrained("run/adapter")
    seen: set[str] = set()
    for example, place in examples:
        ends = [
            id
            for id, label, following in zip(
                example.input_ids, example.labels, [*example.labels[1:], IGNORE_INDEX], strict=True
            )
            if label != IGNORE_INDEX and following == IGNORE_INDEX
        ]
        assert set(ends) <= stop_ids
        prompt = example.input_ids[: next(i for i, label in enumerate(example.labels) if label != IGNORE_INDEX)]
        assert prompt.count(tokenizer.bos_token_id) == ("bos_token" in served.chat_template)
        if place in seen:  # another turn of the row, in an example of its own
            continue
        seen.add(place)
        question = ROWS[int(place.rpartition(":")[2]) - 1]["messages"][:1]
        # What a server sends to the model, with the files beside the adapter only.
        assert prompt == list(served.apply_chat_template(question, add_generation_prompt=True, return_dict=False))


def make_model(tokenizer: PreTrainedTokenizerFast, generation_stops: list[str], template: str | None) -> list[str]:
    """`./model` and `./rows.jsonl`; the flags to train on them."""
    model = tiny_llama(len(tokenizer))
    model.generation_config.eos_token_id = tokenizer.convert_tokens_to_ids(generation_stops) or None
    tokenizer.save_pretrained("model")
    model.save_pretrained("model")
    Path("rows.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    flags = ["--model.name_or_path", "model", "--data.train", "rows.jsonl", "--optim.max_steps", "2"]
    flags += ["--optim.global_batch_size", "4", "--data.max_length", "256", "--run.output_dir", "run"]
    if template is None:
        return [*flags, "--model.chat_template", "null"]
    Path("chat.jinja").write_text(template)
    return [*flags, "--model.chat_template", "chat.jinja"]


def train_and_fetch(monkeypatch: pytest.MonkeyPatch, flags: list[str]) -> list[tuple[Example, str]]:
    """Train in this process; the examples that were trained on, each with its row's place."""
    from chatlora.training import setup

    kept: list[Any] = []
    load_data = setup.load_data
    monkeypatch.setattr(setup, "load_data", lambda *given: kept.append(load_data(*given)) or kept[0])
    Path("my.yaml").write_text("lora: {rank: 2}\nrun: {precision: fp32, cpu_threads: 1}\n")
    train.main(["my.yaml", *flags])
    train_set = kept[0][-1].train
    everything = range(len(train_set))
    return list(zip(train_set.fetch(everything), train_set.places(everything), strict=True))
