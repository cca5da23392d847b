"""Where sequences begin and replies end: training, evaluation and the adapter's own files agree, whatever the model."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast

import evaluate
import train
from chatlora import parse_row
from chatlora.rendering.examples import IGNORE_INDEX, Example
from chatlora.rendering.renderer import Renderer
from tests.runs import noted
from tests.tiny_models import tiny_llama
from tests.tiny_tokenizers import CHATML, GLM, GLM_TOKENS, LLAMA3, llama3_tokenizer, tiny_tokenizer

ROWS: list[dict[str, Any]] = [
    {"messages": [{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": f"{n}."}] * (1 + n % 2)}
    for n in range(12)
]


def adding_bos() -> PreTrainedTokenizerFast:
    """A tokenizer that puts BOS in front of all that it encodes, as Llama's do, whose template does so too."""
    tokenizer = llama3_tokenizer("gpt2")
    bos = "<|begin_of_text|>"
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, tokenizer.bos_token_id)]
    )
    assert tokenizer("x").input_ids[0] == tokenizer.bos_token_id
    return tokenizer


class Case(NamedTuple):
    tokenizer: Callable[[], PreTrainedTokenizerFast]
    must_stop: list[str]
    eos: Sequence[str] = ()  # in the model's generation config
    settings: Mapping[str, object] = MappingProxyType({})  # in the same file
    template: str | None = None  # by file


CASES = {
    "the stop token is the pad token": Case(tiny_tokenizer, ["<|im_end|>"]),
    "the stop token is not the eos": Case(lambda: tiny_tokenizer(eos="<|endoftext|>"), ["<|endoftext|>", "<|im_end|>"]),
    "the stop token belongs to the next message": Case(
        lambda: tiny_tokenizer(chat_template=GLM, control_tokens=GLM_TOKENS, eos="<|endoftext|>"),
        ["<|endoftext|>", "<|user|>", "<|observation|>"],
        eos=["<|endoftext|>", "<|user|>"],
    ),
    "the generation config names others": Case(
        lambda: tiny_tokenizer(control_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|eom|>"]),
        ["<|im_end|>", "<|eom|>"],
        eos=["<|eom|>", "<|im_end|>"],
    ),
    "the generation config names one other": Case(tiny_tokenizer, ["<|im_end|>", "<|endoftext|>"], ["<|endoftext|>"]),
    "its settings contradict each other": Case(
        tiny_tokenizer, ["<|im_end|>"], settings={"do_sample": False, "temperature": 0.6, "top_p": 0.9}
    ),
    "a base model with a template by file": Case(
        lambda: tiny_tokenizer(chat_template=None, eos="<|endoftext|>"),
        ["<|endoftext|>", "<|im_end|>"],
        eos=["<|endoftext|>"],
        template=CHATML,
    ),
    "the tokenizer adds a beginning by itself": Case(adding_bos, ["<|eot_id|>"]),
    "it does, and the template does not": Case(
        adding_bos, ["<|eot_id|>"], template=LLAMA3.replace("{{ bos_token }}", "")
    ),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_training_evaluation_and_the_adapter_agree(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CHATLORA_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    tokenizer = case.tokenizer()
    flags = make_model(tokenizer, case)
    examples = train_and_fetch(monkeypatch, flags)
    stop_ids = set(tokenizer.convert_tokens_to_ids(case.must_stop))

    assert set(GenerationConfig.from_pretrained("run/adapter").eos_token_id) == stop_ids
    evaluate.main(["run", "--data", "rows.jsonl", "--evaluation.max_new_tokens", "3"])
    scores = json.loads(Path("run/eval/rows/scores.json").read_text())
    assert set(scores["decoding"]["stop_ids"]) == stop_ids

    served = AutoTokenizer.from_pretrained("run/adapter")
    if case.template is not None:
        assert served.chat_template == case.template
    evaluating = Renderer(served, generation_stop_ids=sorted(stop_ids))
    first_of_its_row = {place: example for example, place in reversed(examples)}
    for place, example in first_of_its_row.items():
        row = ROWS[int(place.rpartition(":")[2]) - 1]
        # What a server sends to the model, with the files beside the adapter only.
        sent = list(served.apply_chat_template(row["messages"][:1], add_generation_prompt=True, return_dict=False))
        assert prompt_of(example) == sent
        asked = evaluating.render_for_evaluation(parse_row(row), max_prompt_length=256, max_new_tokens=3).examples
        assert sent in [each.input_ids for each in asked]
        assert sent.count(tokenizer.bos_token_id) == ("bos_token" in served.chat_template)
    for example, _ in examples:
        assert set(ends_of(example)) <= stop_ids
        assert ends_of(example)


def prompt_of(example: Example) -> list[int]:
    return example.input_ids[: next(i for i, label in enumerate(example.labels) if label != IGNORE_INDEX)]


def ends_of(example: Example) -> list[int]:
    """The last target of each reply."""
    following: Sequence[int] = [*example.labels[1:], IGNORE_INDEX]
    pairs = zip(example.labels, following, strict=True)
    return [label for label, after in pairs if label != IGNORE_INDEX and after == IGNORE_INDEX]


def make_model(tokenizer: PreTrainedTokenizerFast, case: Case) -> list[str]:
    """`./model` and `./rows.jsonl`; the flags to train on them."""
    tokenizer.save_pretrained("model")
    tiny_llama(len(tokenizer)).save_pretrained("model")
    ids = tokenizer.convert_tokens_to_ids(list(case.eos))
    settings = {**case.settings, "eos_token_id": ids[0] if len(ids) == 1 else ids or None}
    # By hand: published ones are not all valid.
    Path("model/generation_config.json").write_text(json.dumps({"_from_model_config": False, **settings}))
    if case.settings:
        loaded = AutoModelForCausalLM.from_pretrained("model").generation_config
        loaded.eos_token_id = [1, 2]
        with pytest.raises(ValueError, match="Fix these issues to save the configuration"):
            loaded.save_pretrained("again")
    Path("rows.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    flags = ["--model.name_or_path", "model", "--data.train", "rows.jsonl", "--optim.max_steps", "2"]
    flags += ["--optim.global_batch_size", "4", "--data.max_length", "256", "--run.output_dir", "run"]
    if case.template is None:
        return [*flags, "--model.chat_template", "null"]
    Path("chat.jinja").write_text(case.template)
    return [*flags, "--model.chat_template", "chat.jinja"]


def train_and_fetch(monkeypatch: pytest.MonkeyPatch, flags: list[str]) -> list[tuple[Example, str]]:
    """Train in this process; the examples that were trained on, each with its row's place."""
    from chatlora.training import setup

    kept: list[Any] = []
    load_data = setup.load_data
    monkeypatch.setattr(setup, "load_data", lambda *given: noted(kept, load_data(*given)))
    Path("my.yaml").write_text("lora: {rank: 2}\nrun: {precision: fp32, cpu_threads: 1}\n")
    train.main(["my.yaml", *flags])
    train_set = kept[0][-1].train
    everything = range(len(train_set))
    return list(zip(train_set.fetch(everything), train_set.places(everything), strict=True))
